"""Block-scaled FP8 products on Hopper: E4M3 in, promoted to float32 every 128 of K.

A tensor core's sum of FP8 products is short of bits (arXiv:2412.19437, section 3.3.2),
so each 128 of K is summed afresh by four wgmmas and added, times the scales, to a total
in float32 registers. Of the two multiplying warpgroups one promotes while the other has
the tensor cores. Operands lie with K contiguous, as FP8 wgmma reads no other order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.matmul import mosaic_gpu as gpu

Array = jax.Array
plgpu: Any = mosaic_gpu  # typed too loosely for a type checker to be of use

WIDTH = 128  # columns of a tile
DEPTH = 128  # of K a step: the side of a block of scales
STAGES = 5  # slots of the ring, as many as there is shared memory for
STORED = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def check(a_MK: Any, b_NK: Any, out_dtype: Any) -> None:
    """Raises NotImplementedError unless this kernel multiplies such operands."""
    if {a_MK.dtype, b_NK.dtype} != {jnp.dtype(jnp.float8_e4m3fn)}:
        raise NotImplementedError(
            f"codes are {a_MK.dtype} and {b_NK.dtype}: the kernel multiplies "
            "float8_e4m3fn alone"
        )
    if jnp.dtype(out_dtype) not in STORED:
        raise NotImplementedError(
            f"out_dtype is {jnp.dtype(out_dtype)}: the kernel stores "
            "bfloat16 or float32"
        )
    # TMA copies rows that begin at multiples of 16 bytes.
    (rows, depth), columns = a_MK.shape, b_NK.shape[0]
    width = 16 // jnp.dtype(out_dtype).itemsize
    for name, size, multiple in ("K", depth, 16), ("M", rows, 4), ("N", columns, width):
        if size % multiple:
            raise NotImplementedError(
                f"{name} = {size}: the kernel wants a multiple of {multiple}"
            )


def matmul(
    a_MK: Array,
    a_scale_MJ: Array,
    b_NK: Array,
    b_scale: Array,
    out_dtype: Any,
    interpret: Any = None,
) -> Array:
    """The product a b^T, J = ceil(K/128).

    Args:
      a_scale_MJ: of tiles 1 x 128.
      b_scale: of blocks 128 x 128, [ceil(N/128), J], or of tiles, [N, J].
    """
    rows, depth = a_MK.shape
    columns = len(b_NK)
    by_block = len(b_scale) != columns
    down, across = pl.cdiv(rows, gpu.ROWS), pl.cdiv(columns, WIDTH)

    def body(
        a: Any, a_scale: Any, b: Any, b_scale: Any, out: Any, buffers: Any
    ) -> None:
        def left(place: Any) -> Any:
            return pl.ds(place[0] * gpu.ROWS, gpu.ROWS)

        def right(place: Any) -> Any:
            return pl.ds(place[1] * WIDTH, WIDTH)

        def along(step: Array) -> Any:
            return pl.ds(step * DEPTH, DEPTH)

        def compute(place: Any, run: Any) -> None:
            def multiply(step: Array, tiles: Any, total: Array) -> Array:
                a_s, b_s, a_scale_s, *b_scale_s = tiles

                def scales() -> tuple[Array, Array]:
                    if by_block:
                        return of_rows(a_scale_s), b_scale[place[1], step]
                    return of_rows(a_scale_s), of_columns(b_scale_s[0])

                return promoted(total, a_s.at[gpu.rows()], b_s, scales)

            total = run(multiply, zeros((gpu.ROWS // gpu.COMPUTE, WIDTH)))
            gpu.store(total, buffers, out.at[left(place), right(place)])

        scale = (1, DEPTH)
        operands = [
            gpu.Operand(
                (gpu.ROWS, DEPTH), a.dtype, lambda p, k: a.at[left(p), along(k)]
            ),
            gpu.Operand((WIDTH, DEPTH), b.dtype, lambda p, k: b.at[right(p), along(k)]),
            gpu.Operand(
                scale, jnp.float32, lambda p, k: a_scale.at[pl.ds(k, 1), left(p)], True
            ),
        ]
        if not by_block:
            operands.append(
                gpu.Operand(
                    scale,
                    jnp.float32,
                    lambda p, k: b_scale.at[pl.ds(k, 1), right(p)],
                    True,
                )
            )
        tiles = gpu.Tiles(
            number=down * across,
            place=lambda i: plgpu.planar_snake(i, (down, across), 0, 8),
            steps=lambda place: pl.cdiv(depth, DEPTH),
            compute=compute,
        )
        gpu.run(tiles, operands, STAGES)

    kernel = gpu.kernel(
        body,
        jax.ShapeDtypeStruct((rows, columns), out_dtype),
        down * across,
        scratch=[gpu.store_buffer(out_dtype)],
        interpret=interpret,
    )
    return kernel(a_MK, a_scale_MJ.T, b_NK, b_scale if by_block else b_scale.T)


def zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def of_rows(scale_s: Any) -> Array:
    """A warpgroup's 64 scales, as its rows lie in registers."""
    return plgpu.load(scale_s.at[0, gpu.rows()], layout=plgpu.Layout.WGMMA.reduce(1))


def of_columns(scale_s: Any) -> Array:
    return plgpu.load(scale_s.at[0], layout=plgpu.Layout.WGMMA.reduce(0))


def promoted(total: Array, a_s: Any, b_s: Any, scales: Any) -> Array:
    """The total with one step's product added, times the scales."""

    def product(sum_ref: Any) -> tuple[Array, Array, Array]:
        plgpu.wgmma(sum_ref, a_s, b_s.transpose((1, 0)))
        a_scale, b_scale = scales()  # while the tensor cores are at work
        plgpu.commit_smem()  # what was read may be overwritten by TMA
        return sum_ref[...], a_scale, b_scale

    part, a_scale, b_scale = pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))
    if b_scale.ndim:
        part = part * lax.broadcast_in_dim(b_scale, total.shape, [1])
    else:
        a_scale = a_scale * b_scale
    return total + part * lax.broadcast_in_dim(a_scale, total.shape, [0])
