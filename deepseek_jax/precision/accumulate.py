"""Models of how an FP8 tensor core sums a product (arXiv:2412.19437, section 3.3.2).

On Hopper the sum of an FP8 product keeps about 14 bits. DeepSeek-V3 adds it to one in
float32 after every N_C = 128 of K ("promotion"), where the scales of tiles are applied.
A model says how many bits, how often, and which of two emulations:

* exact: in steps of 32, all products and the sum so far are aligned to the largest
  exponent among them, what lies below `bits` bits of it is cut off, and the rest is
  added exactly. Bit for bit what that says; that hardware does just so is not known.
* cheap: each step's 32 products are added in float32, then to the sum, and that is cut
  off to `bits` significant bits. A matrix product for each step, on the fast path.

Both cut towards zero. The cheap form cuts the sum where the exact one cuts products, so
it is no model of everything. With 14 bits and K = 4096 normal numbers of E4M3 are off
from float64 by 1.23e-4 (Frobenius) with promotion and 1.34e-3 without, by the exact
form; the cheap one's error is 0.92 of that with promotion (1.4, 1.0, 1.0 for N_C = 32,
64, 256; with 13 bits 0.78), but 2.4 times that without: what it cuts off always makes
the sum smaller, the more so the longer K. For operands of one sign every cut product
takes from the sum, and the cheap form's error is 0.18 of the exact one's with promotion
and 0.04 without. So results without promotion say which form they are from.
`benchmarks/fp8_gemm.py` has all of these.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from deepseek_jax.typing import Array
from pallas_kernels.fp8_quantize.reference import TILE, spread
from pallas_kernels.matmul.reference import product

STEP = 32  # products that the tensor core adds at a time
DIGITS = 24  # significant bits of a float32
MOST_EXACT = 18  # bits up to which 33 aligned numbers add exactly in float32
TINY = 2.0**-126  # the least normal float32
ROWS = 128  # rows whose sums stay in a CPU's cache
UNROLL = 4  # steps that are compiled as one

Step = Callable[[Array, Array, Array], Array]  # (sum_rN, x_rs, w_sN) -> sum_rN


class Scales(NamedTuple):
    """What numbers are multiplied by, one for each tile along K."""

    x_TJ: Array
    w_JN: Array


@dataclass(frozen=True)
class Accumulator:
    """A model; called with operands it multiplies them.

    Args:
      bits: significant bits of a sum, 2 to 24 (exact: to 18); None: all of float32's.
      promote: a multiple of 32, the numbers of K that are summed so; None: all of K.
      exact: aligns and cuts each product, else only sums of 32.

    Raises:
      ValueError: names the field that is none of this.
    """

    bits: int | None = 14
    promote: int | None = 128
    exact: bool = False

    def __post_init__(self) -> None:
        most = MOST_EXACT if self.exact else DIGITS
        if self.bits is None and self.exact:
            raise ValueError("exact = True: needs bits, the exact model cuts sums off")
        if self.bits is not None and not 2 <= self.bits <= most:
            raise ValueError(f"bits = {self.bits}: must be from 2 to {most}, or None")
        if self.promote is not None and (self.promote < 1 or self.promote % STEP):
            raise ValueError(
                f"promote = {self.promote}: must be a multiple of {STEP}, or None"
            )

    def __call__(
        self,
        x_TK: Array,
        w_KN: Array,
        scales: Scales | None = None,
        tile: int = TILE[1],
    ) -> Array:
        """x @ w of quantised numbers: [T, N] in float32.

        Operands of 8 bits and of bfloat16 are multiplied in bfloat16, where products of
        E4M3, E5M2 and E5M6 are exact; others in float32.

        Args:
          scales: of tiles of `tile` along K, the last one perhaps ragged: [T, J] and
            [J, N]. They multiply sums where those are promoted. If that is not at the
            ends of tiles, they multiply the numbers first, in float32.

        Raises:
          ValueError: scales of other shapes.
        """
        if scales:
            _check(scales, x_TK, w_KN, tile)
        dtype = jnp.promote_types(_exact_in(x_TK), _exact_in(w_KN))
        x_TK, w_KN = x_TK.astype(dtype), w_KN.astype(dtype)
        if scales and (self.promote is None or tile % self.promote):
            x_TK = x_TK * spread(scales.x_TJ, (1, tile), x_TK.shape)
            w_KN = w_KN * spread(scales.w_JN, (tile, 1), w_KN.shape)
            scales = None
        if self.bits is None and self.promote is None:
            return product(x_TK, w_KN)
        width = x_TK.shape[1]
        chunk = _up(min(self.promote or width, width), STEP)
        count = -(-width // chunk)
        if scales:
            times = tile // chunk
            scale_TC, scale_CN = (
                jnp.repeat(scale, times, axis) for scale, axis in zip(scales, (1, 0))
            )
        else:
            scale_TC, scale_CN = (
                jnp.ones(shape, jnp.float32)
                for shape in ((len(x_TK), count), (count, 1))
            )
        return _by_rows(
            _padded(x_TK, 1, chunk),
            _padded(w_KN, 0, chunk),
            Scales(scale_TC[:, :count], scale_CN[:count]),
            self,
        )


# `hopper` is what DeepSeek-V3 trained with; `f32` is what an exact sum would give.
MODELS: dict[str, Accumulator] = {
    "f32": Accumulator(bits=None, promote=None),
    "hopper": Accumulator(bits=14, promote=128),
    "hopper_exact": Accumulator(bits=14, promote=128, exact=True),
    "no_promotion": Accumulator(bits=14, promote=None),
    "no_promotion_exact": Accumulator(bits=14, promote=None, exact=True),
}


def by_tiles(
    x_TK: Array, w_KN: Array, scales: Scales | None = None, tile: int = TILE[1]
) -> Array:
    """What `MODELS["f32"]` computes but for rounding, far faster on a CPU.

    A product for each tile along K, on the fast path, times its scales.
    """
    if scales is None:
        return MODELS["f32"](x_TK, w_KN)
    _check(scales, x_TK, w_KN, tile)
    dtype = jnp.promote_types(_exact_in(x_TK), _exact_in(w_KN))
    x_TK, w_KN = x_TK.astype(dtype), w_KN.astype(dtype)

    def add(j: Array, total_TN: Array) -> Array:
        x_Tk = lax.dynamic_slice_in_dim(x_TK, j * tile, tile, 1)
        w_kN = lax.dynamic_slice_in_dim(w_KN, j * tile, tile, 0)
        scale_T = lax.dynamic_index_in_dim(scales.x_TJ, j, 1, keepdims=False)
        return total_TN + product(x_Tk, w_kN) * (scale_T[:, None] * scales.w_JN[j])

    x_TK, w_KN = _padded(x_TK, 1, tile), _padded(w_KN, 0, tile)
    zeros_TN = jnp.zeros((len(x_TK), w_KN.shape[1]), jnp.float32)
    return lax.fori_loop(0, len(scales.w_JN), add, zeros_TN, unroll=UNROLL)


def _check(scales: Scales, x_TK: Array, w_KN: Array, tile: int) -> None:
    tiles = -(-len(w_KN) // tile)
    wanted = (len(x_TK), tiles), (tiles, w_KN.shape[1])
    shapes = tuple(scale.shape for scale in scales)
    if shapes != wanted:
        raise ValueError(
            f"scales have shapes {shapes}: must be {wanted} for tiles of {tile}"
        )


def _exact_in(x: Array) -> jnp.dtype:
    small = x.dtype.itemsize == 1 or x.dtype == jnp.bfloat16
    return jnp.dtype(jnp.bfloat16 if small else jnp.float32)


def truncated(x: Array, bits: int) -> Array:
    """float32 cut off to `bits` significant bits, towards zero."""
    kept = lax.bitcast_convert_type(x, jnp.int32) & (-1 << (DIGITS - bits))
    return lax.bitcast_convert_type(kept, jnp.float32)


def _power(x: Array) -> Array:
    """The largest power of two up to x >= 0; 0 for zero."""
    exponent = lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    return lax.bitcast_convert_type(exponent, jnp.float32)


def _plain_step(sum_rN: Array, x_rs: Array, w_sN: Array) -> Array:
    return sum_rN + product(x_rs, w_sN)


def _cheap_step(sum_rN: Array, x_rs: Array, w_sN: Array, bits: int) -> Array:
    return truncated(sum_rN + product(x_rs, w_sN), bits)


def _exact_step(sum_rN: Array, x_rs: Array, w_sN: Array, bits: int) -> Array:
    x_rs, w_sN = x_rs.astype(jnp.float32), w_sN.astype(jnp.float32)
    products = [x_rs[:, s, None] * w_sN[s] for s in range(STEP)]
    product_rN = functools.reduce(jnp.maximum, map(jnp.abs, products))
    largest_rN = jnp.maximum(product_rN, jnp.abs(sum_rN))
    unit_rN = jnp.maximum(_power(largest_rN) * 2.0 ** (1 - bits), TINY)
    inverse_rN = 1 / unit_rN  # a power of two as well: all of this is exact
    whole = [jnp.trunc(addend * inverse_rN) for addend in (sum_rN, *products)]
    total_rN = functools.reduce(jnp.add, whole) * unit_rN
    return jnp.where(product_rN == 0, sum_rN, total_rN)


def _step(model: Accumulator) -> Step:
    if model.bits is None:
        return _plain_step
    return functools.partial(
        _exact_step if model.exact else _cheap_step, bits=model.bits
    )


def _up(number: int, multiple: int) -> int:
    return number + -number % multiple


def _padded(x: Array, axis: int, multiple: int) -> Array:
    """Zeros added at the end; adding their products changes no sum of any model."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, edges)


def _by_rows(x_TK: Array, w_KN: Array, scales: Scales, model: Accumulator) -> Array:
    """The product, a block of rows after the other; scales for each of C chunks."""
    rows, count = scales.x_TJ.shape
    block = min(rows, ROWS)
    chunk = x_TK.shape[1] // count
    size = chunk if model.bits is None else STEP
    w_CSsN = w_KN.reshape(count, -1, size, w_KN.shape[1])
    x_nrCSs = _padded(x_TK, 0, block).reshape(-1, block, *w_CSsN.shape[:3])
    scale_nrC = _padded(scales.x_TJ, 0, block).reshape(-1, block, count)
    step = _step(model)

    def sums(part: tuple[Array, Array]) -> Array:
        x_rCSs, scale_rC = part
        parts = x_rCSs.transpose(1, 2, 0, 3), w_CSsN, scale_rC.T, scales.w_JN
        zeros_rN = jnp.zeros((block, w_KN.shape[1]), jnp.float32)

        def promote(total_rN: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
            x_Srs, w_SsN, scale_r, scale_N = part
            sum_rN, _ = lax.scan(
                lambda sum_rN, pair: (step(sum_rN, *pair), None),
                zeros_rN,
                (x_Srs, w_SsN),
                unroll=min(UNROLL, len(x_Srs)),
            )
            return total_rN + sum_rN * (scale_r[:, None] * scale_N), None

        return lax.scan(promote, zeros_rN, parts)[0]

    return lax.map(sums, (x_nrCSs, scale_nrC)).reshape(-1, w_KN.shape[1])[:rows]
