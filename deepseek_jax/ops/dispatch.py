"""How tokens reach their experts and come back: DeepSeekMoE's sum_k w_k FFN_k(x).

Equation 12 of arXiv:2412.19437 for the routed experts. `experts_dense` runs every
expert on every token and is the oracle; `experts_blocks` sorts the T*K routed slots by
expert into blocks of rows padded to a whole number of blocks (MegaBlocks,
arXiv:2211.15841), so that no token is ever dropped. `experts_few` suits the few tokens
of a decoding step: a block of one row for each slot, so nothing is sorted, padded or
copied. The routing weight multiplies the activation before the down projection, which
is the same sum and saves keeping the expert outputs.

A slot may also go nowhere: its expert is E and its weight 0. So a device that holds E
of all experts computes those slots of a batch that are its own (`parallel.expert`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.swiglu import swiglu
from deepseek_jax.precision.later import Later
from deepseek_jax.typing import Array, at_least_f32

GroupedDot = Callable[..., Array]
Activation = Callable[..., Array | Later]
# (x_nbD, gate_EDF, up_EDF, weight_nb, expert_n, used, grouped_dot) -> what experts'
# down-projections multiply: [n, b, F].
Hidden = Callable[..., Array | Later]

FEW_SLOTS = 64  # where reading an expert's weights again costs what sorting costs


class Sorted(NamedTuple):
    """M keys in 0 .. n in order, where n stands for none of the n groups."""

    order_M: Array  # which key comes at each place
    rank_M: Array  # the place of each key
    count_n: Array  # keys of each group
    start_n: Array  # place of its first


def sort(key_M: Array, groups: int) -> Sorted:
    """Sorts keys, stably."""
    size = len(key_M)
    order_M = jnp.argsort(key_M, stable=True)
    count_n = jnp.bincount(key_M, length=groups)
    rank_M = (
        jnp.zeros(size, jnp.int32)
        .at[order_M]
        .set(jnp.arange(size, dtype=jnp.int32), unique_indices=True)
    )
    return Sorted(order_M, rank_M, count_n, jnp.cumsum(count_n) - count_n)


class Layout(NamedTuple):
    """Where each routed slot's row lies. n blocks of b rows; M = T*K slots."""

    expert_n: Array  # [n] the expert whose weights block i needs
    used: Array  # scalar, leading blocks that hold rows
    slot_nb: Array  # [n, b] the slot m = t*K + k in each row, M where it is padding
    row_TK: Array  # [T, K] the row (0 .. n*b - 1) of each slot, n*b if it goes nowhere


def layout(
    experts_TK: Array, num_experts: int, block: int, most: int | None = None
) -> Layout:
    """Sorts slots by expert, stably, and pads each expert's rows to whole blocks.

    There are enough blocks, at least ceil(most / block) + min(num_experts, most), for
    any routing whatever of `most` slots, by default all.
    """
    slots = experts_TK.size
    most = slots if most is None else most
    expert_M = experts_TK.reshape(-1)
    num_blocks = -(-most // block) + min(num_experts, most)
    num_blocks += -num_blocks % 4
    sorted_M, rank_M, count_E, sorted_E = sort(expert_M, num_experts)
    blocks_E = -(-count_E // block)
    end_E = jnp.cumsum(blocks_E)
    expert_n = jnp.searchsorted(end_E, jnp.arange(num_blocks), side="right")
    expert_n = jnp.minimum(expert_n, num_experts - 1).astype(jnp.int32)

    # Rows before expert e: `padded_E` in the blocks, `sorted_E` among the sorted slots.
    padded_E = (end_E - blocks_E) * block
    row_nb = jnp.arange(num_blocks * block).reshape(num_blocks, block)
    rank_nb = row_nb - padded_E[expert_n][:, None]
    position_nb = jnp.minimum(sorted_E[expert_n][:, None] + rank_nb, slots - 1)
    filled_nb = rank_nb < count_E[expert_n][:, None]
    slot_nb = jnp.where(filled_nb, sorted_M[position_nb], slots)

    row_M = padded_E[expert_M] + rank_M - sorted_E[expert_M]
    row_M = jnp.where(expert_M < num_experts, row_M, row_nb.size)
    used = jnp.minimum(end_E[-1], num_blocks)  # more than `most` slots are cut off
    return Layout(expert_n, used, slot_nb, row_M.reshape(experts_TK.shape))


@jax.custom_vjp
def take_rows(x_TD: Array, placed: Layout) -> Array:
    """Copies each slot's token to its row: [n, b, D], zero in padding."""
    top_k = placed.row_TK.shape[1]
    token_nb = placed.slot_nb // top_k  # padding's slot M gives T, out of range
    return jnp.take(x_TD, token_nb, axis=0, mode="fill", fill_value=0)


def _take_forward(x_TD: Array, placed: Layout) -> tuple[Array, Layout]:
    return take_rows(x_TD, placed), placed


def _take_backward(placed: Layout, g_nbD: Array) -> tuple[Array, None]:
    return sum_rows(g_nbD, placed), None


take_rows.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def sum_rows(y_nbD: Array, placed: Layout) -> Array:
    """Adds each token's K rows: [T, D]. The transpose of `take_rows`, also a gather."""
    y_RD = y_nbD.reshape(-1, y_nbD.shape[-1])
    return jnp.take(y_RD, placed.row_TK, axis=0, mode="fill", fill_value=0).sum(1)


def _sum_forward(y_nbD: Array, placed: Layout) -> tuple[Array, Layout]:
    return sum_rows(y_nbD, placed), placed


def _sum_backward(placed: Layout, g_TD: Array) -> tuple[Array, None]:
    return take_rows(g_TD, placed), None


sum_rows.defvjp(_sum_forward, _sum_backward)


def apart(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    grouped_dot: GroupedDot,
    *,
    swiglu: Activation = swiglu,
) -> Array | Later:
    """A `Hidden` of two products."""
    gate_nbF, up_nbF = (
        at_least_f32(grouped_dot(x_nbD, w_EDF, expert_n, used))
        for w_EDF in (gate_EDF, up_EDF)
    )
    return swiglu(gate_nbF, up_nbF, weight_nb)


def joined(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    grouped_dot: GroupedDot,
    *,
    swiglu: Activation = swiglu,
) -> Array | Later:
    """A `Hidden` of one product, for which matrices are copied together."""
    both_EDF = jnp.concatenate([gate_EDF, up_EDF], -1)
    both_nbF = at_least_f32(grouped_dot(x_nbD, both_EDF, expert_n, used))
    return swiglu(*jnp.split(both_nbF, 2, -1), weight_nb)


def experts_blocks(
    x_TD: Array,
    weights_TK: Array,
    experts_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    grouped_dot: GroupedDot,
    most: int | None = None,
    block: int = 128,
    hidden: Hidden = joined,
) -> Array:
    """sum_k weights_TK[:, k] * SwiGLU of expert experts_TK[:, k]: [T, D], dropless.

    Args:
      experts_TK: int, distinct within a token; E where a slot goes nowhere.
      grouped_dot: the Runtime's.
      most: the number of slots that go somewhere, at most; None: all may.
      block: rows a block; larger ones waste more padding and loop less often.
      hidden: how an expert's first half is computed.
    """
    placed = layout(experts_TK, len(gate_EDF), block, most)
    routing = placed.expert_n, placed.used
    x_nbD = take_rows(x_TD, placed)
    weight_nb = _row_weights(weights_TK, placed)
    hidden_nbF = hidden(x_nbD, gate_EDF, up_EDF, weight_nb, *routing, grouped_dot)
    return sum_rows(grouped_dot(hidden_nbF, down_EFD, *routing), placed)


@jax.custom_vjp
def _row_weights(weights_TK: Array, placed: Layout) -> Array:
    """The routing weight of each row, zero in padding: [n, b]."""
    flat_M = weights_TK.reshape(-1)
    return jnp.take(flat_M, placed.slot_nb, mode="fill", fill_value=0)


def _weights_forward(weights_TK: Array, placed: Layout) -> tuple[Array, Layout]:
    return _row_weights(weights_TK, placed), placed


def _weights_backward(placed: Layout, g_nb: Array) -> tuple[Array, None]:
    g_R = g_nb.reshape(-1)
    return jnp.take(g_R, placed.row_TK, mode="fill", fill_value=0), None


_row_weights.defvjp(_weights_forward, _weights_backward)


def experts_few(
    x_TD: Array,
    weights_TK: Array,
    experts_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    grouped_dot: GroupedDot,
    most: int | None = None,
    hidden: Hidden = apart,
) -> Array:
    """What `experts_blocks` computes, one row at a time."""
    routing = experts_TK.reshape(-1), jnp.asarray(experts_TK.size)
    x_M1D = jnp.repeat(x_TD, experts_TK.shape[1], axis=0)[:, None]
    weight_M1 = weights_TK.reshape(-1, 1)
    hidden_M1F = hidden(x_M1D, gate_EDF, up_EDF, weight_M1, *routing, grouped_dot)
    y_M1D = grouped_dot(hidden_M1F, down_EFD, *routing)
    return y_M1D.reshape(*experts_TK.shape, -1).sum(1)


def experts_by_size(
    x_TD: Array,
    weights_TK: Array,
    experts_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    grouped_dot: GroupedDot,
    most: int | None = None,
    block: int = 128,
    hidden: Hidden = apart,
    of_blocks: Hidden = joined,
) -> Array:
    """`experts_few` up to FEW_SLOTS slots, `experts_blocks` beyond.

    Blocks have `block` rows, and `of_blocks` computes an expert's first half; or as
    many as hold an expert's even share of the slots if that power of two is smaller.
    Then copying the experts would not pay.
    """
    share = -(-(most or experts_TK.size) // len(gate_EDF))
    rows = min(block, 1 << (share - 1).bit_length())
    if experts_TK.size <= FEW_SLOTS:
        experts: Callable[..., Array] = experts_few
    else:
        experts = functools.partial(experts_blocks, block=rows)
        hidden = of_blocks if rows == block else hidden
    return experts(
        x_TD,
        weights_TK,
        experts_TK,
        gate_EDF,
        up_EDF,
        down_EFD,
        grouped_dot=grouped_dot,
        most=most,
        hidden=hidden,
    )


def experts_dense(
    x_TD: Array,
    weights_TK: Array,
    experts_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    grouped_dot: GroupedDot,
    most: int | None = None,
    hidden: Hidden = apart,
) -> Array:
    """The oracle: every expert on every token, as E blocks of T rows."""
    num_experts = len(gate_EDF)
    everyone_n = jnp.arange(num_experts, dtype=jnp.int32)
    routing = everyone_n, jnp.asarray(num_experts)
    x_ETD = jnp.broadcast_to(x_TD, (num_experts, *x_TD.shape))
    hidden_ETF = hidden(x_ETD, gate_EDF, up_EDF, None, *routing, grouped_dot)
    y_ETD = grouped_dot(hidden_ETF, down_EFD, *routing)
    hit_TKE = experts_TK[..., None] == everyone_n
    weight_TE = jnp.where(hit_TKE, weights_TK[..., None], 0).sum(1)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("TE,ETD->TD", weight_TE, y_ETD, precision=highest)
