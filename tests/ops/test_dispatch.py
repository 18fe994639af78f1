"""The block layout's invariants, and routed experts against plain loops."""

import functools

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.ops import dispatch
from deepseek_jax.ops.dispatch import (
    experts_blocks,
    experts_by_size,
    experts_dense,
    experts_few,
    layout,
    sum_rows,
    take_rows,
)
from pallas_kernels.grouped_matmul.reference import grouped_dot, grouped_dot_oracle
from tests.agreement import as_dtype, assert_agree, with_gradients

place = jax.jit(layout, static_argnums=(1, 2))

# Tokens, choices a token, experts, rows a block.
SHAPES = [(13, 3, 5, 4), (16, 2, 8, 8), (1, 1, 9, 4), (3, 2, 40, 2), (9, 1, 1, 1)]


def routings(tokens, top_k, experts):
    """Any choice, the worst ones included: a token may even name an expert twice."""
    elements = st.integers(0, experts - 1)
    return arrays.arrays(np.int32, (tokens, top_k), elements=elements)


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
def test_every_slot_has_one_row_in_a_block_of_its_expert(shape, data):
    tokens, top_k, experts, block = shape
    experts_TK = data.draw(routings(tokens, top_k, experts))
    expert_n, used, slot_nb, row_TK = map(np.asarray, place(experts_TK, experts, block))
    expert_M, slots = experts_TK.reshape(-1), experts_TK.size
    filled = slot_nb < slots
    assert slot_nb.shape == (len(expert_n), block)
    assert (expert_n >= 0).all() and (expert_n < experts).all()
    np.testing.assert_array_equal(np.sort(slot_nb[filled]), np.arange(slots))
    np.testing.assert_array_equal(slot_nb[~filled], slots)
    np.testing.assert_array_equal(slot_nb.flat[row_TK].flat, np.arange(slots))
    expert_nb = np.broadcast_to(expert_n[:, None], slot_nb.shape)
    np.testing.assert_array_equal(expert_nb[filled], expert_M[slot_nb[filled]])
    # An expert's rows follow each other in the order of its slots, packed tight.
    for expert in range(experts):
        mine = slot_nb[expert_n == expert].reshape(-1)
        count = (expert_M == expert).sum()
        np.testing.assert_array_equal(mine[:count], np.flatnonzero(expert_M == expert))
    counts = np.bincount(expert_M, minlength=experts)
    assert used == (-(-counts // block)).sum() <= len(expert_n)
    assert not filled[used:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_most_wasteful_routing_fits(shape):
    """One slot beyond whole blocks for as many experts as the slots allow."""
    tokens, top_k, experts, block = shape
    slots, counts = tokens * top_k, np.zeros(experts, int)
    for expert in range(experts):
        counts[expert] = min(1, slots - counts.sum())
    counts[0] += (slots - counts.sum()) // block * block
    counts[-1] += slots - counts.sum()
    experts_TK = np.repeat(np.arange(experts), counts).reshape(tokens, top_k)
    placed = place(experts_TK.astype(np.int32), experts, block)
    assert (placed.slot_nb < slots).sum() == slots
    assert placed.used <= len(placed.expert_n)


def test_taking_and_adding_rows_are_each_other_s_transpose():
    rng = np.random.default_rng(0)
    placed = place(jnp.array(rng.integers(0, 5, (13, 3))), 5, 4)
    with jax.enable_x64(True):
        x_TD = jnp.array(rng.normal(size=(13, 6)))
        y_nbD = jnp.array(rng.normal(size=(*placed.slot_nb.shape, 6)))
        taken_nbD, dx_TD = with_gradients(take_rows)((x_TD,), (placed,), y_nbD)
        added_TD, dy_nbD = with_gradients(sum_rows)((y_nbD,), (placed,), x_TD)
    x_TD, y_nbD, taken_nbD, added_TD = map(
        np.asarray, (x_TD, y_nbD, taken_nbD, added_TD)
    )
    slot_nb = np.asarray(placed.slot_nb)
    np.testing.assert_array_equal(taken_nbD[slot_nb == 39], 0)
    np.testing.assert_array_equal(
        taken_nbD[slot_nb < 39], x_TD[slot_nb[slot_nb < 39] // 3]
    )
    assert_agree([(taken_nbD * y_nbD).sum()], [(x_TD * added_TD).sum()], 1e-13)
    np.testing.assert_array_equal(dx_TD, added_TD)
    np.testing.assert_array_equal(dy_nbD, taken_nbD)


TOKENS, TOP_K, EXPERTS, WIDTH, FFN = 37, 3, 8, 6, 5


def distinct(experts):
    """A routing of each token to some of the given experts, none twice."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(experts)[:TOP_K] for _ in range(TOKENS)]
    return np.array(rows, np.int32)


ROUTINGS = {
    "random": distinct(range(EXPERTS)),
    "empty experts": distinct([1, 2, 4, 6]),
    "always the same": distinct([7, 0, 3]),
    "one expert takes everything": np.full((TOKENS, TOP_K), 5, np.int32),
}


def operands():
    """x, weights, gate, up, down and a cotangent, in float64."""
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, EXPERTS, WIDTH, FFN))
    down = rng.normal(size=(EXPERTS, FFN, WIDTH))
    x, cotangent = rng.normal(size=(2, TOKENS, WIDTH))
    return x, rng.random((TOKENS, TOP_K)), gate, up, down, cotangent


def loops(experts_TK):
    x, weights, gate, up, down, _ = operands()
    y = np.zeros_like(x)
    for t, k in np.ndindex(experts_TK.shape):
        e = experts_TK[t, k]
        gated = x[t] @ gate[e]
        hidden = gated / (1 + np.exp(-gated)) * (x[t] @ up[e])
        y[t] += weights[t, k] * (hidden @ down[e])
    return y


@functools.cache
def compiled(experts, grouped_dot, compute=None, **options):
    """(x, weights, gate, up, down), (experts_TK,), cotangent -> value and gradients."""
    if compute is not None:
        grouped_dot = functools.partial(grouped_dot, compute_dtype=compute)

    def run(x, weights, gate, up, down, experts_TK):
        arguments = x, weights, experts_TK, gate, up, down
        return experts(*arguments, grouped_dot=grouped_dot, **options)

    return with_gradients(run)


def evaluate(run, routing, dtype=jnp.float64):
    *floats, cotangent = as_dtype(operands(), dtype)
    return run(floats, (jnp.asarray(ROUTINGS[routing]),), cotangent)


@functools.cache
def exact(routing):
    """The oracle's value and plain autodiff's gradients in float64."""
    with jax.enable_x64(True):
        run = compiled(experts_dense, grouped_dot_oracle)
        return [np.asarray(x) for x in evaluate(run, routing)]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_oracle_is_what_plain_loops_compute(routing):
    assert_agree(exact(routing)[:1], [loops(ROUTINGS[routing])], 1e-13)


@pytest.mark.parametrize("block", [1, 4, 7, 128])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_blocks_agree_with_the_oracle(routing, block):
    with jax.enable_x64(True):
        actual = evaluate(compiled(experts_blocks, grouped_dot, block=block), routing)
    assert all(x.dtype == jnp.float64 for x in actual)
    assert_agree(actual, exact(routing), 1e-13)


separate = functools.partial(experts_blocks, hidden=dispatch.apart)
WAYS = [experts_dense, experts_blocks, separate, experts_few]


@pytest.mark.parametrize("experts", WAYS)
@pytest.mark.parametrize("product", [grouped_dot, grouped_dot_oracle])
def test_experts_and_grouped_dots_go_together(experts, product):
    with jax.enable_x64(True):
        actual = evaluate(compiled(experts, product), "random")
    assert_agree(actual, exact("random"), 1e-13)


@pytest.mark.parametrize(
    ("tokens", "used", "rows", "hidden"),
    [
        (1, "experts_few", None, dispatch.apart),
        (32, "experts_few", None, dispatch.apart),
        (33, "experts_blocks", 16, dispatch.apart),
        (256, "experts_blocks", 64, dispatch.apart),
        (257, "experts_blocks", 128, dispatch.joined),
    ],
)
def test_the_layout_follows_the_number_of_slots(
    tokens, used, rows, hidden, monkeypatch
):
    """Two of eight experts a token: 64 slots are few, and blocks hold even shares."""
    called = []

    def watch(name):
        return lambda *args, hidden, block=None, **_: called.append(
            (name, block, hidden)
        )

    for name in ("experts_few", "experts_blocks"):
        monkeypatch.setattr(dispatch, name, watch(name))
    slots, gate = jnp.zeros((tokens, 2)), jnp.zeros((8, 1, 1))
    experts_by_size(slots, slots, slots, gate, gate, gate, grouped_dot=grouped_dot)
    assert called == [(used, rows, hidden)]


@pytest.mark.parametrize("experts", [experts_dense, experts_blocks, experts_few])
@pytest.mark.parametrize(("compute", "bound"), [(None, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("routing", ["random", "empty experts"])
def test_they_round_no_more_than_their_products(experts, compute, bound, routing):
    run = compiled(experts, grouped_dot, compute)
    actual = evaluate(run, routing, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in actual)
    assert_agree(actual, exact(routing), bound)


def test_a_token_sees_only_its_own_experts():
    """Bit for bit: what other experts hold, NaN too, changes nothing."""
    run = compiled(experts_blocks, grouped_dot, block=4)
    floats = as_dtype(operands(), jnp.float32)
    x, weights, *matrices, cotangent = floats
    routing = (jnp.asarray(ROUTINGS["empty experts"]),)
    idle = np.isin(np.arange(EXPERTS), [1, 2, 4, 6], invert=True)
    poisoned = [m.at[idle].set(jnp.nan) for m in matrices]
    clean = run([x, weights, *matrices], routing, cotangent)
    for got, want in zip(run([x, weights, *poisoned], routing, cotangent), clean):
        np.testing.assert_array_equal(got, want)
    for gradient in clean[3:]:
        np.testing.assert_array_equal(gradient[idle], 0)
