"""E4M3 with a scale for every tile or block (arXiv:2412.19437, section 3.3.2).

Activations go by tiles of 1 x 128 (a token, 128 channels), weights by blocks of 128 x
128. A scale is the largest magnitude over 448, the format's largest number, computed
from the values at hand; the magnitude counts as at least 1e-4, as in DeepSeek's
released kernel, or as `least`, so that zeros have a scale. `power_of_two` rounds scales
up to powers of two (their `ue8m0` format). A number is its code *times* its scale.
Blocks that stick out over an edge are filled with zeros, which changes nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Block = tuple[int, int]

E4M3_MAX = 448.0
MIN_AMAX = 1e-4
TINY_AMAX = E4M3_MAX * 2.0**-126  # the least whose scale is a normal float32
TILE: Block = (1, 128)
BLOCK: Block = (128, 128)


def blocks(x: Array, block: Block) -> Array:
    """x [..., M, N] as [..., M/m, m, N/n, n], zeros beyond its edges."""
    *outer, rows, columns = x.shape
    m, n = block
    edges = [(0, 0)] * len(outer) + [(0, -rows % m), (0, -columns % n)]
    x = jnp.pad(x, edges)
    return x.reshape(*outer, x.shape[-2] // m, m, x.shape[-1] // n, n)


def _spread(scale: Array, block: Block, shape: tuple[int, ...]) -> Array:
    """Every element's scale, [..., M, N]."""
    scale = jnp.repeat(jnp.repeat(scale, block[0], -2), block[1], -1)
    return scale[..., : shape[-2], : shape[-1]]


def _amax(parts: Array) -> Array:
    """Largest magnitude of each block [..., m, ., n]; not finite if any number is not.

    Magnitudes without their sign are ordered as integers are, infinity and NaN last.
    XLA:CPU (jax 0.11.2) loses NaN in a maximum of floats, and is slower at it.
    """
    width = 8 * parts.dtype.itemsize
    bits = lax.bitcast_convert_type(parts, jnp.dtype(f"uint{width}"))
    magnitude = bits & (2 ** (width - 1) - 1)
    return lax.bitcast_convert_type(magnitude.max((-3, -1)), parts.dtype)


def power_of_two_above(x: Array) -> Array:
    """2^ceil(log2(x)) of positive x, exactly."""
    mantissa, exponent = jnp.frexp(x)  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    return jnp.ldexp(jnp.ones_like(x), exponent - (mantissa == 0.5))


def scales(
    x: Array, block: Block, power_of_two: bool = False, least: float = MIN_AMAX
) -> Array:
    """The scale of each block of x [..., M, N]: f32 [..., ceil(M/m), ceil(N/n)].

    Not finite where a number of the block is not.

    Args:
      least: what a block's largest magnitude counts as at least, TINY_AMAX or more. A
        block of zeros counts as MIN_AMAX in any case.
    """
    amax = _amax(blocks(x, block)).astype(jnp.float32)
    # No constant: XLA would multiply by its rounded reciprocal, often 1 ulp off.
    largest = E4M3_MAX + 0 * amax
    amax = jnp.where(amax == 0, MIN_AMAX, jnp.maximum(amax, least))
    scale = amax / largest
    return power_of_two_above(scale) if power_of_two else scale


def encode(x: Array, scale: Array, block: Block) -> Array:
    """Codes of x [..., M, N] under given scales: E4M3, nearest, ties to even.

    Clipped first: a plain cast gives NaN above 464.
    """
    unit = x.astype(jnp.float32) / _spread(scale, block, x.shape)
    return jnp.clip(unit, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def quantize(x: Array, block: Block, power_of_two: bool = False) -> tuple[Array, Array]:
    """(codes E4M3 [..., M, N], scales f32 [..., ceil(M/m), ceil(N/n)]) of x."""
    # Apart, or XLA:CPU finds the maximum anew for every number.
    scale = lax.optimization_barrier(scales(x, block, power_of_two))
    return encode(x, scale, block), scale


def dequantize(
    codes: Array, scale: Array, block: Block, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Codes [..., M, N] times their scales, multiplied in f32, then in `dtype`."""
    scale = _spread(scale.astype(jnp.float32), block, codes.shape)
    return (codes.astype(jnp.float32) * scale).astype(dtype)
