"""Quantisation by tiles and blocks against a numpy oracle, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choice import XLA
from pallas_kernels.fp8_quantize import api
from pallas_kernels.fp8_quantize import reference as fp8
from pallas_kernels.fp8_quantize.shapes import SHAPES as NAMED
from pallas_kernels.testing import KERNEL, distance, interpreted
from tests.pallas_kernels.fp8_oracle import assert_codes, quantized

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


def by_api(shape, power_of_two, x, implementation):
    return api.quantize(
        x,
        shape.block,
        power_of_two=power_of_two,
        turned=shape.turned,
        implementation=implementation,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", NAMED["ci"])
def test_the_kernel_s_codes_and_scales_are_the_oracle_s(name, dtype):
    shape = NAMED["ci"][name]
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, *shape[:2])) * 10.0 ** rng.integers(-6, 6, (2, shape.M, 1))
    x[0, :3] = 0
    x = jnp.asarray(x, dtype)
    power_of_two = dtype == jnp.float32
    function = functools.partial(by_api, shape, power_of_two)
    kernel = interpreted(functools.partial(function, implementation=KERNEL))
    wide = np.asarray(x.astype(jnp.float32))
    wide = wide.swapaxes(1, 2) if shape.turned else wide
    codes, scales = quantized(wide, shape.block, power_of_two, least=1e-4)
    for made_codes, made_scales in (kernel(x), function(x, implementation=XLA)):
        assert_codes(made_codes, codes)
        np.testing.assert_array_equal(made_scales, scales)


@pytest.mark.parametrize("implementation", [XLA, KERNEL])
def test_requantised_is_what_was_dequantised_and_turned(implementation):
    x = np.random.default_rng(5).normal(size=(2, 144, 208)).astype(np.float32)
    codes, scale = fp8.quantize(x, fp8.TILE)
    function = functools.partial(
        api.requantize, power_of_two=True, implementation=implementation
    )
    made = interpreted(function)(codes, scale)
    back = np.asarray(fp8.dequantize(codes, scale, fp8.TILE)).swapaxes(1, 2)
    want_codes, want_scales = quantized(back, fp8.TILE, True, least=1e-4)
    assert_codes(made[0], want_codes)
    np.testing.assert_array_equal(made[1], want_scales)


@pytest.mark.parametrize("turned", [False, True])
def test_swiglu_is_quantised_as_if_it_had_been_written(turned):
    keys = jax.random.split(jax.random.key(6))
    shape = (2, 144, 208)
    gate, up = (3 * jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    made = []
    for name in (KERNEL, XLA):
        call = functools.partial(
            api.quantize_swiglu, turned=turned, implementation=name
        )
        made.append([np.asarray(x, np.float32) for x in interpreted(call)(gate, up)])
    (codes, scale), (want_codes, want_scale) = made
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)
    # Where exponentials differ in their last bit, a code may be the next one.
    assert (codes != want_codes).mean() < 1e-3
    np.testing.assert_allclose(codes, want_codes, rtol=0.13)
    # And that is SwiGLU, to E4M3's rounding.
    wide = np.asarray(gate, np.float64)
    exact = wide / (1 + np.exp(-wide)) * np.asarray(up, np.float64)
    exact = exact.swapaxes(1, 2) if turned else exact
    assert distance(fp8.dequantize(codes, scale, fp8.TILE), exact) < 0.04


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_norm_is_quantised_as_if_it_had_been_written(turned, dtype):
    """But for the sum of squares, which XLA may add up in another order."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2, 144, 208)) * 10.0 ** rng.integers(-3, 3, (2, 144, 1))
    x, scale = jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=208), jnp.float32)
    made = []
    for name in (KERNEL, XLA):
        call = functools.partial(
            api.quantize_rms_norm, eps=1e-6, turned=turned, implementation=name
        )
        made.append([np.asarray(y, np.float32) for y in interpreted(call)(x, scale)])
    (codes, scales), (want_codes, want_scales) = made
    np.testing.assert_allclose(scales, want_scales, rtol=1e-6)
    assert (codes != want_codes).mean() < 1e-3
    np.testing.assert_allclose(codes, want_codes, rtol=0.13)
    # And that is RMSNorm, to E4M3's rounding.
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    exact = exact * np.asarray(scale, np.float64)
    exact = exact.swapaxes(1, 2) if turned else exact
    assert distance(fp8.dequantize(codes, scales, fp8.TILE), exact) < 0.04


def test_what_is_not_finite_has_a_scale_that_is_not():
    x = jnp.ones((64, 256)).at[3, 130].set(jnp.nan).at[5, 7].set(jnp.inf)
    for power_of_two in (False, True):
        function = functools.partial(by_api, NAMED["ci"]["tiles"], power_of_two)
        run = interpreted(functools.partial(function, implementation=KERNEL))
        finite = np.isfinite(np.asarray(run(x)[1]))
        want = np.ones((64, 2), bool)
        want[3, 1] = want[5, 0] = False
        np.testing.assert_array_equal(finite, want)


@pytest.mark.parametrize(
    ("shape", "dtype", "block", "turned", "complaint"),
    [
        ((8, 20), jnp.float32, fp8.TILE, False, "N = 20.*multiple of 16"),
        ((6, 32), jnp.float32, fp8.TILE, False, "M = 6.*multiple of 4"),
        ((24, 32), jnp.float32, fp8.BLOCK, True, "M = 24.*multiple of 16"),
        ((32, 4), jnp.bfloat16, fp8.BLOCK, True, "N = 4.*multiple of 8"),
        ((32, 32), jnp.float32, (1, 8), False, r"block = \(1, 8\)"),
        ((32, 32), jnp.float16, fp8.TILE, False, "float16.*bfloat16 and float32"),
    ],
)
def test_the_kernel_says_what_it_does_not_do(shape, dtype, block, turned, complaint):
    call = functools.partial(
        api.quantize, jnp.zeros(shape, dtype), block, turned=turned
    )
    with pytest.raises(NotImplementedError, match=complaint):
        call(implementation=KERNEL)
    want = shape[::-1] if turned else shape
    assert jax.eval_shape(call)[0].shape == want  # XLA does


def test_shapes_that_do_not_fit_are_refused():
    codes = jnp.zeros((4, 256), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scale has shape \(4, 1\): must be \(4, 2\)"):
        api.requantize(codes, jnp.ones((4, 1)))
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        api.quantize(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"scale_N has shape \(9,\): must be \(8,\)"):
        api.quantize_rms_norm(jnp.zeros((4, 8)), jnp.ones(9), 1e-6)
    with pytest.raises(ValueError, match=r"gate and up .*\(4, 8\) and .*\(4, 9\)"):
        api.quantize_swiglu(jnp.zeros((4, 8)), jnp.zeros((4, 9)))
