"""What attention kernels for Hopper have in common: where tiles lie, products of them.

A warpgroup is 128 threads. Its products (wgmma) have 64 rows; the sum is spread over
its registers, the second operand is in shared memory, the first in either.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as typed

plgpu: Any = typed  # too loosely for a type checker to be of use

Array = jax.Array

ROWS = 64  # of a warpgroup's product
LOG2E = math.log2(math.e)

# Sums and maxima are along rows, which a warp holds whole: no memory to reduce in.
COMPILER = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)

MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(1)  # a number for each row
ROW = MATRIX.reduce(0)  # a number for each column


def tiles(*shape: int, widest: int = 64, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for matrices as TMA writes and wgmma reads them.

    Columns can be cut where tiles end, which are at most `widest` wide.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(math.gcd(shape[-1], widest) * size * 8)
    transforms = (
        plgpu.TilingTransform((8, swizzle // size)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def full(x: float, shape: tuple[int, ...], layout: Any = MATRIX) -> Array:
    """float32 numbers, all the same, spread over registers as a sum is."""
    return plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)


def across(x: Array, shape: tuple[int, ...]) -> Array:
    """A number for each row, in every column."""
    return lax.broadcast_in_dim(x, shape, [0])


def down(x: Array, shape: tuple[int, ...]) -> Array:
    """A number for each column, in every row."""
    return lax.broadcast_in_dim(x, shape, [1])


def indices(shape: tuple[int, ...], axis: int) -> Array:
    """The row or column that each number is in."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def summed(shape: tuple[int, ...], *products: tuple[Any, Any]) -> Array:
    """The sum of products a @ b, once they are through."""

    def run(acc: Any) -> Array:
        for a, b in products:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def operand(x: Array, stage: Any | None) -> Any:
    """Numbers in registers, rounded, as the first operand of products.

    JAX's simulator has no products with an operand in registers, so there, and only
    there, `stage` is memory that they go through.
    """
    x = x.astype(jnp.bfloat16)
    if stage is None:
        return x
    stage[...] = x
    plgpu.commit_smem()
    return stage


def fetched(x: Any, simulated: Any) -> Any:
    """Numbers in shared memory as the first operand, from registers where possible.

    From there they need not be laid out as the second operand is.
    """
    return x if simulated else plgpu.load(x, layout=MATRIX)


def afresh(index: Array | int) -> Array:
    """The same index, of which the compiler must not know that it is the same.

    Used in a loop for an operand that stays from step to step, it keeps the compiler
    from keeping the addresses of all the operand's parts in registers too; used where
    warpgroups part, from working out before what each then has to hold.
    """
    return lax.optimization_barrier(jnp.int32(index))
