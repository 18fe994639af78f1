"""The skeleton of a matmul on Hopper, which dense and grouped kernels fill in.

One thread block runs on each multiprocessor for the kernel's whole life and takes tiles
of the result in turn ("persistent"). It has three warpgroups of 128 threads. The last
one only copies: the tensor memory accelerator (TMA) brings tiles of the operands into a
ring of `stages` buffers in shared memory. The first two multiply (`wgmma`), each half
of the tile's rows. A ring slot has two barriers: `full`, which the copies complete, and
`empty`, on which both multiplying warpgroups arrive once they have read it. Because the
ring runs on from tile to tile, the next tile's operands arrive while the last one's
result is stored. Such a division of labour is that of CUTLASS's and DeepGEMM's kernels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.choice import target

Array = jax.Array
plgpu: Any = mosaic_gpu  # typed too loosely for a type checker to be of use
Ref = Any
Place = Any  # whatever tells a tile from others: scalars

COMPUTE = 2  # warpgroups that multiply
ROWS = 128  # of a tile: 64, the height of a wgmma, for each of them
STRIPE = 256  # bytes of a row that are stored at a time
# Of 65536 registers, those that 128 threads of each kind hold.
COPY_REGISTERS, COMPUTE_REGISTERS = 40, 232


class Operand(NamedTuple):
    """What is copied to shared memory for each step along K.

    Attributes:
      shape: of a tile.
      at: (place, step) -> the tile in global memory; may stick out, into zeros.
      plain: stored row by row; else in the swizzled order that wgmma reads.
    """

    shape: tuple[int, ...]
    dtype: Any
    at: Callable[[Place, Array], Ref]
    plain: bool = False


def swizzled(width: int, dtype: Any) -> tuple[Any, ...]:
    """The order in shared memory of rows of `width` that wgmma and TMA agree on."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * width * size)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return tiling, plgpu.SwizzleTransform(swizzle)


def rows() -> Any:
    """A multiplying warpgroup's half of a tile's rows."""
    return pl.ds(lax.axis_index("wg") * (ROWS // COMPUTE), ROWS // COMPUTE)


class Tiles(NamedTuple):
    """The work of a kernel.

    Attributes:
      number: of tiles of the result.
      place: number of a tile -> its place.
      steps: place -> steps along K, perhaps none.
      compute: (place, run) -> None; calls `run(multiply, start)` once for the sum over
        all steps and stores it. `multiply(step, buffers, carry)` gives the next carry.
      behind: steps that a multiplication may be under way after `multiply` returned.
      products: that `multiply` starts in a step.
    """

    number: int
    place: Callable[[Array], Place]
    steps: Callable[[Place], Array | int]
    compute: Callable[[Place, Callable[..., Any]], None]
    behind: int = 0
    products: int = 1


def run(tiles: Tiles, operands: Sequence[Operand], stages: int) -> None:
    """Goes through all tiles, from the body of a kernel that `kernel` made."""

    def body(buffers: list[Ref], full: Ref, empty: Ref) -> None:
        @pl.when(lax.axis_index("wg") < COMPUTE)
        def multiplying() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            _compute(tiles, buffers, full, empty, stages)

        @pl.when(lax.axis_index("wg") == COMPUTE)
        def copying() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            _copy(tiles, operands, buffers, full, empty, stages)

    buffers = [
        plgpu.SMEM(
            (stages, *each.shape),
            each.dtype,
            transforms=() if each.plain else swizzled(each.shape[-1], each.dtype),
        )
        for each in operands
    ]
    pl.run_scoped(
        body,
        buffers,
        plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        collective_axes="wg",
    )


def _each(tiles: Tiles, body: Callable[..., None]) -> Any:
    """body(place, steps, steps before) for this block's tiles; all steps in the end."""

    loop = plgpu.nd_loop((tiles.number,), collective_axes="sm", init_carry=jnp.int32(0))

    def one(info: Any, carry: Array) -> Array:
        place = tiles.place(info.index[0])
        steps = jnp.asarray(tiles.steps(place), jnp.int32)
        body(place, steps, carry)
        return carry + steps

    return loop(one)


def _copy(
    tiles: Tiles,
    operands: Sequence[Operand],
    buffers: list[Ref],
    full: Ref,
    empty: Ref,
    stages: int,
) -> None:
    def one(place: Place, steps: Array, before: Array) -> None:
        def copy(step: Array, _: None) -> None:
            slot = lax.rem(before + step, stages)

            used = before + step >= stages
            pl.when(used)(lambda: plgpu.barrier_wait(empty.at[slot]))

            for each, buffer in zip(operands, buffers, strict=True):
                plgpu.copy_gmem_to_smem(
                    each.at(place, step), buffer.at[slot], full.at[slot]
                )

        lax.fori_loop(0, steps, copy, None)

    total = _each(tiles, one)

    # Barriers must be at rest when the kernel ends.
    def rest(step: Array, _: None) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

    lax.fori_loop(jnp.maximum(total - stages, 0), total, rest, None)


def _compute(
    tiles: Tiles, buffers: list[Ref], full: Ref, empty: Ref, stages: int
) -> None:
    def one(place: Place, steps: Array, before: Array) -> None:
        def release(step: Array) -> None:
            plgpu.barrier_arrive(empty.at[lax.rem(before + step, stages)])

        def run(multiply: Callable[..., Any], start: Any) -> Any:
            def each(step: Array, carry: Any) -> Any:
                slot = lax.rem(before + step, stages)
                plgpu.barrier_wait(full.at[slot])
                carry = multiply(step, [buffer.at[slot] for buffer in buffers], carry)
                if tiles.behind:
                    plgpu.wgmma_wait(tiles.behind * tiles.products)
                    pl.when(step >= tiles.behind)(lambda: release(step - tiles.behind))
                else:
                    release(step)
                return carry

            carry = lax.fori_loop(0, steps, each, start)
            if tiles.behind:
                plgpu.wgmma_wait(0)
                for late in range(tiles.behind, 0, -1):
                    last = functools.partial(release, steps - late)
                    pl.when(steps >= late)(last)
            return carry

        tiles.compute(place, run)

    _each(tiles, one)
    plgpu.wait_smem_to_gmem(0)


def store_buffer(dtype: Any, sharing: int = 1) -> Any:
    """Shared memory for `store`: a swizzled stripe of columns for each warpgroup.

    Args:
      sharing: how many buffers have the room of one.
    """
    width = STRIPE // sharing // jnp.dtype(dtype).itemsize
    shape = (COMPUTE, ROWS // COMPUTE, width)
    return plgpu.SMEM(shape, dtype, transforms=swizzled(shape[-1], dtype))


def store(value: Array, buffers: Ref, destination: Ref) -> None:
    """Copies a warpgroup's value out, stripe by stripe; returns before it is there.

    Args:
      buffers: of `store_buffer`.
      destination: of both warpgroups, as wide as the value.
    """
    buffer = buffers.at[lax.axis_index("wg")]
    destination = destination.at[rows()]
    width = buffer.shape[-1]
    for start in range(0, value.shape[-1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = value[:, start : start + width].astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, destination.at[:, pl.ds(start, width)])


def kernel(
    body: Callable[..., None],
    out: Any,
    tiles: int,
    *,
    interpret: Any = None,
    scratch: Any = (),
) -> Callable[..., Any]:
    """The kernel of three warpgroups `wg` on as many blocks `sm` as there is room for.

    Args:
      interpret: parameters of the simulator; its GPU has two multiprocessors.
    """
    blocks = 2 if interpret else multiprocessors()
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(min(tiles, blocks),),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        **({"interpret": interpret} if interpret else {}),
    )


def multiprocessors() -> int:
    """How many the GPU has that is compiled for."""
    device = target()
    return getattr(device, "core_count", None) or device.num_cores
