"""Causal attention of MLA on Hopper GPUs, forward, as a Pallas Mosaic GPU kernel.

The schedule is that of FlashAttention-3 (arXiv:2407.08608), for the heads of equations
9 and 10 of arXiv:2412.19437: 128 + 64 numbers of a query or key, of which the 64
rotated ones of the keys belong to all heads, and 128 of a value.

A thread block has 128 query rows of a head. Its third warpgroup brings tiles of 128
keys and values from global memory by TMA, the one on the diagonal first, two of them
ahead. The other two each own 64 rows: scores are two wgmma products into one
accumulator in registers, unrotated and rotated part; an online softmax in powers of two
makes of them the first operand, still in registers, of the product with the values.
The two take turns, so that one's exponentials run under the other's products.

Rows and keys beyond the sequence are zeros that TMA fills in, and are not written.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as typed

from pallas_kernels.flash_mla import fragments
from pallas_kernels.flash_mla.fragments import COLUMN, LOG2E, ROW, ROWS, across, down

plgpu: Any = typed  # too loosely for a type checker to be of use

Array = jax.Array

TILE = 2 * ROWS  # query rows of a thread block, and keys that it takes at a time
STAGES = 2  # tiles of keys and values that are in shared memory at once


class Operands(NamedTuple):
    """What attention is computed of; all but the ids in bf16."""

    q_nope: Array  # [B, L, H, N]
    q_rope: Array  # [B, L, H, R]
    k_nope: Array  # [B, L, G, N]
    k_rope: Array  # [B, L, g, R]
    v: Array  # [B, L, G, O]
    segment: Array | None  # [B, L]


# The widest heads whose tiles fit the shared memory, two of each.
WIDEST = {"q_nope": 128, "q_rope": 64, "v": 128}


def check(x: Operands, compute_dtype: Any = None, *, scale: float) -> None:
    """Raises NotImplementedError unless the kernels do this; x has shapes, dtypes."""
    for name, array in zip(x._fields, x[:5]):
        dtype = jnp.dtype(compute_dtype or array.dtype)
        if dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"{name} is multiplied as {dtype}: the kernel does bfloat16 alone"
            )
    for name, widest in WIDEST.items():
        width = getattr(x, name).shape[-1]
        if width % 16 or not 0 < width <= widest:
            raise NotImplementedError(
                f"heads of {name} are {width} wide: the kernel wants a multiple of 16 "
                f"up to {widest}"
            )
    if not scale > 0:
        raise NotImplementedError(f"scale = {scale}: the kernel wants it above 0")


def forward(x: Operands, *, scale: float, interpret: Any) -> tuple[Array, Array]:
    """The output in bf16, and the base-2 log-sum-exp of the scores [B, H, Q * TILE]."""
    batch, length, heads, nope = x.q_nope.shape
    rope, value = x.q_rope.shape[-1], x.v.shape[-1]
    repeat = heads // x.k_nope.shape[2]
    shared = x.k_rope.shape[2] == 1
    count = pl.cdiv(length, TILE)
    masks = () if x.segment is None else segment_tiles(x.segment)[:2]

    def body(*refs: Any) -> None:
        q_nope, q_rope, k_nope, k_rope, v, *mask, out, lse, memory, barriers = refs
        q_nope_s, q_rope_s, k_nope_s, k_rope_s, v_s, lse_s, out_s, seen_s, p_s = memory
        out_s = (
            q_nope_s if out_s is None else out_s
        )  # the output goes where the query was
        q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
        b, h, warpgroup = map(lax.axis_index, ("batch", "head", "warpgroup"))
        # The longest rows first, so that thread blocks end about together.
        tile = count - 1 - lax.axis_index("tile")
        steps = tile + 1 - (mask[1][b, tile] if mask else 0)

        @pl.when(warpgroup < 2)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            top = tile * TILE + warpgroup * ROWS
            rows = pl.ds(top, ROWS)
            mine_q, mine_r = q_nope_s.at[warpgroup], q_rope_s.at[warpgroup]
            ready = q_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_nope.at[b, rows, h], mine_q, ready)
            plgpu.copy_gmem_to_smem(q_rope.at[b, rows, h], mine_r, ready)
            plgpu.barrier_wait(ready)
            seen = (
                plgpu.load(mask[0].at[b, rows], layout=COLUMN, optimized=False)
                if mask
                else None
            )

            def scores(slot: Array) -> Array:
                def products(acc: Any) -> Array:
                    plgpu.wgmma(acc, mine_q, k_nope_s.at[slot].T)
                    plgpu.wgmma(acc, mine_r, k_rope_s.at[slot].T)
                    take_turns()
                    return acc[...]

                plgpu.barrier_wait(k_ready.at[slot])
                return pl.run_scoped(products, plgpu.ACC((ROWS, TILE), jnp.float32))

            def take_turns() -> None:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step(i: Array, carry: tuple[Array, ...], diagonal: bool) -> Any:
                o, peak, total = carry
                slot = lax.rem(i, STAGES)
                s = scores(slot)
                if seen is not None:
                    keys = plgpu.load(seen_s.at[slot], layout=ROW)
                    plgpu.commit_smem()  # read before TMA writes there again
                    same = across(seen, s.shape) == down(keys, s.shape)
                    s = jnp.where(same, s, -jnp.inf)
                plgpu.barrier_arrive(k_free.at[slot])
                if diagonal:
                    row = fragments.indices(s.shape, 0) + warpgroup * ROWS
                    visible = row >= fragments.indices(s.shape, 1)
                    s = jnp.where(visible, s, -jnp.inf)
                # A row sees itself in the first tile: its maximum is finite from there.
                higher = jnp.maximum(peak, s.max(1) * (scale * LOG2E))
                shrink = jnp.exp2(peak - higher)
                p = jnp.exp2(s * (scale * LOG2E) - across(higher, s.shape))
                total = total * shrink + p.sum(1)
                p = fragments.operand(p, None if p_s is None else p_s.at[warpgroup])
                take_turns()
                plgpu.barrier_wait(v_ready.at[slot])
                part = fragments.summed(o.shape, (p, v_s.at[slot]))
                plgpu.barrier_arrive(v_free.at[slot])
                # One fused operation a number, as scaling in place would be.
                return o * across(shrink, o.shape) + part, higher, total

            start = (
                fragments.full(0, (ROWS, value)),
                fragments.full(-jnp.inf, (ROWS,), COLUMN),
                fragments.full(0, (ROWS,), COLUMN),
            )
            # The second warpgroup stays half a step behind the first.
            pl.when(warpgroup == 1)(take_turns)
            carry = step(jnp.int32(0), start, diagonal=True)
            rest = functools.partial(step, diagonal=False)
            o, peak, total = lax.fori_loop(1, steps, rest, carry)
            pl.when(warpgroup == 0)(take_turns)

            o = o * across(1 / total, o.shape)
            out_s.at[warpgroup][...] = o.astype(jnp.bfloat16)
            lse_s.at[warpgroup][...] = peak + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 2)
        def _memory() -> None:
            plgpu.set_max_registers(24, action="decrease")
            g = h // repeat

            @pl.loop(0, steps + STAGES)
            def _(i: Array) -> None:
                slot = lax.rem(i, STAGES)
                keys = pl.ds((tile - i) * TILE, TILE)

                def copy(free: Any, ready: Any, *pairs: tuple[Any, Any]) -> None:
                    """Source to target, once what was there has been read."""

                    @pl.when(i >= STAGES)
                    def _() -> None:
                        plgpu.barrier_wait(free.at[slot])

                    @pl.when(i < steps)
                    def _() -> None:
                        for source, target in pairs:
                            plgpu.copy_gmem_to_smem(
                                source, target.at[slot], ready.at[slot]
                            )

                seen = [(mask[0].at[b, keys], seen_s)] if mask else []
                copy(
                    k_free,
                    k_ready,
                    (k_nope.at[b, keys, g], k_nope_s),
                    (k_rope.at[b, keys, 0 if shared else g], k_rope_s),
                    *seen,
                )
                copy(v_free, v_ready, (v.at[b, keys, g], v_s))

    memory = [
        fragments.tiles(2, ROWS, nope),
        fragments.tiles(2, ROWS, rope),
        fragments.tiles(STAGES, TILE, nope),
        fragments.tiles(STAGES, TILE, rope),
        fragments.tiles(STAGES, TILE, value),
        plgpu.SMEM((2, ROWS), jnp.float32),
        None if nope == value else fragments.tiles(2, ROWS, value),
        plgpu.SMEM((STAGES, TILE), jnp.int32) if masks else None,
        fragments.tiles(2, ROWS, TILE) if interpret else None,
    ]
    barrier = functools.partial(plgpu.Barrier, num_barriers=STAGES)
    barriers = [
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        barrier(num_arrivals=3 if masks else 2),
        barrier(num_arrivals=1),
        barrier(num_arrivals=2),
        barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    run = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch, length, heads, value), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, count * TILE), jnp.float32),
        ],
        scratch_types=[memory, barriers],
        grid=(batch, heads, count),
        grid_names=("batch", "head", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=fragments.COMPILER,
        interpret=interpret,
        kernel_name="flash_mla_forward",
    )
    return run(*x[:5], *masks)


def segment_tiles(segment_BL: Array) -> tuple[Array, Array, Array]:
    """Ids filled up to whole tiles, the first tile that each sees, the last seen by.

    Tiles whose ranges of ids do not meet have no id in common: of documents one after
    the other, all tiles outside a tile's own documents are left out.
    """
    batch, length = segment_BL.shape
    ids = jnp.pad(segment_BL.astype(jnp.int32), [(0, 0), (0, -length % TILE)], "edge")
    ids_BQt = ids.reshape(batch, -1, TILE)
    low, high = ids_BQt.min(-1), ids_BQt.max(-1)
    meet_BQQ = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    first, back = (jnp.argmax(m, -1) for m in (meet_BQQ, meet_BQQ[:, :, ::-1]))
    last = meet_BQQ.shape[-1] - 1 - back
    return ids, first.astype(jnp.int32), last.astype(jnp.int32)
