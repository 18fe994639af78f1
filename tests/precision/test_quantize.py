"""Formats, tilings, what is lost and packing, bit for bit against tables in numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.precision import quantize as quantizers
from deepseek_jax.precision.quantize import (
    Counts,
    Quantized,
    Scheme,
    counts,
    dequantize,
    pack_e5m6,
    quantize,
    unpack_e5m6,
    values,
)
from pallas_kernels.fp8_quantize import reference as fp8
from pallas_kernels.fp8_quantize.reference import FORMATS

# The largest number, and how many codes above it stand for infinity or NaN.
TOP = {"e4m3": (448, 1), "e5m2": (57344, 2**2), "e5m6": (65024, 2**6)}
LIBRARY = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
formats = pytest.mark.parametrize("form", FORMATS)


@functools.cache
def table(form):
    """Every finite number from 0 up, in the order of its code."""
    exponent, mantissa = FORMATS[form][:2]
    bias, digits = 2 ** (exponent - 1) - 1, 2**mantissa
    found = [
        2.0 ** (max(e, 1) - bias) * ((e > 0) + m / digits)
        for e in range(2**exponent)
        for m in range(digits)
    ]
    return np.array(found[: len(found) - TOP[form][1]])


def nearest(x, form):
    """x to the nearest number of the table, to the even code of two, saturating."""
    numbers = table(form)
    size = np.abs(x.astype(np.float64))
    high = np.searchsorted(numbers, size).clip(1, len(numbers) - 1)
    low = high - 1
    middle = (numbers[low] + numbers[high]) / 2
    up = (size > middle) | ((size == middle) & (high % 2 == 0))
    return np.copysign(numbers[np.where(up, high, low)], x)


@functools.cache
def interesting(form):
    """float32: of 16 bits all there are, all numbers, ties and what is beside them."""
    bits = np.arange(2**16, dtype=np.uint16)
    both = [bits.view(np.float16), bits.view(ml_dtypes.bfloat16)]
    numbers = table(form)
    ties = (numbers[1:] + numbers[:-1]) / 2
    edge = numbers[-1] + (numbers[-1] - numbers[-2]) / 2
    points = np.concatenate([numbers, ties, [edge]]).astype(np.float32)
    around = [np.nextafter(points, np.float32(to)) for to in (-np.inf, np.inf)]
    x = np.concatenate([*(b.astype(np.float32) for b in both), points, *around])
    x = np.concatenate([x, -x])
    return x[np.isfinite(x)]


def bits_of(x):
    return np.asarray(x, np.float32).view(np.uint32)


@formats
def test_a_format_is_its_table(form):
    numbers, kind = table(form), FORMATS[form]
    assert numbers[-1] == kind.largest == TOP[form][0]
    assert kind.normal == numbers[2**kind.mantissa]
    # What codes are stored as, and bfloat16, hold all of them.
    for dtype in (kind.dtype, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(numbers.astype(dtype).astype(float), numbers)


@formats
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_are_rounded_to_the_nearest_of_the_table(form, compiled):
    x, kind = interesting(form), FORMATS[form]
    want = nearest(x, form)
    with jax.disable_jit(not compiled):
        got = jax.jit(lambda x: fp8.rounded(x, kind))(x)
        codes = jax.jit(lambda x: fp8.encode(x, jnp.ones((1, 1)), x.shape, kind))(
            x[None]
        )
    np.testing.assert_array_equal(bits_of(got), bits_of(want))
    assert codes.dtype == kind.dtype
    np.testing.assert_array_equal(bits_of(codes[0]), bits_of(want))


@pytest.mark.parametrize("form", LIBRARY)
def test_numbers_are_rounded_as_another_library_does(form):
    x, largest = interesting(form), FORMATS[form].largest
    want = x.clip(-largest, largest).astype(LIBRARY[form])
    got = fp8.rounded(jnp.asarray(x), FORMATS[form])
    np.testing.assert_array_equal(bits_of(got), bits_of(want))


SHAPES = [
    ((5, 300), (1, 128)),
    ((300, 5), (128, 1)),
    ((130, 200), (128, 128)),  # ragged at both edges
    ((2, 3, 37), (2, 8)),  # leading axes
    ((2, 9, 37), None),
]


def blockwise(x, scheme):
    """Values, unscaled, and scales, one block after the other, in float32."""
    *outer, rows, columns = x.shape
    m, n = scheme.block or (rows, columns)
    codes = np.empty(x.shape, np.float32)
    scales = np.empty((*outer, -(-rows // m), -(-columns // n)), np.float32)
    for *o, i, j in np.ndindex(*scales.shape):
        part = (*o, slice(i * m, i * m + m), slice(j * n, j * n + n))
        amax = max(np.abs(x[part]).max(), np.float32(scheme.least))
        scale = amax / np.float32(FORMATS[scheme.form].largest)
        if scheme.power_of_two:
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        scales[*o, i, j] = scale
        codes[part] = nearest(x[part] / scale, scheme.form)
    return codes, scales


def sample(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("form", "power_of_two"),
    [("e4m3", False), ("e5m2", False), ("e5m6", True)],
)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_every_block_is_quantised_by_itself(form, shape, block, power_of_two):
    scheme, x = Scheme(form, block, power_of_two), sample(shape)
    want, want_scale = blockwise(x, scheme)
    for function in (quantize, values):
        codes, scale = jax.jit(function, static_argnums=1)(x, scheme)
        np.testing.assert_array_equal(bits_of(codes), bits_of(want))
        np.testing.assert_array_equal(scale, want_scale)
    assert codes.dtype == jnp.bfloat16
    rows, columns = scheme.block_of(x)
    spread = want_scale.repeat(rows, -2).repeat(columns, -1)
    spread = spread[..., : shape[-2], : shape[-1]]
    got = dequantize(Quantized(codes, scale), scheme)
    np.testing.assert_array_equal(got, want * spread)


@pytest.mark.parametrize(("shape", "block"), SHAPES[:3])
def test_what_sticks_out_counts_as_zeros(shape, block):
    scheme, x = Scheme(block=block), sample(shape)
    whole = np.pad(x, [(0, -size % b) for size, b in zip(shape, block)])
    want, want_scale = quantize(whole, scheme)
    codes, scale = quantize(x, scheme)
    np.testing.assert_array_equal(bits_of(codes), bits_of(want)[: len(x), : shape[1]])
    np.testing.assert_array_equal(scale, want_scale)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_types_are_quantised_as_their_float32(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray(sample((5, 300)), dtype)
        for scheme in (Scheme(), Scheme("e5m6", power_of_two=True)):
            codes, scale = quantize(x, scheme)
            want, want_scale = quantize(x.astype(jnp.float32), scheme)
            assert scale.dtype == jnp.float32
            np.testing.assert_array_equal(bits_of(codes), bits_of(want))
            np.testing.assert_array_equal(scale, want_scale)
            assert dequantize(Quantized(codes, scale), scheme, dtype).dtype == dtype


def test_powers_of_two_let_tiles_be_turned_without_a_further_error():
    rows = Scheme("e5m6", (1, 128), power_of_two=True)
    columns = Scheme("e5m6", (128, 1), power_of_two=True)
    x = np.random.default_rng(1).normal(size=(256, 256)).astype(np.float32)
    once = dequantize(quantize(x, rows), rows)
    assert (once != x).any()
    np.testing.assert_array_equal(dequantize(quantize(once, columns), columns), once)
    # Not so with other scales.
    columns = Scheme("e5m6", (128, 1))
    again = dequantize(quantize(once, columns), columns)
    assert (again != once).mean() > 0.5


@formats
@pytest.mark.parametrize("noise", [0.0, 0.3, 1 - 2.0**-23])
def test_noise_leads_to_a_neighbour_and_nowhere_from_a_number(form, noise):
    kind, x = FORMATS[form], interesting(form)
    got = np.asarray(fp8.rounded(jnp.asarray(x), kind, jnp.full(x.shape, noise)))
    numbers = np.concatenate([-table(form)[:0:-1], table(form)])
    size = x.clip(numbers[0], numbers[-1])
    below = numbers[np.searchsorted(numbers, size, "right") - 1]
    above = numbers[np.searchsorted(numbers, size, "left")]
    exact = size == below
    assert (got == below)[exact].all()
    part = np.where(exact, 0, (size - below) / np.where(exact, 1, above - below))
    want = np.where(noise < part, above, below)
    assert ((got == below) | (got == above)).all()
    # The part of a step is a float32, and a CPU takes what is not normal for zero.
    clear = (np.abs(noise - part) > 2.0**-24) & (np.abs(x) > 2.0**-126)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(got[clear], want[clear])


@formats
def test_stochastic_rounding_is_right_on_average(form):
    kind, draws = FORMATS[form], 4096
    scheme = Scheme(form, None)
    rng = np.random.default_rng(2)
    x = rng.uniform(-1, 1, 64) * 2.0 ** rng.integers(-9, 6, 64)
    x = x.astype(np.float32)
    many = np.broadcast_to(x, (draws, 64))
    one = jnp.ones((1, 1))
    codes = values(many, scheme, scale=one, key=jax.random.key(0)).codes
    got = np.asarray(codes).astype(np.float64)
    again = quantize(many, scheme, scale=one, key=jax.random.key(0)).codes
    np.testing.assert_array_equal(bits_of(again), bits_of(got))
    step = np.maximum(2.0 ** np.floor(np.log2(np.abs(x))), kind.normal)
    step *= 2.0**-kind.mantissa
    # A draw's variance is at most step^2 / 4.
    assert (np.abs(got.mean(0) - x) < 4.5 * step / 2 / draws**0.5).all()
    assert (np.abs(nearest(x, form) - x) > 9 * step / draws**0.5).any()


@formats
def test_what_is_lost_is_counted(form):
    kind = FORMATS[form]
    top, least = table(form)[-1], table(form)[1]
    edge = top + (top - table(form)[-2]) / 2  # even for E4M3 only
    x = [top, edge, edge * (1 + 2.0**-20), -4 * top, 0, -0.0, least, least / 2]
    x = np.array([[*x, least / 2 * (1 + 2.0**-20), -least / 8]], np.float32)
    one = jnp.ones((1, 1))
    count = jax.jit(counts, static_argnums=1)
    assert count(x, Scheme(form, None), scale=one) == (2 + (form != "e4m3"), 2, 0)
    # Own scales leave nothing too large.
    wide = np.array([[1e3, 1e3 / kind.largest * least / 3, 1.0]], np.float32)
    assert counts(wide, Scheme(form, None)) == (0, 1, 0)
    bad = np.array([[1.0, np.nan, 1e-30], [np.inf, 1e-30, 1.0]], np.float32)
    bad = np.concatenate([bad, [[1, 1, 1e-30]]]).astype(np.float32)
    assert counts(bad, Scheme(form, (1, 3))) == Counts(0, 1, 2)


def test_codes_of_12_bits_are_packed_and_unpacked_exactly():
    bits = (np.arange(2**12) << 4).astype(np.uint16)
    codes = np.random.default_rng(3).permutation(bits).view(np.float16)
    for shape in ((4096,), (2, 2048), (4, 1024), (64, 64)):
        given = jnp.asarray(codes.reshape(shape))
        packed = jax.jit(pack_e5m6)(given)
        assert packed.dtype == jnp.uint8 and packed.nbytes == 4096 * 3 // 2
        back = np.asarray(jax.jit(unpack_e5m6, static_argnums=1)(packed, shape[-1]))
        np.testing.assert_array_equal(
            back.view(np.uint16), np.asarray(given).view(np.uint16)
        )
    np.testing.assert_array_equal(
        pack_e5m6(jnp.array([1, -1], jnp.float16)), [0x3C, 0x0B, 0xC0]
    )


def test_an_odd_row_is_packed_with_a_zero():
    scheme = Scheme("e5m6", power_of_two=True)
    codes = quantize(sample((5, 37)), scheme).codes
    packed = pack_e5m6(codes)
    assert packed.shape == (5, 57)
    np.testing.assert_array_equal(unpack_e5m6(packed, 37), codes)
    with pytest.raises(ValueError, match=r"size = 36: must be .* \(5, 57\)"):
        unpack_e5m6(packed, 36)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "e4m4"}, "form = 'e4m4': must be one of .*; did you mean 'e4m3'"),
        ({"block": (1, 0)}, r"block = \(1, 0\): must be two positive integers"),
        ({"block": (128,)}, r"block = \(128,\): must be two positive integers"),
        ({"block": (1, 0.5)}, r"block = \(1, 0.5\): must be two positive integers"),
        ({"block": [1, 128]}, r"block = \[1, 128\]: must be two positive integers"),
        ({"least": 0.0}, "least = 0.0: must be at least 5.26"),
        ({"least": float("nan")}, "least = nan: must be at least"),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\): must have at least two"):
        quantizers.scales(jnp.ones(3), Scheme())
