"""Absorbed latent attention over a cache, by the fastest implementation there is.

Forward only: it serves decoding, which has no gradients.
"""

from typing import Any

import jax

from pallas_kernels.choice import INTERPRETED, XLA, Choice, choose
from pallas_kernels.mla_decode import mosaic_gpu
from pallas_kernels.mla_decode.reference import latent_attention

Array = jax.Array


def choice(
    q_lat_BLHC: Array,
    q_rope_BLHR: Array,
    c_kv: Array,
    k_rope: Array,
    table_BP: Array | None = None,
    *,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Choice:
    """Which implementation `mla_decode` takes for such operands, and why no faster."""

    def check() -> None:
        queries = {"q_lat": q_lat_BLHC, "q_rope": q_rope_BLHR}
        dtypes = {name: compute_dtype or x.dtype for name, x in queries.items()}
        mosaic_gpu.check(dtypes, c_kv, k_rope, table_BP)

    return choose(implementation, check, (("S", c_kv.shape[1], 8),))


def mla_decode(
    q_lat_BLHC: Array,
    q_rope_BLHR: Array,
    c_kv: Array,
    k_rope: Array,
    position_BL: Array,
    table_BP: Array | None = None,
    *,
    scale: float,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """Averaged latents up to each query's position: [B, L, H, C], at least float32.

    Args:
      c_kv: latents [B, S, C], or with `table_BP` pages of them [n, p, C].
      k_rope: rotary keys [B, S, R], or pages of them [n, p, R].
      position_BL: int, how far a query sees: key s where s <= position; -1 = nothing,
        which gives zeros. Keys that no query of a row sees may hold anything.
      table_BP: int, the page that holds a row's keys [j * p, (j + 1) * p).
      scale: multiplies the scores; a Python number.
      compute_dtype: what queries are rounded to; None keeps them. The kernel reads
        queries and a cache in bfloat16.
      implementation: see `choice.choose`.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    queries, pools = (q_lat_BLHC, q_rope_BLHR), (c_kv, k_rope)
    _check(*queries, *pools, position_BL, table_BP)
    options = {"compute_dtype": compute_dtype, "implementation": implementation}
    chosen = choice(*queries, *pools, table_BP, **options).implementation
    if compute_dtype is not None:
        queries = q_lat_BLHC.astype(compute_dtype), q_rope_BLHR.astype(compute_dtype)
    x = *queries, *pools, position_BL, table_BP
    if chosen == XLA:
        return latent_attention(*x, scale=scale)
    return mosaic_gpu.attend(*x, scale=scale, interpret=INTERPRETED.get(chosen))


def _check(
    q_lat: Array,
    q_rope: Array,
    c_kv: Array,
    k_rope: Array,
    position: Array,
    table: Array | None,
) -> None:
    """Raises ValueError unless the shapes fit each other."""
    for name, x, rank in ("q_lat", q_lat, 4), ("q_rope", q_rope, 4), ("c_kv", c_kv, 3):
        if x.ndim != rank:
            raise ValueError(f"{name} has shape {x.shape}: must have {rank} axes")
    batch, length, heads, latent = q_lat.shape
    rope = q_rope.shape[-1]
    pool = (batch if table is None else c_kv.shape[0], c_kv.shape[1])
    wanted = {
        "q_rope": (q_rope, (batch, length, heads, rope)),
        "c_kv": (c_kv, (*pool, latent)),
        "k_rope": (k_rope, (*pool, rope)),
        "position": (position, (batch, length)),
    }
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {x.shape}: must be {shape} beside q_lat "
                f"{q_lat.shape}"
            )
    if table is not None and (table.ndim != 2 or len(table) != batch):
        raise ValueError(f"table has shape {table.shape}: must be [{batch}, pages]")
