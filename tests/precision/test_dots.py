"""What each weight matmul rounds, and what it doesn't, in all three of its products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from deepseek_jax import runtime
from deepseek_jax.precision.dots import dot_bf16, dot_f32, dot_plain
from tests.agreement import as_dtype, assert_agree, matmul_dtypes, with_gradients

ROWS, WIDTH, OUT = 37, 29, 11


def operands():
    """x, w and a cotangent in float64, equal to their float32 selves."""
    rng = np.random.default_rng(0)
    shapes = (ROWS, WIDTH), (WIDTH, OUT), (ROWS, OUT)
    return [rng.normal(size=shape).astype(np.float32).astype(float) for shape in shapes]


def products(x, w, g):
    return [x @ w, g @ w.T, x.T @ g]


def evaluate(dot, dtype):
    x, w, g = as_dtype(operands(), dtype)
    return with_gradients(dot)((x, w), (), g)


@pytest.mark.parametrize("dot", [dot_plain, dot_f32])
def test_float64_stays_float64(dot):
    with jax.enable_x64(True):
        actual = evaluate(dot, jnp.float64)
    assert all(x.dtype == jnp.float64 for x in actual)
    assert_agree(actual, products(*operands()), 1e-14)


@pytest.mark.parametrize("dot", [dot_plain, dot_f32])
def test_float32_is_not_rounded_further(dot):
    actual = evaluate(dot, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in actual)
    assert_agree(actual, products(*operands()), 1e-6)


def test_bf16_rounds_the_operands_of_all_three_products_and_sums_in_float32():
    actual = evaluate(dot_bf16, jnp.float32)
    assert all(x.dtype == jnp.float32 for x in actual)
    expected = products(*(x.astype(bfloat16).astype(float) for x in operands()))
    assert_agree(actual, expected, 1e-6)
    # Not so for any one of them if its operands were kept.
    for got, exact in zip(actual, products(*operands())):
        assert np.abs(got - exact).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_bf16_multiplies_nothing_but_bf16(dtype):
    with jax.enable_x64(True):
        x, w, g = as_dtype(operands(), dtype)
        dtypes = matmul_dtypes(with_gradients(dot_bf16), (x, w), (), g)
        assert dtypes == [("bfloat16", "bfloat16", "float32")] * 3
        gradients = evaluate(dot_bf16, dtype)[1:]
    assert all(each.dtype == dtype for each in gradients)


@pytest.mark.parametrize("dot", [dot_plain, *runtime.DOTS.values()])
def test_16_bit_operands_are_summed_in_float32(dot):
    value, *gradients = evaluate(dot, jnp.bfloat16)
    assert value.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    expected = products(*(x.astype(bfloat16).astype(float) for x in operands()))
    assert_agree([value], expected[:1], 1e-6)
    assert_agree(gradients, expected[1:], 2**-8)
