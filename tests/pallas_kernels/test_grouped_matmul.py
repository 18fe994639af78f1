"""Block-grouped matmul against gathered weights, whatever lies in unused blocks."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choice import XLA
from pallas_kernels.grouped_matmul import api
from pallas_kernels.grouped_matmul.reference import grouped_dot, grouped_dot_oracle
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape
from pallas_kernels.testing import KERNEL, Suite, distance, interpreted
from tests.agreement import as_dtype, assert_agree, matmul_dtypes, with_gradients

EXPERTS, ROWS, WIDTH, OUT = 5, 3, 7, 9


class Case(NamedTuple):
    """The expert of each block, and how many blocks hold rows."""

    expert_n: list[int]
    used: int


# Odd, even, three and four times something: the loop takes several blocks a trip.
CASES = {
    "every expert": Case([0, 1, 1, 2, 3, 4, 4], 7),
    "every expert, none used": Case([0, 1, 1, 2, 3, 4, 4], 0),
    "empty experts": Case([1, 1, 4, 4, 4, 4, 4, 4, 4], 3),
    "one expert takes everything": Case([2] * 10, 10),
    "one expert, two blocks unused": Case([2] * 10, 8),
    "within a trip": Case([0, 0, 1, 3, 3, 4, 4, 4], 5),
    "first block only": Case([3, 4, 4, 4, 4, 4, 4, 4], 1),
    "none used": Case([4] * 8, 0),
    "in any order": Case([3, 0, 4, 0, 3, 1], 5),
    "one block": Case([1], 1),
}


def operands(case, fill):
    """x, w and a cotangent in float64; unused blocks hold `fill`."""
    rng = np.random.default_rng(0)
    blocks = len(case.expert_n)
    unused = np.arange(blocks)[:, None, None] >= case.used
    x, g = (rng.normal(size=(blocks, ROWS, width)) for width in (WIDTH, OUT))
    w = rng.normal(size=(EXPERTS, WIDTH, OUT))
    return np.where(unused, fill, x), w, np.where(unused, fill, g)


def evaluate(function, case, dtype=jnp.float64, fill=0.0):
    """The value and the gradients of x and w, from operands rounded to `dtype`."""
    x, w, g = as_dtype(operands(case, fill), dtype)
    routing = jnp.array(case.expert_n), jnp.asarray(case.used)
    return with_gradients(function)((x, w), routing, g)


@functools.cache
def exact(name):
    with jax.enable_x64(True):
        return [np.asarray(x) for x in evaluate(grouped_dot_oracle, CASES[name])]


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_what_plain_loops_compute(name):
    case = CASES[name]
    x, w, g = operands(case, 0.0)
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    for block in range(case.used):
        expert = case.expert_n[block]
        y[block] = x[block] @ w[expert]
        dx[block] = g[block] @ w[expert].T
        dw[expert] += x[block].T @ g[block]
    assert_agree(exact(name), [y, dx, dw], 1e-13)


@pytest.mark.parametrize("fill", [0.0, np.nan])
@pytest.mark.parametrize("name", CASES)
def test_blocks_agree_with_the_oracle_whatever_unused_rows_hold(name, fill):
    with jax.enable_x64(True):
        actual = evaluate(grouped_dot, CASES[name], fill=fill)
    assert all(x.dtype == jnp.float64 for x in actual)
    assert_agree(actual, exact(name), 1e-13)


@pytest.mark.parametrize(("compute", "bound"), [(None, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ["every expert", "within a trip"])
def test_blocks_round_no_more_than_their_operands(name, compute, bound):
    function = functools.partial(with_compute, compute)
    actual = evaluate(function, CASES[name], jnp.float32, fill=np.nan)
    assert all(x.dtype == jnp.float32 for x in actual)
    assert_agree(actual, exact(name), bound)


def with_compute(compute, x, w, expert_n, used):
    return grouped_dot(x, w, expert_n, used, compute)


@pytest.mark.parametrize("function", [grouped_dot, grouped_dot_oracle])
def test_16_bit_operands_are_summed_in_float32(function):
    value, *gradients = evaluate(function, CASES["every expert"], jnp.bfloat16)
    assert value.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    assert_agree([value, *gradients], exact("every expert"), 1e-2)


def test_all_three_products_have_rounded_operands_and_a_float32_sum():
    case = CASES["every expert"]
    x, w, g = as_dtype(operands(case, 0.0), jnp.float32)
    routing = jnp.array(case.expert_n), jnp.asarray(case.used)

    def run(x, w):
        product = functools.partial(with_compute, jnp.bfloat16)
        return jax.vjp(lambda x, w: product(x, w, *routing), x, w)[1](g)

    dtypes = matmul_dtypes(run, x, w)
    assert set(dtypes) == {("bfloat16", "bfloat16", "float32")}
    assert len(dtypes) >= 3


def kernel_inputs(key, shape):
    """bfloat16 operands, experts in any order, some without blocks; the rest is NaN."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (shape.n, shape.rows, shape.D), jnp.bfloat16)
    w = jax.random.normal(keys[1], (shape.E, shape.D, shape.F), jnp.bfloat16)
    expert_n = jax.random.randint(keys[2], (shape.n,), 0, shape.E)
    unused = jnp.arange(shape.n)[:, None, None] >= shape.used
    return jnp.where(unused, jnp.nan, x), w, expert_n, jnp.int32(shape.used)


def in_float32(x, w, expert_n, used):
    return grouped_dot_oracle(*as_dtype((x, w), jnp.float32), expert_n, used)


SUITE = Suite(
    operation=api.grouped_dot,
    oracle=in_float32,
    inputs=kernel_inputs,
    shapes=SHAPES["ci"] | {"tall blocks": Shape(2, 2, 64, 128, 1, rows=256)},
    bound=1e-6,
    differentiable=(0, 1),
)


@pytest.mark.parametrize("shape", ["ragged", "one block", "tall blocks"])
def test_the_kernel_is_the_oracle(shape):
    SUITE.check_values(KERNEL, shape)


@pytest.mark.parametrize("shape", ["ragged", "none used"])
@pytest.mark.parametrize("implementation", [XLA, KERNEL])
def test_its_gradients_are_the_oracle_s(implementation, shape):
    # Both are rounded to bfloat16, the operands' type, from slightly different numbers.
    suite = dataclasses.replace(SUITE, bound=1e-3)
    suite.check_gradients(implementation, shape, seed=1)


def test_master_weights_are_rounded_and_their_gradient_is_not():
    x, w, *routing = kernel_inputs(jax.random.key(0), SHAPES["ci"]["plain"])
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)

    def gradients(x, w, implementation):
        def loss(x, w):
            y = api.grouped_dot(
                x, w, *routing, jnp.bfloat16, implementation=implementation
            )
            return (y**2).sum()

        return jax.grad(loss, (0, 1))(x, w)

    got, want = (
        jax.jit(gradients, static_argnums=2)(x, w, name) for name in (KERNEL, XLA)
    )
    assert all(x.dtype == jnp.float32 for x in got)
    assert_agree(got, want, 1e-5)


def swiglu_inputs(key, shape):
    """As `kernel_inputs`, with a second matrix for each expert."""
    x, gate, *routing = kernel_inputs(key, shape)
    up = jax.random.normal(jax.random.key(9), gate.shape, gate.dtype)
    x = x * shape.D**-0.5  # so that the gate is neither open nor shut
    return x, gate, up, *routing


def swiglu_in_float32(x, gate, up, *routing):
    gate, up = (in_float32(x, w, *routing) for w in (gate, up))
    return jax.nn.silu(gate) * up


def weighted_inputs(key, shape):
    """As `swiglu_inputs`, with a weight for each row; of unused blocks NaN."""
    inputs = swiglu_inputs(key, shape)
    weight = jax.random.uniform(jax.random.key(8), inputs[0].shape[:2])
    unused = jnp.arange(shape.n)[:, None] >= shape.used
    return *inputs[:3], jnp.where(unused, jnp.nan, weight), *inputs[3:]


def weighted(x, gate, up, weight, expert_n, used, **options):
    return api.grouped_swiglu(x, gate, up, expert_n, used, weight, **options)


def weighted_in_float32(x, gate, up, weight, *routing):
    return swiglu_in_float32(x, gate, up, *routing) * jnp.nan_to_num(weight)[..., None]


# Results and gradients of sums are rounded to bfloat16.
SWIGLU = Suite(
    operation=api.grouped_swiglu,
    oracle=swiglu_in_float32,
    inputs=swiglu_inputs,
    shapes=SUITE.shapes,
    bound=5e-3,
    differentiable=(0, 1, 2),
)
WEIGHTED = dataclasses.replace(
    SWIGLU,
    operation=weighted,
    oracle=weighted_in_float32,
    inputs=weighted_inputs,
    differentiable=(0, 1, 2, 3),
)


@pytest.mark.parametrize("suite", [SWIGLU, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", ["ragged", "tall blocks", "none used"])
@pytest.mark.parametrize("implementation", [XLA, KERNEL])
def test_swiglu_and_its_gradients_are_the_oracle_s(implementation, shape, suite):
    suite.check_values(implementation, shape)
    suite.check_gradients(implementation, shape, seed=1)


@pytest.mark.parametrize("implementation", [XLA, KERNEL])
def test_gradients_of_unused_blocks_are_not_read(implementation):
    shape = SHAPES["ci"]["ragged"]
    *given, expert_n, used = weighted_inputs(jax.random.key(4), shape)

    def gradients(*given):
        call = functools.partial(weighted, implementation=implementation)
        y, pull = jax.vjp(lambda *given: call(*given, expert_n, used), *given)
        unused = jnp.arange(shape.n)[:, None, None] >= used
        return pull(jnp.where(unused, jnp.nan, jnp.ones_like(y)))

    compile = jax.jit if implementation == XLA else interpreted
    assert shape.used < shape.n
    assert all(
        np.isfinite(np.asarray(x, np.float32)).all() for x in compile(gradients)(*given)
    )


def test_swiglu_is_rounded_once():
    x = swiglu_inputs(jax.random.key(2), SHAPES["ci"]["ragged"])
    made = [SWIGLU.run(name, *x) for name in (KERNEL, XLA)]
    assert all(each.dtype == jnp.bfloat16 for each in made)
    # But for ties, which a last bit of an exponential decides.
    assert (np.asarray(made[0]) != np.asarray(made[1])).mean() < 1e-3
    assert distance(made[0], swiglu_in_float32(*x)) < 2e-3


def test_swiglu_in_float32_is_exact():
    operands = weighted_inputs(jax.random.key(3), Shape(2, 2, 24, 40, 2))[:4]
    operands = as_dtype(operands, jnp.float32)
    routing = jnp.array([1, 0]), jnp.int32(2)

    def gradients(function, *x):
        value, pull = jax.vjp(lambda *x: function(*x, *routing), *x)
        return value, *pull(jnp.ones_like(value))

    got = jax.jit(functools.partial(gradients, weighted))(*operands)
    want = jax.jit(functools.partial(gradients, weighted_in_float32))(*operands)
    assert all(each.dtype == jnp.float32 for each in got)
    assert_agree(got, want, 1e-5)


def test_weights_in_float64_are_no_matter_to_float32():
    with jax.enable_x64(True):
        given = weighted_inputs(jax.random.key(3), Shape(2, 2, 24, 40, 2))
        given = (
            *as_dtype(given[:3], jnp.float32),
            given[3].astype(jnp.float64),
            *given[4:],
        )
        y, pull = jax.vjp(
            lambda weight: weighted(*given[:3], weight, *given[4:]), given[3]
        )
        (slope,) = pull(jnp.ones_like(y))
    assert y.dtype == jnp.float32 and slope.dtype == jnp.float64


@pytest.mark.parametrize(
    ("shape", "dtype", "complaint"),
    [
        (Shape(2, 1, 64, 64, 1, rows=64), jnp.bfloat16, "64 rows.*multiple of 128"),
        (Shape(2, 1, 60, 64, 1), jnp.bfloat16, "D = 60.*multiple of 8"),
        (Shape(2, 1, 64, 60, 1), jnp.bfloat16, "F = 60.*multiple of 8"),
        (Shape(2, 1, 64, 64, 1), jnp.float32, "float32.*bfloat16 alone"),
    ],
)
def test_the_kernel_says_what_it_does_not_do(shape, dtype, complaint):
    x = jnp.zeros((shape.n, shape.rows, shape.D), dtype)
    w = jnp.zeros((shape.E, shape.D, shape.F), dtype)
    call = functools.partial(api.grouped_dot, x, w, jnp.zeros(shape.n, int), shape.used)
    with pytest.raises(NotImplementedError, match=complaint):
        call(implementation=KERNEL)
    assert jax.eval_shape(call).shape == (shape.n, shape.rows, shape.F)  # XLA does


def test_shapes_that_do_not_fit_are_refused():
    x, w = jnp.zeros((2, 128, 8)), jnp.zeros((3, 8, 16))
    expert_n = jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"\(2, 128, 8\) and \(3, 16, 8\)"):
        api.grouped_dot(x, w.swapaxes(1, 2), expert_n, 1)
    with pytest.raises(ValueError, match=r"gate and up.*\(3, 8, 16\) and \(3, 8, 9\)"):
        api.grouped_swiglu(x, w, w[..., :9], expert_n, 1)
    with pytest.raises(ValueError, match=r"weight_nb.*\(2, 8\): must be \(2, 128\)"):
        api.grouped_swiglu(x, w, w, expert_n, 1, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r"\(3,\) and \(\): must be \(2,\)"):
        api.grouped_dot(x, w, jnp.zeros(3, int), 1)
    with pytest.raises(ValueError, match=r"must be \(2,\) and \(\)"):
        api.grouped_dot(x, w, expert_n, jnp.ones(2, int))
