"""Causal attention in plain JAX: an oracle, and a tiled form that is fast on a CPU.

Equations 9 and 10 of arXiv:2412.19437: scores of a head are the dot product of the
unrotated parts plus that of the rotated parts, whose key may be shared by all heads.
The tiled form is FlashAttention-2's (arXiv:2307.08691): online softmax over tiles,
output and log-sum-exp saved, probabilities recomputed in the backward pass; tiles above
the diagonal are never computed. Softmax is at least float32 whatever the operands are.

Shapes: B batch, L = S length, H query heads, G key heads (G divides H), g rotary key
heads (1 or G), N unrotated, R rotated, X = N + R, O value width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.matmul.reference import PRODUCT, product, transposed

Array = jax.Array
Keep = Callable[[Array, Array], tuple[Array, Array]]


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
    einsum = functools.partial(
        jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )
    s_BHLS = einsum("BLHX,BSHX->BHLS", q_BLHX, k_BSHX)
    length = q_BLHX.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    if segment_BL is not None:
        visible &= (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]
    p_BHLS = jax.nn.softmax(jnp.where(visible, scale * s_BHLS, -jnp.inf), -1)
    return einsum("BHLS,BSHO->BLHO", p_BHLS, v_BSHO)


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


def keep_all(out: Array, lse: Array) -> tuple[Array, Array]:
    """Both as they are, for policies that keep products."""
    kept: tuple[Array, Array] = checkpoint_name((out, lse), PRODUCT)
    return kept


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
    keep: Keep | None = None,
) -> Array:
    """What `attention` computes, tile by tile, with its own backward pass.

    Args:
      segment_BL: as in `attention`. A position must see itself, so ids are equal to
        themselves (no NaN).
      chunk: query rows a tile, H/G a position; more for very long rows, to bound the
        program.
      compute_dtype: what operands of the matmuls, and the five gradients, are rounded
        to; None keeps them, at least float32.
      keep: output [P, R, O] and log-sum-exp [P, R, 1] to what is returned of the one,
        and kept of both for the backward pass, named for `jax.checkpoint`.

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
    operands = Operands(q_PRX, k_PSX, v_PSO, segment_PL)
    o_PRO = _tiled(tiles, keep or keep_all, operands)
    o_BGLrO = o_PRO.reshape(batch, groups, length, heads // groups, -1)
    return o_BGLrO.swapaxes(1, 2).reshape(batch, length, heads, -1)


def _head_major(x_BLHX: Array, groups: int | None = None) -> Array:
    """[B * G, L * H/G, X]: each key head with all query rows that read it."""
    batch, length, heads, width = x_BLHX.shape
    groups = groups or heads
    x_BLGrX = x_BLHX.reshape(batch, length, groups, heads // groups, width)
    return x_BLGrX.swapaxes(1, 2).reshape(batch * groups, -1, width)


class Tile(NamedTuple):
    """Query rows [top, bottom), at positions from `start`, against keys [low, high)."""

    top: int
    bottom: int
    start: int
    low: int
    high: int


class Tiles(NamedTuple):
    """How the scores are cut up; a plain value, so that it can be a static argument."""

    chunks: tuple[tuple[Tile, ...], ...]  # one tuple a query chunk, diagonal tile first
    repeat: int  # query rows a position: H / G
    pieces: int  # loop trips over the leading (batch x key head) axis


# Scores that exist at once in a trip of the loop over pieces should fit the cache.
_SCORES = 1 << 19
_MAX_CHUNKS = 16


def _tiles(length: int, repeat: int, leading: int, chunk: int) -> Tiles:
    """Causal tiles: those that no query of a chunk can see are not in the list."""
    chunk = max(1, chunk // repeat, -(-length // _MAX_CHUNKS))
    width = max(4 * chunk, 128)
    chunks = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        rows = start * repeat, stop * repeat, start
        ends = range(stop, 0, -width)
        chunks.append(tuple(Tile(*rows, max(0, end - width), end) for end in ends))
    largest = chunk * repeat * min(width, length)
    fewest = -(-leading // max(1, _SCORES // largest))
    pieces = next(n for n in range(fewest, leading + 1) if leading % n == 0)
    return Tiles(tuple(chunks), repeat, pieces)


class Operands(NamedTuple):
    """One piece: q [p, L*repeat, X], k [p, L, X], v [p, L, O], segment [p, L]."""

    q: Array
    k: Array
    v: Array
    segment: Array | None


def _scores(tile: Tile, repeat: int, x: Operands) -> Array:
    """Scores of one tile, -inf where the query may not look: [p, rows, keys]."""
    s = product(x.q[:, tile.top : tile.bottom], x.k[:, tile.low : tile.high], -1)
    position = jnp.arange(tile.top, tile.bottom) // repeat
    if tile.high > tile.start:
        s = jnp.where(position[:, None] >= jnp.arange(tile.low, tile.high), s, -jnp.inf)
    if x.segment is not None:
        keys = x.segment[:, None, tile.low : tile.high]
        s = jnp.where(x.segment[:, position, None] == keys, s, -jnp.inf)
    return s


def _chunk_forward(
    chunk: tuple[Tile, ...], repeat: int, x: Operands
) -> tuple[Array, Array]:
    """Output and log-sum-exp of one query chunk, by online softmax over its tiles."""
    diagonal, *rest = chunk  # its own tile first, so that the maximum is finite
    s = _scores(diagonal, repeat, x)
    top = s.max(-1, keepdims=True)
    out, total = _tile_forward(diagonal, s, top, x)
    for tile in rest:
        s = _scores(tile, repeat, x)
        peak = jnp.maximum(top, s.max(-1, keepdims=True))
        part, mass = _tile_forward(tile, s, peak, x)
        shrink = jnp.exp(top - peak)
        out, total, top = out * shrink + part, total * shrink + mass, peak
    return out / total, top + jnp.log(total)


def _tile_forward(
    tile: Tile, s: Array, peak: Array, x: Operands
) -> tuple[Array, Array]:
    """A tile's share of the output and of the probability mass, over exp(peak)."""
    p = jnp.exp(s - peak)
    part = product(p.astype(x.v.dtype), x.v[:, tile.low : tile.high])
    return part, p.sum(-1, keepdims=True)


def _forward_piece(tiles: Tiles, x: Operands) -> tuple[Array, Array]:
    done = [_chunk_forward(chunk, tiles.repeat, x) for chunk in tiles.chunks]
    out, lse = zip(*done, strict=True)
    return jnp.concatenate(out, 1), jnp.concatenate(lse, 1)


def _backward_piece(
    tiles: Tiles, saved: tuple[Operands, Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v by recomputing each tile's probabilities."""
    x, lse, delta, g = saved
    # Products with these copies need no large transposed operand, which is slow.
    q_t, g_t = transposed(x.q), transposed(g)
    wide = lse.dtype
    dk_t, dv_t = jnp.zeros(x.k.mT.shape, wide), jnp.zeros(x.v.mT.shape, wide)
    dq = []
    for chunk in tiles.chunks:
        parts = []
        for tile in chunk:
            rows, keys = slice(tile.top, tile.bottom), slice(tile.low, tile.high)
            p = jnp.exp(_scores(tile, tiles.repeat, x) - lse[:, rows])
            dp = product(g[:, rows], x.v[:, keys], -1)
            ds = (p * (dp - delta[:, rows])).astype(x.q.dtype)
            dv_t = _add(dv_t, tile, product(g_t[..., rows], p.astype(g.dtype)))
            dk_t = _add(dk_t, tile, product(q_t[..., rows], ds))
            parts.append(product(ds, x.k[:, keys]))
        dq.append(sum(parts))
    return jnp.concatenate(dq, 1), dk_t.mT, dv_t.mT


def _add(total_t: Array, tile: Tile, part: Array) -> Array:
    """Adds a tile's part to columns [low, high).

    Not by `.at[].add`, on which XLA:CPU (jax 0.11.2) crashes inside `shard_map`.
    """
    sums = total_t[..., tile.low : tile.high] + part
    return lax.dynamic_update_slice_in_dim(total_t, sums, tile.low, -1)


def _map_pieces(function: Any, pieces: int, operands: Any) -> Any:
    """Runs `function` on slices of the leading axis, one after another."""
    cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), operands)
    done = lax.map(function, cut)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(tiles: Tiles, keep: Keep, x: Operands) -> Array:
    return _tiled_forward(tiles, keep, x)[0]


def _tiled_forward(
    tiles: Tiles, keep: Keep, x: Operands
) -> tuple[Array, tuple[Any, ...]]:
    piece = functools.partial(_forward_piece, tiles)
    out, lse = keep(*_map_pieces(piece, tiles.pieces, x))
    return out, (x, out, lse)


def _tiled_backward(
    tiles: Tiles, keep: Keep, saved: tuple[Any, ...], g: Array
) -> tuple[Operands]:
    x, out, lse = saved
    delta = (out * g).sum(-1, keepdims=True)
    piece = functools.partial(_backward_piece, tiles)
    grads = _map_pieces(piece, tiles.pieces, (x, lse, delta, g.astype(x.q.dtype)))
    dq, dk, dv = (d.astype(x.q.dtype) for d in grads)
    return (Operands(dq, dk, dv, None),)


_tiled.defvjp(_tiled_forward, _tiled_backward)
