"""Absorbed latent attention over a cache: an oracle, and a form that is fast on a CPU.

Equations 1-11 of arXiv:2412.19437 with the key's up-projection moved to the query: a
head's query becomes as wide as the latent, all heads share one key, which is latent and
rotary key side by side, and the value is the latent again. What is left of equation 10,
the value's up-projection, is the caller's. The fast form keeps an online softmax
(FlashAttention-2, arXiv:2307.08691) over tiles of keys and stops after the last key
that a query sees, so that time follows what a row has filled, not its capacity.

Shapes: B batch, L query length, S capacity of a row's cache, H heads, C latent, R
rotated; in a paged cache n pages of p tokens, P of them a row; r query rows (positions
x heads) that pass over their keys together, t keys of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.reference import product

Array = jax.Array


def latent_attention_oracle(
    q_lat_BLHC: Array,
    q_rope_BLHR: Array,
    c_kv: Array,
    k_rope: Array,
    position_BL: Array,
    table_BP: Array | None = None,
    *,
    scale: float,
) -> Array:
    """All scores at once, masked, softmax, averaged latents.

    Args:
      c_kv: the latents [B, S, C], or with `table_BP` pages of them [n, p, C].
      k_rope: the rotary keys [B, S, R], or pages of them [n, p, R].
      position_BL: int, how far a query sees: key s where s <= position; -1 = nothing.
        Keys that no query of a row sees may hold anything, NaN too.
      table_BP: int, the page that holds a row's keys [j * p, (j + 1) * p). Entries
        for keys that no query of a row sees may be anything in [0, n).
      scale: multiplies the scores.

    Returns:
      [B, L, H, C], at least float32; zeros where a query sees nothing.
    """
    wide = _wide(q_lat_BLHC, c_kv)
    if table_BP is not None:
        c_kv, k_rope = (
            pool[table_BP].reshape(len(table_BP), -1, pool.shape[-1])
            for pool in (c_kv, k_rope)
        )
    q_lat, q_rope, c_BSC, k_BSR = (
        x.astype(wide) for x in (q_lat_BLHC, q_rope_BLHR, c_kv, k_rope)
    )
    key_S = jnp.arange(c_BSC.shape[1])
    c_BSC = jnp.where((key_S <= position_BL.max(1, keepdims=True))[..., None], c_BSC, 0)
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    s_BLHS = einsum("BLHC,BSC->BLHS", q_lat, c_BSC)
    s_BLHS += einsum("BLHR,BSR->BLHS", q_rope, k_BSR)
    visible = (key_S <= position_BL[..., None])[:, :, None]
    p_BLHS = jax.nn.softmax(scale * s_BLHS, -1, where=visible)
    return einsum("BLHS,BSC->BLHC", p_BLHS, c_BSC)


class Piece(NamedTuple):
    """Query rows that pass together over the keys of one row of the cache."""

    row: Array  # scalar int
    q_lat_rC: Array
    q_rope_rR: Array
    position_r: Array


# Query rows of a piece, or one position's heads if those are more.
_ROWS = 512
# Slices of pages, side by side, are twice as fast as a gather while they are few.
_PAGES = 8


def latent_attention(
    q_lat_BLHC: Array,
    q_rope_BLHR: Array,
    c_kv: Array,
    k_rope: Array,
    position_BL: Array,
    table_BP: Array | None = None,
    *,
    scale: float,
    tile: int = 512,
) -> Array:
    """What `latent_attention_oracle` computes, tile by tile; forward only.

    Args:
      tile: keys at a time; in a paged cache as many whole pages as fit, from 1 to 8.

    Returns:
      [B, L, H, C], at least float32.
    """
    batch, length, heads, _ = q_lat_BLHC.shape
    chunks = -(-length // max(1, _ROWS // heads))
    chunk = -(-length // chunks)
    wide = _wide(q_lat_BLHC, c_kv)

    def cut(x_BLHX: Array, filler: float = 0) -> Array:
        """[pieces, r, X], the last piece of each row filled up."""
        short = [(0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)]
        x_BLHX = jnp.pad(x_BLHX, short, constant_values=filler)
        return x_BLHX.reshape(batch * chunks, chunk * heads, -1)

    q_lat, q_rope = (cut(x.astype(wide) * scale) for x in (q_lat_BLHC, q_rope_BLHR))
    position = jnp.broadcast_to(position_BL[..., None, None], (batch, length, heads, 1))
    pieces = Piece(
        jnp.repeat(jnp.arange(batch), chunks),
        q_lat,
        q_rope,
        cut(position, -1)[..., 0],
    )
    run = functools.partial(_piece, tile, c_kv, k_rope, table_BP)
    out = lax.map(run, pieces).reshape(batch, chunks * chunk, heads, -1)
    return out[:, :length]


def _wide(*arrays: Array) -> jnp.dtype:
    """The dtype of the scores and of every sum."""
    return jnp.result_type(*arrays, jnp.float32)


def _piece(
    tile: int, c_kv: Array, k_rope: Array, table_BP: Array | None, x: Piece
) -> Array:
    """Online softmax of one piece over the tiles that it sees: [r, C]."""
    capacity, size = _extent(tile, c_kv, table_BP)
    last, position_r1 = x.position_r.max(), x.position_r[:, None]

    def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        out, total, top = carry
        # The last tile ends with the cache, so it may begin with keys already seen.
        start = jnp.minimum(j * size, capacity - size)
        c_tC, k_tR = (
            _keys(pool, table_BP, x.row, start, size).astype(out.dtype)
            for pool in (c_kv, k_rope)
        )
        key_t = start + jnp.arange(size)
        c_tC = jnp.where((key_t <= last)[:, None], c_tC, 0)
        s_rt = product(x.q_lat_rC, c_tC, -1) + product(x.q_rope_rR, k_tR, -1)
        visible = (key_t >= j * size) & (key_t <= position_r1)
        s_rt = jnp.where(visible, s_rt, -jnp.inf)
        peak = jnp.maximum(top, s_rt.max(-1, keepdims=True))
        p_rt, shrink = jnp.exp(s_rt - peak), jnp.exp(top - peak)
        out = out * shrink + product(p_rt, c_tC)
        return out, total * shrink + p_rt.sum(-1, keepdims=True), peak

    zero = jnp.zeros((len(x.position_r), 1), x.q_lat_rC.dtype)
    # The lowest finite number: a row that sees nothing yet must not get inf - inf.
    lowest = jnp.nan_to_num(zero - jnp.inf)
    start = jnp.zeros_like(x.q_lat_rC), zero, lowest
    out, total, _ = lax.fori_loop(0, last // size + 1, step, start)
    return out / jnp.where(total == 0, 1, total)


def _extent(tile: int, pool: Array, table_BP: Array | None) -> tuple[int, int]:
    """Keys that a row can hold, and how many of them a tile has."""
    if table_BP is None:
        return pool.shape[1], min(tile, pool.shape[1])
    page, pages = pool.shape[1], table_BP.shape[1]
    return pages * page, min(max(1, tile // page), pages, _PAGES) * page


def _keys(
    pool: Array, table_BP: Array | None, row: Array, start: Array, size: int
) -> Array:
    """A row's keys [start, start + size), of whole pages when paged."""
    if table_BP is None:
        return lax.dynamic_slice(pool, (row, start, 0), (1, size, pool.shape[-1]))[0]
    page = pool.shape[1]
    pages = lax.dynamic_slice(table_BP, (row, start // page), (1, size // page))[0]
    parts = [lax.dynamic_index_in_dim(pool, i, keepdims=False) for i in pages]
    return jnp.concatenate(parts)
