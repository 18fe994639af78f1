"""Quantile balancing: the biases that would have balanced the last batch, in one step.

With a_t the (K+1)-th largest of s_t + b, token t picks expert i exactly when b_i is
above a_t - s_ti, the bias it requires of i. With the a_t held, expert i would have got
its fair K/E of the tokens had b_i been the K/E quantile, over the global batch, of what
they require. Sources: torchtitan PR 4577 (after Kimi K3's report) and marin issue 3406.

A quantile over shards and micro-batches needs a histogram, whose counts add up. Where
we differ is its range, which elsewhere follows b. We shift b so that its (K+1)-th
largest entry is 0; a constant never changes the selection. Then K+1 choices are at
least 0 and at most K exceed 1, so a_t lies in [0, 1] and a_t - s_ti in [-1, 1],
whatever b is. Bins are even in sign(x) sqrt|x|: 1e-6 wide at 0, where softmax over many
experts and fresh sigmoid routers need it, 6e-4 at 0.1 and 2e-3 at the ends.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.typing import Array

BINS = 2048


def required_bias(scores_TE: Array, choice_TE: Array, top_k: int) -> Array:
    """a_t - s_ti, the bias above which token t picks expert i: [T, E]."""
    cut_T1 = jax.lax.top_k(choice_TE, top_k + 1)[0][:, top_k:]
    return cut_T1 - scores_TE


def histogram(x_TE: Array, valid_T: Array) -> Array:
    """int32 [E, BINS]: how many valid tokens fall into each bin of [-1, 1], per expert.

    Root and floor are correctly rounded (a logarithm is not), so that where a token
    sits in a batch or shard can't change its bin.
    """
    spread_TE = jnp.sign(x_TE) * jnp.sqrt(jnp.abs(x_TE))
    bin_TE = jnp.floor((spread_TE + 1) * (BINS / 2)).astype(jnp.int32)
    bin_TE = jnp.clip(bin_TE, 0, BINS - 1)
    experts = x_TE.shape[-1]
    counts = jnp.zeros((experts, BINS), jnp.int32)
    weight_T1 = valid_T.astype(jnp.int32)[:, None]
    return counts.at[jnp.arange(experts), bin_TE].add(weight_T1)


def edges(dtype: jnp.dtype) -> Array:
    """The BINS + 1 edges of the bins."""
    spread = jnp.linspace(-1, 1, BINS + 1, dtype=dtype)
    return spread * jnp.abs(spread)


def solve(counts: Array, bias_E: Array, top_k: int) -> Array:
    """New biases: each expert's K/E quantile, linear inside a bin, then shifted.

    Args:
      counts: int32 [E, BINS], `histogram` summed over the global batch.
      bias_E: the present biases, kept when the batch holds no valid token.
      top_k: K < E.
    """
    experts = len(bias_E)
    upto = counts.cumsum(-1, dtype=jnp.int32)
    tokens = upto[0, -1]
    # tokens * K / E = whole + rest / E without the product, which could overflow.
    rest = tokens % experts * top_k
    whole, rest = tokens // experts * top_k + rest // experts, rest % experts
    bin_E = (upto < whole + (rest > 0)).sum(-1, dtype=jnp.int32)
    bin_E = jnp.minimum(bin_E, BINS - 1)
    inside_E = jnp.take_along_axis(counts, bin_E[:, None], -1)[:, 0]
    below_E = jnp.take_along_axis(upto, bin_E[:, None], -1)[:, 0] - inside_E
    part_E = (whole - below_E + rest.astype(bias_E.dtype) / experts) / jnp.maximum(
        inside_E, 1
    )
    edge = edges(bias_E.dtype)
    new_E = edge[bin_E] + part_E * (edge[bin_E + 1] - edge[bin_E])
    new_E = (new_E - jax.lax.top_k(new_E, top_k + 1)[0][top_k]).astype(bias_E.dtype)
    return jnp.where(tokens > 0, new_E, bias_E)
