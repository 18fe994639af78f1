"""Dense products against numpy's, in every operand layout they are asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul.reference import (
    dot,
    product,
    rounded,
    row_product,
    transposed,
)
from tests.agreement import as_dtype, assert_agree, with_gradients

# Rows, inputs, outputs: the weight gradient copies the narrower operand.
SIZES = [(1, 1, 1), (37, 5, 11), (37, 11, 5), (6, 7, 7)]


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("contract", [-2, -1])
def test_product_sums_over_the_axis_it_is_told(lead, contract):
    a, b = normal((*lead, 4, 5), (*lead, 5, 7))
    given = b if contract == -2 else b.swapaxes(-1, -2)
    with jax.enable_x64(True):
        actual = jax.jit(functools.partial(product, contract=contract))(a, given)
    assert_agree([actual], [a @ b], 1e-14)


@pytest.mark.parametrize("sizes", SIZES)
def test_row_product_sums_over_rows(sizes):
    rows, left, right = sizes
    a, b = normal((rows, left), (rows, right))
    with jax.enable_x64(True):
        actual = jax.jit(row_product)(a, b)
    assert_agree([actual], [a.T @ b], 1e-14)


def test_transposed_exchanges_the_last_two_axes():
    (x,) = normal((2, 3, 4))
    np.testing.assert_array_equal(jax.jit(transposed)(x), np.float32(x).mT)


def test_rounded_leaves_alone_what_has_no_compute_dtype():
    x = jnp.array([1.0, 1.001])
    assert rounded(x, None) is x
    np.testing.assert_array_equal(rounded(x, jnp.bfloat16), [1, 1])


@pytest.mark.parametrize("sizes", SIZES)
def test_dot_agrees_with_numpy(sizes):
    rows, width, out = sizes
    x, w, g = normal((rows, width), (width, out), (rows, out))
    expected = [x @ w, g @ w.T, x.T @ g]
    with jax.enable_x64(True):
        actual = with_gradients(dot)(as_dtype([x, w], jnp.float64), (), g)
    assert all(each.dtype == jnp.float64 for each in actual)
    assert_agree(actual, expected, 1e-14)
    for compute, bound in (None, 1e-6), (jnp.bfloat16, 1e-2):
        function = functools.partial(dot, compute_dtype=compute)
        actual = with_gradients(function)(as_dtype([x, w], jnp.float32), (), g)
        assert all(each.dtype == jnp.float32 for each in actual)
        assert_agree(actual, expected, bound)
