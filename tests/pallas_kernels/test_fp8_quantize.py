"""Quantisation by tiles and blocks against a numpy oracle, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_quantize import reference as fp8
from tests.pallas_kernels.fp8_oracle import quantized

SHAPES = [
    ((5, 300), fp8.TILE),
    ((256, 384), fp8.BLOCK),
    ((130, 200), fp8.BLOCK),  # ragged at both edges
    ((2, 3, 37), (2, 8)),  # leading axes, other blocks
]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_codes_and_scales_are_the_oracle_s(shape, block, power_of_two):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))
    x = x.astype(np.float32)
    codes, scales = jax.jit(fp8.quantize, static_argnums=(1, 2))(x, block, power_of_two)
    want_codes, want_scales = quantized(x, block, power_of_two, least=1e-4)
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), want_codes)
    np.testing.assert_array_equal(scales, want_scales)
    assert scales.shape == want_scales.shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_number_is_its_code_times_its_scale(dtype):
    x = np.random.default_rng(1).normal(size=(130, 200)).astype(np.float32)
    codes, scale = fp8.quantize(x, fp8.BLOCK)
    back = fp8.dequantize(codes, scale, fp8.BLOCK, dtype)
    for i, j in np.ndindex(2, 2):
        part = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        want = np.asarray(codes).astype(np.float32)[part] * np.float32(scale[i, j])
        np.testing.assert_array_equal(back[part], want.astype(dtype))
    # Half a step of three mantissa bits, or of the smallest code.
    step = np.maximum(np.abs(x) * 2.0**-4, np.asarray(scale).max() * 2.0**-10)
    slack = 2.0**-8 * np.abs(x) if dtype == jnp.bfloat16 else 1e-6
    assert (np.abs(np.asarray(back, np.float32) - x) <= step + slack).all()


def test_a_block_s_largest_number_is_the_format_s():
    x = np.random.default_rng(2).normal(size=(4, 256)).astype(np.float32)
    codes = np.abs(np.asarray(fp8.quantize(x, fp8.TILE)[0]).astype(np.float32))
    assert (codes.reshape(4, 2, 128).max(-1) == 448).all()
    codes = np.abs(np.asarray(fp8.quantize(x, fp8.TILE, True)[0]).astype(np.float32))
    largest = codes.reshape(4, 2, 128).max(-1)
    assert (largest > 224 * (1 - 2.0**-4)).all() and (largest <= 448).all()


def test_zeros_have_a_scale():
    codes, scale = fp8.quantize(np.zeros((2, 130), np.float32), fp8.TILE)
    assert (np.asarray(codes).astype(np.float32) == 0).all()
    np.testing.assert_array_equal(scale, np.float32(1e-4) / np.float32(448))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_small_numbers_keep_their_digits_if_asked_to(power_of_two):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(32, 8)) * 10.0 ** -np.arange(32)[:, None]).astype(np.float32)
    scale = fp8.scales(x, (1, 8), power_of_two, fp8.TINY_AMAX)
    codes = np.asarray(fp8.encode(x, scale, (1, 8)))
    want_codes, want_scales = quantized(x, (1, 8), power_of_two)
    np.testing.assert_array_equal(codes.view(np.uint8), want_codes)
    np.testing.assert_array_equal(scale, want_scales)
    error = np.abs(codes.astype(np.float64) * np.asarray(scale, np.float64) - x)
    amax = np.abs(x).max(-1, keepdims=True)
    assert (error <= np.maximum(np.abs(x) * 2.0**-4, amax * 2.0**-15)).all()
    lost = np.asarray(fp8.quantize(x, (1, 8), power_of_two)[0])[-1]
    assert (lost.astype(np.float32) == 0).all()


def test_scales_are_normal_numbers_however_small_a_block():
    x = np.full((1, 8), 1e-37, np.float32)
    scale = fp8.scales(x, (1, 8), True, fp8.TINY_AMAX)
    assert scale == np.finfo(np.float32).tiny


def test_numbers_beyond_the_scale_are_clipped():
    x = np.array([[1000.0, -1000.0, 449.0, 464.0, 3.0]], np.float32)
    codes = fp8.encode(x, np.ones((1, 1), np.float32), fp8.TILE)
    np.testing.assert_array_equal(
        np.asarray(codes).astype(np.float32), [[448, -448, 448, 448, 3]]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [fp8.TILE, (2, 64), fp8.BLOCK])
def test_what_is_not_finite_shows_in_the_scale_of_its_block(block, bad):
    x = np.ones((4, 256), np.float32)
    x[2, 133] = bad
    scale = np.asarray(jax.jit(fp8.scales, static_argnums=1)(x, block))
    want = np.zeros(scale.shape, bool)
    want[2 // block[0], 133 // block[1]] = True
    np.testing.assert_array_equal(~np.isfinite(scale), want)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_largest_number_that_just_fits_does_not_double_the_scale(compiled):
    x = (448 * 2.0 ** np.arange(-20, 20)).astype(np.float32)[:, None]
    with jax.disable_jit(not compiled):
        scale = jax.jit(fp8.scales, static_argnums=(1, 2))(x, (1, 1), True)
    np.testing.assert_array_equal(scale[21:], 2.0 ** np.arange(1, 20)[:, None])


def test_powers_of_two_are_exact_at_and_beside_every_power():
    powers = 2.0 ** np.arange(-120, 121)
    x = np.concatenate([powers, powers * (1 + 2.0**-23), powers * (1 - 2.0**-24)])
    got = fp8.power_of_two_above(x.astype(np.float32))
    want = np.concatenate([powers, powers * 2, powers])
    np.testing.assert_array_equal(got, want.astype(np.float32))
