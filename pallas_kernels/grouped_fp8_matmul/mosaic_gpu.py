"""Block-grouped products on Hopper of E4M3 numbers with scales.

The grouping is that of `grouped_matmul`, the arithmetic of each tile that of
`fp8_matmul`: every 128 of K is summed afresh and promoted. A block has 128
rows, so in the weight gradient, which sums over rows, a block is one step and its
scales are of 128 x 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.fp8_matmul import mosaic_gpu as fp8
from pallas_kernels.grouped_matmul.mosaic_gpu import by_expert, in_turn, integers
from pallas_kernels.matmul import mosaic_gpu as gpu

Array = jax.Array

DEPTH, WIDTH = fp8.DEPTH, fp8.WIDTH


def check(a: Array, b: Array, out_dtype: Any) -> None:
    """Raises NotImplementedError unless this kernel multiplies such operands.

    Args:
      a, b: codes; each block's or each expert's are a matrix with K last.
    """
    one, other = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (a, b))
    fp8.check(one, other, out_dtype)


def check_rows(rows: int) -> None:
    if rows != gpu.ROWS:
        raise NotImplementedError(
            f"blocks have {rows} rows: the kernel wants {gpu.ROWS}"
        )


def blocks(
    a_nbK: Array,
    a_scale_nbJ: Array,
    b_ENK: Array,
    b_scale_EIJ: Array,
    expert_n: Array,
    used: Array,
    dtype: Any,
    interpret: Any = None,
) -> Array:
    """Each used block times its expert's matrix transposed; zeros for the others."""
    number, _, depth = a_nbK.shape
    columns = b_ENK.shape[1]
    across = pl.cdiv(columns, WIDTH)

    def body(
        a: Any, a_scale: Any, b: Any, b_scale: Any, expert: Any, used: Any, *rest: Any
    ) -> None:
        out, buffers = rest

        def along(step: Array) -> Any:
            return pl.ds(step * DEPTH, DEPTH)

        def right(place: Any) -> Any:
            return pl.ds(place[1] * WIDTH, WIDTH)

        def compute(place: Any, run: Any) -> None:
            def multiply(step: Array, tiles: Any, total: Array) -> Array:
                a_s, b_s, a_scale_s = tiles

                def scales() -> tuple[Array, Array]:
                    block = b_scale[expert[place[0]], place[1], step]
                    return fp8.of_rows(a_scale_s), block

                return fp8.promoted(total, a_s.at[gpu.rows()], b_s, scales)

            total = run(multiply, fp8.zeros((gpu.ROWS // gpu.COMPUTE, WIDTH)))
            gpu.store(total, buffers, out.at[place[0], :, right(place)])

        operands = [
            gpu.Operand(
                (gpu.ROWS, DEPTH), a.dtype, lambda p, k: a.at[p[0], :, along(k)]
            ),
            gpu.Operand(
                (WIDTH, DEPTH),
                b.dtype,
                lambda p, k: b.at[expert[p[0]], right(p), along(k)],
            ),
            gpu.Operand(
                (1, gpu.ROWS),
                jnp.float32,
                lambda p, k: a_scale.at[p[0], pl.ds(k, 1), :],
                plain=True,
            ),
        ]
        steps = pl.cdiv(depth, DEPTH)
        tiles = gpu.Tiles(
            number=number * across,
            place=lambda i: in_turn(i, number, across),
            steps=lambda place: jnp.where(place[0] < used[0], steps, 0),
            compute=compute,
        )
        gpu.run(tiles, operands, fp8.STAGES)

    kernel = gpu.kernel(
        body,
        jax.ShapeDtypeStruct((number, gpu.ROWS, columns), dtype),
        number * across,
        scratch=[gpu.store_buffer(dtype)],
        interpret=interpret,
    )
    scales = a_scale_nbJ.swapaxes(1, 2), b_scale_EIJ
    return kernel(a_nbK, scales[0], b_ENK, scales[1], *integers(expert_n, used))


def weight_gradient(
    a_nMb: Array,
    a_scale_nM: Array,
    b_nNb: Array,
    b_scale_nN: Array,
    expert_n: Array,
    used: Array,
    experts: int,
    dtype: Any,
    interpret: Any = None,
) -> Array:
    """The sum of a b^T over the used blocks of each expert: [E, M, N]."""
    rows, columns = a_nMb.shape[1], b_nNb.shape[1]
    down, across = pl.cdiv(rows, gpu.ROWS), pl.cdiv(columns, WIDTH)

    def body(
        a: Any, a_scale: Any, b: Any, b_scale: Any, order: Any, first: Any, *rest: Any
    ) -> None:
        count, out, buffers = rest

        def block(place: Any, step: Array) -> Array:
            return order[first[place[0]] + step]

        def left(place: Any) -> Any:
            return pl.ds(place[1] * gpu.ROWS, gpu.ROWS)

        def right(place: Any) -> Any:
            return pl.ds(place[2] * WIDTH, WIDTH)

        def place(i: Array) -> Any:
            expert, within = lax.div(i, down * across), lax.rem(i, down * across)
            return (expert, *in_turn(within, down, across))

        def compute(place: Any, run: Any) -> None:
            def multiply(step: Array, tiles: Any, total: Array) -> Array:
                a_s, b_s, a_scale_s, b_scale_s = tiles

                def scales() -> tuple[Array, Array]:
                    return fp8.of_rows(a_scale_s), fp8.of_columns(b_scale_s)

                return fp8.promoted(total, a_s.at[gpu.rows()], b_s, scales)

            total = run(multiply, fp8.zeros((gpu.ROWS // gpu.COMPUTE, WIDTH)))
            gpu.store(total, buffers, out.at[place[0], left(place), right(place)])

        operands = [
            gpu.Operand(
                (gpu.ROWS, DEPTH), a.dtype, lambda p, k: a.at[block(p, k), left(p), :]
            ),
            gpu.Operand(
                (WIDTH, DEPTH), b.dtype, lambda p, k: b.at[block(p, k), right(p), :]
            ),
            gpu.Operand(
                (1, gpu.ROWS),
                jnp.float32,
                lambda p, k: a_scale.at[pl.ds(block(p, k), 1), left(p)],
                plain=True,
            ),
            gpu.Operand(
                (1, WIDTH),
                jnp.float32,
                lambda p, k: b_scale.at[pl.ds(block(p, k), 1), right(p)],
                plain=True,
            ),
        ]
        tiles = gpu.Tiles(
            number=experts * down * across,
            place=place,
            steps=lambda place: count[place[0]],
            compute=compute,
        )
        gpu.run(tiles, operands, fp8.STAGES)

    kernel = gpu.kernel(
        body,
        jax.ShapeDtypeStruct((experts, rows, columns), dtype),
        experts * down * across,
        scratch=[gpu.store_buffer(dtype)],
        interpret=interpret,
    )
    operands = a_nMb, a_scale_nM, b_nNb, b_scale_nN
    return kernel(*operands, *by_expert(expert_n, used, experts))
