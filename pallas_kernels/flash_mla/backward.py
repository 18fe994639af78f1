"""Gradients of MLA's causal attention on Hopper GPUs, as two Pallas Mosaic GPU kernels.

FlashAttention-2's backward pass (arXiv:2307.08691): probabilities are recomputed from
the saved log-sum-exp, and `delta`, the products of output and its gradient summed over
a row, is there before. No number has two writers, so that results are reproducible:
one kernel has a thread block for 128 queries and passes over their keys, the other one
for 128 keys and passes over the queries that see them, of all heads that read them.

In both a third warpgroup brings tiles of 64 by TMA, two at a time, and two warpgroups
own 64 rows each, whose gradients stay in registers from the first tile to the last.
The second kernel's scores are transposed, so that probabilities, and their gradients,
have the rows of the keys. It takes them 32 queries at a time: with three sums of 64
rows in registers there is no room for more. The rotary key's gradient leaves it as a
part for each head, which XLA sums in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as typed

from pallas_kernels.flash_mla import fragments
from pallas_kernels.flash_mla.fragments import COLUMN, LOG2E, ROW, ROWS, across, down
from pallas_kernels.flash_mla.mosaic_gpu import TILE, Operands, segment_tiles

plgpu: Any = typed  # too loosely for a type checker to be of use

Array = jax.Array

STAGES = 2  # tiles of the other side that are in shared memory at once
SQUARE = ROWS, ROWS  # of scores: a warpgroup's rows, a tile of the other side
HALF = ROWS // 2
STRIP = ROWS, HALF


def backward(
    x: Operands, out: Array, lse: Array, g: Array, *, scale: float, interpret: Any
) -> tuple[Array, Array, Array, Array, Array]:
    """The five gradients in bf16, from what `forward` returned and its gradient."""
    length = out.shape[1]
    delta_BLH = (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1)
    short = [(0, 0), (0, 0), (0, -length % TILE)]
    delta = jnp.pad(delta_BLH.swapaxes(1, 2), short)
    arrays = *x[:5], g.astype(jnp.bfloat16), lse, delta
    seen: tuple[Array, ...] = ()
    seeing: tuple[Array, ...] = ()
    if x.segment is not None:
        ids, first, last = segment_tiles(x.segment)
        seen, seeing = (ids, first), (ids, last)
    run = {"scale": scale, "interpret": interpret}
    dq_nope, dq_rope = _queries(*arrays, *seen, **run)
    dk_nope, dk_rope, dv = _keys(*arrays, *seeing, **run)
    if x.k_rope.shape[2] == 1:
        dk_rope = dk_rope.sum(2, keepdims=True, dtype=jnp.float32)
    return dq_nope, dq_rope, dk_nope, dk_rope.astype(jnp.bfloat16), dv


def _stream(steps: Array, ready: Any, free: Any, copies: Callable[..., Any]) -> None:
    """Brings what `copies(i)` names, pairs of source and target, for each step i."""
    plgpu.set_max_registers(24, action="decrease")

    @pl.loop(0, steps + STAGES)
    def _(i: Array) -> None:
        slot = lax.rem(i, STAGES)

        @pl.when(i >= STAGES)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot])

        @pl.when(i < steps)
        def _() -> None:
            for source, target in copies(i):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])


def _both(
    shape: tuple[int, int],
    scores: list[tuple[Any, Any]],
    gradients: tuple[Any, Any],
) -> tuple[Array, Array]:
    """Scores, and gradients of probabilities; the products are under way at once."""

    def run(s: Any, dp: Any) -> tuple[Array, Array]:
        for a, b in scores:
            plgpu.wgmma(s, a, b)
        plgpu.wgmma(dp, *gradients)
        return plgpu.wgmma_accumulator_load(s, wait_n=1), dp[...]

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * 2)


def _queries(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    g: Array,
    lse: Array,
    delta: Array,
    *masks: Array,
    scale: float,
    interpret: Any,
) -> tuple[Array, Array]:
    """Gradients of both parts of the queries."""
    batch, length, heads, nope = q_nope.shape
    rope, value = q_rope.shape[-1], v.shape[-1]
    repeat, shared = heads // k_nope.shape[2], k_rope.shape[2] == 1
    count = pl.cdiv(length, TILE)

    def body(*refs: Any) -> None:
        q_nope, q_rope, k_nope, k_rope, v, g, lse, delta, *mask, dqn, dqr = refs[:-2]
        qn_s, qr_s, g_s, kn_s, kr_s, v_s, seen_s, ds_s = refs[-2]
        begin, ready, free = refs[-1]
        b, h, warpgroup = map(lax.axis_index, ("batch", "head", "warpgroup"))
        tile = count - 1 - lax.axis_index("tile")

        def visits(tile: Array) -> tuple[Any, Any]:
            """Where tiles of 64 keys end, and how many before that may be seen.

            Each warpgroup works it out for itself, as below.
            """
            end = 2 * (tile + 1)
            return end, end - (2 * mask[1][b, tile] if mask else 0)

        def compute(dqn_acc: Any, dqr_acc: Any) -> None:
            _, steps = visits(tile)
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            mine = [s.at[warpgroup] for s in (qn_s, qr_s, g_s)]
            for source, target in zip((q_nope, q_rope, g), mine, strict=True):
                source = source.at[b, rows, h]
                plgpu.copy_gmem_to_smem(source, target, begin.at[warpgroup])
            load = functools.partial(plgpu.load, layout=COLUMN, optimized=False)
            base, mean = load(lse.at[b, h, rows]), load(delta.at[b, h, rows])
            seen: Any = load(mask[0].at[b, rows]) if mask else None
            plgpu.barrier_wait(begin.at[warpgroup])

            def step(i: Array, _: Any, diagonal: bool) -> None:
                slot = lax.rem(i, STAGES)
                plgpu.barrier_wait(ready.at[slot])
                kn, kr, vs = (s.at[slot] for s in (kn_s, kr_s, v_s))
                scores = [(mine[0], kn.T), (mine[1], kr.T)]
                s, dp = _both(SQUARE, scores, (mine[2], vs.T))
                p = jnp.exp2(s * (scale * LOG2E) - across(base, SQUARE))
                if diagonal:
                    row = fragments.indices(SQUARE, 0) + warpgroup * ROWS
                    key = fragments.indices(SQUARE, 1) + (1 - i) * ROWS
                    p = jnp.where(row >= key, p, 0)
                if mask:
                    keys = plgpu.load(seen_s.at[slot], layout=ROW)
                    p = jnp.where(across(seen, SQUARE) == down(keys, SQUARE), p, 0)
                ds = p * (dp - across(mean, SQUARE))
                ds = fragments.operand(ds, None if ds_s is None else ds_s.at[warpgroup])
                plgpu.wgmma(dqn_acc, ds, kn)
                plgpu.wgmma(dqr_acc, ds, kr)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            lax.fori_loop(0, 2, functools.partial(step, diagonal=True), None)
            lax.fori_loop(2, steps, functools.partial(step, diagonal=False), None)
            for acc, target, out in zip((dqn_acc, dqr_acc), mine, (dqn, dqr)):
                target[...] = (acc[...] * scale).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(target, out.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < 2)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            accs = plgpu.ACC((ROWS, nope)), plgpu.ACC((ROWS, rope))
            pl.run_scoped(compute, *accs)

        @pl.when(warpgroup == 2)
        def _memory() -> None:
            group = h // repeat
            end, steps = visits(fragments.afresh(tile))

            def copies(i: Array) -> list[tuple[Any, Any]]:
                keys = pl.ds((end - 1 - i) * ROWS, ROWS)
                return [
                    (k_nope.at[b, keys, group], kn_s),
                    (k_rope.at[b, keys, 0 if shared else group], kr_s),
                    (v.at[b, keys, group], v_s),
                    *([(mask[0].at[b, keys], seen_s)] if mask else []),
                ]

            _stream(steps, ready, free, copies)

    tiles = fragments.tiles
    memory = [
        *(tiles(2, ROWS, width) for width in (nope, rope, value)),
        *(tiles(STAGES, ROWS, width) for width in (nope, rope, value)),
        plgpu.SMEM((STAGES, ROWS), jnp.int32) if masks else None,
        tiles(2, *SQUARE) if interpret else None,
    ]
    barriers = [
        plgpu.Barrier(num_arrivals=3, num_barriers=2),
        plgpu.Barrier(num_arrivals=4 if masks else 3, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    ]
    like: Any = jax.ShapeDtypeStruct
    run = plgpu.kernel(
        body,
        out_type=[like(x.shape, jnp.bfloat16) for x in (q_nope, q_rope)],
        scratch_types=[memory, barriers],
        grid=(batch, heads, count),
        grid_names=("batch", "head", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=fragments.COMPILER,
        interpret=interpret,
        kernel_name="flash_mla_queries",
    )
    return run(q_nope, q_rope, k_nope, k_rope, v, g, lse, delta, *masks)


def _keys(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    g: Array,
    lse: Array,
    delta: Array,
    *masks: Array,
    scale: float,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Gradients of keys and values; of the rotary key one for each key head."""
    batch, length, heads, nope = q_nope.shape
    rope, value, groups = q_rope.shape[-1], v.shape[-1], k_nope.shape[2]
    repeat, shared = heads // groups, k_rope.shape[2] == 1
    count = pl.cdiv(length, TILE)

    def body(*refs: Any) -> None:
        q_nope, q_rope, k_nope, k_rope, v, g, lse, delta, *mask, dkn, dkr, dv = refs[
            :-2
        ]
        kn_s, kr_s, v_s, qn_s, qr_s, g_s, lse_s, delta_s, seen_s, p_s, ds_s = refs[-2]
        begin, ready, free = refs[-1]
        b, group, warpgroup = map(lax.axis_index, ("batch", "group", "warpgroup"))
        tile = lax.axis_index("tile")

        def visits(tile: Array) -> Any:
            """Tiles of 64 queries from the diagonal to the last that may see a key.

            Each warpgroup works it out for itself: what is known before they part is
            spilled.
            """
            return 2 * ((mask[1][b, tile] + 1 if mask else count) - tile)

        def compute(dkn_acc: Any, dkr_acc: Any, dv_acc: Any) -> None:
            each = visits(tile)
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            mine = [s.at[warpgroup] for s in (kn_s, kr_s, v_s)]
            sources = (
                k_nope.at[b, rows, group],
                k_rope.at[b, rows, 0 if shared else group],
                v.at[b, rows, group],
            )
            for source, target in zip(sources, mine, strict=True):
                plgpu.copy_gmem_to_smem(source, target, begin.at[warpgroup])
            plgpu.barrier_wait(begin.at[warpgroup])

            def step(i: Array, before: Array, diagonal: bool) -> Array:
                slot = lax.rem(before + i, STAGES)
                plgpu.barrier_wait(ready.at[slot])
                qn, qr, gs = (s.at[slot] for s in (qn_s, qr_s, g_s))
                for at in (0, HALF):
                    half = pl.ds(at, HALF)
                    again = fragments.afresh(warpgroup)
                    kn, kr, vs = (x.at[again] for x in (kn_s, kr_s, v_s))
                    scores = (kn, qn.at[half].T), (kr, qr.at[half].T)
                    s = fragments.summed(STRIP, *scores)
                    base = plgpu.load(lse_s.at[slot, half], layout=ROW)
                    p = jnp.exp2(s * (scale * LOG2E) - down(base, STRIP))
                    if diagonal:
                        key = fragments.indices(STRIP, 0) + warpgroup * ROWS
                        query = fragments.indices(STRIP, 1) + (i * ROWS + at)
                        p = jnp.where(query >= key, p, 0)
                    if mask:
                        # Loaded again, for want of registers to keep it in.
                        seen = plgpu.load(
                            mask[0].at[b, rows], layout=COLUMN, optimized=False
                        )
                        queries = plgpu.load(seen_s.at[slot, half], layout=ROW)
                        same = across(seen, STRIP) == down(queries, STRIP)
                        p = jnp.where(same, p, 0)
                    p_s.at[warpgroup, :, half][...] = p.astype(jnp.bfloat16)
                    dp = fragments.summed(STRIP, (vs, gs.at[half].T))
                    mean = plgpu.load(delta_s.at[slot, half], layout=ROW)
                    ds = p * (dp - down(mean, STRIP))
                    ds_s.at[warpgroup, :, half][...] = ds.astype(jnp.bfloat16)
                plgpu.commit_smem()
                products = (dv_acc, p_s, gs), (dkn_acc, ds_s, qn), (dkr_acc, ds_s, qr)
                for acc, left, right in products:
                    left = fragments.fetched(left.at[warpgroup], interpret)
                    plgpu.wgmma(acc, left, right)
                    plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])
                return before

            def head(r: Array, _: Any) -> None:
                lax.fori_loop(0, 2, functools.partial(step, diagonal=True), r * each)
                rest = functools.partial(step, diagonal=False)
                lax.fori_loop(2, each, rest, r * each)

            lax.fori_loop(0, repeat, head, None)
            mine[0][...] = (dkn_acc[...] * scale).astype(jnp.bfloat16)
            mine[1][...] = (dkr_acc[...] * scale).astype(jnp.bfloat16)
            mine[2][...] = dv_acc[...].astype(jnp.bfloat16)
            plgpu.commit_smem()
            for source, out in zip(mine, (dkn, dkr, dv), strict=True):
                plgpu.copy_smem_to_gmem(source, out.at[b, rows, group])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup < 2)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            accs = (plgpu.ACC((ROWS, width)) for width in (nope, rope, value))
            pl.run_scoped(compute, *accs)

        @pl.when(warpgroup == 2)
        def _memory() -> None:
            own = fragments.afresh(tile)
            each = visits(own)

            def copies(i: Array) -> list[tuple[Any, Any]]:
                h = group * repeat + i // each
                queries = pl.ds((2 * own + lax.rem(i, each)) * ROWS, ROWS)
                return [
                    (q_nope.at[b, queries, h], qn_s),
                    (q_rope.at[b, queries, h], qr_s),
                    (g.at[b, queries, h], g_s),
                    (lse.at[b, h, queries], lse_s),
                    (delta.at[b, h, queries], delta_s),
                    *([(mask[0].at[b, queries], seen_s)] if mask else []),
                ]

            _stream(repeat * each, ready, free, copies)

    tiles = fragments.tiles
    memory = [
        *(tiles(2, ROWS, width) for width in (nope, rope, value)),
        *(tiles(STAGES, ROWS, width) for width in (nope, rope, value)),
        *[plgpu.SMEM((STAGES, ROWS), jnp.float32)] * 2,
        plgpu.SMEM((STAGES, ROWS), jnp.int32) if masks else None,
        *[tiles(2, *SQUARE, widest=HALF)] * 2,
    ]
    barriers = [
        plgpu.Barrier(num_arrivals=3, num_barriers=2),
        plgpu.Barrier(num_arrivals=6 if masks else 5, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    ]
    like: Any = jax.ShapeDtypeStruct
    run = plgpu.kernel(
        body,
        out_type=[
            like(k_nope.shape, jnp.bfloat16),
            like((batch, length, groups, rope), jnp.bfloat16),
            like(v.shape, jnp.bfloat16),
        ],
        scratch_types=[memory, barriers],
        grid=(batch, groups, count),
        grid_names=("batch", "group", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=fragments.COMPILER,
        interpret=interpret,
        kernel_name="flash_mla_keys",
    )
    return run(q_nope, q_rope, k_nope, k_rope, v, g, lse, delta, *masks)
