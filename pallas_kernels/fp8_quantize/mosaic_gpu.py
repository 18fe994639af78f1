"""Quantisation to E4M3 on Hopper: numbers are read once, codes and scales written.

There is nothing to multiply, so the time is that of the memory. A thread block makes 64
rows (128 for square blocks) by 128 columns of codes: TMA brings the numbers to shared
memory, one warpgroup takes them into registers, finds largest magnitudes, divides and
rounds, and TMA takes the codes away. Several thread blocks share a multiprocessor and
hide each other's waiting. To turn a matrix, the tile is read from shared memory
transposed (`ldmatrix.trans`); the rest is the same. What an activation or a norm does
to numbers happens in registers: a second matrix may come along, and a factor for each
row or column. A norm's sum over a row is there before: a row is longer than a tile.

Scales are the reference's bit for bit. Codes are but for ties: the GPU's division of
numbers by scales may be off by two units in the last place, unless these are powers of
two.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.fp8_quantize.reference import BLOCK, E4M3, MIN_AMAX, TILE, Block
from pallas_kernels.matmul.mosaic_gpu import swizzled

Array = jax.Array
plgpu: Any = mosaic_gpu  # typed too loosely for a type checker to be of use

WIDTH = 128
HEIGHT = {TILE: 64, BLOCK: 128}
INPUTS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float32)))
CODES = jnp.dtype(E4M3.dtype)


def check(x: Array, block: Block, turned: bool, inputs: Any = INPUTS) -> None:
    """Raises NotImplementedError unless this kernel quantises such an x [..., M, N]."""
    if block not in HEIGHT:
        raise NotImplementedError(
            f"block = {block}: the kernel has blocks of {TILE} and {BLOCK}"
        )
    if x.dtype not in inputs:
        names = " and ".join(map(str, inputs))
        raise NotImplementedError(f"x is {x.dtype}: the kernel quantises {names}")
    # TMA copies rows that begin at multiples of 16 bytes: of x, of codes, of scales.
    rows, columns = x.shape[-2:]
    wanted = {"M": 4, "N": 16} if not turned else {"M": 16, "N": 16 // x.dtype.itemsize}
    for (name, multiple), size in zip(wanted.items(), (rows, columns), strict=True):
        if size % multiple:
            raise NotImplementedError(
                f"{name} = {size}: the kernel wants a multiple of {multiple}"
            )


class Factor(NamedTuple):
    """What numbers are multiplied by before they are quantised.

    Attributes:
      values: f32 [B, J, rows of the result], or columns; J = 1, or of each 128 rows.
      by_row: one for each row of the result, else for each column.
    """

    values: Array
    by_row: bool


def scale_of(amax: Array, power_of_two: bool, least: float) -> Array:
    """What `reference.scales` makes of largest magnitudes."""
    amax = jnp.where(amax == 0, MIN_AMAX, jnp.maximum(amax, least))
    scale = amax / (E4M3.largest + 0 * amax)
    # The GPU's quotient is a little off. What it lacks is exact, as 448 = 512 - 64.
    lack = (amax - 512 * scale) + 64 * scale
    scale = scale + lack / E4M3.largest
    if not power_of_two:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    above = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(scale < jnp.inf, above, scale)


def quantize(
    x: Array,
    block: Block,
    turned: bool,
    power_of_two: bool,
    least: float,
    interpret: Any = None,
    up: Array | None = None,
    factors: tuple[Factor, ...] = (),
) -> tuple[Array, Array]:
    """Codes of x [B, M, N], or turned of [B, N, M], and their scales.

    Args:
      up: of x's shape; if there, the numbers are silu(x) * up.
      factors: what numbers are multiplied by, one after another.

    Returns:
      Scales of tiles with the axis of tiles before that of rows.
    """
    batch, *sizes = x.shape
    rows, columns = sizes[::-1] if turned else sizes
    height = HEIGHT[block]
    down, across = pl.cdiv(rows, height), pl.cdiv(columns, WIDTH)
    matrices = (x,) if up is None else (x, up)
    inputs = (*matrices, *(factor.values for factor in factors))

    def body(*refs: Any) -> None:
        read, (codes, scales), (codes_s, scale_s, arrived, *read_s) = (
            refs[: len(inputs)],
            refs[len(inputs) : len(inputs) + 2],
            refs[len(inputs) + 2 :],
        )
        b, i, j = map(lax.axis_index, "bij")
        at = pl.ds(i * height, height), pl.ds(j * WIDTH, WIDTH)
        source = (b, *(at[::-1] if turned else at))
        places = [source] * len(matrices)
        for values, by_row in factors:
            tile = lax.div(i * height, WIDTH) if values.shape[1] > 1 else 0
            places.append((b, pl.ds(tile, 1), at[0 if by_row else 1]))
        for ref, place, ref_s in zip(read, places, read_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[place], ref_s, arrived)
        plgpu.barrier_wait(arrived)
        load = _turned if turned else _straight
        value = load(read_s[0])
        if up is not None:
            value = value / (1 + jnp.exp(-value)) * load(read_s[1])
        for (_, by_row), factor_s in zip(factors, read_s[len(matrices) :], strict=True):
            layout = plgpu.Layout.WGMMA.reduce(1 if by_row else 0)
            factor = plgpu.load(factor_s.at[0], layout=layout)
            along = [0 if by_row else 1]
            value = value * lax.broadcast_in_dim(factor, value.shape, along)
        # Magnitudes as integers, in whose order NaN is last and is not lost.
        bits = lax.bitcast_convert_type(value, jnp.int32) & 0x7FFFFFFF
        most = jnp.max(bits, axis=1)
        if block == BLOCK:  # the same for all rows
            most = lax.broadcast_in_dim(jnp.max(most), most.shape, [])
            most = plgpu.layout_cast(most, plgpu.Layout.WGMMA.reduce(1))
        amax = lax.bitcast_convert_type(most, jnp.float32)
        made = scale_of(amax, power_of_two, least)
        value = value / lax.broadcast_in_dim(made, value.shape, [0])
        value = jnp.clip(value, -E4M3.largest, E4M3.largest)
        codes_s[...] = value.astype(CODES)
        if block == BLOCK:
            scales[b, i, j] = jnp.max(made)
        else:
            scale_s[0] = made
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(codes_s, codes.at[b, at[0], at[1]])
        if block == TILE:
            plgpu.copy_smem_to_gmem(scale_s, scales.at[b, pl.ds(j, 1), at[0]])
        plgpu.wait_smem_to_gmem(0)

    tile = (WIDTH, height) if turned else (height, WIDTH)
    read = [
        plgpu.SMEM(tile, each.dtype, transforms=swizzled(tile[1], each.dtype))
        for each in matrices
    ]
    read += [
        plgpu.SMEM((1, height if by_row else WIDTH), jnp.float32)
        for _, by_row in factors
    ]
    scales = (down, across) if block == BLOCK else (across, rows)
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, columns), CODES),
            jax.ShapeDtypeStruct((batch, *scales), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((height, WIDTH), CODES, transforms=swizzled(WIDTH, CODES)),
            plgpu.SMEM((1, height), jnp.float32),
            plgpu.Barrier(num_arrivals=len(inputs)),
            *read,
        ],
        grid=(batch, down, across),
        grid_names=("b", "i", "j"),
        **({"interpret": interpret} if interpret else {}),
    )
    return kernel(*inputs)


def _straight(x_s: Any) -> Array:
    return plgpu.load(x_s, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _turned(x_s: Any) -> Array:
    """The tile transposed, in float32. Only of 16 bits can it be read so at once."""
    x_s = x_s.transpose((1, 0))
    if x_s.dtype.itemsize == 2:
        return _straight(x_s)
    value = plgpu.load(x_s, layout=plgpu.Layout.WGMMA_TRANSPOSED).astype(jnp.float32)
    return plgpu.layout_cast(value, plgpu.Layout.WGMMA)
