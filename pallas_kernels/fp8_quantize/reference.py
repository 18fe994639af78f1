"""Numbers of 8 and 12 bits with a scale for every tile or block.

Section 3.3.2 of arXiv:2412.19437: activations go by tiles of 1 x 128 (a token, 128
channels), weights by blocks of 128 x 128, both as E4M3. A scale is the largest
magnitude over the format's largest number, 448, computed from the values at hand; the
magnitude counts as at least 1e-4, as in DeepSeek's released kernel, or as `least`, so
that zeros have a scale. `power_of_two` rounds scales up to powers of two (their `ue8m0`
format). A number is its code *times* its scale. Blocks that stick out over an edge are
filled with zeros, which changes nothing.

E5M6 (section 3.3.3) is published by its name alone. Here it is what E5M2 is with four
more digits: a float16 whose last four bits are zero, the top exponent kept for infinity
and NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Block = tuple[int, int]


class Format(NamedTuple):
    """A sign, `exponent` and `mantissa` bits; codes are numbers of type `dtype`."""

    exponent: int
    mantissa: int
    largest: float
    dtype: Any

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def normal(self) -> float:
        """The least number with a full mantissa; below, numbers are equally spaced."""
        return 2.0 ** (2 - 2 ** (self.exponent - 1))

    @property
    def tiny_amax(self) -> float:
        """The least largest magnitude whose scale is a normal float32."""
        return self.largest * 2.0**-126


FORMATS: dict[str, Format] = {
    "e4m3": Format(4, 3, 448.0, jnp.float8_e4m3fn),
    "e5m2": Format(5, 2, 57344.0, jnp.float8_e5m2),
    "e5m6": Format(5, 6, 65024.0, jnp.float16),
}
E4M3 = FORMATS["e4m3"]
MIN_AMAX = 1e-4
TINY_AMAX = E4M3.tiny_amax
TILE: Block = (1, 128)
BLOCK: Block = (128, 128)


def blocks(x: Array, block: Block) -> Array:
    """x [..., M, N] as [..., M/m, m, N/n, n], zeros beyond its edges."""
    *outer, rows, columns = x.shape
    m, n = block
    edges = [(0, 0)] * len(outer) + [(0, -rows % m), (0, -columns % n)]
    x = jnp.pad(x, edges)
    return x.reshape(*outer, x.shape[-2] // m, m, x.shape[-1] // n, n)


def spread(scale: Array, block: Block, shape: tuple[int, ...]) -> Array:
    """Every element's scale, [..., M, N]."""
    scale = jnp.repeat(jnp.repeat(scale, block[0], -2), block[1], -1)
    return scale[..., : shape[-2], : shape[-1]]


def amax(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """Largest magnitude over some axes, or all; not finite if any number is not.

    Magnitudes without their sign are ordered as integers are, infinity and NaN last.
    XLA:CPU (jax 0.11.2) loses NaN in a maximum of floats, and is slower at it.
    """
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    magnitude = bits & (2 ** (width - 1) - 1)
    return lax.bitcast_convert_type(magnitude.max(axes), x.dtype)


def power_of_two_above(x: Array) -> Array:
    """2^ceil(log2(x)) of positive x, exactly."""
    mantissa, exponent = jnp.frexp(x)  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    return jnp.ldexp(jnp.ones_like(x), exponent - (mantissa == 0.5))


def scales(
    x: Array,
    block: Block,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
    form: Format = E4M3,
) -> Array:
    """The scale of each block of x [..., M, N]: f32 [..., ceil(M/m), ceil(N/n)].

    Not finite where a number of the block is not.

    Args:
      least: what a block's largest magnitude counts as at least, `form.tiny_amax` or
        more. A block of zeros counts as MIN_AMAX in any case.
    """
    largest = amax(blocks(x, block), (-3, -1)).astype(jnp.float32)
    # Apart, or XLA:CPU finds the maximum anew for every number that has the scale.
    return lax.optimization_barrier(scale_of(largest, power_of_two, least, form))


def scale_of(
    largest: Array,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
    form: Format = E4M3,
) -> Array:
    """The scale for numbers of some largest magnitude, float32; see `scales`."""
    # No constant: XLA would multiply by its rounded reciprocal, often 1 ulp off.
    most = form.largest + 0 * largest
    counted = jnp.where(largest == 0, MIN_AMAX, jnp.maximum(largest, least))
    scale = counted / most
    return power_of_two_above(scale) if power_of_two else scale


def clip(x: Array, form: Format) -> Array:
    """x, but not beyond the format's largest number."""
    return jnp.clip(x, -form.largest, form.largest)


def rounded(x: Array, form: Format, noise: Array | None = None) -> Array:
    """float32 as the format has it, still float32: nearest, ties to even; saturates.

    Args:
      noise: uniform in [0, 1), of x's shape. With it x becomes the next number below or
        above, the nearer of them the more often: x on average.
    """
    x = clip(x, form)
    exponent = lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    step = jnp.maximum(power, form.normal) * 2.0**-form.mantissa
    steps = x / step  # exactly: a step is a power of two
    if noise is None:
        return jnp.round(steps) * step
    below = jnp.floor(steps)
    return jnp.where(noise < steps - below, below + 1, below) * step


def units(x: Array, scale: Array, block: Block) -> Array:
    """x [..., M, N] over its scales, in f32: what is rounded."""
    return x.astype(jnp.float32) / spread(scale, block, x.shape)


def encode(
    x: Array,
    scale: Array,
    block: Block,
    form: Format = E4M3,
    noise: Array | None = None,
) -> Array:
    """Codes of x [..., M, N] under given scales, rounded as `rounded` does it."""
    unit = units(x, scale, block)
    if noise is not None or form.bits < 8 * jnp.dtype(form.dtype).itemsize:
        return rounded(unit, form, noise).astype(form.dtype)
    # As `rounded`, and faster. A cast alone gives NaN above 464, infinity from 61440.
    return clip(unit, form).astype(form.dtype)


def quantize(
    x: Array, block: Block, power_of_two: bool = False, form: Format = E4M3
) -> tuple[Array, Array]:
    """(codes [..., M, N], scales f32 [..., ceil(M/m), ceil(N/n)]) of x."""
    scale = scales(x, block, power_of_two, form=form)
    return encode(x, scale, block, form), scale


def quantize_turned(
    x: Array,
    turned: bool,
    block: Block,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
) -> tuple[Array, Array]:
    """`quantize` to E4M3 of x [..., M, N], or `turned` of its transpose."""
    x = x.swapaxes(-1, -2) if turned else x
    scale = scales(x, block, power_of_two, least)
    return encode(x, scale, block), scale


def inverse_rms(x: Array, eps: float) -> Array:
    """1 / sqrt(mean of squares + eps) of each row of x [..., M, N]: [..., M], f32."""
    return lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1) + eps)


def rms_normed(x: Array, inverse_M: Array, scale_N: Array) -> Array:
    """x [..., M, N] times its inverse root mean squares, times `scale_N`, in f32."""
    return x.astype(jnp.float32) * inverse_M[..., None] * scale_N.astype(jnp.float32)


def dequantize(
    codes: Array, scale: Array, block: Block, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Codes [..., M, N] times their scales, multiplied in f32, then in `dtype`."""
    scale = spread(scale.astype(jnp.float32), block, codes.shape)
    return (codes.astype(jnp.float32) * scale).astype(dtype)
