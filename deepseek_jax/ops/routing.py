"""The router: token-to-expert scores, node-limited top-k, combine weights.

arXiv:2412.19437, section 2.1.2, equations 12-16. How a balancer's state moves the
selection is the balancer's rule (`ops.balancing`); it never reaches the weights, which
are gathered from the scores: taking them back as (s + b) - b would lose small ones.

Dropped groups become -inf. A 0 there, as in older public implementations, picks masked
experts as soon as a bias makes the kept choices negative. The report sums the K_r / M
best affinities of a node, 2 at its sizes: `top2`. `max` is DeepSeek-V2's rule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.config import MoEConfig
from deepseek_jax.typing import Array, at_least_f32


class Routing(NamedTuple):
    """One router's view of T tokens; floats are at least f32."""

    weights_TK: Array  # combine weights, scale included
    experts_TK: Array  # int32, the selection, best choice first
    scores_TE: Array  # s, from 0 to 1, without bias
    logits_TE: Array
    choice_TE: Array  # what was ranked, bias included, before the group mask
    plain_TK: Array  # int32, the K largest of s alone, as equation 18 prints it


class Select(Protocol):
    """A balancer's ranking rule: scores and the balancer's state to choices."""

    def __call__(self, scores_TE: Array, state: Any, /) -> Array: ...


SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
GROUP_SCORES: dict[str, Callable[[Array], Array]] = {
    "top2": lambda choice_TGe: jax.lax.top_k(choice_TGe, 2)[0].sum(-1),
    "max": lambda choice_TGe: choice_TGe.max(-1),
}


def route(logits_TE: Array, state: Any, select: Select, moe: MoEConfig) -> Routing:
    """Scores, selects `top_k` experts a token and weighs them (equations 12-16).

    The selection carries no gradient; the weights do, through the scores. Ties go to
    the lower expert. In f32 a sigmoid underflows to 0 at a logit of about -88: where
    all K selected scores do, normalised weights are 0, not NaN.

    Args:
      logits_TE: router logits of every expert, any float type.
      state: the balancer's state for this layer.
      select: `Balancer.select`.
      moe: scores, groups, top_k, normalisation and scale.
    """
    logits_TE = at_least_f32(logits_TE)
    scores_TE = SCORES[moe.score](logits_TE)
    choice_TE = jax.lax.stop_gradient(select(scores_TE, state))
    _, experts_TK = jax.lax.top_k(node_limited(choice_TE, moe), moe.top_k)
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, -1)
    if moe.normalize:
        weights_TK = normalized(weights_TK)
    weights_TK = moe.scale * weights_TK
    _, plain_TK = jax.lax.top_k(scores_TE, moe.top_k)
    return Routing(weights_TK, experts_TK, scores_TE, logits_TE, choice_TE, plain_TK)


def node_limited(choice_TE: Array, moe: MoEConfig) -> Array:
    """Choices with all but each token's `keep_groups` best groups at -inf: [T, E]."""
    if moe.keep_groups == moe.num_groups:
        return choice_TE
    choice_TGe = choice_TE.reshape(len(choice_TE), moe.num_groups, -1)
    group_TG = GROUP_SCORES[moe.group_score](choice_TGe)
    _, kept = jax.lax.top_k(group_TG, moe.keep_groups)
    keep_TG = jax.nn.one_hot(kept, moe.num_groups, dtype=jnp.bool_).any(-2)
    return jnp.where(keep_TG[..., None], choice_TGe, -jnp.inf).reshape(choice_TE.shape)


def normalized(s: Array) -> Array:
    """s >= 0 over its sum along the last axis; zeros where all of s is 0.

    Scaled by the largest first, which cancels: the gradient divides by the square of
    the sum, so would be NaN in f32 below 1e-19. The scaled sum is at least 1.
    """
    largest = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    s = s / jnp.where(largest > 0, largest, 1)
    return s / jnp.maximum(s.sum(-1, keepdims=True), 0.5)


def count_experts(experts_TK: Array, valid_T: Array, num_experts: int) -> Array:
    """How many valid tokens picked each expert: int32 [E]."""
    zeros = jnp.zeros(num_experts, jnp.int32)
    return zeros.at[experts_TK].add(valid_T.astype(jnp.int32)[:, None])
