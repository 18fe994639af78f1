"""Products of E4M3 numbers with scales, by the fastest implementation there is."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.choice import INTERPRETED, XLA, Choice, Tiled, choose
from pallas_kernels.fp8_matmul import mosaic_gpu, reference

Array = jax.Array


def choice(
    a_MK: Array, b_NK: Array, out_dtype: Any, implementation: str | None = None
) -> Choice:
    """Which implementation `fp8_matmul` takes for such operands, and why no faster."""
    out_dtype = jnp.dtype(out_dtype)
    return choose(
        implementation,
        lambda: mosaic_gpu.check(a_MK, b_NK, out_dtype),
        tiled(a_MK.shape, b_NK.shape, out_dtype),
    )


def tiled(a_MK: tuple[int, ...], b_NK: tuple[int, ...], out_dtype: Any) -> Tiled:
    """Of operands with these shapes, whose last axes are M, N and K."""
    return (
        ("K", a_MK[-1], 128),
        ("M", a_MK[-2], 8),
        ("N", b_NK[-2], 128 // out_dtype.itemsize),
    )


def fp8_matmul(
    a_MK: Array,
    a_scale_MJ: Array,
    b_NK: Array,
    b_scale: Array,
    *,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """a b^T of codes with scales, summed in float32 after every 128 of K: [M, N].

    The three products of a layer y = x w, w [D, F], are, with t for transposed codes
    (FP8 tensor cores read operands with K last only):

    * forward: x by tiles, w^t by blocks.
    * input gradient: gradient of y by tiles, w by blocks.
    * weight gradient: x^t by tiles, gradient of y ^t by tiles.

    No gradient flows through codes: see `fp8_dot`.

    Args:
      a_scale_MJ: of tiles 1 x 128; J = ceil(K / 128).
      b_scale: of blocks 128 x 128, [ceil(N/128), J], or of tiles 1 x 128, [N, J].
      implementation: see `choice.choose`.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check(a_MK, a_scale_MJ, b_NK, b_scale)
    chosen = choice(a_MK, b_NK, out_dtype, implementation).implementation
    operands = a_MK, a_scale_MJ, b_NK, b_scale
    if chosen == XLA:
        return reference.matmul(*operands, out_dtype)
    return mosaic_gpu.matmul(*operands, out_dtype, INTERPRETED.get(chosen))


def _check(a_MK: Array, a_scale_MJ: Array, b_NK: Array, b_scale: Array) -> None:
    if a_MK.ndim != 2 or b_NK.ndim != 2 or a_MK.shape[1] != b_NK.shape[1]:
        raise ValueError(
            f"operands have shapes {a_MK.shape} and {b_NK.shape}: must be "
            "[M, K] and [N, K]"
        )
    rows, depth = a_MK.shape
    columns, steps = len(b_NK), pl.cdiv(depth, reference.DEPTH)
    if a_scale_MJ.shape != (rows, steps):
        raise ValueError(
            f"a_scale has shape {a_scale_MJ.shape}: must be {(rows, steps)}, one for "
            f"every 1 x {reference.DEPTH} of a"
        )
    allowed = (pl.cdiv(columns, reference.DEPTH), steps), (columns, steps)
    if b_scale.shape not in allowed:
        raise ValueError(
            f"b_scale has shape {b_scale.shape}: must be {allowed[0]}, by blocks, or "
            f"{allowed[1]}, by tiles"
        )
