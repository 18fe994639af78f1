"""Causal attention in plain JAX: an oracle, and a tiled form that is fast on a CPU.

Equations 9 and 10 of arXiv:2412.19437: scores of a head are the dot product of the
unrotated parts plus that of the rotated parts, whose key may be shared by all heads.
The tiled form is FlashAttention-2's (arXiv:2307.08691): online softmax over tiles, output
and log-sum-exp saved, probabilities recomputed in the backward pass; tiles above the
diagonal are never computed. Softmax is at least float32 whatever the operands are.

Shapes: B batch, L = S length, H query heads, G key heads (G divides H), g rotary key heads
(1 or G), N unrotated, R rotated, X = N + R, O value width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.reference import product, transposed

Array = jax.Array


def attention(
    q_nope_BLHN: Array,
    q_rope_BLHR: Array,
    k_nope_BSGN: Array,
    k_rope_BSgR: Array,
    v_BSGO: Array,
    segment_BL: Array | None = None,
    *,
    scale: float,
) -> Array:
    """The oracle: all L x L scores at once, masked, softmax, averaged values.

    Args:
      segment_BL: positions attend only where ids are equal; None = no such limit.
      scale: multiplies the scores.

    Returns:
      [B, L, H, O] in the operands' dtype, at least float32.
    """
    q_BLHX, k_BSHX, v_BSHO = _joined(
        q_nope_BLHN, q_rope_BLHR, k_nope_BSGN, k_rope_BSgR, v_BSGO
    )
    groups = q_BLHX.shape[2] // k_BSHX.shape[2]
    k_BSHX, v_BSHO = (jnp.repeat(x, groups, axis=2) for x in (k_BSHX, v_BSHO))
    wide = jnp.promote_types(q_BLHX.dtype, jnp.float32)
    s_BHLS = jnp.einsum("BLHX,BSHX->BHLS", q_BLHX, k_BSHX, preferred_element_type=wide)
    length = q_BLHX.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    if segment_BL is not None:
        visible &= (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]
    p_BHLS = jax.nn.softmax(jnp.where(visible, scale * s_BHLS, -jnp.inf), -1)
    return jnp.einsum("BHLS,BSHO->BLHO", p_BHLS, v_BSHO, preferred_element_type=wide)


def _joined(
    q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array
) -> tuple[Array, Array, Array]:
    """Both parts side by side, the rotary key copied to every key head."""
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
    return (
        jnp.concatenate([q_nope, q_rope], -1),
        jnp.concatenate([k_nope, k_rope], -1),
        v,
    )


def chunked_attention(
    q_nope_BLHN: Array,
    q_rope_BLHR: Array,
    k_nope_BSGN: Array,
    k_rope_BSgR: Array,
    v_BSGO: Array,
    segment_BL: Array | None = None,
    *,
    scale: float,
    chunk: int = 128,
    compute_dtype: Any = None,
) -> Array:
    """What `attention` computes, tile by tile, with its own backward pass.

    Args:
      segment_BL: as in `attention`. A position must see itself, so ids are equal to
        themselves (no NaN).
      chunk: query positions a tile; longer for very long rows, to bound the program.
      compute_dtype: what operands of the matmuls are rounded to; None keeps them.

    Returns:
      [B, L, H, O], at least float32.
    """
    parts = q_nope_BLHN * scale, q_rope_BLHR * scale, k_nope_BSGN, k_rope_BSgR, v_BSGO
    wide = jnp.promote_types(q_nope_BLHN.dtype, jnp.float32)
    dtype = compute_dtype or wide
    q_BLHX, k_BSGX, v_BSGO = (x.astype(dtype) for x in _joined(*parts))
    batch, length, heads, _ = q_BLHX.shape
    groups = k_BSGX.shape[2]
    tiles = _tiles(length, heads // groups, batch * groups, chunk)
    q_PRX, k_PSX, v_PSO = (
        _head_major(q_BLHX, groups),
        _head_major(k_BSGX),
        _head_major(v_BSGO),
    )
    segment_PL = None if segment_BL is None else jnp.repeat(segment_BL, groups, axis=0)
    o_PRO = _tiled(tiles, wide, q_PRX, k_PSX, v_PSO, segment_PL)
    o_BGLrO = o_PRO.reshape(batch, groups, length, heads // groups, -1)
    return o_BGLrO.swapaxes(1, 2).reshape(batch, length, heads, -1)


def _head_major(x_BLHX: Array, groups: int | None = None) -> Array:
    """[B * G, L * H/G, X]: each key head with all query rows that read it."""
    batch, length, heads, width = x_BLHX.shape
    groups = groups or heads
    x_BLGrX = x_BLHX.reshape(batch, length, groups, heads // groups, width)
    return x_BLGrX.swapaxes(1, 2).reshape(batch * groups, -1, width)


class Tile(NamedTuple):
    """Query positions [start, stop) against key positions [low, high)."""

    start: int
    stop: int
    low: int
    high: int


class Tiles(NamedTuple):
    """How the scores are cut up; a plain value, so that it can be a static argument."""

    chunks: tuple[tuple[Tile, ...], ...]  # one tuple a query chunk, diagonal tile first
    repeat: int  # query rows a position: H / G
    pieces: int  # loop trips over the leading (batch x key head) axis


# Score elements of a loop trip's widest tile: keeps it in a core's cache.
_TILE_ELEMENTS = 1 << 19
_MAX_CHUNKS = 16


def _tiles(length: int, repeat: int, leading: int, chunk: int) -> Tiles:
    """Causal tiles: those that no query of the chunk can see are not in the list."""
    chunk = max(chunk, -(-length // _MAX_CHUNKS))
    width = max(4 * chunk, _TILE_ELEMENTS // (chunk * repeat * 8))
    chunks = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        highs = range(stop, 0, -width)
        chunks.append(tuple(Tile(start, stop, max(0, h - width), h) for h in highs))
    widest = chunk * repeat * min(width, length)
    per_piece = max(1, _TILE_ELEMENTS // widest)
    pieces = next(
        n for n in range(-(-leading // per_piece), leading + 1) if leading % n == 0
    )
    return Tiles(tuple(chunks), repeat, pieces)


def _dot(a: Array, b: Array, contract: tuple[int, int], wide: Any) -> Array:
    """Batched over the leading axis; `contract` names the summed axis of each operand."""
    dims = ((contract[:1], contract[1:]), ((0,), (0,)))
    return lax.dot_general(a, b, dims, preferred_element_type=wide)


def _scores(
    tile: Tile, repeat: int, q: Array, k: Array, segment: Array | None, wide: Any
) -> Array:
    """Scores of one tile, -inf where the query may not look: [p, rows, keys]."""
    s = _dot(
        q[:, tile.start * repeat : tile.stop * repeat],
        k[:, tile.low : tile.high],
        (2, 2),
        wide,
    )
    rows = jnp.arange(tile.start * repeat, tile.stop * repeat) // repeat
    if tile.high > tile.start + 1:
        s = jnp.where(rows[:, None] >= jnp.arange(tile.low, tile.high), s, -jnp.inf)
    if segment is not None:
        same = segment[:, rows, None] == segment[:, None, tile.low : tile.high]
        s = jnp.where(same, s, -jnp.inf)
    return s


def _chunk_forward(
    chunk: tuple[Tile, ...],
    repeat: int,
    wide: Any,
    q: Array,
    k: Array,
    v: Array,
    segment: Array | None,
) -> tuple[Array, Array]:
    """Output and log-sum-exp of one query chunk by online softmax."""
    top: Array | None = None
    for tile in chunk:  # the diagonal comes first, so that the maximum is finite
        s = _scores(tile, repeat, q, k, segment, wide)
        new_top = s.max(-1, keepdims=True)
        if top is not None:
            new_top = jnp.maximum(top, new_top)
        p = jnp.exp(s - new_top)
        part = _dot(p.astype(v.dtype), v[:, tile.low : tile.high], (2, 1), wide)
        if top is None:
            out, total = part, p.sum(-1, keepdims=True)
        else:
            shrink = jnp.exp(top - new_top)
            out, total = out * shrink + part, total * shrink + p.sum(-1, keepdims=True)
        top = new_top
    return out / total, top + jnp.log(total)


def _forward_piece(
    tiles: Tiles, wide: Any, operands: tuple[Array, Array, Array, Array | None]
) -> tuple[Array, Array]:
    done = [_chunk_forward(c, tiles.repeat, wide, *operands) for c in tiles.chunks]
    out, lse = zip(*done, strict=True)
    return jnp.concatenate(out, 1), jnp.concatenate(lse, 1)


def _backward_piece(
    tiles: Tiles, wide: Any, operands: tuple[Any, ...]
) -> tuple[Array, ...]:
    """Gradients of q, k and v by recomputing each tile's probabilities."""
    q, k, v, segment, lse, delta, g = operands
    # Products with these transposes need no large transposed operand, which is slow.
    q_t, g_t = q.swapaxes(1, 2), g.swapaxes(1, 2)
    dk_t, dv_t = (jnp.zeros(x.swapaxes(1, 2).shape, wide) for x in (k, v))
    dq = []
    for chunk in tiles.chunks:
        rows = slice(chunk[0].start * tiles.repeat, chunk[0].stop * tiles.repeat)
        dq_chunk = jnp.zeros((), wide)
        for tile in chunk:
            keys = slice(tile.low, tile.high)
            p = jnp.exp(_scores(tile, tiles.repeat, q, k, segment, wide) - lse[:, rows])
            dp = _dot(g[:, rows], v[:, keys], (2, 2), wide)
            ds = (p * (dp - delta[:, rows])).astype(q.dtype)
            dv_t = dv_t.at[:, :, keys].add(
                _dot(g_t[:, :, rows], p.astype(q.dtype), (2, 1), wide)
            )
            dk_t = dk_t.at[:, :, keys].add(_dot(q_t[:, :, rows], ds, (2, 1), wide))
            dq_chunk += _dot(ds, k[:, keys], (2, 1), wide)
        dq.append(dq_chunk)
    return jnp.concatenate(dq, 1), dk_t.swapaxes(1, 2), dv_t.swapaxes(1, 2)


def _map_pieces(function: Any, pieces: int, operands: Any) -> Any:
    """Runs `function` on slices of the leading axis, one after another."""
    cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), operands)
    done = lax.map(function, cut)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(
    tiles: Tiles, wide: Any, q: Array, k: Array, v: Array, segment: Array | None
) -> Array:
    return _tiled_forward(tiles, wide, q, k, v, segment)[0]


def _tiled_forward(
    tiles: Tiles, wide: Any, q: Array, k: Array, v: Array, segment: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    piece = functools.partial(_forward_piece, tiles, wide)
    out, lse = _map_pieces(piece, tiles.pieces, (q, k, v, segment))
    return out, (q, k, v, segment, out, lse)


def _tiled_backward(
    tiles: Tiles, wide: Any, saved: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    q, k, v, segment, out, lse = saved
    delta = (out * g).sum(-1, keepdims=True)
    piece = functools.partial(_backward_piece, tiles, wide)
    operands = q, k, v, segment, lse, delta, g.astype(q.dtype)
    dq, dk, dv = _map_pieces(piece, tiles.pieces, operands)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_tiled.defvjp(_tiled_forward, _tiled_backward)
