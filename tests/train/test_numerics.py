"""What is said of a model's numbers, against what numpy counts and autodiff finds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig, PipelineConfig, RuntimeConfig
from deepseek_jax.precision.dots import linear
from deepseek_jax.precision.policy import Pieces
from deepseek_jax.train import numerics
from deepseek_jax.train.objective import objective, totals
from deepseek_jax.train.state import assemble, init_state
from tests.factory import as_f64, random_batch, small

FP8 = RuntimeConfig(compute="fp8_v3")
CONFIG = small(depth=1)


@functools.cache
def looked(runtime=FP8):
    parts = assemble(dataclasses.replace(CONFIG, runtime=runtime))
    state = init_state(parts, 0)
    # What the first layers are given is from ordinary to far too small for 8 bits.
    params = dict(state.params)
    params["embed"] = params["embed"] * jnp.logspace(0, -7, CONFIG.model.dim)
    state = state._replace(params=params)
    look = jax.jit(functools.partial(numerics.look, parts))
    return parts, state, look, look(state, random_batch(CONFIG))


def state_of_maps():
    """The weights of all linear maps."""
    params = looked()[1].params
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = "kernel", "gate", "up", "down"
    return [np.asarray(w) for path, w in flat if path[-1].key in names]


def broken(change):
    """What is said first of parameters that `change` has spoilt."""
    _, state, look, _ = looked()
    params = jax.tree.map(np.array, state.params)
    change(params)
    # Placed as before, or it would be compiled again.
    params = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), params, state.params
    )
    spoilt = state._replace(params=params)
    found = look(spoilt, random_batch(CONFIG))
    return numerics.spoilt(spoilt), numerics.first_not_finite(found)


def test_every_map_is_there_with_all_its_numbers():
    *_, found = looked()
    model, data = CONFIG.model, CONFIG.data
    assert found["x"].keys() == found["w"].keys() == found["g"].keys()
    names = {where.rpartition("/")[2] for where in found["x"]}
    assert names == {"q_a", "q_b", "kv_a", "kv_b", "o", "combine"} | {
        "gate",
        "up",
        "down",
        "experts",
    }
    rows = data.batch * data.length
    experts = found["x"]["moe/moe/experts"]
    np.testing.assert_array_equal(experts.total, [rows * model.dim] * model.num_moe)
    in_experts = 3 * model.moe.num_experts * model.dim * model.moe.ffn_dim
    assert set(found["w"]["moe/moe/experts"].total.tolist()) == {in_experts}
    for maps in found.values():
        for each in maps.values():
            assert not each.not_finite.any()
            assert each.scales.shape == (len(each.total), numerics.POWERS)


def test_first_input_is_what_numpy_counts():
    _, state, _, found = looked()
    batch, dim = random_batch(CONFIG), CONFIG.model.dim
    x = np.asarray(state.params["embed"])[batch.tokens[:, : CONFIG.data.length]]
    mean = (x**2).mean(-1, keepdims=True)
    x = (x / np.sqrt(mean + CONFIG.model.norm_eps)).reshape(-1, dim)
    assert dim <= 128  # one tile a row
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    lost = (x != 0) & ((x / scale).astype(ml_dtypes.float8_e4m3fn) == 0)
    first = found["x"]["dense/attn/q_a"]
    assert int(first.underflowed[0]) == lost.sum() > 0
    powers = np.floor(np.log2(scale)).astype(int).ravel() - numerics.LEAST
    counted = np.bincount(powers, minlength=numerics.POWERS)
    np.testing.assert_array_equal(first.scales[0], counted)


def test_gradients_are_those_of_outputs(monkeypatch):
    """Their sum is the loss's slope in a number added to all of a map's outputs."""
    names = "q_a", "kv_b", "down"

    def sums(x, scheme, known=None):
        zeros = jnp.zeros(())
        return numerics.Found(x.sum(), zeros, zeros, zeros, zeros)

    def shifted(x, w_DF, name, by):
        y_TF = linear(x, w_DF, name)
        return y_TF + by[names.index(name)] if name in names else y_TF

    monkeypatch.setattr(numerics, "of", sums)
    with jax.enable_x64(True):
        parts = assemble(dataclasses.replace(CONFIG, runtime=RuntimeConfig()))
        state, batch = as_f64(init_state(parts, 0)), random_batch(CONFIG)
        found = jax.jit(functools.partial(numerics.look, parts))(state, batch)["g"]
        counts, weight = totals(parts, batch), CONFIG.optim.mtp_weight

        def loss(by):
            rt = dataclasses.replace(
                parts.model.rt, linear=functools.partial(shifted, by=by), remat=None
            )
            own = dataclasses.replace(parts, model=parts.model.clone(rt=rt))
            return objective(own, state.params, state.balance, batch, counts, weight)[0]

        want = jax.jit(jax.grad(loss))(jnp.zeros(3))
    for name, slope in zip(names, np.asarray(want), strict=True):
        places = [
            np.asarray(x.saturated)
            for where, x in found.items()
            if where.rpartition("/")[2] == name
        ]
        assert len(places) >= 2
        np.testing.assert_allclose(sum(map(np.sum, places)), slope, rtol=1e-9)


def test_record_has_shares_by_map_and_layer():
    _, _, _, found = looked()
    record = numerics.record(found)
    for operand in "xwg":
        assert record[f"eval_saturated_{operand}"] == 0  # scales are by the largest
        by_map = record[f"eval_underflowed_{operand}_by_map"]
        assert len(by_map["moe/attn/o"]) == CONFIG.model.num_moe
        assert len(by_map["mtp_0/combine"]) == 1
    lost = sum(int(each.underflowed.sum()) for each in found["x"].values())
    total = sum(int(each.total.sum()) for each in found["x"].values())
    assert record["eval_underflowed_x"] == lost / total > 0
    by_map = found["w"].values()
    tiles = sum(int(each.scales.sum()) for each in by_map)
    assert sum(count for _, count in record["eval_scales_w"]) == tiles > 0
    (low, _), *_, (high, _) = record["eval_scales_w"]
    largest = max(abs(w).max() for w in jax.tree.leaves(state_of_maps()))
    # The scales of attention's output projection are rounded up to powers of two.
    exact = np.log2(largest / 448)
    assert low <= np.floor(exact) <= high <= np.ceil(exact)


def test_operands_are_rounded_as_the_policy_says():
    def recipe_of(**runtime):
        config = dataclasses.replace(CONFIG, runtime=RuntimeConfig(**runtime))
        return numerics.recipes(assemble(config))

    own = recipe_of(compute="fp8_v3", fp8=Pieces(forward="e5m2", maps="q_a"))
    assert own("q_a").x.form == "e5m2"
    assert own("kv_a").x.form == "e4m3"  # not in FP8 here; what fp8_v3 would lose
    assert own("combine").g.least < own("combine").x.least
    assert recipe_of(compute="bf16")("q_a").x.block == (1, 128)


def test_first_layer_that_is_not_finite_is_named():
    def weight(params):
        params["moe"]["attn"]["kv_b"]["kernel"][1, 0, 0] = np.nan

    def expert(params):
        params["moe"]["moe"]["up"][0, 1, 0, 0] = np.inf

    def head(params):
        params["head"][0, 0] = np.inf

    def large(params):  # finite, but the products of the layer after it are not
        params["dense"]["ffn_norm"]["scale"][:] = 1e38

    named, first = broken(weight)
    assert named.startswith("moe/attn/kv_b/kernel has 1 numbers of")
    assert "the weight of moe/attn/kv_b, layer 1: 1 of" in first
    named, first = broken(expert)
    assert named.startswith("moe/moe/up has 1 numbers of")
    assert "the weight of moe/moe/experts, layer 0: 1 of" in first
    named, first = broken(head)
    assert named.startswith("head has 1 numbers of")
    assert first.startswith("the inputs of all linear maps are finite")
    named, first = broken(large)
    assert named == ""
    assert "the input of dense/ffn/down, layer 0" in first
    assert broken(lambda params: None) == ("", "")


def test_a_refused_step_is_explained():
    parts, state, *_ = looked()
    dense = state.params["dense"]
    large = {"scale": dense["ffn_norm"]["scale"].at[:].set(1e38)}
    params = state.params | {"dense": dense | {"ffn_norm": large}}
    refused = state._replace(step=-1 - state.step, params=params)
    said = numerics.explained(parts, refused, random_batch(CONFIG))
    assert "the input of dense/ffn/down, layer 0" in said


def test_gradients_are_named_when_all_else_is_finite():
    *_, found = looked()
    bad = found["g"]["moe/moe/shared/up"]
    bad = bad._replace(not_finite=np.array(bad.not_finite) + 2)
    spoilt = found | {"g": found["g"] | {"moe/moe/shared/up": bad}}
    last = CONFIG.model.num_moe - 1
    said = numerics.first_not_finite(spoilt)
    assert f"the output's of moe/moe/shared/up, layer {last}: 2 of" in said


@pytest.mark.slow
def test_under_a_pipeline_as_without():
    model = dataclasses.replace(CONFIG.model, num_layers=5)
    pipeline = PipelineConfig(schedule="1f1b", microbatches=2)
    plain = small(model=model, runtime=FP8)
    piped = dataclasses.replace(
        plain, mesh=MeshConfig(pipe=2, data=2), pipeline=pipeline
    )
    batch, found = random_batch(plain), []
    for config in (plain, piped):
        parts = assemble(config, jax.devices()[: config.mesh.size])
        found.append(numerics.recorder(parts)(init_state(parts, 0), batch))
    one, other = found
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float):  # of one row, and of a row for each of 4 devices
            assert abs(other[name] - value) < 1e-3, name
        elif name.endswith("by_map"):
            assert other[name].keys() == value.keys()
            assert [*map(len, other[name].values())] == [*map(len, value.values())]
