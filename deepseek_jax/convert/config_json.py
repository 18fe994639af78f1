"""Hugging Face's `config.json` as a `ModelConfig`, and back.

Field names and defaults are those of DeepSeek's released files and of transformers'
`DeepseekV2Config` and `DeepseekV3Config` (read in 5.23). Every field is either read,
known to change nothing that is computed, or refused; where config classes differ in
their defaults, it must be there.
"""

import functools
from typing import Any, NamedTuple

from deepseek_jax.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from deepseek_jax.convert import rope_json
from deepseek_jax.convert.fields import Fields, integer, named, number, only, refuse


class Family(NamedTuple):
    """A model class of transformers, and the router that it has."""

    architecture: str
    score: str
    group_score: str
    least: int  # experts of a group
    bias: bool  # e_score_correction_bias
    normalize: tuple[bool, ...]  # what norm_topk_prob may be
    flat: str  # topk_method without groups
    grouped: str  # topk_method with them
    mtp: bool  # whether anything reads MTP layers
    whole_heads: bool  # whether the heads must divide the width


FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        score="sigmoid",
        group_score="top2",
        least=2,
        bias=True,
        normalize=(True, False),
        flat="noaux_tc",
        grouped="noaux_tc",
        mtp=True,
        whole_heads=False,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        score="softmax",
        group_score="max",
        least=1,
        bias=False,
        normalize=(False,),
        flat="greedy",
        grouped="group_limited_greedy",
        mtp=False,
        whole_heads=True,
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
# The rest of what is read. Config classes disagree on what a missing one of NEEDED is.
MTP = "num_nextn_predict_layers"
NEEDED = {
    "model.attention.q_rank": "q_lora_rank",
    "model.moe.num_shared": "n_shared_experts",
    "model.moe.num_groups": "n_group",
    "model.moe.keep_groups": "topk_group",
    "model.moe.scale": "routed_scaling_factor",
    "model.moe.normalize": "norm_topk_prob",
}
OPTIONAL = (MTP, "num_key_value_heads", "scoring_func", "topk_method", "model_type")
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
# What changes nothing that is computed here: of training, of other programs, derived.
HARMLESS = (
    *("initializer_range", "attention_dropout", "aux_loss_alpha", "seq_aux"),
    *("ep_size", "pretraining_tp", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "qk_head_dim"),
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("quantization_config", "use_cache", "return_dict", "_name_or_path"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder"),
    "chunk_size_feed_forward",
)


def _theirs() -> dict[str, str]:
    """What the file calls our fields, with and without their group."""
    tables = {"": SIZES, "attention.": ATTENTION_SIZES, "moe.": MOE_SIZES}
    full = {
        f"model.{group}{ours}": name
        for group, table in tables.items()
        for ours, name in table.items()
    }
    full |= NEEDED | {"model.mtp.depth": MTP}
    return full | {ours.rpartition(".")[2]: name for ours, name in full.items()}


THEIRS = _theirs()
KNOWN = {*THEIRS.values(), *OPTIONAL, *FIXED, *HARMLESS}
KNOWN |= {*rope_json.BLOCKS, rope_json.THETA}


class Parsed(NamedTuple):
    """What a config.json says of the model."""

    model: ModelConfig
    family: Family


def _sizes(config: Fields, names: dict[str, str]) -> dict[str, Any]:
    return {ours: integer(config, theirs) for ours, theirs in names.items()}


def read(config: Fields) -> Parsed:
    """The model that a config.json describes.

    Raises:
      ValueError: a field is missing, unknown or impossible, or asks for something that
        this library does not compute; the message names it.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        refuse("model_type", kind, f"must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    only(config, KNOWN)
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            refuse(name, config[name], f"must be {allowed[0]!r}")
    for name in NEEDED.values():
        if name not in config:
            raise ValueError(f"config.json: {name} is missing")
    heads, value = (config.get(f"num_{n}_heads") for n in ("attention", "key_value"))
    if value not in (None, heads):
        refuse("num_key_value_heads", value, f"must equal num_attention_heads, {heads}")
    attention = _sizes(config, ATTENTION_SIZES)
    attention["q_rank"] = integer(config, "q_lora_rank", 0)
    attention["rope"] = rope_json.read(config)
    moe, sizes = _read_moe(config, family), _sizes(config, SIZES)
    depth = integer(config, MTP, 0)
    with named(THEIRS):
        model = ModelConfig(
            attention=AttentionConfig(**attention),
            moe=MoEConfig(**moe),
            mtp=MTPConfig(depth=depth),
            **sizes,
        )
    return Parsed(model, family)


def _read_moe(config: Fields, family: Family) -> dict[str, Any]:
    """The fields of a `MoEConfig`."""
    if config.get("scoring_func") not in (None, family.score):
        refuse("scoring_func", config["scoring_func"], f"must be {family.score!r}")
    normalize = config["norm_topk_prob"]
    if type(normalize) is not bool or normalize not in family.normalize:
        allowed = " or ".join(map(repr, family.normalize))
        refuse("norm_topk_prob", normalize, f"must be {allowed}")
    method = config.get("topk_method")
    method = family.flat if method is None else method
    if method not in (family.flat, family.grouped):
        allowed = " or ".join(dict.fromkeys((family.flat, family.grouped)))
        refuse("topk_method", method, f"must be {allowed}")
    moe = _sizes(config, MOE_SIZES)
    groups, keep = 1, 1
    if method == family.grouped:
        groups, keep = integer(config, "n_group"), integer(config, "topk_group")
    if moe["num_experts"] < family.least * groups:
        refuse("n_group", groups, f"a group must have {family.least} experts or more")
    return moe | {
        "num_shared": integer(config, "n_shared_experts", 0),
        "num_groups": groups,
        "keep_groups": keep,
        "score": family.score,
        "group_score": family.group_score,
        "normalize": normalize,
        "scale": number(config, "routed_scaling_factor"),
    }


def family_of(model: ModelConfig, bias: bool) -> str:
    """The `model_type` that computes what `model` does.

    Args:
      bias: whether its routers have a bias that is not zero.

    Raises:
      ValueError: there is none; names the field that has no counterpart.
    """
    at, moe, mtp = model.attention, model.moe, model.mtp
    kind = next(k for k, family in FAMILIES.items() if family.score == moe.score)
    family, eps = FAMILIES[kind], FIXED["rms_norm_eps"][0]
    score = f"with score {moe.score!r} it must be"
    grouped = moe.keep_groups < moe.num_groups
    rows = (
        ("attention.kind", at.kind == "mla", "only 'mla' has one"),
        (
            "moe.group_score",
            not grouped or moe.group_score == family.group_score,
            f"{score} {family.group_score!r}",
        ),
        (
            "moe.num_groups",
            moe.num_experts >= family.least * moe.num_groups,
            f"there, {family.least} experts or more make a group",
        ),
        (
            "moe.normalize",
            moe.normalize in family.normalize,
            f"{score} {family.normalize[0]!r}",
        ),
        (
            "moe.score",
            family.bias or not bias,
            "the router has a bias, which only 'sigmoid' has there",
        ),
        ("moe.num_shared", moe.num_shared > 0, "there, it is at least 1"),
        ("norm_eps", model.norm_eps == eps, f"must be {eps}"),
        (
            "attention.rope.mscale",
            at.rope.mscale_all_dim != 0 or at.rope.mscale == 1,
            "without mscale_all_dim it must be 1",
        ),
        (
            "dim",
            not family.whole_heads or model.dim % at.num_heads == 0,
            f"{score} a multiple of attention.num_heads = {at.num_heads}",
        ),
        ("mtp.depth", family.mtp or mtp.depth == 0, f"{score} 0"),
        (
            "mtp.input_norm",
            mtp.input_norm or mtp.depth == 0,
            "there, MTP modules read normed states",
        ),
    )
    for name, ok, right in rows:
        if not ok:
            value = functools.reduce(getattr, name.split("."), model)
            raise ValueError(
                f"model.{name} = {value!r} has no Hugging Face form: {right}"
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
        "n_shared_experts": moe.num_shared,
        "n_group": moe.num_groups,
        "topk_group": moe.keep_groups,
        "topk_method": family.grouped if grouped else family.flat,
        "scoring_func": moe.score,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.scale,
        "num_nextn_predict_layers": model.mtp.depth,
        "initializer_range": model.init_std or model.dim**-0.5,
        "rope_theta": at.rope.theta,
        "rope_scaling": rope_json.write(at.rope),
        "max_position_embeddings": int(at.rope.original_length * at.rope.factor),
        "use_cache": True,
        **{name: allowed[0] for name, allowed in FIXED.items() if name != "mlp_bias"},
    }
    return config
