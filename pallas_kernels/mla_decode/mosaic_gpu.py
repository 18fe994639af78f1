"""Absorbed latent attention over a cache on Hopper GPUs, as Pallas Mosaic GPU kernels.

All heads of a row read one key of 512 + 64 numbers, whose first 512 are the value too
(equations 1-11 of arXiv:2412.19437, absorbed), so a tile of the cache is read once and
serves 64 query rows (positions x heads). The division of labour is that of DeepSeek's
FlashMLA: every thread block takes an equal share of all rows' tiles, and goes on from
one row of the batch to the next; what it found of a row, with its log-sum-exp, goes to
memory, where a second kernel adds up each row's parts, always in the same order.

The third warpgroup of a thread block brings tiles of 64 keys by TMA, two at a time,
from pages or from a cache without. The other two share the work on a tile: each takes
the scores of 32 keys, they tell each other the rows' maxima and their probabilities
through shared memory, and each adds to its own half of the 512 columns of the output.
Keys that no query sees may hold anything: as values they are overwritten with zeros.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as typed

from pallas_kernels.flash_mla import fragments
from pallas_kernels.flash_mla.fragments import COLUMN, LOG2E, ROWS, across

plgpu: Any = typed  # too loosely for a type checker to be of use

Array = jax.Array

KEYS = 64  # of a tile
HALF = KEYS // 2  # whose scores one warpgroup computes
STAGES = 2  # tiles that are in shared memory at once
LOWEST = float.fromhex("-0x1.fffffep127")  # of float32
PROCESSORS = 132  # of an H100 or H200; each has room for one thread block


def check(
    queries: dict[str, Any], c_kv: Array, k_rope: Array, table_BP: Array | None
) -> None:
    """Raises NotImplementedError unless the kernel does this.

    Args:
      queries: the dtypes in which they come, by name.
    """
    dtypes = queries | {"c_kv": c_kv.dtype, "k_rope": k_rope.dtype}
    for name, dtype in dtypes.items():
        if jnp.dtype(dtype) != jnp.bfloat16:
            raise NotImplementedError(
                f"{name} is {jnp.dtype(dtype)}: the kernel reads bfloat16 alone"
            )
    latent, rope = c_kv.shape[-1], k_rope.shape[-1]
    if latent % (32 if latent <= 256 else 256) or not 0 < latent <= 512:
        raise NotImplementedError(
            f"latents are {latent} wide: the kernel wants 512, or a multiple of 32 up "
            "to 256"
        )
    if rope % 16 or not 0 < rope <= 64:
        raise NotImplementedError(
            f"rotary keys are {rope} wide: the kernel wants a multiple of 16 up to 64"
        )
    if table_BP is not None and c_kv.shape[1] % KEYS:
        raise NotImplementedError(
            f"pages hold {c_kv.shape[1]} tokens: the kernel wants a multiple of {KEYS}"
        )


class Shares(NamedTuple):
    """Tiles of all rows of the batch, one after the other, cut into equal shares.

    What share p finds of row b is part p + b: no two pairs that meet have one number.
    """

    begin_b: Array  # where a row's tiles begin, [B + 1]
    size: Array  # tiles of a share, [1]
    first_p: Array  # the row that a share begins in
    stop_p: Array  # the row after its last


def shares(last_B: Array, parts: int) -> Shares:
    """Cuts up the tiles of rows that see keys up to `last_B`."""
    begin_b = jnp.pad(jnp.cumsum(last_B // KEYS + 1), (1, 0)).astype(jnp.int32)
    total = begin_b[-1]
    size = jnp.maximum(-(-total // parts), 1)
    start_p = jnp.minimum(jnp.arange(parts) * size, total)
    end_p = jnp.minimum(start_p + size, total)
    row = functools.partial(jnp.searchsorted, begin_b[1:])
    first_p, stop_p = row(start_p, side="right"), row(end_p, side="left") + 1
    stop_p = jnp.where(start_p < end_p, stop_p, first_p)
    return Shares(
        begin_b, size[None], *(x.astype(jnp.int32) for x in (first_p, stop_p))
    )


def chunk_width(latent: int) -> int:
    """Columns of the latent that are multiplied at a time; each half has whole ones."""
    return min(128, latent // 2)


def attend(
    q_lat_BLHC: Array,
    q_rope_BLHR: Array,
    c_kv: Array,
    k_rope: Array,
    position_BL: Array,
    table_BP: Array | None,
    *,
    scale: float,
    parts: int | None = None,
    interpret: Any = None,
) -> Array:
    """The averaged latents [B, L, H, C] in float32; arguments as in `reference`.

    Args:
      parts: equal shares to cut the work into; by default as many as run at once.
    """
    batch, length, heads, latent = q_lat_BLHC.shape
    rows = length * heads
    blocks = pl.cdiv(rows, ROWS)
    parts = parts or max(1, PROCESSORS // blocks)
    page, capacity = c_kv.shape[1], c_kv.shape[1]
    if table_BP is not None:
        capacity = page * table_BP.shape[1]
    position_BL = jnp.minimum(position_BL, capacity - 1).astype(jnp.int32)
    last_B = position_BL.max(1)
    share = shares(last_B, parts)
    position_Br = jnp.repeat(position_BL, heads, axis=1)
    short = [(0, 0), (0, blocks * ROWS - rows)]
    position_Br = jnp.pad(position_Br, short, constant_values=-1)
    sees: tuple[Array, ...] = position_Br, last_B, *share
    if table_BP is not None:
        sees += (table_BP.astype(jnp.int32),)
    queries = (x.reshape(batch, rows, -1) for x in (q_lat_BLHC, q_rope_BLHR))
    part, lse = _partial(
        *queries, c_kv, k_rope, *sees, scale=scale, parts=parts, interpret=interpret
    )
    out_BrC = _combined(part, lse, share.begin_b, share.size, interpret=interpret)
    return out_BrC[:, :rows].reshape(batch, length, heads, latent)


def _partial(
    q_lat_BrC: Array,
    q_rope_BrR: Array,
    c_kv: Array,
    k_rope: Array,
    *sees: Array,
    scale: float,
    parts: int,
    interpret: Any,
) -> tuple[Array, Array]:
    """What each share finds: outputs [part, r, C], base-2 log-sum-exps [part, r]."""
    batch, rows, latent = q_lat_BrC.shape
    rope, page = q_rope_BrR.shape[-1], c_kv.shape[1]
    width = chunk_width(latent)
    chunks = latent // width
    blocks = pl.cdiv(rows, ROWS)

    def body(*given: Any) -> None:
        q_lat, q_rope, c_kv, k_rope, position, last, *refs = given
        begin, size, first, stop, *table, part, lse, memory, barriers = refs
        q_s, q_rope_s, (c_s, out_s), rope_s, p_s, peak_s, total_s = memory
        row_ready, row_done, ready, free, meet = barriers
        p, block, warpgroup = map(lax.axis_index, ("part", "block", "warpgroup"))
        mine = pl.ds(block * ROWS, ROWS)
        share_start, share_stop = p * size[0], (p + 1) * size[0]

        def each_row(do: Any) -> None:
            """do(row, its first tile here, the tile after its last)."""

            @pl.loop(first[p], stop[p])
            def _(b: Array) -> None:
                start = jnp.maximum(share_start, begin[b])
                end = jnp.minimum(share_stop, begin[b + 1])
                do(b, start - begin[b], end - begin[b])

        def meeting() -> None:
            plgpu.barrier_arrive(meet)
            plgpu.barrier_wait(meet)

        def row(b: Array, start: Array, end: Array) -> None:
            seen = plgpu.load(position.at[b, mine], layout=COLUMN, optimized=False)
            plgpu.barrier_wait(row_ready)

            def step(tile: Array, carry: Any) -> Any:
                o, peak, total = carry
                slot = lax.rem(tile - start, STAGES)
                plgpu.barrier_wait(ready.at[slot])
                keys = pl.ds(warpgroup * HALF, HALF)
                zero = fragments.afresh(0)
                s = fragments.summed(
                    (ROWS, HALF),
                    *(
                        (q_s.at[c + zero], c_s.at[slot, c, keys].T)
                        for c in range(chunks)
                    ),
                    (q_rope_s.at[zero], rope_s.at[slot, keys].T),
                )
                key = tile * KEYS + warpgroup * HALF + fragments.indices(s.shape, 1)
                visible = key <= across(seen, s.shape)
                s = jnp.where(visible, s * (scale * LOG2E), -jnp.inf)
                peak_s.at[warpgroup][...] = s.max(1)
                plgpu.commit_smem()
                meeting()
                # Finite from the start: a row that sees nothing is no inf - inf.
                higher = peak
                for other in range(2):
                    found = plgpu.load(peak_s.at[other], layout=COLUMN)
                    higher = jnp.maximum(higher, found)
                x = jnp.exp2(s - across(higher, s.shape))
                p_s.at[:, keys][...] = x.astype(jnp.bfloat16)
                total = total * jnp.exp2(peak - higher) + x.sum(1)
                plgpu.commit_smem()
                meeting()
                valid = last[b] + 1 - tile * KEYS
                own = [(c, warpgroup * (chunks // 2) + c) for c in range(chunks // 2)]

                @pl.when(valid < KEYS)
                def _() -> None:
                    for _, c in own:
                        v = c_s.at[slot, c][...]
                        v = plgpu.layout_cast(v, fragments.MATRIX)
                        here = fragments.indices(v.shape, 0) < valid
                        c_s.at[slot, c][...] = jnp.where(here, v, 0)
                    plgpu.commit_smem()

                shrink = jnp.exp2(peak - higher)
                o = tuple(
                    o[i] * across(shrink, o[i].shape)
                    + fragments.summed(
                        o[i].shape,
                        (fragments.fetched(p_s, interpret), c_s.at[slot, c]),
                    )
                    for i, c in own
                )
                plgpu.barrier_arrive(free.at[slot])
                return o, higher, total

            zero = tuple(fragments.full(0, (ROWS, width)) for _ in range(chunks // 2))
            carry = (
                zero,
                fragments.full(LOWEST, (ROWS,), COLUMN),
                fragments.full(0, (ROWS,), COLUMN),
            )
            o, peak, total = lax.fori_loop(start, end, step, carry)
            total_s.at[warpgroup][...] = total
            plgpu.commit_smem()
            meeting()
            total = sum(plgpu.load(total_s.at[i], layout=COLUMN) for i in range(2))
            meeting()
            inverse = 1 / jnp.where(total == 0, 1, total)
            # All tiles have been read: their memory takes the output on its way out.
            for i, x in enumerate(o):
                c = warpgroup * (chunks // 2) + i
                out_s.at[c][...] = x * across(inverse, x.shape)
            plgpu.commit_smem()
            for i in range(chunks // 2):
                c = warpgroup * (chunks // 2) + i
                target = part.at[p + b, mine, pl.ds(c * width, width)]
                plgpu.copy_smem_to_gmem(out_s.at[c], target)
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(row_done)

            @pl.when(warpgroup == 0)
            def _() -> None:
                lse.at[p + b, mine][...] = jnp.where(
                    total == 0, -jnp.inf, peak + jnp.log2(total)
                )

        def fetch(b: Array, start: Array, end: Array) -> None:
            for c in range(chunks):
                columns = pl.ds(c * width, width)
                plgpu.copy_gmem_to_smem(
                    q_lat.at[b, mine, columns], q_s.at[c], row_ready
                )
            plgpu.copy_gmem_to_smem(q_rope.at[b, mine], q_rope_s.at[0], row_ready)

            def copy(tile: Array, slot: Array) -> None:
                pool, at = b, tile * KEYS
                if table:
                    pool, at = table[0][b, at // page], lax.rem(at, page)
                for c in range(chunks):
                    source = c_kv.at[pool, pl.ds(at, KEYS), pl.ds(c * width, width)]
                    plgpu.copy_gmem_to_smem(source, c_s.at[slot, c], ready.at[slot])
                source = k_rope.at[pool, pl.ds(at, KEYS)]
                plgpu.copy_gmem_to_smem(source, rope_s.at[slot], ready.at[slot])

            @pl.loop(start, end + STAGES)
            def _(tile: Array) -> None:
                slot = lax.rem(tile - start, STAGES)
                waits = tile >= start + STAGES
                pl.when(waits)(lambda: plgpu.barrier_wait(free.at[slot]))
                pl.when(tile < end)(lambda: copy(tile, slot))

            plgpu.barrier_wait(row_done)

        @pl.when(warpgroup < 2)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            each_row(row)

        @pl.when(warpgroup == 2)
        def _memory() -> None:
            plgpu.set_max_registers(24, action="decrease")
            each_row(fetch)

    tiles = fragments.tiles
    run = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((parts + batch, blocks * ROWS, latent), jnp.float32),
            jax.ShapeDtypeStruct((parts + batch, blocks * ROWS), jnp.float32),
        ],
        scratch_types=[
            [
                tiles(chunks, ROWS, width),
                tiles(1, ROWS, rope),
                plgpu.RefUnion(
                    tiles(STAGES, chunks, KEYS, width),
                    tiles(chunks, ROWS, width, dtype=jnp.float32),
                ),
                tiles(STAGES, KEYS, rope),
                tiles(ROWS, KEYS, widest=HALF),
                plgpu.SMEM((2, ROWS), jnp.float32),
                plgpu.SMEM((2, ROWS), jnp.float32),
            ],
            [
                plgpu.Barrier(num_arrivals=chunks + 1),
                plgpu.Barrier(num_arrivals=2),
                plgpu.Barrier(num_arrivals=chunks + 1, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=2),
            ],
        ],
        grid=(parts, blocks),
        grid_names=("part", "block"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=fragments.COMPILER,
        interpret=interpret,
        kernel_name="mla_decode",
    )
    return run(q_lat_BrC, q_rope_BrR, c_kv, k_rope, *sees)


def _combined(
    part: Array, lse: Array, begin_b: Array, size: Array, *, interpret: Any
) -> Array:
    """Each row's parts, weighted by their share of the probability: [B, r, C]."""
    batch = len(begin_b) - 1
    _, rows, latent = part.shape
    width = chunk_width(latent)

    def body(part: Any, lse: Any, begin: Any, size: Any, out: Any) -> None:
        b, block, chunk = map(lax.axis_index, ("batch", "block", "chunk"))
        mine = pl.ds(block * ROWS, ROWS)
        columns = pl.ds(chunk * width, width)
        load = functools.partial(plgpu.load, optimized=False)

        def step(p: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            o, peak, total = carry
            found = load(lse.at[p + b, mine], layout=COLUMN)
            x = load(part.at[p + b, mine, columns], layout=fragments.MATRIX)
            higher = jnp.maximum(peak, found)
            shrink, weight = jnp.exp2(peak - higher), jnp.exp2(found - higher)
            o = o * across(shrink, o.shape) + x * across(weight, o.shape)
            return o, higher, total * shrink + weight

        carry = (
            fragments.full(0, (ROWS, width)),
            fragments.full(LOWEST, (ROWS,), COLUMN),
            fragments.full(0, (ROWS,), COLUMN),
        )
        first, stop = begin[b] // size[0], pl.cdiv(begin[b + 1], size[0])
        stop = jnp.where(begin[b] == begin[b + 1], first, stop)
        o, _, total = lax.fori_loop(first, stop, step, carry)
        inverse = 1 / jnp.where(total == 0, 1, total)
        out.at[b, mine, columns][...] = o * across(inverse, o.shape)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, rows, latent), jnp.float32),
        grid=(batch, rows // ROWS, latent // width),
        grid_names=("batch", "block", "chunk"),
        compiler_params=fragments.COMPILER,
        interpret=interpret,
        kernel_name="mla_decode_combine",
    )
    return run(part, lse, begin_b, size)
