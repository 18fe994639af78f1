"""How matrices are quantised, by name; counts of what it loses; E5M6 at 12 bits.

Section 3.3 of arXiv:2412.19437: E4M3 in every product, tiles of 1 x 128 for activations
(128 x 1 where they are transposed), blocks of 128 x 128 for weights, E5M6 with scales
that are powers of two for the cached input of attention's output projection. E5M2, one
scale for a matrix, scales from earlier steps and stochastic rounding are there to
compare with. The arithmetic is `pallas_kernels.fp8_quantize.reference`.

A number is x over its scale, both float32 whatever x is, rounded to the nearest number
of the format, ties to even, or with a key to one of its two neighbours at random.
"""

import difflib
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.typing import Array
from pallas_kernels.fp8_quantize import reference as fp8
from pallas_kernels.fp8_quantize.reference import FORMATS, MIN_AMAX, TILE, Block, Format


@dataclass(frozen=True)
class Scheme:
    """A format and what shares a scale.

    Args:
      form: a name in FORMATS.
      block: rows and columns with one scale, filled with zeros where they stick out
        over an edge; None: the whole matrix (of each index of leading axes).
      power_of_two: scales are rounded up to powers of two.
      least: what a largest magnitude counts as at least, lest scales be 0. Numbers far
        below it lose digits; the format's `tiny_amax` keeps them.
      unit: all scales are 1: numbers come divided by theirs, as `delayed` has it.

    Raises:
      ValueError: names the field that is none of this.
    """

    form: str = "e4m3"
    block: Block | None = TILE
    power_of_two: bool = False
    least: float = MIN_AMAX
    unit: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMATS:
            near = difflib.get_close_matches(str(self.form), FORMATS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            names = ", ".join(FORMATS)
            raise ValueError(f"form = {self.form!r}: must be one of {names}{hint}")
        sizes = self.block if isinstance(self.block, tuple) else ()
        whole = all(type(size) is int and size > 0 for size in sizes)
        if self.block is not None and not (whole and len(sizes) == 2):
            raise ValueError(
                f"block = {self.block}: must be two positive integers, or None"
            )
        if not self.least >= self.format.tiny_amax:
            raise ValueError(
                f"least = {self.least}: must be at least {self.format.tiny_amax}"
            )

    @property
    def format(self) -> Format:
        return FORMATS[self.form]

    def block_of(self, x: Array) -> Block:
        """Rows and columns of x [..., M, N] that share a scale."""
        if x.ndim < 2:
            raise ValueError(f"x has shape {x.shape}: must have at least two axes")
        return self.block or (x.shape[-2], x.shape[-1])


class Quantized(NamedTuple):
    """Codes [..., M, N], and in f32 the scale of each block, [..., M/m, N/n]."""

    codes: Array
    scale: Array


def scales(x: Array, scheme: Scheme) -> Array:
    """The scales that x [..., M, N] has by itself; not finite where x is not."""
    block = scheme.block_of(x)
    if scheme.unit:
        tiles = (-(-size // side) for size, side in zip(x.shape[-2:], block))
        return jnp.ones((*x.shape[:-2], *tiles), jnp.float32)
    power, least = scheme.power_of_two, scheme.least
    return fp8.scales(x, block, power, least, scheme.format)


def scale_of(largest: Array, scheme: Scheme) -> Array:
    """The scale of numbers whose largest magnitude is `largest`."""
    power, least = scheme.power_of_two, scheme.least
    return fp8.scale_of(largest, power, least, scheme.format)


def _noise(x: Array, key: Array | None) -> Array | None:
    return None if key is None else jax.random.uniform(key, x.shape, jnp.float32)


def quantize(
    x: Array, scheme: Scheme, *, scale: Array | None = None, key: Array | None = None
) -> Quantized:
    """Codes and scales of x [..., M, N].

    Args:
      scale: given scales, as from earlier steps; what is too large for one saturates.
      key: rounds to either neighbour, to x on average.
    """
    scale = scales(x, scheme) if scale is None else scale
    block, noise = scheme.block_of(x), _noise(x, key)
    return Quantized(fp8.encode(x, scale, block, scheme.format, noise), scale)


def dequantize(
    quantized: Quantized, scheme: Scheme, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Codes times their scales, multiplied in float32, then in `dtype`."""
    block = scheme.block_of(quantized.codes)
    return fp8.dequantize(*quantized, block, dtype)


def values(
    x: Array, scheme: Scheme, *, scale: Array | None = None, key: Array | None = None
) -> Quantized:
    """`quantize` with codes in bfloat16, which holds numbers of all formats exactly.

    Faster on a CPU, and what is fast to multiply there.
    """
    scale = scales(x, scheme) if scale is None else scale
    unit = fp8.units(x, scale, scheme.block_of(x))
    codes = fp8.rounded(unit, scheme.format, _noise(x, key))
    return Quantized(codes.astype(jnp.bfloat16), scale)


class Counts(NamedTuple):
    """How many numbers quantisation loses, int32."""

    saturated: Array  # too large: nearest to what would follow the largest number
    underflowed: Array  # not zero, but nearest to it
    not_finite: Array  # infinity or NaN; the rest of their blocks counts for nothing


def counts(x: Array, scheme: Scheme, *, scale: Array | None = None) -> Counts:
    """What happens to x [..., M, N] under its own or given scales."""
    form, block = scheme.format, scheme.block_of(x)
    scale = scales(x, scheme) if scale is None else scale
    unit = jnp.abs(fp8.units(x, scale, block))
    finite = jnp.isfinite(fp8.spread(scale, block, x.shape)) & jnp.isfinite(x)
    # As many digits, but no largest number.
    digits = lax.reduce_precision(unit, 8, form.mantissa)
    saturated = finite & (digits > form.largest)
    underflowed = finite & (x != 0) & (fp8.rounded(unit, form) == 0)
    each = (saturated, underflowed, ~jnp.isfinite(x))
    return Counts(*(mask.sum(dtype=jnp.int32) for mask in each))


def pack_e5m6(codes: Array) -> Array:
    """E5M6 codes, float16 [..., N], as bytes [..., 3 ceil(N/2)]: 12 bits each.

    Two neighbours are 24 bits, the first one's sign first; an odd N gets a zero more.
    """
    edges = [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]
    bits = lax.bitcast_convert_type(jnp.pad(codes, edges), jnp.uint16) >> 4
    first, second = bits[..., ::2], bits[..., 1::2]
    parts = first >> 4, (first & 15) << 4 | second >> 8, second & 255
    packed = jnp.stack(parts, -1).astype(jnp.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_e5m6(packed: Array, size: int) -> Array:
    """The codes [..., size] that `pack_e5m6` packed."""
    shape = packed.shape[:-1]
    if packed.shape[-1] != 3 * (-(-size // 2)):
        raise ValueError(
            f"size = {size}: must be twice a third of the last axis of packed "
            f"{packed.shape}, or one less"
        )
    parts = packed.reshape(*shape, -1, 3).astype(jnp.uint16)
    high, middle, low = (parts[..., i] for i in range(3))
    pairs = jnp.stack([high << 4 | middle >> 4, (middle & 15) << 8 | low], -1) << 4
    bits = pairs.reshape(*shape, -1)[..., :size]
    return lax.bitcast_convert_type(bits, jnp.float16)
