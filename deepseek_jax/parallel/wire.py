"""What travels between devices, and as what: copies of rows over mesh axes.

Rows go out to experts (`send`, dispatch) and come back (`collect`, combine); the
backward pass of either is the other. As in DeepSeek-V3 (arXiv:2412.19437, sections
3.2.2, 3.3.3) what goes out may be FP8 in tiles of 1 x 128, and so may the gradient that
goes the same way in the backward pass of `collect`; what comes back is then BF16. A
scale travels as f32 or, where it is a power of two, as one byte.

Each pair of ranks may have the same room, or what it needs: with `sizes_RR` rows
travel by `lax.ragged_all_to_all`, and where XLA has none, by the same made from a
gather of everything, which is for tests.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.dispatch import Sorted, sort
from deepseek_jax.typing import Array
from pallas_kernels.fp8_quantize.reference import (
    TILE,
    TINY_AMAX,
    dequantize,
    encode,
    scales,
)

EXPONENT = 23  # bits of a float32 below its exponent


class Hop(NamedTuple):
    """Where the copies of t rows go, one to each rank that a row has an expert on."""

    row_s: Array  # the row whose copy lies in each of s places; t where there is none
    place_tK: Array  # the place of the copy for the row's k-th slot; s: it has none
    sizes_RR: Array | None  # copies from each rank to each; None: s/R places for each


@dataclass(frozen=True)
class Wire:
    """How rows travel."""

    axes: tuple[str, ...]
    payload: str
    room: int  # places for what comes in
    native: bool  # `lax.ragged_all_to_all` exists here


def plan(rank_tK: Array, ranks: int, room: int) -> tuple[Hop, Array]:
    """Places for one copy of a row to each rank among its slots', `room` for a rank.

    Returns:
      The hop, and whether all copies have a place.
    """
    (order_M, rank_M, count_R, start_R), first_tK = sort_copies(rank_tK, ranks)
    size, top_k = rank_tK.size, rank_tK.shape[1]
    place_Rc = start_R[:, None] + jnp.arange(room)
    filled_Rc = jnp.arange(room) < count_R[:, None]
    slot_Rc = jnp.where(filled_Rc, order_M[jnp.minimum(place_Rc, size - 1)], size)
    key_M = first_tK.reshape(-1)
    within_M = rank_M - start_R[key_M]
    placed = (key_M < ranks) & (within_M < room)
    place_M = jnp.where(placed, key_M * room + within_M, ranks * room)
    hop = Hop(slot_Rc.reshape(-1) // top_k, place_M.reshape(rank_tK.shape), None)
    return hop, (count_R <= room).all()


def plan_ragged(
    rank_tK: Array, ranks: int, room: int, axes: tuple[str, ...]
) -> tuple[Hop, Array]:
    """The same without gaps between ranks' shares, `room` for all that comes in."""
    (order_M, rank_M, count_R, _), first_tK = sort_copies(rank_tK, ranks)
    top_k = rank_tK.shape[1]
    places = len(rank_tK) * min(top_k, ranks)
    sent = count_R.sum()
    row_s = jnp.where(
        jnp.arange(places) < sent, order_M[:places] // top_k, len(rank_tK)
    )
    place_M = jnp.where(first_tK.reshape(-1) < ranks, rank_M, places)
    sizes_RR = lax.all_gather(count_R, axes)
    fits = sizes_RR[:, lax.axis_index(axes)].sum() <= room
    # What does not fit is not sent: it would be written past the end.
    ends_RR = jnp.minimum(jnp.cumsum(sizes_RR, 0), room)
    sizes_RR = jnp.diff(ends_RR, axis=0, prepend=0)
    return Hop(row_s, place_M.reshape(rank_tK.shape), sizes_RR), fits


def sort_copies(rank_tK: Array, ranks: int) -> tuple[Sorted, Array]:
    """The slots sorted by rank, but only a row's first of each rank, and that rank."""
    same_tKK = rank_tK[:, :, None] == rank_tK[:, None, :]
    earlier_KK = jnp.tri(rank_tK.shape[1], k=-1, dtype=bool)
    repeated_tK = (same_tKK & earlier_KK).any(-1)
    first_tK = jnp.where(repeated_tK, ranks, rank_tK)
    return sort(first_tK.reshape(-1), ranks), first_tK


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(x_tD: Array, hop: Hop, wire: Wire) -> Array:
    """The copies that come in: [room, D], zero where nothing came."""
    return out(_take(x_tD, hop), hop, wire)


def _send_forward(x_tD: Array, hop: Hop, wire: Wire) -> tuple[Array, Hop]:
    return send(x_tD, hop, wire), hop


def _send_backward(wire: Wire, hop: Hop, g_rD: Array) -> tuple[Array, None]:
    return collect(g_rD, hop, wire), None


send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(y_rD: Array, hop: Hop, wire: Wire) -> Array:
    """Sends copies back where they came from and adds those of each row: [t, D]."""
    y_sD = _back(y_rD, hop, wire)
    return jnp.take(y_sD, hop.place_tK, axis=0, mode="fill", fill_value=0).sum(1)


def _collect_forward(y_rD: Array, hop: Hop, wire: Wire) -> tuple[Array, Hop]:
    return collect(y_rD, hop, wire), hop


def _collect_backward(wire: Wire, hop: Hop, g_tD: Array) -> tuple[Array, None]:
    return send(g_tD, hop, wire), None


collect.defvjp(_collect_forward, _collect_backward)


def _take(x_tD: Array, hop: Hop) -> Array:
    return jnp.take(x_tD, hop.row_s, axis=0, mode="fill", fill_value=0)


def out(x_sD: Array, hop: Hop, wire: Wire) -> Array:
    """Exchanges what lies in the places to send, as the payload has it."""
    encode, decode = PAYLOADS[wire.payload]
    move = functools.partial(_move, hop.sizes_RR, wire, wire.room)
    return decode(*map(move, encode(x_sD)), x_sD.dtype)


def numbers_out(x_tK: Array, hop: Hop, wire: Wire) -> Array:
    """`send` for integers of at least 0; -1 where nothing came."""
    return _move(hop.sizes_RR, wire, wire.room, _take(x_tK + 1, hop)) - 1


def _back(y_rD: Array, hop: Hop, wire: Wire) -> Array:
    dtype = y_rD.dtype if wire.payload == "exact" else jnp.bfloat16
    sizes_RR = None if hop.sizes_RR is None else hop.sizes_RR.T
    y_sD = _move(sizes_RR, wire, len(hop.row_s), y_rD.astype(dtype))
    return y_sD.astype(y_rD.dtype)


def _move(sizes_RR: Array | None, wire: Wire, room: int, x_sD: Array) -> Array:
    """Rows to the ranks whose shares they lie in; `room` places for what comes."""
    if sizes_RR is None:
        return lax.all_to_all(x_sD, wire.axes, 0, 0, tiled=True)
    me = lax.axis_index(wire.axes)
    before_RR = jnp.cumsum(sizes_RR, 1) - sizes_RR
    there_RR = jnp.cumsum(sizes_RR, 0) - sizes_RR
    out = jnp.zeros((room, *x_sD.shape[1:]), x_sD.dtype)
    move = lax.ragged_all_to_all if wire.native else ragged_all_to_all
    where = before_RR[me], sizes_RR[me], there_RR[me], sizes_RR[:, me]
    return move(x_sD, out, *where, axis_name=wire.axes)


def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: tuple[str, ...],
) -> Array:
    """`lax.ragged_all_to_all`: all gather everything, and each picks its own."""
    all_x, starts, sizes, ends = (
        lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me = lax.axis_index(axis_name)
    place = jnp.arange(len(output))[:, None]
    after = place - ends[:, me]
    hit = (after >= 0) & (after < sizes[:, me])
    rank = jnp.argmax(hit, 1)
    row = starts[rank, me] + jnp.take_along_axis(after, rank[:, None], 1)[:, 0]
    came = all_x[rank, jnp.clip(row, 0, len(operand) - 1)]
    wanted = hit.any(1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(wanted, came, output)


Encode = Callable[[Array], tuple[Array, ...]]
Decode = Callable[..., Array]


def _cast(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


def _to_bf16(x: Array) -> tuple[Array, ...]:
    return (x.astype(jnp.bfloat16),)


def _to_fp8(x: Array) -> tuple[Array, ...]:
    # Gradients of a mean over millions of tokens are far below the usual least scale.
    scale = scales(x, TILE, True, TINY_AMAX)
    return encode(x, scale, TILE), scale


def _from_fp8(codes: Array, scale: Array, dtype: Any) -> Array:
    return dequantize(codes, scale, TILE, dtype)


def _to_fp8_ue8m0(x: Array) -> tuple[Array, ...]:
    codes, scale = _to_fp8(x)
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    return codes, (bits >> EXPONENT).astype(jnp.uint8)


def _from_fp8_ue8m0(codes: Array, exponent: Array, dtype: Any) -> Array:
    bits = exponent.astype(jnp.uint32) << EXPONENT
    return _from_fp8(codes, lax.bitcast_convert_type(bits, jnp.float32), dtype)


PAYLOADS: dict[str, tuple[Encode, Decode]] = {
    "exact": (lambda x: (x,), _cast),
    "bf16": (_to_bf16, _cast),
    "fp8": (_to_fp8, _from_fp8),
    "fp8_ue8m0": (_to_fp8_ue8m0, _from_fp8_ue8m0),
}
