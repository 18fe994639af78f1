"""One FP8 product per expert, by the fastest implementation there is.

No gradient flows through codes: the custom VJP of a layer that quantises calls these
for all its products, `grouped_fp8_matmul` forward and, with weights turned, for the
input's gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.choice import INTERPRETED, XLA, Choice, choose
from pallas_kernels.fp8_matmul.api import tiled
from pallas_kernels.fp8_matmul.reference import DEPTH
from pallas_kernels.grouped_fp8_matmul import mosaic_gpu, reference

Array = jax.Array


def choice(
    a: Array, b: Array, rows: int, out_dtype: Any, implementation: str | None = None
) -> Choice:
    """Which implementation is taken for such operands, and why no faster one.

    Args:
      rows: of a block.
    """

    def check() -> None:
        mosaic_gpu.check_rows(rows)
        mosaic_gpu.check(a, b, jnp.dtype(out_dtype))

    return choose(implementation, check, tiled(a.shape, b.shape, jnp.dtype(out_dtype)))


def grouped_fp8_matmul(
    a_nbK: Array,
    a_scale_nbJ: Array,
    b_ENK: Array,
    b_scale_EIJ: Array,
    expert_n: Array,
    used: Array,
    *,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """Block i of a times b_ENK[expert_n[i]]^T for i < used, zeros elsewhere.

    Args:
      a_scale_nbJ: of tiles 1 x 128, J = ceil(K / 128).
      b_scale_EIJ: of blocks 128 x 128, I = ceil(N / 128).
      expert_n: [n] int, the expert of each block.
      used: scalar int, how many leading blocks hold rows; others are never read.
      implementation: see `choice.choose`.

    Returns:
      [n, b, N] in `out_dtype`, summed in float32 after every 128 of K.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    number, rows, depth = a_nbK.shape
    experts, columns, _ = b_ENK.shape
    steps = pl.cdiv(depth, DEPTH)
    _check("b", b_ENK, (experts, columns, depth))
    _check("a_scale", a_scale_nbJ, (number, rows, steps))
    _check("b_scale", b_scale_EIJ, (experts, pl.cdiv(columns, DEPTH), steps))
    _check("expert_n", expert_n, (number,))
    chosen = choice(a_nbK, b_ENK, rows, out_dtype, implementation).implementation
    operands = a_nbK, a_scale_nbJ, b_ENK, b_scale_EIJ, expert_n, used
    if chosen == XLA:
        return reference.blocks(*operands, out_dtype)
    return mosaic_gpu.blocks(*operands, out_dtype, INTERPRETED.get(chosen))


def grouped_fp8_weight_gradient(
    a_nMb: Array,
    a_scale_nM: Array,
    b_nNb: Array,
    b_scale_nN: Array,
    expert_n: Array,
    used: Array,
    *,
    experts: int,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """The sum of a b^T over the used blocks of each expert: [E, M, N].

    Args:
      a_nMb, b_nNb: both operands with a block's rows last.
      a_scale_nM, b_scale_nN: of tiles of all rows of a block, at most 128.
      expert_n, used, implementation: as in `grouped_fp8_matmul`; no order is needed.
      experts: E; those without blocks get zeros.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    number, left, rows = a_nMb.shape
    if rows > DEPTH:
        raise ValueError(f"blocks have {rows} rows: must be at most {DEPTH}")
    _check("b", b_nNb, (number, b_nNb.shape[1], rows))
    _check("a_scale", a_scale_nM, (number, left))
    _check("b_scale", b_scale_nN, (number, b_nNb.shape[1]))
    _check("expert_n", expert_n, (number,))
    chosen = choice(a_nMb, b_nNb, rows, out_dtype, implementation).implementation
    operands = a_nMb, a_scale_nM, b_nNb, b_scale_nN, expert_n, used, experts, out_dtype
    if chosen == XLA:
        return reference.weight_gradient(*operands)
    return mosaic_gpu.weight_gradient(*operands, INTERPRETED.get(chosen))


def _check(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}: must be {shape}")
