"""From logits to tokens: adjusted distributions, draws, and speculative acceptance.

`adjusted` changes logits in the order of Hugging Face's `generate`, whose definitions
it follows:

1. repetition: logits of tokens seen before are divided by the penalty where positive,
   multiplied where negative (arXiv:1909.05858);
2. temperature: logits / temperature;
3. top-k: the k most probable tokens;
4. top-p: in order of probability, every token before which lies less than the share p
   of the mass that top-k left (arXiv:1904.09751);
5. min-p: tokens with at least min_p times the highest probability (arXiv:2407.01082).

Where we differ: ties are ordered by token id, lowest first, so that top-k keeps k
tokens and not all that equal the k-th; and temperature 0 is greedy decoding, a
distribution with all its mass on the most probable token (the lowest id of equals).

With p the target's and q the draft's adjusted distribution, a token drawn from q and
kept with probability min(1, p/q) (`accept`), or else replaced by a draw from
max(p - q, 0) (`residual`), is distributed as p: arXiv:2211.17192, arXiv:2302.01318. Of
greedy distributions that is equality with the target's choice, without a special case.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

from deepseek_jax.typing import Array, at_least_f32

TINY, MAX_INT = float(np.finfo(np.float32).tiny), np.iinfo(np.int32).max

# Type, lowest and highest value, and what to say of others.
RULES: dict[str, tuple[type[np.generic], float, float, str]] = {
    "temperature": (np.float32, 0, 1e6, "from 0 (greedy) to 1e6"),
    "top_k": (np.int32, 0, MAX_INT, "a whole number, at least 0 (0 is off)"),
    "top_p": (np.float32, TINY, 1, "above 0 and at most 1 (1 is off)"),
    "min_p": (np.float32, 0, 1, "from 0 (off) to 1"),
    "repetition": (np.float32, 1e-6, 1e6, "from 1e-6 to 1e6 (1 is off)"),
    "seed": (
        np.int32,
        0,
        MAX_INT,
        f"a whole number, 0 to {MAX_INT} (a single seed s gives rows s, s + 1, ...)",
    ),
}


class Sampling(NamedTuple):
    """How each row of a batch is sampled; arrays, so that a change compiles nothing."""

    temperature: Array  # float32 [B]; 0 is greedy
    top_k: Array  # int32 [B]; 0 is off
    top_p: Array  # float32 [B]; 1 is off
    min_p: Array  # float32 [B]; 0 is off
    repetition: Array  # float32 [B]; 1 is off, above 1 discourages
    seed: Array  # int32 [B]


def sampling(
    batch: int,
    *,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    repetition: ArrayLike = 1.0,
    seed: ArrayLike = 0,
) -> Sampling:
    """Settings of `batch` rows, each one number for all rows or one number a row.

    A single seed s gives the rows s, s + 1, ..., so that equal prompts differ.

    Raises:
      ValueError: a value out of its range, or not one a row.
    """
    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition": repetition,
        "seed": seed,
    }
    rows = {name: _rows(name, value, batch) for name, value in settings.items()}
    return Sampling(**{name: jnp.asarray(row) for name, row in rows.items()})


def _rows(name: str, value: ArrayLike, batch: int) -> NDArray[np.generic]:
    dtype, low, high, wanted = RULES[name]
    given = np.asarray(value)
    if given.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} has shape {given.shape}: must be one number, or {batch} of them, "
            "one for each row"
        )
    whole = dtype is np.int32
    if given.dtype.kind not in ("iu" if whole else "iuf"):
        raise ValueError(f"{name} = {value!r}: must be {wanted}")
    # What float32 makes of a value is what counts: 1e-50 is 0 and 1e50 is infinite.
    with np.errstate(over="ignore", under="ignore"):
        rows = np.broadcast_to(given, (batch,)).astype(np.int64 if whole else dtype)
    if name == "seed" and not given.shape:
        rows = rows + np.arange(batch)
    (wrong,) = np.nonzero(~((rows >= low) & (rows <= high)))
    if wrong.size:
        at = f"[{wrong[0]}]" if given.shape else ""
        one = given[wrong[0]] if given.shape else given
        raise ValueError(f"{name}{at} = {one}: must be {wanted}")
    return rows.astype(dtype)


def adjusted(logits_BLV: Array, seen: Array, s: Sampling) -> Array:
    """Logits of the distribution to sample from, -inf at what is masked: [B, L, V].

    Args:
      logits_BLV: the model's; at least float32 comes back.
      seen: bool, broadcastable to [B, L, V]: the tokens of prompt and output so far.
      s: a row's settings hold at all of its L positions.
    """
    logits_BLV = at_least_f32(logits_BLV)
    temperature, top_p, min_p, repetition = (
        setting.astype(logits_BLV.dtype)[:, None, None]
        for setting in (s.temperature, s.top_p, s.min_p, s.repetition)
    )
    top_k = s.top_k[:, None, None]
    rescaled = jnp.where(
        logits_BLV < 0, logits_BLV * repetition, logits_BLV / repetition
    )
    logits_BLV = jnp.where(seen, rescaled, logits_BLV)
    logits_BLV = jnp.minimum(logits_BLV, np.finfo(logits_BLV.dtype).max)

    # The largest at 0: a tiny temperature then overflows to -inf, not to inf - inf.
    top_BL1 = logits_BLV.max(-1, keepdims=True)
    x_BLV = logits_BLV - jnp.where(top_BL1 > -jnp.inf, top_BL1, 0)
    # Devices take floats below TINY for 0.
    greedy = temperature < TINY
    x_BLV = x_BLV / jnp.where(greedy, 1, temperature)

    # Both go by the logits before the shift, which can round two of them to one.
    def by_top_k(x_BLV: Array) -> Array:
        kept_BLV = _first(logits_BLV, jnp.ones_like(x_BLV, jnp.int32), top_k)
        return jnp.where(kept_BLV | (top_k == 0), x_BLV, -jnp.inf)

    def by_top_p(x_BLV: Array) -> Array:
        p_BLV = jnp.exp(x_BLV)
        limit = top_p * p_BLV.sum(-1, keepdims=True)
        kept_BLV = _first(logits_BLV, p_BLV, limit)
        return jnp.where(kept_BLV | (top_p == 1), x_BLV, -jnp.inf)

    x_BLV = _if_any(~greedy & (top_k > 0), by_top_k, x_BLV)
    x_BLV = _if_any(~greedy & (top_p < 1), by_top_p, x_BLV)
    x_BLV = jnp.where(x_BLV < jnp.log(min_p), -jnp.inf, x_BLV)
    best_BLV = jnp.arange(x_BLV.shape[-1]) == _argmax(logits_BLV)[..., None]
    return jnp.where(greedy, jnp.where(best_BLV, 0, -jnp.inf), x_BLV)


def _if_any(asked: Array, f: Callable[[Array], Array], x: Array) -> Array:
    return lax.cond(asked.any(), f, lambda x: x, x)


def _argmax(x_BLV: Array) -> Array:
    """jnp.argmax, in two reductions that a CPU vectorises: five times as fast there."""
    largest_BLV = x_BLV == x_BLV.max(-1, keepdims=True)
    last = x_BLV.shape[-1] - 1
    return jnp.where(largest_BLV, jnp.arange(last + 1, dtype=jnp.int32), last).min(-1)


def _first(x_BLV: Array, weight_BLV: Array, limit: Array) -> Array:
    """Tokens before which less than `limit` of the weight lies, the largest x first.

    Of equal x the lowest id comes first; they weigh the same, but for a last few that
    may weigh nothing. Nothing is sorted: the x at which the limit is reached is found
    bit by bit, with one sum over V for each bit, some ten times faster on a CPU than
    sorting 8192 logits.
    """
    bits = 8 * x_BLV.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    # Unsigned integers in the order of the floats they stand for, with -0 equal to 0.
    code_BLV = lax.bitcast_convert_type(jnp.where(x_BLV == 0, 0, x_BLV), unsigned)
    sign = jnp.array(1 << (bits - 1), unsigned)
    code_BLV = jnp.where(code_BLV < sign, code_BLV | sign, ~code_BLV)

    def weight_of(chosen_BLV: Array) -> Array:
        return jnp.where(chosen_BLV, weight_BLV, 0).sum(-1, keepdims=True)

    def next_bit(i: Array, edge_BL1: Array) -> Array:
        higher_BL1 = edge_BL1 | (sign >> i.astype(unsigned))
        enough = weight_of(code_BLV >= higher_BL1) >= limit
        return jnp.where(enough, higher_BL1, edge_BL1)

    edge_BL1 = jnp.zeros((*x_BLV.shape[:-1], 1), unsigned)
    edge_BL1 = lax.fori_loop(0, bits, next_bit, edge_BL1)
    equal_BLV = code_BLV == edge_BL1
    left_BL1 = limit - weight_of(code_BLV > edge_BL1)
    earlier_BLV = (equal_BLV.cumsum(-1) - 1) * weight_BLV
    return (code_BLV > edge_BL1) | (equal_BLV & (earlier_BLV < left_BL1))


def keys(s: Sampling, position_BL: Array, purpose: int) -> Array:
    """Random keys [B, L] of (seed, position, purpose), whatever else is in the batch.

    A token drafted again after its draft was thrown away gets the same number again.
    That changes no distribution: what was thrown away decided nothing that was kept.
    """

    def key(seed: Array, position: Array) -> Array:
        # Other generators give other numbers under vmap than alone.
        root = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(root, purpose), position)

    return jax.vmap(jax.vmap(key, (None, 0)))(s.seed, position_BL)


def _each(draw: Callable[[Array], Array], keys: Array) -> Array:
    """One draw for each key of an array of keys."""
    drawn = jax.vmap(draw)(keys.reshape(-1))
    return drawn.reshape(*keys.shape, *drawn.shape[1:])


def sample(logits_BLV: Array, keys_BL: Array) -> Array:
    """One token from each distribution: int32 [B, L]. Any leading axes will do.

    Draws no random numbers where nothing is left to chance, as in greedy decoding.
    """
    vocab, dtype = logits_BLV.shape[-1], logits_BLV.dtype

    def noisy(logits_BLV: Array) -> Array:
        return logits_BLV + _each(
            lambda key: jax.random.gumbel(key, (vocab,), dtype), keys_BL
        )

    open_BL = (logits_BLV > -jnp.inf).sum(-1) > 1
    return _argmax(_if_any(open_BL, noisy, logits_BLV))


def log_prob(logits_BLV: Array, tokens_BL: Array) -> Array:
    """Natural logarithm of the tokens' probabilities: [B, L]. Any leading axes."""
    logits_BLV = at_least_f32(logits_BLV)
    chosen_BL = jnp.take_along_axis(logits_BLV, tokens_BL[..., None], -1)[..., 0]
    return chosen_BL - jax.nn.logsumexp(logits_BLV, -1)


def accept(p_BJV: Array, q_BJV: Array, draft_BJ: Array, keys_BJ: Array) -> Array:
    """Whether each drafted token may stay, by itself: bool [B, J].

    Args:
      p_BJV: the target's adjusted logits at the drafted tokens' positions.
      q_BJV: the adjusted logits that the tokens were drawn from.
      draft_BJ: the tokens.
      keys_BJ: of a purpose that nothing else uses.
    """
    ratio_BJ = jnp.exp(log_prob(p_BJV, draft_BJ) - log_prob(q_BJV, draft_BJ))
    u_BJ = _each(lambda key: jax.random.uniform(key, (), ratio_BJ.dtype), keys_BJ)
    return u_BJ < ratio_BJ


def residual(p_BV: Array, q_BV: Array) -> Array:
    """Log-probabilities of max(p - q, 0) / sum, to draw from where a draft was refused.

    Arguments are adjusted logits; any leading axes. Where p nowhere exceeds q (they are
    equal, and nothing is refused) it is p.
    """
    log_p_BV = jax.nn.log_softmax(p_BV)
    rest_BV = jnp.maximum(jnp.exp(log_p_BV) - jnp.exp(jax.nn.log_softmax(q_BV)), 0)
    sum_B1 = rest_BV.sum(-1, keepdims=True)
    return jnp.where(sum_B1 > 0, jnp.log(rest_BV) - jnp.log(sum_B1), log_p_BV)
