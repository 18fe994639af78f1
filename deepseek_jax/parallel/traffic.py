"""Counts what the transports of `parallel.transport` send over links, from the routing.

Rows are counted from device to device, exchange by exchange, then as bytes over the
links inside a node and over those between nodes (arXiv:2412.19437, section 3.2.2: 160
and 50 GB/s a device, so that an expert on a node costs less than reaching the node by a
factor of 3.2). What stays on its device crosses none.

This is a forward pass. The backward pass sends as much again, with dispatch and combine
in each other's place. Not counted are the few numbers that a layer sends whatever its
size: whether all had room, and how many rows a `ragged` exchange sends to each rank.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]  # [devices, devices], from each to each

TILE = 128  # numbers that share a scale in FP8
SCALES = {"fp8": 4, "fp8_ue8m0": 1}  # bytes of one
SLOT = 4 + 4  # bytes of a slot's routing weight and of its expert's number
HALF = 2  # bytes of a number in bf16


class Layout(NamedTuple):
    """E experts and a batch's tokens over devices, node after node, in equal shares."""

    nodes: int
    local: int  # devices of a node
    experts: int  # E

    @property
    def devices(self) -> int:
        return self.nodes * self.local


class Links(NamedTuple):
    """Of the links inside a node, and of those between nodes."""

    intra: float
    inter: float


class Room(NamedTuple):
    """An exchange's places."""

    rows: int  # that a device has to send, empty ones too
    room: int  # places for each rank, or of a ragged exchange for all that comes in
    most: int  # what would always do


class Traffic(NamedTuple):
    """Bytes that cross links in a layer's forward pass, over all tokens."""

    dispatch: Links  # rows on their way to experts
    combine: Links  # and back
    metadata: Links  # routing weights and expert numbers, beside the dispatch
    padded_dispatch: Links  # the same, as buffers have room for it
    padded_combine: Links
    padded_metadata: Links
    fits: bool  # if not, the ring's traffic comes on top of the padded one


def row_bytes(payload: str, dim: int, itemsize: int = 4) -> tuple[int, int]:
    """Bytes of a row of `dim` numbers on its way to an expert, and on its way back.

    Args:
      itemsize: bytes of one of the model's own numbers, as which `exact` sends it.

    Raises:
      ValueError: there is no such payload.
    """
    if payload == "exact":
        return dim * itemsize, dim * itemsize
    if payload == "bf16":
        return dim * HALF, dim * HALF
    if payload in SCALES:
        return dim + SCALES[payload] * math.ceil(dim / TILE), dim * HALF
    raise ValueError(
        f"payload = {payload!r}: must be one of exact, bf16, {', '.join(SCALES)}"
    )


def rooms(
    ranks: tuple[int, ...],
    reach: tuple[int, ...],
    tokens: int,
    top_k: int,
    *,
    capacity: float,
    ragged: bool,
) -> tuple[Room, ...]:
    """The places of one exchange after another, as `transport.plan_route` has them.

    Args:
      ranks: of each exchange.
      reach: of those, how many a token has experts on, at most.
      tokens: of a device.
      capacity: room over what an even load needs.
    """
    rows, copies, found = tokens, tokens, []
    for each, most in zip(ranks, reach, strict=True):
        copies = min(copies * min(top_k, each, most), tokens * top_k)
        wanted = math.ceil(capacity * copies / (1 if ragged else each))
        ceiling = rows * each if ragged else rows
        found.append(Room(rows, min(wanted, ceiling), ceiling))
        rows = found[-1].room * (1 if ragged else each)
    return tuple(found)


def copies(transport: str, experts_TK: ArrayLike, layout: Layout) -> list[Counts]:
    """Rows sent from each device to each (itself too), exchange by exchange.

    Args:
      experts_TK: int, distinct within a token; tokens in the order of their devices.

    Raises:
      ValueError: tokens or experts do not divide over the devices, an expert is none
        of E, or there is no such transport.
    """
    nodes, local, devices = layout.nodes, layout.local, layout.devices
    chosen_TK = _checked(np.asarray(experts_TK), layout)
    if transport == "ring":
        following = np.roll(np.eye(devices, dtype=np.int64), 1, axis=1)
        return [following * (len(chosen_TK) // devices * (devices - 1))]
    hit_TR = np.zeros((len(chosen_TK), devices), bool)
    device_TK = chosen_TK // (layout.experts // devices)
    np.put_along_axis(hit_TR, device_TK, True, axis=1)
    hit = hit_TR.reshape(nodes, local, -1, nodes, local)
    if transport in ("all_to_all", "ragged"):
        return [hit.sum(2).reshape(devices, devices)]
    if transport == "two_hop":
        square = (devices, devices)
        # To the own place l on each node m, whence to the places k there.
        across = np.einsum("nlm,lk->nlmk", hit.any(-1).sum(2), np.eye(local, dtype=int))
        within = np.einsum("lmk,nm->nlmk", hit.sum((0, 2)), np.eye(nodes, dtype=int))
        return [across.reshape(square), within.reshape(square)]
    raise ValueError(
        f"transport = {transport!r}: must be one of ring, all_to_all, ragged, two_hop"
    )


def crossing(counts: Counts, layout: Layout) -> Links:
    """How much of what is sent from device to device crosses links of either kind."""
    node_R = np.arange(layout.devices) // layout.local
    same_RR = node_R[:, None] == node_R
    inside = same_RR & ~np.eye(layout.devices, dtype=bool)
    return Links(int(counts[inside].sum()), int(counts[~same_RR].sum()))


def count(
    transport: str,
    experts_TK: ArrayLike,
    layout: Layout,
    *,
    dim: int,
    payload: str = "fp8",
    itemsize: int = 4,
    capacity: float = 1.5,
    reach: int | None = None,
) -> Traffic:
    """The bytes of a layer whose tokens chose `experts_TK`.

    Args:
      payload: of the rows; the ring sends them as they are.
      itemsize: as `row_bytes` has it.
      capacity: `mesh.capacity`.
      reach: nodes that a token has experts on, at most; all by default.

    Raises:
      ValueError: as `copies` and `row_bytes`.
    """
    experts_TK = np.asarray(experts_TK)
    sent = copies(transport, experts_TK, layout)
    places, fits = _places(transport, experts_TK, layout, sent, capacity, reach)
    kind = "exact" if transport == "ring" else payload
    there, back = row_bytes(kind, dim, itemsize)
    slots = SLOT * experts_TK.shape[1]
    return Traffic(
        dispatch=_total(sent, layout, there),
        combine=_total(sent, layout, back),
        metadata=_total(sent, layout, slots),
        padded_dispatch=_total(places, layout, there),
        padded_combine=_total(places, layout, back),
        padded_metadata=_total(places, layout, slots),
        fits=fits,
    )


def seconds(sent: Links, speed: Links) -> Links:
    """Time on either kind of link; they work at the same time.

    Args:
      sent: bytes of a device.
      speed: bytes/s of a device.
    """
    return Links(sent.intra / speed.intra, sent.inter / speed.inter)


def _checked(experts_TK: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    for name, size in (("tokens", len(experts_TK)), ("experts", layout.experts)):
        if size % layout.devices:
            raise ValueError(
                f"{size} {name}: must divide over {layout.nodes} nodes of "
                f"{layout.local} devices"
            )
    if experts_TK.min() < 0 or experts_TK.max() >= layout.experts:
        raise ValueError(
            f"experts {experts_TK.min()} to {experts_TK.max()}: must be 0 to "
            f"{layout.experts - 1}"
        )
    return experts_TK


def _places(
    transport: str,
    experts_TK: NDArray[np.int64],
    layout: Layout,
    sent: list[Counts],
    capacity: float,
    reach: int | None,
) -> tuple[list[Counts], bool]:
    """Places in what is sent, filled or not; and whether all rows have one."""
    if transport == "ring":
        return sent, True
    tokens, top_k = len(experts_TK) // layout.devices, experts_TK.shape[1]
    ragged, experts = transport == "ragged", layout.experts // layout.devices
    nodes, local = layout.nodes, layout.local
    two = transport == "two_hop"
    ranks = (nodes, local) if two else (layout.devices,)
    most = (reach or nodes, local) if two else ranks
    found = rooms(ranks, most, tokens, top_k, capacity=capacity, ragged=ragged)
    came = found[-1].room * (1 if ragged else ranks[-1])
    slots = min(came * min(top_k, experts), math.ceil(capacity * tokens * top_k))
    load_R = np.bincount(experts_TK.reshape(-1) // experts, minlength=layout.devices)
    fits = bool(load_R.max() <= slots)
    if ragged:
        return sent, fits and bool(sent[0].sum(0).max() <= found[0].room)
    node_R, place_R = np.divmod(np.arange(layout.devices), local)
    ways = [place_R[:, None] == place_R, node_R[:, None] == node_R]
    ways = ways if two else [np.ones_like(ways[0])]
    places = [way * each.room for way, each in zip(ways, found, strict=True)]
    fits = fits and all((s <= p).all() for s, p in zip(sent, places, strict=True))
    return places, bool(fits)


def _total(counts: list[Counts], layout: Layout, size: int) -> Links:
    """Bytes over links of all exchanges together, `size` a row."""
    each = [crossing(one, layout) for one in counts]
    intra, inter = (sum(column) * size for column in zip(*each, strict=True))
    return Links(intra, inter)
