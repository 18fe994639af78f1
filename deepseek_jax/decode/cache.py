"""The cache of decoding: one latent and one rotated key a token and layer.

What MLA exists for (arXiv:2412.19437, section 2.1.1): kv_rank + rope_dim numbers, 576
at DeepSeek-V3's sizes, instead of every head's key and value. A row's tokens lie one
after another in arrays of a fixed capacity or, paged, in pages that a table assigns
(arXiv:2309.06180), so that rows of unequal lengths share one pool. Nothing is ever
moved or freed: a position that is written again replaces what was there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.typing import Array

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class Layer(NamedTuple):
    """Latents [B, S, C] and rotated keys [B, S, R]; paged [n, p, C] and [n, p, R]."""

    c_kv: Array
    k_rope: Array


class Cache(NamedTuple):
    """Layers of the main model, then one of each MTP module."""

    layers: tuple[Layer, ...]
    table_BP: Array | None  # page j of row b; None where rows are contiguous


def bucket(size: int, least: int = 16) -> int:
    """What shapes round up to: eighths of the power of two that holds `size`.

    So at most a seventh is wasted, but that steps are at least `least`.
    """
    step = max(least, (1 << (size - 1).bit_length()) // 8)
    return -(-size // step) * step


def create(
    config: ModelConfig,
    needs: Sequence[int],
    depth: int = 0,
    *,
    dtype: Any = jnp.float32,
    page: int = 0,
    at: jax.sharding.Sharding | None = None,
) -> Cache:
    """An empty cache.

    Args:
      needs: tokens that each row may come to hold. Contiguous rows all get room for the
        longest; pages are given out for each row's own need.
      depth: MTP modules that have a cache too.
      page: tokens a page; 0 for contiguous rows.
      at: where contiguous rows lie; by default on one device.
    """
    attention = config.attention
    capacity = bucket(max(needs))
    table_BP, shape = None, (len(needs), capacity)
    if page:
        table_BP = assign(needs, page, -(-capacity // page))
        shape = bucket(int(table_BP.max()) + 1, 1), page

    def layer() -> Layer:
        return Layer(
            jnp.zeros((*shape, attention.kv_rank), dtype, device=at),
            jnp.zeros((*shape, attention.rope_dim), dtype, device=at),
        )

    return Cache(tuple(layer() for _ in range(config.num_layers + depth)), table_BP)


def assign(needs: Sequence[int], page: int, width: int) -> Array:
    """Consecutive pages for each row, [B, width].

    Entries that a row does not need are 0; nobody looks at them.
    """
    counts = [-(-need // page) for need in needs]
    ends = np.cumsum(counts)
    table_BP = np.zeros((len(needs), width), np.int32)
    for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
        table_BP[row, :count] = np.arange(end - count, end)
    return jnp.asarray(table_BP)


def append(
    layer: Layer, new: Layer, position_BL: Array, table_BP: Array | None
) -> Layer:
    """Writes latents [B, L, ...] at positions; those < 0 or past the end go nowhere."""
    shape = layer.c_kv.shape[:2]
    place_BL = _place(shape, position_BL, table_BP)

    def write(old: Array, values: Array) -> Array:
        flat = old.reshape(shape[0] * shape[1], -1)
        flat = flat.at[place_BL].set(values.astype(old.dtype), mode="drop")
        return flat.reshape(old.shape)

    return Layer(write(layer.c_kv, new.c_kv), write(layer.k_rope, new.k_rope))


def _place(shape: tuple[int, ...], position_BL: Array, table_BP: Array | None) -> Array:
    """Index of each position among all rows' or pages' tokens; beyond all if none."""
    rows = jnp.arange(len(position_BL))[:, None]
    outer, inner, capacity = rows, position_BL, shape[1]
    if table_BP is not None:
        capacity = table_BP.shape[1] * shape[1]
        page, inner = jnp.divmod(position_BL.clip(0, capacity - 1), shape[1])
        outer = table_BP[rows, page]
    there = (position_BL >= 0) & (position_BL < capacity)
    return jnp.where(there, outer * shape[1] + inner, shape[0] * shape[1])


def num_bytes(cache: Cache) -> int:
    """Bytes of all its arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
