"""MTP modules as drafters, and what the main model accepts of their drafts.

Module k predicts the token after next from module k-1's hidden state, so a chain of J
modules drafts J tokens, which one forward pass of J+1 positions verifies
(arXiv:2412.19437, sections 2.2 and 5.4.3). Acceptance is speculative sampling
(arXiv:2211.17192): the output has the main model's distribution, and with temperature 0
is its greedy output. Without modules this is plain decoding.

n is a row's number of known tokens. The caches hold positions 0 .. n-2, and `hidden`
the main model's hidden states of the last 2J of those. Module k's states at positions
n-k .. n-2 came from drafts, and those after them in the next round are new, at most
J + k in all: so each round has every module do the whole window again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.decode import sampling
from deepseek_jax.decode.cache import Cache
from deepseek_jax.decode.forward import (
    Weights,
    final_norm,
    forward,
    forward_mtp,
    logits,
)
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.typing import Array

CHOOSE, DRAFT, ACCEPT = range(3)  # what a random number is for
NOWHERE = jnp.iinfo(jnp.int32).max  # an index that a scatter drops


class State(NamedTuple):
    """What a step changes. Rows are independent of each other."""

    tokens_BS: Array  # prompt, output, then drafts or anything
    length_B: Array  # n, tokens that count
    done_B: Array  # rows that need no more
    seen_BV: Array  # tokens that the row has, for the repetition penalty
    log_prob_BS: Array  # of generated tokens, under the model itself
    hidden_BWD: Array
    cache: Cache
    steps_B: Array  # verifications
    judged_BJ: Array  # how often draft 1, 2, .. J was one that the output could keep
    accepted_BJ: Array  # and how often it kept it


class Drafts(NamedTuple):
    """J drafted tokens a row and the distributions that they are from."""

    tokens_BJ: Array
    logits_BJV: Array


def window(depth: int) -> int:
    """Positions whose hidden states a round needs."""
    return 2 * depth


def acceptance(rows: Sequence[Any]) -> list[float]:
    """Share of draft 1, 2, .. J that was accepted, of how often it was judged.

    A draft is judged where all before it were accepted, none of them stopped the row
    and its place is within the limit: what lies past the output counts nowhere.

    Args:
      rows: `engine.Generation`s.
    """
    accepted = [sum(each) for each in zip(*(row.accepted for row in rows), strict=True)]
    judged = [sum(each) for each in zip(*(row.judged for row in rows), strict=True)]
    return [part / max(whole, 1) for part, whole in zip(accepted, judged, strict=True)]


def mtp_input(model: Transformer, weights: Weights, x_BLD: Array) -> Array:
    """What the first module reads of the main model's hidden states."""
    if model.config.mtp.input_norm:
        return final_norm(model, weights, x_BLD)
    return x_BLD


def draft(
    model: Transformer, weights: Weights, state: State, s: sampling.Sampling
) -> tuple[State, Drafts]:
    """Runs the chain of modules; drafts stand in `tokens_BS` after the known tokens."""
    depth, size = state.accepted_BJ.shape[1], state.hidden_BWD.shape[1]
    position_BW = state.length_B[:, None] - 1 + jnp.arange(-size, 0)
    position_BW = jnp.where(state.done_B[:, None], -1, position_BW)
    tokens_BS, cache, seen_BV = state.tokens_BS, state.cache, state.seen_BV
    h_BWD, drafted, distributions = state.hidden_BWD, [], []
    for k in range(1, depth + 1):
        place_BW = jnp.maximum(position_BW + k, 0)
        next_BW = jnp.take_along_axis(tokens_BS, place_BW, 1)
        h_BWD, normed_BWD, cache = forward_mtp(
            model, weights, k, h_BWD, next_BW, position_BW, cache
        )
        raw_B1V = logits(model, weights, normed_BWD[:, -1:])
        tokens_BS, seen_BV, token_B, q_BV = model.rt.rows(propose)(
            raw_B1V, tokens_BS, seen_BV, state.length_B + k - 1, s
        )
        drafted.append(token_B)
        distributions.append(q_BV)
    drafts = Drafts(jnp.stack(drafted, 1), jnp.stack(distributions, 1))
    return state._replace(tokens_BS=tokens_BS, cache=cache), drafts


def propose(
    raw_B1V: Array, tokens_BS: Array, seen_BV: Array, at_B: Array, s: sampling.Sampling
) -> tuple[Array, Array, Array, Array]:
    """Draws the tokens at `at_B` from a module's logits.

    Returns:
      The tokens and what has been seen, with the new ones; these, and the logits that
      they were drawn from, [B, V].
    """
    rows = jnp.arange(len(at_B))
    q_B1V = sampling.adjusted(raw_B1V, seen_BV[:, None], s)
    token_B = sampling.sample(q_B1V, sampling.keys(s, at_B[:, None], DRAFT))[:, 0]
    tokens_BS = tokens_BS.at[rows, at_B].set(token_B)
    return tokens_BS, seen_BV.at[rows, token_B].set(True), token_B, q_B1V[:, 0]


def step(
    model: Transformer,
    weights: Weights,
    state: State,
    s: sampling.Sampling,
    limit_B: Array,
    stop_N: Array,
) -> State:
    """From 1 to J+1 tokens more for every row that is not done.

    Args:
      limit_B: the length at which a row is done.
      stop_N: tokens at which it is, too.
    """
    depth = state.accepted_BJ.shape[1]
    drafts = None
    if depth:
        state, drafts = draft(model, weights, state, s)
    there_BL = state.length_B[:, None] + jnp.arange(depth + 1)  # of what comes next
    position_BL = jnp.where(state.done_B[:, None], -1, there_BL - 1)
    input_BL = jnp.take_along_axis(state.tokens_BS, there_BL - 1, 1)
    x_BLD, cache = forward(model, weights, input_BL, position_BL, state.cache)
    raw_BLV = logits(model, weights, final_norm(model, weights, x_BLD))
    h_BLD = mtp_input(model, weights, x_BLD)
    state = state._replace(cache=cache)
    return model.rt.rows(settle, whole=(6,))(
        state, raw_BLV, h_BLD, drafts, s, limit_B, stop_N
    )


def settle(
    state: State,
    raw_BLV: Array,
    h_BLD: Array,
    drafts: Drafts | None,
    s: sampling.Sampling,
    limit_B: Array,
    stop_N: Array,
) -> State:
    """What a step keeps of what the main model says; each row by itself.

    Args:
      raw_BLV: the main model's logits after the last token and each draft.
      h_BLD: its hidden states there, as the first module reads them.
    """
    depth = state.accepted_BJ.shape[1]
    there_BL = state.length_B[:, None] + jnp.arange(depth + 1)
    p_BLV = sampling.adjusted(raw_BLV, _seen(state.seen_BV, drafts), s)
    new_BL, count_B = accept(p_BLV, drafts, there_BL, s)

    kept_B, stopped_B = cut(new_BL, count_B, state, limit_B, stop_N)

    rows, keep_BL = jnp.arange(len(kept_B))[:, None], _first(kept_B, depth + 1)
    place_BL = jnp.where(keep_BL, there_BL, NOWHERE)
    token_BL = jnp.where(keep_BL, new_BL, NOWHERE)
    log_p_BL = sampling.log_prob(raw_BLV, new_BL)
    length_B = state.length_B + kept_B
    return State(
        state.tokens_BS.at[rows, place_BL].set(new_BL, mode="drop"),
        length_B,
        state.done_B | stopped_B | (length_B >= limit_B),
        state.seen_BV.at[rows, token_BL].set(True, mode="drop"),
        state.log_prob_BS.at[rows, place_BL].set(log_p_BL, mode="drop"),
        _shifted(state.hidden_BWD, h_BLD, kept_B),
        state.cache,
        state.steps_B + ~state.done_B,
        state.judged_BJ + _first(kept_B, depth),
        state.accepted_BJ + _first(jnp.minimum(kept_B, count_B - 1), depth),
    )


def _first(count_B: Array, size: int) -> Array:
    """True at the first `count_B` of `size` entries: bool [B, size]."""
    return jnp.arange(size) < count_B[:, None]


def _shifted(old_BWD: Array, new_BLD: Array, by_B: Array) -> Array:
    """The last W states that count when `by_B` of the new ones do."""
    size = old_BWD.shape[1]
    if not size:
        return old_BWD
    both = jnp.concatenate([old_BWD, new_BLD], 1)
    return jnp.take_along_axis(both, (by_B[:, None] + jnp.arange(size))[..., None], 1)


def cut(
    new_BL: Array, count_B: Array, state: State, limit_B: Array, stop_N: Array
) -> tuple[Array, Array]:
    """How many of the next tokens a row keeps, int32 [B], and if the last one stops it.

    None if the row is done, else those up to the first stop token and to the limit.
    """
    stops_BL = (new_BL[..., None] == stop_N).any(-1) & _first(count_B, new_BL.shape[1])
    end_B = jnp.where(stops_BL.any(1), stops_BL.argmax(1) + 1, count_B)
    kept_B = jnp.minimum(end_B, limit_B - state.length_B)
    kept_B = jnp.where(state.done_B, 0, kept_B).astype(jnp.int32)
    stopped_B = (stops_BL & _first(kept_B, new_BL.shape[1])).any(1)
    return kept_B, stopped_B


def _seen(seen_BV: Array, drafts: Drafts | None) -> Array:
    """What the row has before each of the J+1 positions, [B, J+1, V] or [B, 1, V]."""
    if drafts is None:
        return seen_BV[:, None]
    hit_BJV = jax.nn.one_hot(drafts.tokens_BJ, seen_BV.shape[1], dtype=jnp.bool_)
    before_BLV = jnp.concatenate([seen_BV[:, None], hit_BJV], 1)
    return jax.lax.associative_scan(jnp.logical_or, before_BLV, axis=1)


def accept(
    p_BLV: Array, drafts: Drafts | None, there_BL: Array, s: sampling.Sampling
) -> tuple[Array, Array]:
    """The next tokens [B, J+1] and how many of them hold, from 1 to J+1.

    They are the drafts up to the first that is refused, then one of the main model.

    Args:
      p_BLV: the main model's distributions, as logits.
      there_BL: the positions that they are for.
    """
    keys_BL = sampling.keys(s, there_BL, CHOOSE)
    if drafts is None:
        return sampling.sample(p_BLV, keys_BL), jnp.ones(len(p_BLV), jnp.int32)
    depth = drafts.tokens_BJ.shape[1]
    fine_BJ = sampling.accept(
        p_BLV[:, :depth],
        drafts.logits_BJV,
        drafts.tokens_BJ,
        sampling.keys(s, there_BL[:, :depth], ACCEPT),
    )
    good_B = jnp.cumprod(fine_BJ.astype(jnp.int32), 1).sum(1)
    rest_BJV = sampling.residual(p_BLV[:, :depth], drafts.logits_BJV)
    rest_BLV = jnp.concatenate([rest_BJV, p_BLV[:, depth:]], 1)
    rest_B1V = jnp.take_along_axis(rest_BLV, good_B[:, None, None], 1)
    key_B1 = keys_BL[jnp.arange(len(good_B)), good_B][:, None]
    token_B1 = sampling.sample(rest_B1V, key_B1)
    padded_BL = jnp.pad(drafts.tokens_BJ, ((0, 0), (0, 1)))
    here_BL = jnp.arange(depth + 1) == good_B[:, None]
    return jnp.where(here_BL, token_B1, padded_BL), good_B + 1
