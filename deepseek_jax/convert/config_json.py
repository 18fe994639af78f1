"""Hugging Face's `config.json` as a `ModelConfig`, and back.

Field names and defaults are those of DeepSeek's released files and of transformers'
`DeepseekV2Config` and `DeepseekV3Config` (read in 5.23). Rotary settings stand in
`rope_scaling` beside `rope_theta` (released) or in `rope_parameters` (transformers 5).
A field we have no counterpart of is refused unless it has the one value we compute.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
)

Fields = Mapping[str, Any]


class Family(NamedTuple):
    """A model class of transformers, and the router that it has."""

    architecture: str
    score: str
    group_score: str
    bias: bool  # e_score_correction_bias
    normalize: tuple[bool, ...]  # what norm_topk_prob may be
    flat: str  # topk_method without groups
    grouped: str  # topk_method with them


FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "sigmoid",
        "top2",
        True,
        (True, False),
        "noaux_tc",
        "noaux_tc",
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "softmax",
        "max",
        False,
        (False,),
        "greedy",
        "group_limited_greedy",
    ),
}

# Integers that mean the same on both sides, by ours.
SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense": "first_k_dense_replace",
    "dense_dim": "intermediate_size",
}
ATTENTION_SIZES = {
    "num_heads": "num_attention_heads",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}
MOE_SIZES = {
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "ffn_dim": "moe_intermediate_size",
}
# Fields with a single value that we compute; absent means that value.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "moe_layer_freq": (1, None),
    "rope_interleave": (True, None),
    # Transformers' latent norms use 1e-6 whatever this says; ours have one epsilon.
    "rms_norm_eps": (1e-6,),
}


class Parsed(NamedTuple):
    """What a config.json says of the model."""

    model: ModelConfig
    family: Family


def _refuse(name: str, value: object, right: str) -> None:
    raise ValueError(f"config.json: {name} = {value!r} is not supported: {right}")


def _integer(config: Fields, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"config.json: {name} = {value!r}: must be an integer >= 0")
    return value


def _sizes(config: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: _integer(config, theirs) for ours, theirs in names.items()}


def read(config: Fields) -> Parsed:
    """The model that a config.json describes.

    Raises:
      ValueError: a field is missing, or asks for something that this library does not
        compute; the message names it.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        _refuse("model_type", kind, f"must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[str(kind)]
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            _refuse(name, config[name], f"must be {allowed[0]!r}")
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        value = config["num_key_value_heads"]
        _refuse(
            "num_key_value_heads", value, f"must equal num_attention_heads = {heads}"
        )
    attention = AttentionConfig(
        q_rank=config.get("q_lora_rank") or 0,
        rope=_read_rope(config),
        **_sizes(config, ATTENTION_SIZES),
    )
    return Parsed(
        ModelConfig(
            attention=attention,
            moe=_read_moe(config, family),
            mtp=MTPConfig(depth=config.get("num_nextn_predict_layers") or 0),
            **_sizes(config, SIZES),
        ),
        family,
    )


def _read_moe(config: Fields, family: Family) -> MoEConfig:
    if config.get("scoring_func") not in (None, family.score):
        _refuse("scoring_func", config["scoring_func"], f"must be {family.score!r}")
    normalize = bool(config.get("norm_topk_prob", family.normalize[0]))
    if normalize not in family.normalize:
        _refuse("norm_topk_prob", normalize, f"must be {family.normalize[0]!r}")
    method = config.get("topk_method") or family.flat
    if method not in (family.flat, family.grouped):
        allowed = " or ".join(dict.fromkeys((family.flat, family.grouped)))
        _refuse("topk_method", method, f"must be {allowed}")
    groups = method == family.grouped and bool(config.get("n_group"))
    return MoEConfig(
        num_shared=config.get("n_shared_experts") or 0,
        num_groups=_integer(config, "n_group") if groups else 1,
        keep_groups=_integer(config, "topk_group") if groups else 1,
        score=family.score,
        group_score=family.group_score,
        normalize=normalize,
        scale=float(config.get("routed_scaling_factor", 1.0)),
        **_sizes(config, MOE_SIZES),
    )


def _read_rope(config: Fields) -> RopeConfig:
    at = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = dict(config.get(at) or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind != "yarn":
        _refuse(f"{at}.type", kind, "must be 'yarn' or 'default'")
    for name, allowed in {
        "attention_factor": (None,),
        "truncate": (True, None),
        "partial_rotary_factor": (1.0, None),
    }.items():
        if rope.get(name) not in allowed:
            _refuse(f"{at}.{name}", rope[name], f"must be {allowed[0]!r}")
    for name in ("factor", "original_max_position_embeddings"):
        if not rope.get(name):
            _refuse(f"{at}.{name}", rope.get(name), "must be given")
    m, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if all_dim and not m:
        _refuse(f"{at}.mscale_all_dim", all_dim, "mscale is missing")
    if not all_dim and m not in (0, 1):
        # DeepSeek's own code heeds a lone mscale, transformers does not.
        _refuse(f"{at}.mscale", m, "mscale_all_dim is missing")
    return RopeConfig(
        theta=float(theta),
        factor=float(rope["factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(m or 1),
        mscale_all_dim=float(all_dim),
    )


def family_of(model: ModelConfig, bias: bool) -> str:
    """The `model_type` that computes what `model` does.

    Args:
      bias: whether its routers have a bias that is not zero.

    Raises:
      ValueError: there is none; names the field that has no counterpart.
    """
    at, moe = model.attention, model.moe

    def need(ok: bool, name: str, value: object, right: str) -> None:
        if not ok:
            raise ValueError(
                f"model.{name} = {value!r} has no Hugging Face form: {right}"
            )

    need(at.kind == "mla", "attention.kind", at.kind, "only 'mla' has one")
    kind = next(k for k, family in FAMILIES.items() if family.score == moe.score)
    family = FAMILIES[kind]
    grouped = moe.keep_groups < moe.num_groups
    need(
        not grouped or moe.group_score == family.group_score,
        "moe.group_score",
        moe.group_score,
        f"with score {moe.score!r} it must be {family.group_score!r}",
    )
    need(
        moe.normalize in family.normalize,
        "moe.normalize",
        moe.normalize,
        f"with score {moe.score!r} it must be {family.normalize[0]!r}",
    )
    need(
        family.bias or not bias,
        "moe.score",
        moe.score,
        "the router has a bias, which only 'sigmoid' has there",
    )
    eps = FIXED["rms_norm_eps"][0]
    need(model.norm_eps == eps, "norm_eps", model.norm_eps, f"must be {eps}")
    need(
        at.rope.mscale_all_dim != 0 or at.rope.mscale == 1,
        "attention.rope.mscale",
        at.rope.mscale,
        "without mscale_all_dim it must be 1",
    )
    need(
        model.mtp.input_norm or model.mtp.depth == 0,
        "mtp.input_norm",
        model.mtp.input_norm,
        "there, MTP modules read normed states",
    )
    return kind


def write(model: ModelConfig, kind: str) -> dict[str, Any]:
    """A config.json of `model` in the form of the released ones."""
    at, moe, family = model.attention, model.moe, FAMILIES[kind]
    grouped = moe.keep_groups < moe.num_groups
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        **{theirs: getattr(at, ours) for ours, theirs in ATTENTION_SIZES.items()},
        **{theirs: getattr(moe, ours) for ours, theirs in MOE_SIZES.items()},
        "q_lora_rank": at.q_rank or None,
        "num_key_value_heads": at.num_heads,
        "n_shared_experts": moe.num_shared or None,
        "n_group": moe.num_groups,
        "topk_group": moe.keep_groups,
        "topk_method": family.grouped if grouped else family.flat,
        "scoring_func": moe.score,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.scale,
        "num_nextn_predict_layers": model.mtp.depth,
        "initializer_range": model.init_std or model.dim**-0.5,
        "rope_theta": at.rope.theta,
        "rope_scaling": _write_rope(at.rope),
        "max_position_embeddings": int(at.rope.original_length * at.rope.factor),
        "use_cache": True,
        **{name: allowed[0] for name, allowed in FIXED.items() if name != "mlp_bias"},
    }
    return config


def _write_rope(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.factor == 1:
        return None
    whole = math.floor(rope.factor) == rope.factor
    scaling = {
        "type": "yarn",
        "factor": int(rope.factor) if whole else rope.factor,
        "original_max_position_embeddings": rope.original_length,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    if rope.mscale_all_dim:
        scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    return scaling
