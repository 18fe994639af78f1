"""The sums of the auxiliary balance losses (arXiv:2412.19437, equations 17-20).

f_i = E / (K T) * #{t: token t picks i}, P_i = mean over t of s_ti / sum_j s_tj, and the
loss is proportional to sum_i f_i P_i. Which T tokens are meant (a row, a micro-batch,
the global batch) is the strategy's choice, in `ops.balancing`.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.ops.routing import Routing, count_experts, normalized
from deepseek_jax.typing import Array


def picked(routing: Routing, biased: bool) -> Array:
    """The experts that f counts, [T, K]: the selection, or the top-k of plain s.

    Equation 18 prints plain s, so neither bias nor group mask; public code varies.
    """
    return routing.experts_TK if biased else routing.plain_TK


def tally(routing: Routing, valid_BL: Array, biased: bool) -> tuple[Array, Array]:
    """Counts of picked experts and sums of normalised scores, by row: both [B, E]."""
    experts = routing.scores_TE.shape[-1]
    picked_BLK = picked(routing, biased).reshape(*valid_BL.shape, -1)
    count_BE = jax.vmap(count_experts, (0, 0, None))(picked_BLK, valid_BL, experts)
    p_BLE = normalized(routing.scores_TE).reshape(*valid_BL.shape, experts)
    return count_BE, jnp.where(valid_BL[..., None], p_BLE, 0).sum(1)


def imbalance(count_E: Array, p_E: Array, tokens: Array | int, top_k: int) -> Array:
    """sum_i f_i P_i from sums over `tokens` tokens: 1 at perfect balance, 0 of none.

    Leading axes of the arguments are batched over.
    """
    tokens = jnp.maximum(tokens, 1).astype(p_E.dtype)
    f_E = count_E.astype(p_E.dtype) * (p_E.shape[-1] / top_k) / tokens[..., None]
    return (f_E * p_E).sum(-1) / tokens
