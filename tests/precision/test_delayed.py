"""Products by scales of earlier steps, against numpy and those of the moment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.config import (
    MeshConfig,
    PipelineConfig,
    RuntimeConfig,
    TrainConfig,
)
from deepseek_jax.ops.swiglu import swiglu
from deepseek_jax.precision import delayed, policy
from deepseek_jax.precision.delayed import Remembered
from deepseek_jax.precision.fp8_dots import MODELS, fp8_dot, fp8_grouped_dot
from deepseek_jax.precision.later import Later
from deepseek_jax.precision.recipe import recipe
from deepseek_jax.train import numerics
from deepseek_jax.train.objective import totals
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import accumulate, micro_batches, plain_step
from tests.agreement import assert_agree
from tests.factory import SMALL, random_batch, small

PIECES = policy.POLICIES["fp8_delayed"]
RECIPE = recipe(PIECES, "up")
UNKNOWN = jnp.zeros(3)
CHOICE = RuntimeConfig(compute="fp8_delayed", block=8)
MOE = dataclasses.replace(SMALL.moe, top_k=8, keep_groups=4)  # all experts are chosen


def operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 40)) * np.exp(rng.normal(size=(1, 40)))
    w = rng.normal(size=(40, 24)) * 40**-0.5
    g = rng.normal(size=(50, 24)) * 1e-7
    return [each.astype(np.float32) for each in (x, w, g)]


def rounded(x, largest):
    """x as E4M3 holds it under the scale of `largest`: too large a number saturates."""
    scale = np.float32(largest) / np.float32(448)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * np.float64(scale)


@functools.partial(jax.jit, static_argnames=("dot", "by"))
def products(x, w, g, *blocks, dot=fp8_dot, by=RECIPE):
    """y, dx and dw of a product, the last with the largest magnitudes if remembered."""
    y, pull = jax.vjp(
        lambda x, w: delayed.multiplied(dot, by, MODELS, x, w, *blocks), x, w
    )
    return y, *pull(g)


def test_numbers_are_rounded_by_earlier_scales_and_their_magnitudes_come_back():
    x, w, g = operands()
    seen = [np.abs(each).max() for each in (x, w, g)]
    known = np.array([0.3, 1.7, 0.5]) * seen  # x and g saturate, w has room
    y, dx, dw = products(x, Remembered(w, jnp.asarray(known, jnp.float32)), g)
    x8, w8, g8 = (rounded(*each) for each in zip((x, w, g), known, strict=True))
    assert np.abs(x8).max() < 0.4 * seen[0]
    assert_agree([y, dx, dw.weight], [x8 @ w8, g8 @ w8.T, x8.T @ g8], 2e-6)
    np.testing.assert_array_equal(dw.amax, seen)


@pytest.mark.parametrize("name", ["up", "o"])
def test_without_history_scales_are_those_of_the_moment(name):
    by, (x, w, g) = recipe(PIECES, name), operands()
    got = products(x, Remembered(w, UNKNOWN), g, by=by)
    want = products(x, w, g, by=by)
    np.testing.assert_array_equal(got[0], want[0])
    assert_agree([got[1], got[2].weight], want[1:], 1e-6)


def test_an_operand_that_is_computed_later():
    """What is kept of it, SwiGLU's inputs, has scales of its own."""
    x, w, g = operands()
    gate, up = x * 300, x[::-1] / 300
    later = Later(swiglu, (gate, up))
    known = np.array([0.2, 1.2, 2.0]) * [
        np.abs(each).max() for each in (swiglu(gate, up), w, g)
    ]
    known = jnp.asarray(known, jnp.float32)
    y, d_later, dw = products(later, Remembered(w, known), g)
    computed = products(swiglu(gate, up), Remembered(w, known), g)
    np.testing.assert_array_equal(y, computed[0])
    np.testing.assert_array_equal(dw.amax, computed[2].amax)
    own = products(later, w, g)
    for part, each in zip(d_later.rounded, own[1].rounded, strict=True):
        error = np.linalg.norm(part - each) / np.linalg.norm(each)
        assert 1e-3 < error < 0.1


def test_experts_are_one_operand():
    x, w, g = operands()
    w_EDF = np.stack([w, 5 * w, w[::-1]])
    x_nbD, g_nbF = x[:48].reshape(6, 8, -1), g[:48].reshape(6, 8, -1)
    expert_n, used = jnp.array([0, 0, 1, 2, 2, 2]), jnp.asarray(5)
    g_nbF[5] = x_nbD[5] = 0
    known = np.array([0.5, 1.0, 3.0]) * [
        np.abs(each).max() for each in (x_nbD, w_EDF, g_nbF)
    ]
    remembered = Remembered(w_EDF, jnp.asarray(known, jnp.float32))
    y, dx, dw = products(x_nbD, remembered, g_nbF, expert_n, used, dot=fp8_grouped_dot)
    x8, w8, g8 = (rounded(*each) for each in zip((x_nbD, w_EDF, g_nbF), known))
    want = np.zeros(y.shape), np.zeros(x8.shape), np.zeros(w8.shape)
    for i in range(5):
        e = int(expert_n[i])
        want[0][i], want[1][i] = x8[i] @ w8[e], g8[i] @ w8[e].T
        want[2][e] += x8[i].T @ g8[i]
    assert_agree([y, dx, dw.weight], want, 2e-6)
    np.testing.assert_array_equal(
        dw.amax, [np.abs(each).max() for each in (x_nbD, w_EDF, g_nbF)]
    )


def test_a_history_forgets_its_oldest_step():
    params = {"attn": {"q_a": {"kernel": jnp.ones((2, 4, 5))}}, "norm": jnp.ones(3)}
    pieces = dataclasses.replace(PIECES, history=2)
    histories = delayed.empty(params, pieces)
    assert {k: v.shape for k, v in histories.items()} == {"attn.q_a.kernel": (2, 3, 2)}
    steps = [jnp.full((2, 3), value) for value in (5.0, 3.0, 4.0)]
    largest = []
    for step in steps:
        histories = delayed.pushed(histories, {"attn.q_a.kernel": step})
        known = delayed.remembered(params, histories)
        assert known["norm"] is params["norm"]
        largest.append(float(known["attn"]["q_a"]["kernel"].amax[1, 2]))
    assert largest == [5, 5, 4]


def with_accumulation(count):
    own = dataclasses.replace(SMALL, moe=MOE)
    train = TrainConfig(steps=10, accumulation=count)
    return small(batch=4, length=16, runtime=CHOICE, model=own, train=train)


@functools.cache
def trained():
    """(parts, step, states) of two steps on different batches."""
    parts = assemble(with_accumulation(1))
    state, step = init_state(parts, 0), jax.jit(plain_step(parts))
    states = [state]
    for seed in range(2):
        states.append(step(states[-1], random_batch(parts.config, seed))[0])
    return parts, step, states


def test_a_step_keeps_what_each_map_and_layer_saw():
    _, _, (first, after, last) = trained()
    assert all((h == 0).all() for h in first.scales.values())
    maps = set(policy.MAPS) - {"q", "k", "v", "experts"} | set(delayed.EXPERTS)
    named = {path.removesuffix(".kernel").rpartition(".")[2] for path in last.scales}
    assert named == maps
    for path, history in last.scales.items():
        assert (history[..., :2] > 0).all() and (history[..., 2:] == 0).all()
        np.testing.assert_array_equal(history[..., 1], after.scales[path][..., 0])
        leaf = functools.reduce(
            lambda tree, key: tree[key], path.split("."), first.params
        )
        layers = leaf.reshape(*history.shape[:-2], -1)
        np.testing.assert_array_equal(
            after.scales[path][..., 1, 0], abs(layers).max(-1)
        )


def test_micro_batches_are_seen_together():
    parts = assemble(with_accumulation(2))
    state = trained()[2][-1]
    batch = random_batch(parts.config, 5)
    counts = totals(parts, batch)
    batches = jax.tree.map(jnp.asarray, micro_batches(batch, 2))

    @jax.jit
    def gradients(state, *order):
        known = delayed.remembered(state.params, state.scales)
        chosen = jax.tree.map(lambda x: x[jnp.stack(order)], batches)
        found = accumulate(parts, state._replace(params=known), chosen, counts, 0.3)
        return delayed.forgotten(found[0])

    (first, one), (second, other), (whole, both) = (
        gradients(state, *order) for order in ((0, 0), (1, 1), (0, 1))
    )
    assert both.keys() == state.scales.keys()
    for path, largest in both.items():
        np.testing.assert_array_equal(largest, np.maximum(one[path], other[path]))
        assert (one[path] != other[path]).any()
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a + b, 2 * c, rtol=1e-5, atol=1e-6),
        first,
        second,
        whole,
    )


def test_a_step_that_is_not_finite_leaves_the_histories():
    parts, step, (*_, last) = trained()
    spoilt = last._replace(params={**last.params, "head": last.params["head"] * np.nan})
    after, _ = step(spoilt, random_batch(parts.config, 9))
    assert int(after.step) == -1 - int(last.step)
    for path, history in last.scales.items():
        np.testing.assert_array_equal(after.scales[path], history)


def test_what_is_lost_is_told_by_the_earlier_scales():
    parts, _, (*_, last) = trained()
    look = jax.jit(functools.partial(numerics.look, parts))
    batch = random_batch(parts.config, 2)
    for operand, maps in look(last, batch).items():
        for where, each in maps.items():  # numbers may be a little larger than before
            assert (each.saturated <= 0.02 * each.total).all(), (operand, where)
    short = dict(last.scales)
    for changed in ("moe.attn.o.kernel", "moe.moe.gate", "moe.moe.down"):
        short[changed] = short[changed] / 64
    found = look(last._replace(scales=short), batch)
    for where in ("moe/attn/o", "moe/moe/experts"):
        for operand in "xwg":
            each = found[operand][where]
            assert (each.saturated > 0.1 * each.total).all(), (operand, where)


def test_without_remembered_weights_nothing_is_added():
    config = small(runtime=RuntimeConfig(compute="fp8_per_tensor", block=8))
    assert init_state(assemble(config), 0).scales == {}
    assert delayed.empty({}, None) == {}


@pytest.mark.parametrize(
    "changed, found",
    [
        ({"mesh": MeshConfig(data=2)}, "one device and no pipeline"),
        (
            {
                "mesh": MeshConfig(pipe=2),
                "pipeline": PipelineConfig(schedule="1f1b", microbatches=4),
            },
            "one device and no pipeline",
        ),
    ],
)
def test_where_histories_are_not_kept_they_are_refused(changed, found):
    config = dataclasses.replace(small(runtime=CHOICE), **changed)
    with pytest.raises(ValueError, match=f"runtime.fp8.history = 16: .*{found}"):
        assemble(config)


def test_tiles_have_no_history():
    with pytest.raises(ValueError, match="history = 4: needs one scale a matrix"):
        policy.pieces("fp8_v3", policy.Pieces(history=4))
