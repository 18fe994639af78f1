"""Products by scales of earlier steps, against numpy and those of the moment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.checkpoint import manager
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
from deepseek_jax.train import evaluate, numerics
from deepseek_jax.train.objective import totals
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import accumulate, micro_batches, plain_step
from tests.agreement import assert_agree
from tests.factory import SMALL, random_batch, small

PIECES = policy.POLICIES["fp8_delayed"]
RECIPE = recipe(PIECES, "up")
W = 2  # where the largest magnitudes of weights begin
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


def amax(x):
    return np.abs(x).max()


def known(w, x_amax, g_amax, *w_amax):
    return Remembered(w, jnp.array([x_amax, g_amax, *w_amax], jnp.float32))


def test_numbers_are_rounded_by_earlier_scales_and_their_magnitudes_come_back():
    x, w, g = operands()
    # x and g saturate, w has room.
    x_amax, w_amax, g_amax = 0.3 * amax(x), 1.7 * amax(w), 0.5 * amax(g)
    y, dx, dw = products(x, known(w, x_amax, g_amax, w_amax), g)
    x8, w8, g8 = rounded(x, x_amax), rounded(w, w_amax), rounded(g, g_amax)
    assert amax(x8) < 0.4 * amax(x)
    assert_agree([y, dx, dw.weight], [x8 @ w8, g8 @ w8.T, x8.T @ g8], 2e-6)
    np.testing.assert_array_equal(dw.amax, [amax(x), amax(g), amax(w)])


@pytest.mark.parametrize("name", ["up", "o"])
def test_without_history_scales_are_those_of_the_moment(name):
    by, (x, w, g) = recipe(PIECES, name), operands()
    got = products(x, known(w, 0, 0, 0), g, by=by)
    want = products(x, w, g, by=by)
    assert_agree([got[0], got[1], got[2].weight], want, 1e-6)


def test_tiny_gradients_do_not_vanish():
    x, w, g = operands()
    got = products(x, known(1e-2 * w, 0, 0, 0), 1e-23 * g)
    want = products(x, 1e-2 * w, 1e-23 * g)
    assert_agree([got[1], got[2].weight], want[1:], 1e-6)


def test_an_operand_that_is_computed_later():
    """What is kept of it, SwiGLU's inputs, has scales of its own."""
    x, w, g = operands()
    gate, up = x * 300, x[::-1] / 300
    now = swiglu(gate, up)
    remembered = known(w, 0.9 * amax(now), 2 * amax(g), 1.2 * amax(w))
    y, d_later, dw = products(Later(swiglu, (gate, up)), remembered, g)
    computed = products(now, remembered, g)
    np.testing.assert_array_equal(y, computed[0])
    np.testing.assert_array_equal(dw.amax, computed[2].amax)
    own = products(Later(swiglu, (gate, up)), w, g)
    pairs = [*zip(d_later.rounded, own[1].rounded, strict=True)]
    for got, want in (*pairs, (dw.weight, own[2]), (dw.weight, computed[2].weight)):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-3 < error < 0.1


def grouped():
    """x, w and g of six blocks of rows, the last unused, with three experts."""
    x, w, g = operands()
    w_EDF = np.stack([w, 50 * w, w[::-1]])
    x_nbD, g_nbF = x[:48].reshape(6, 8, -1), g[:48].reshape(6, 8, -1)
    x_nbD[5] = g_nbF[5] = 0
    return x_nbD, w_EDF, g_nbF, jnp.array([0, 0, 1, 2, 2, 2]), jnp.asarray(5)


def test_each_expert_has_its_scale():
    x_nbD, w_EDF, g_nbF, expert_n, used = grouped()
    x_amax, g_amax = 0.5 * amax(x_nbD), 3 * amax(g_nbF)
    w_amax = [1.1 * amax(w) for w in w_EDF]
    y, dx, dw = products(
        x_nbD,
        known(w_EDF, x_amax, g_amax, *w_amax),
        g_nbF,
        expert_n,
        used,
        dot=fp8_grouped_dot,
    )
    x8, g8 = rounded(x_nbD, x_amax), rounded(g_nbF, g_amax)
    w8 = np.stack([rounded(*each) for each in zip(w_EDF, w_amax, strict=True)])
    want = np.zeros(y.shape), np.zeros(x8.shape), np.zeros(w8.shape)
    for i in range(5):
        e = int(expert_n[i])
        want[0][i], want[1][i] = x8[i] @ w8[e], g8[i] @ w8[e].T
        want[2][e] += x8[i].T @ g8[i]
    assert_agree([y, dx, dw.weight], want, 2e-6)
    seen = [amax(x_nbD), amax(g_nbF), *map(amax, w_EDF)]
    np.testing.assert_array_equal(dw.amax, seen)


def test_experts_without_history_have_scales_of_the_moment():
    x_nbD, w_EDF, g_nbF, *blocks = grouped()
    empty = known(w_EDF, 0, 0, 0, 0, 0)
    got = products(x_nbD, empty, g_nbF, *blocks, dot=fp8_grouped_dot)
    want = products(x_nbD, w_EDF, g_nbF, *blocks, dot=fp8_grouped_dot)
    assert_agree([got[0], got[1], got[2].weight], want, 1e-6)


def test_in_float64():
    with jax.enable_x64(True):
        x, w, g = (jnp.asarray(each, jnp.float64) for each in operands())
        y, dx, dw = products(x, known(w, 2, 1e-7, 1), jnp.asarray(g, jnp.float32))
    assert dx.dtype == dw.weight.dtype == jnp.float64
    assert y.dtype == dw.amax.dtype == jnp.float32


def test_a_history_forgets_its_oldest_step():
    params = {"attn": {"q_a": {"kernel": jnp.ones((2, 4, 5))}}, "norm": jnp.ones(3)}
    pieces = dataclasses.replace(PIECES, history=2)
    histories = delayed.empty(params, pieces)
    assert {k: v.shape for k, v in histories.items()} == {"attn.q_a.kernel": (2, 3, 2)}
    steps = [jnp.full((2, 3), value) for value in (5.0, 3.0, 4.0)]
    largest = []
    for step in steps:
        histories = delayed.pushed(histories, {"attn.q_a.kernel": step})
        remembered = delayed.remembered(params, histories)
        assert remembered["norm"] is params["norm"]
        largest.append(float(remembered["attn"]["q_a"]["kernel"].amax[1, 2]))
    assert largest == [5, 5, 4]


def with_accumulation(count):
    own = dataclasses.replace(SMALL, moe=MOE)
    steps = TrainConfig(steps=10, accumulation=count)
    return small(batch=4, length=16, runtime=CHOICE, model=own, train=steps)


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
        w = functools.reduce(dict.__getitem__, path.split("."), first.params)
        largest = abs(w).max((-2, -1)).reshape(*history.shape[:-2], -1)
        np.testing.assert_array_equal(after.scales[path][..., W:, 0], largest)


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["head", "norm"])
def test_a_step_that_is_not_finite_leaves_the_histories(value, where):
    """An infinite input would only saturate under an earlier scale."""
    parts, step, (*_, last) = trained()
    params = jax.tree.map(lambda w: w, last.params)
    if where == "head":
        params["head"] = params["head"] * value
    else:
        norm = params["moe"]["ffn_norm"]
        norm["scale"] = norm["scale"].at[0, 0].set(value)
    spoilt = last._replace(params=params)
    after, _ = step(spoilt, random_batch(parts.config, 9))
    assert int(after.step) == -1 - int(last.step)
    for path, history in last.scales.items():
        np.testing.assert_array_equal(after.scales[path], history)


def test_a_first_step_is_that_of_one_scale_a_matrix():
    config = with_accumulation(1)
    alone = dataclasses.replace(config.runtime, compute="fp8_per_tensor")
    others = assemble(dataclasses.replace(config, runtime=alone))
    _, step, (first, *_) = trained()
    batch = random_batch(config)
    _, metrics = jax.jit(plain_step(others))(init_state(others, 0), batch)
    _, own = step(first, batch)
    np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(own["grad_norm"], metrics["grad_norm"], rtol=1e-3)
    np.testing.assert_array_equal(own["load"], metrics["load"])


def test_a_checkpoint_has_the_histories(tmp_path):
    """A step after one is, bit for bit, what it was."""
    parts, step, (first, middle, last) = trained()
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, middle, {}, {})
    restored = manager.restore(tmp_path, first, optional=("scales",)).state
    again, _ = step(restored, random_batch(parts.config, 1))
    jax.tree.map(np.testing.assert_array_equal, again, last)


def test_evaluations_are_by_earlier_scales():
    parts, _, (*_, last) = trained()
    run = evaluate.make_evaluate_batch(parts, 1)
    short = {path: history / 64 for path, history in last.scales.items()}
    batches = [random_batch(parts.config, 5)]
    losses = []
    for state in (last, last._replace(scales=short)):
        found = evaluate.evaluate(run, parts, state, batches, ("text",))
        losses.append(found.metrics["eval_ce"])
    assert abs(losses[1] - losses[0]) > 1e-2


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
    ("field", "changed"),
    [
        ("mesh.size = 2: must be 1", {"mesh": MeshConfig(data=2)}),
        (
            "pipeline.schedule = '1f1b': must be 'none'",
            {"pipeline": PipelineConfig(schedule="1f1b", microbatches=4)},
        ),
    ],
)
def test_where_histories_are_not_kept_they_are_refused(field, changed):
    match = f"{field} with runtime.compute = 'fp8_delayed' and a history of 16 steps"
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(small(runtime=CHOICE), **changed)


def test_tiles_have_no_history():
    with pytest.raises(ValueError, match=r"tile = 128: must be 0, .* of 4 steps"):
        policy.pieces("fp8_v3", policy.Pieces(history=4))
