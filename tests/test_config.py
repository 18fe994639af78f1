"""deepseek_jax.config: the impossible is refused by name, the rest round-trips."""

import dataclasses
import json
import sys

import pytest

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.config import Config, from_dict, signature, to_dict

GQA = {"model.attention.kind": "gqa"}
KEEP_ONE = {"model.moe.keep_groups": 1}
LONE_EXPERTS = {"model.moe.num_groups": 256, "model.moe.keep_groups": 8}
FROZEN = {"balance.strategy": "loss_free_frozen"}
SIX_PARTS = {"train.accumulation": 3, "mesh.data": 2}
THREE_SHARES = {"data.batch": 18, "mesh.expert": 3}

# field, impossible value, what the message says is right, other fields that make it so
PIPED = {"pipeline.schedule": "dualpipe"}
REFUSED = [
    ("model.attention.rope.theta", 0.0, "must be positive", {}),
    ("model.attention.rope.original_length", -1, "must be positive", {}),
    ("model.attention.rope.factor", 0.5, "must be at least 1", {}),
    ("model.attention.kind", "mlaa", "mla, mha, gqa; did you mean 'mla'?", {}),
    ("model.attention.num_heads", 0, "must be positive", {}),
    ("model.attention.kv_heads", 0, "must be positive", {}),
    ("model.attention.kv_rank", 0, "must be positive", {}),
    ("model.attention.rope_dim", 0, "must be positive", {}),
    ("model.attention.value_dim", 0, "must be positive", {}),
    ("model.attention.q_rank", -1, "must be 0 (none) or more", {}),
    ("model.attention.nope_dim", -2, "must be 0 or more", {}),
    ("model.attention.rope_dim", 7, "must be even", {}),
    ("model.attention.kv_heads", 3, "must divide num_heads = 128", GQA),
    ("model.moe.num_experts", 0, "must be positive", {}),
    ("model.moe.top_k", 0, "must be positive", {}),
    ("model.moe.ffn_dim", 0, "must be positive", {}),
    ("model.moe.num_groups", 0, "must be positive", {}),
    ("model.moe.keep_groups", 0, "must be positive", {}),
    ("model.moe.num_shared", -1, "must be >= 0", {}),
    ("model.moe.score", "softmx", "did you mean 'softmax'?", {}),
    ("model.moe.group_score", "top3", "did you mean 'top2'?", {}),
    ("model.moe.num_groups", 7, "must divide num_experts = 256", {}),
    ("model.moe.keep_groups", 9, "must be at most num_groups = 8", {}),
    ("model.moe.top_k", 33, "at most 32, the experts in the 1 kept groups", KEEP_ONE),
    ("model.moe.group_score", "top2", "must be 'max'", LONE_EXPERTS),
    ("model.mtp.depth", 5, "must be 0 to 4", {}),
    ("model.vocab_size", 0, "must be positive", {}),
    ("model.dim", 0, "must be positive", {}),
    ("model.num_layers", 0, "must be positive", {}),
    ("model.dense_dim", 0, "must be positive", {}),
    ("model.norm_eps", 0.0, "must be positive", {}),
    ("model.init_std", -0.1, "must be >= 0", {}),
    ("model.num_dense", 61, "must be 0 to 60", {}),
    ("data.batch", 0, "must be positive", {}),
    ("data.length", 0, "must be positive", {}),
    ("data.packing", "bestfit", "did you mean 'best_fit'?", {}),
    ("data.lanes", 5, "must divide data.batch = 16", {}),
    ("data.val_fraction", 1.0, "must lie between 0 and 1", {}),
    ("optim.lr", 0.0, "must be positive", {}),
    ("optim.clip", -1.0, "must be positive", {}),
    ("optim.b1", 1.0, "must lie in [0, 1)", {}),
    ("optim.b2", -0.1, "must lie in [0, 1)", {}),
    ("optim.ema", 1.0, "must lie in [0, 1)", {}),
    ("optim.weight_decay", -1.0, "must be >= 0", {}),
    ("optim.mtp_weight", -0.3, "must be >= 0", {}),
    ("optim.schedule", "cosin", "did you mean 'cosine'?", {}),
    ("optim.warmup", -1, "must be >= 0", {}),
    ("optim.horizon", -1, "must be >= 0", {}),
    ("optim.decay", 0.0, "must lie in (0, 1]", {}),
    ("optim.final", 1.5, "must lie in [0, 1]", {}),
    ("optim.mtp_weight_changes", ((5, 0.1), (5, 0.2)), "increasing positive", {}),
    ("optim.mtp_weight_changes", ((5, -0.1),), "values must be >= 0", {}),
    ("balance.speed_changes", ((5, -0.1),), "values must be >= 0", {}),
    ("balance.strategy", "lossfree", "did you mean 'loss_free'?", {}),
    ("balance.speed", -1e-3, "must be >= 0", {}),
    ("balance.alpha", -1.0, "must be >= 0", {}),
    ("balance.z_weight", -1.0, "must be >= 0", {}),
    ("balance.freeze_step", -1, "must be >= 0", {}),
    ("balance.speed_changes", ((9, 0.1), (3, 0.2)), "increasing positive", {}),
    ("balance.freeze_step", 0, "must be positive for strategy", FROZEN),
    *(
        (f"train.{field.name}", 0, "must be positive", {})
        for field in dataclasses.fields(config_lib.TrainConfig)
        if field.name != "trackers"
    ),
    ("runtime.compute", "fp32", "did you mean 'f32'?", {}),
    ("runtime.attention", "plan", "did you mean 'plain'?", {}),
    ("runtime.experts", "block", "did you mean 'blocks'?", {}),
    ("optim.moments", "fp16", "did you mean 'bf16'?", {}),
    ("runtime.remat", "ful", "did you mean 'full'?", {}),
    ("runtime.implementation", "mosaic", "must be one of auto, xla, mosaic_gpu", {}),
    ("runtime.block", 0, "must be positive", {}),
    *(
        (f"mesh.{name}", 0, "must be positive", {})
        for name in ("data", "fsdp", "node", "expert")
    ),
    ("mesh.capacity", 0.0, "must be positive", {}),
    ("mesh.transport", "alltoall", "did you mean 'all_to_all'?", {}),
    ("mesh.payload", "fp16", "did you mean 'bf16'?", {}),
    ("mesh.payload", "fp8", "must be 'exact' with", {"mesh.transport": "ring"}),
    (
        "model.moe.num_experts",
        256,
        "multiple of mesh.node x mesh.expert = 3",
        THREE_SHARES,
    ),
    ("mesh.rules", "fdsp", "did you mean 'fsdp'?", {}),
    ("mesh.own_rules", 5, "must be (pattern, axes) pairs", {}),
    (
        "data.batch",
        16,
        "multiple of train.accumulation x the mesh's devices / mesh.pipe = 6",
        SIX_PARTS,
    ),
    ("data.batch", 18, "multiple of the mesh's 4 devices", PIPED | {"mesh.pipe": 4}),
    ("mesh.pipe", 2, "needs a pipeline.schedule: gpipe", {}),
    ("pipeline.schedule", "dualpip", "did you mean 'dualpipe'?", {}),
    ("pipeline.keep", "input", "did you mean 'inputs'?", {}),
    ("pipeline.microbatches", 0, "must be positive", {}),
    ("pipeline.microbatches", 2, "needs a pipeline.schedule", {}),
    ("mesh.pipe", 0, "must be positive", {}),
    ("pipeline.chunks", -1, "must be >= 0", {}),
    ("pipeline.chunks", 3, "needs a pipeline.schedule", {}),
    ("train.accumulation", 2, "micro-batches are pipeline.microbatches", PIPED),
    ("balance.strategy", "aux_global", "'aux_seq' (per sequence), 'aux_batch'", PIPED),
]


def nested(flat: dict) -> dict:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = value
    return tree


def fields(cls: type, at: str = "") -> dict[str, object]:
    """Every leaf field of a config class by its dotted name, with its default."""
    leaves = {}
    for name, value in vars(cls()).items():
        if dataclasses.is_dataclass(value):
            leaves |= fields(type(value), f"{at}{name}.")
        else:
            leaves[at + name] = value
    return leaves


def context(name: str) -> dict:
    """What a field needs to have another value."""
    if name.startswith("runtime.fp8."):
        return {"runtime.compute": "fp8_v3"}
    return PIPED if name == "mesh.pipe" or name.startswith("pipeline.") else {}


def other(name: str, default: object) -> object:
    """A value that is allowed for a field and is not its default."""
    special = {
        "model.attention.kind": "mha",
        "pipeline.schedule": "gpipe",
        "pipeline.keep": "products",
        "model.attention.rope_dim": 32,
        "model.moe.score": "softmax",
        "model.moe.group_score": "max",
        "model.moe.num_groups": 4,
        "model.moe.num_experts": 512,
        "data.batch": 32,
        "data.lanes": 8,
        "data.packing": "best_fit",
        "data.val_fraction": 0.02,
        "optim.schedule": "cosine",
        "optim.moments": "bf16",
        "optim.b1": 0.5,
        "optim.b2": 0.5,
        "optim.decay": 0.5,
        "optim.final": 0.5,
        "optim.ema": 0.5,
        "balance.strategy": "quantile",
        "train.accumulation": 2,
        "runtime.compute": "bf16",
        "runtime.fp8.forward": "e5m2",
        "runtime.fp8.gradients": "e5m2",
        "runtime.fp8.rows": 128,
        "runtime.fp8.powers": "yes",
        "runtime.fp8.bits": 14,
        "runtime.fp8.promote": 128,
        "runtime.fp8.exact": "no",
        "runtime.fp8.products": "fprop,wgrad",
        "runtime.fp8.maps": "q_a,experts",
        "runtime.fp8.kept": "bf16",
        "runtime.fp8.swiglu": "no",
        "runtime.fp8.out": "e4m3",
        "runtime.attention": "plain",
        "runtime.experts": "dense",
        "runtime.remat": "full",
        "runtime.implementation": "xla",
        "mesh.data": 4,
        "mesh.fsdp": 2,
        "mesh.node": 2,
        "mesh.expert": 2,
        "mesh.rules": "zero1",
        "mesh.own_rules": (("embed$", "-,fsdp"),),
        "mesh.transport": "ring",
        "mesh.payload": "fp8",
    }
    if name in special:
        return special[name]
    if isinstance(default, tuple):
        return ((10, 0.5), (20, 0.0))
    if isinstance(default, bool):
        return not default
    return default + ("x" if isinstance(default, str) else 1)


@pytest.mark.parametrize(("name", "value", "right", "context"), REFUSED)
def test_refused(name, value, right, context):
    with pytest.raises(ValueError) as refusal:
        from_dict(Config, nested({**context, name: value}))
    message = str(refusal.value)
    assert message.startswith(f"{name} = {value!r}: ")
    assert right in message


def test_every_check_is_refused_once(monkeypatch):
    check, seen, failed = config_lib._check, set(), set()

    def spy(ok, name, value, right):
        place = sys._getframe(1).f_lineno, name
        seen.add(place)
        if not ok:
            failed.add(place)
        check(ok, name, value, right)

    monkeypatch.setattr(config_lib, "_check", spy)
    Config()
    made = set(seen)
    for name, value, _, context in REFUSED:
        with pytest.raises(ValueError):
            from_dict(Config, nested({**context, name: value}))
    assert sorted(made - failed) == []


@pytest.mark.parametrize(("name", "default"), fields(Config).items())
def test_round_trip_of_every_field(name, default):
    config = from_dict(Config, nested(context(name) | {name: other(name, default)}))
    assert config != Config()
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(("name", "default"), fields(Config).items())
def test_signature_is_what_changes_the_mathematics(name, default):
    config = from_dict(Config, nested(context(name) | {name: other(name, default)}))
    free = name.split(".")[0] in ("train", "runtime", "mesh", "pipeline")
    assert (signature(config) == signature(Config())) == free


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_presets_round_trip(name):
    model = getattr(presets, name)()
    assert from_dict(type(model), json.loads(json.dumps(to_dict(model)))) == model


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"moe": {"topk": 1}}}, "model.moe.topk", "top_k"),
        ({"optim": {"warm_up": 1}}, "optim.warm_up", "warmup"),
    ],
)
def test_unknown_key_names_the_nearest(values, key, nearest):
    with pytest.raises(ValueError) as refusal:
        from_dict(Config, values)
    assert (
        str(refusal.value) == f"unknown config key {key!r}; did you mean {nearest!r}?"
    )


def test_unknown_key_with_nothing_near():
    with pytest.raises(ValueError) as refusal:
        from_dict(Config, {"data": {"zzzz": 1}})
    assert str(refusal.value) == "unknown config key 'data.zzzz'"


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("seed", "1", "must be int"),
        ("seed", True, "must be int"),
        ("train.steps", 10.0, "must be int"),
        ("optim.lr", "1e-3", "must be float"),
        ("data.segment_mask", 1, "must be bool"),
        ("data.source", None, "must be str"),
        ("model", 3, "must be a group of settings"),
        ("balance.speed_changes", 5, "must be (step, value) pairs"),
        ("balance.speed_changes", ((1, 2, 3),), "must be (step, value) pairs"),
    ],
)
def test_wrong_type(name, value, right):
    with pytest.raises(ValueError) as refusal:
        from_dict(Config, nested({name: value}))
    assert str(refusal.value) == f"{name} = {value!r}: {right}"


def test_int_is_taken_where_a_float_is_meant():
    config = from_dict(Config, {"optim": {"clip": 2}})
    assert isinstance(config.optim.clip, float)


def test_routers_are_the_moe_layers_then_the_mtp_modules():
    model = from_dict(Config, nested({"model.mtp.depth": 2})).model
    assert (model.num_moe, model.num_routers) == (61 - 3, 61 - 3 + 2)


def test_micro_batches_are_mathematics_to_the_loss_of_each_micro_batch_only():
    def signed(strategy, accumulation):
        values = {
            "balance": {"strategy": strategy},
            "train": {"accumulation": accumulation},
        }
        return signature(from_dict(Config, values))

    assert signed("v3", 1) == signed("v3", 4)
    assert signed("aux_batch", 1) != signed("aux_batch", 4)
