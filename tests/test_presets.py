"""Sizes of the presets against the published and derived figures."""

import dataclasses
import json
import math

import pytest

from deepseek_jax import presets
from deepseek_jax.config import BalanceConfig, ModelConfig, from_dict, to_dict
from deepseek_jax.model.count import cache_bytes, count_parameters
from deepseek_jax.ops.rope import softmax_scale

NO_BIAS = BalanceConfig(strategy="none")
NAMES = (
    "tiny",
    "mini",
    "v3_671b",
    "v2_236b",
    "v2_lite_16b",
    "ablation_16b",
    "ablation_229b",
    "deepseekmoe_2b",
)


def by_hand(model: ModelConfig, bias: bool) -> tuple[int, int]:
    """(total, active) of an MLA model, from its widths alone."""
    at, moe, d = model.attention, model.moe, model.dim
    query = at.num_heads * (at.nope_dim + at.rope_dim)
    q = d * at.q_rank + at.q_rank + at.q_rank * query if at.q_rank else d * query
    kv = d * (at.kv_rank + at.rope_dim) + at.kv_rank
    kv += at.kv_rank * at.num_heads * (at.nope_dim + at.value_dim)
    layer = q + kv + at.num_heads * at.value_dim * d + 2 * d
    expert = 3 * d * moe.ffn_dim
    router = moe.num_experts * (d + bias)
    shared = moe.num_shared * expert
    dense = model.num_dense * 3 * d * model.dense_dim
    rest = 2 * model.vocab_size * d + d + model.num_layers * layer + dense
    rest += model.num_moe * (router + shared)
    return tuple(
        rest + model.num_moe * n * expert for n in (moe.num_experts, moe.top_k)
    )


@pytest.mark.parametrize(
    ("name", "bias", "total", "active", "cache"),
    [
        ("v3_671b", True, 671_026_419_200, 37_552_297_472, 70_272),
        ("v2_236b", False, 235_741_434_880, 21_375_800_320, 69_120),
        ("v2_lite_16b", False, 15_706_484_224, 2_661_150_208, 31_104),
    ],
)
def test_released_models_have_their_published_sizes(name, bias, total, active, cache):
    model = getattr(presets, name)()
    balance = BalanceConfig() if bias else NO_BIAS
    counts = count_parameters(model, balance)
    assert (counts.total, counts.active) == (total, active)
    assert (counts.total, counts.active) == by_hand(model, bias)
    assert cache_bytes(model) == cache


def test_v3_with_its_mtp_module_is_what_lies_on_the_hub():
    counts = count_parameters(presets.v3_671b())
    assert counts.embedding == 926_679_040
    assert counts.mtp == 11_610_068_224
    assert counts.total + counts.mtp + 2 * counts.embedding == 684_489_845_504


@pytest.mark.parametrize(
    ("name", "factor", "mscale"),
    [("v3_671b", 40, 1), ("v2_236b", 40, 0.707), ("v2_lite_16b", 40, 0.707)],
)
def test_released_models_scale_the_softmax_by_yarn(name, factor, mscale):
    at = getattr(presets, name)().attention
    m = 0.1 * mscale * math.log(factor) + 1
    assert softmax_scale(at) == pytest.approx(m * m / math.sqrt(192), rel=1e-12)
    plain = dataclasses.replace(at, rope=dataclasses.replace(at.rope, factor=1.0))
    assert softmax_scale(plain) == pytest.approx(192**-0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("ablation_16b", 15.7, 2.4),
        ("ablation_229b", 228.7, 20.9),
        ("deepseekmoe_2b", 2.0, 0.3),
    ],
)
def test_approximate_presets_come_near_the_published_sizes(name, billions, active):
    model = getattr(presets, name)()
    counts = count_parameters(model, NO_BIAS)
    assert counts.total / 1e9 == pytest.approx(billions, rel=0.04)
    # The papers' active counts leave the embedding out.
    assert (counts.active - counts.embedding) / 1e9 == pytest.approx(active, rel=0.06)


def test_ablations_are_the_second_generation_with_the_third_s_router():
    old, new = presets.v2_236b(), presets.ablation_229b()
    keep = {"score": "sigmoid", "group_score": "top2", "normalize": True}
    want = dataclasses.replace(old.moe, **keep, scale=presets.v3_671b().moe.scale)
    assert new.moe == want and new.attention.rope.factor == 1
    assert dataclasses.replace(new, moe=old.moe, attention=old.attention) == old


def test_a_cache_of_other_attention_holds_every_head():
    model = presets.deepseekmoe_2b()
    assert cache_bytes(model) == 9 * 10 * 2 * 128 * 2
    grouped = dataclasses.replace(model.attention, kind="gqa", kv_heads=2)
    model = dataclasses.replace(model, attention=grouped)
    assert cache_bytes(model, 4) == 9 * 2 * 2 * 128 * 4


@pytest.mark.parametrize("name", NAMES)
def test_presets_survive_json(name):
    model = getattr(presets, name)()
    assert from_dict(type(model), json.loads(json.dumps(to_dict(model)))) == model
