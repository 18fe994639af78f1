"""Where experts and their copies lie, so that every device has about the same load.

The redundant experts of arXiv:2412.19437, section 3.4, placed as DeepSeek's EPLB does
(github.com/deepseek-ai/EPLB), hierarchically: groups of experts are dealt out to nodes,
an expert group staying on one node; then each node copies its busiest experts; then it
deals the copies out to its devices. Where groups do not divide over the nodes, all is
one group on one node ("global"). `place` runs on the host, on measured loads;
`replica_of` and `expand` are what a device needs of it, `on_copies` puts the first
between a router and its experts.

Greedy, so not optimal: loads that happen to lie evenly can come out less even than they
were. What does hold, in every layer: no choice of as many copies on a node has a
smaller largest share (load over copies), and two devices of a node differ by at most
that share, as two nodes differ by at most the largest group. Two copies of an expert
may meet on one device. We list an expert's copies by place, DeepSeek in the order in
which they were made, and loads are float64 where DeepSeek has float32, so near ties
may fall otherwise.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek_jax.runtime import Experts
from deepseek_jax.typing import Array

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


class Placement(NamedTuple):
    """Of R layers: E logical experts on P places, P / devices in a row on a device."""

    phy2log: Ints  # [R, P] the logical expert at each place
    log2phy: Ints  # [R, E, most copies] an expert's places, ascending, then -1
    counts: Ints  # [R, E] copies of each expert, at least 1


def place(
    loads_RE: ArrayLike, replicas: int, *, devices: int, nodes: int = 1, groups: int = 1
) -> Placement:
    """Copies experts up to `replicas` places and spreads these over the devices.

    Args:
      loads_RE: tokens, or anything proportional, that each expert received by layer.
      replicas: P, places on all devices together, at least E.
      devices: in all, node after node; each gets replicas / devices places.
      groups: consecutive experts that a node keeps together; 1 if routing has none.

    Raises:
      ValueError: sizes that do not divide, or loads that are no finite numbers >= 0.
    """
    loads_RE = _checked(loads_RE)
    layers, experts = loads_RE.shape
    _check_sizes(experts, replicas, devices, nodes, groups)
    if groups % nodes:
        groups = nodes = 1

    size = experts // groups
    slot_RG = _pack(loads_RE.reshape(layers, groups, size).sum(-1), nodes)
    group_RG = np.argsort(slot_RG, -1)
    expert_RE = (group_RG[..., None] * size + np.arange(size)).reshape(layers, experts)

    # From here on a row n is a node of a layer; its experts go by their order on it.
    by_node = (layers * nodes, experts // nodes)
    load_nE = np.take_along_axis(loads_RE, expert_RE, -1).reshape(by_node)
    local_nP, counts_nE = _replicate(load_nE, replicas // nodes)
    share_nP = np.take_along_axis(load_nE / counts_nE, local_nP, -1)
    slot_nP = _pack(share_nP, devices // nodes)
    local_nP = np.take_along_axis(local_nP, np.argsort(slot_nP, -1), -1)
    phy2log = np.take_along_axis(expert_RE.reshape(by_node), local_nP, -1)
    return _placement(phy2log.reshape(layers, replicas), experts)


def contiguous(layers: int, experts: int) -> Placement:
    """One copy of each expert, in order: what a mesh does without being told."""
    in_order = np.broadcast_to(np.arange(experts), (layers, experts))
    return _placement(in_order, experts)


def device_loads(loads_RE: ArrayLike, placement: Placement, devices: int) -> Floats:
    """Load of each device, a copied expert's load being shared evenly: [R, devices].

    Raises:
      ValueError: loads of another shape, or places that do not divide over `devices`.
    """
    loads_RE = _checked(loads_RE)
    if loads_RE.shape != placement.counts.shape:
        raise ValueError(
            f"loads have shape {list(loads_RE.shape)}: the placement is one of "
            f"{list(placement.counts.shape)}"
        )
    layers, places = placement.phy2log.shape
    _divides("devices", devices, places, "places")
    share_RE = loads_RE / placement.counts
    share_RP = np.take_along_axis(share_RE, placement.phy2log, -1)
    return share_RP.reshape(layers, devices, -1).sum(-1)


def imbalance(device_Rg: ArrayLike) -> Floats:
    """Largest over mean load by layer: 1 is even; NaN where there is no load at all."""
    loads = np.asarray(device_Rg, np.float64)
    with np.errstate(invalid="ignore"):
        ratio: Floats = loads.max(-1) / loads.mean(-1)
    return ratio


def replica_of(
    log2phy_Ec: Array, counts_E: Array, experts_TK: Array, first: Array | int = 0
) -> Array:
    """The places that T tokens go to, one of the copies of each expert chosen: [T, K].

    Token number t takes copy t modulo the number of copies, so that any run of tokens
    that want one expert spreads evenly over its copies, and which copy it is does not
    depend on what other tokens want. Tokens that take turns, as every second one
    wanting an expert of two copies, meet on one of them.

    Args:
      log2phy_Ec: of one layer.
      experts_TK: int, logical experts.
      first: number of the first token; where each device has its own, their offset.
    """
    token_T1 = (first + jnp.arange(len(experts_TK)))[:, None]
    copy_TK = token_T1 % jnp.asarray(counts_E)[experts_TK]
    return jnp.asarray(log2phy_Ec)[experts_TK, copy_TK]


def expand(weights_EDF: Array, phy2log_P: Array) -> Array:
    """The weights at each place of one layer, from those of each expert: [P, D, F]."""
    return jnp.take(weights_EDF, phy2log_P, axis=0)


class Copies(NamedTuple):
    """What a router needs of one layer's placement, on its devices."""

    log2phy_Ec: Array
    counts_E: Array


def on_copies(
    x_TD: Array,
    weights_TK: Array,
    experts_TK: Array,
    *weights_at_places: Array,
    experts: Experts,
    copies: Copies,
    **how: Any,
) -> tuple[Array, Array | None]:
    """`Runtime.experts` with a matrix for each place and not for each expert.

    Args:
      experts: the runtime's, to which a place is what an expert is elsewhere.
    """
    place_TK = replica_of(*copies, experts_TK)
    return experts(x_TD, weights_TK, place_TK, *weights_at_places, **how)


def _checked(loads_RE: ArrayLike) -> Floats:
    loads = np.asarray(loads_RE, np.float64)
    if loads.ndim != 2 or not loads.size:
        raise ValueError(f"loads have shape {list(loads.shape)}: must be [layers, E]")
    if not (np.isfinite(loads).all() and (loads >= 0).all()):
        raise ValueError("loads: must be finite and at least 0")
    return loads


def _divides(name: str, value: int, of: int, what: str) -> None:
    if value < 1 or of % value:
        raise ValueError(f"{name} = {value}: must divide the {of} {what}")


def _check_sizes(
    experts: int, replicas: int, devices: int, nodes: int, groups: int
) -> None:
    _divides("groups", groups, experts, "experts")
    if devices < 1 or replicas < experts or replicas % devices:
        raise ValueError(
            f"replicas = {replicas}: must be a multiple of devices = {devices} and at "
            f"least the {experts} experts"
        )
    _divides("nodes", nodes, devices, "devices")


def _pack(loads_ni: Floats, packs: int) -> NDArray[np.int64]:
    """Deals items out to packs of one size; each item's slot, pack after pack: [n, i].

    The heaviest first, each to the lightest pack that has room.
    """
    rows, items = loads_ni.shape
    room = items // packs
    # With one slot a pack there is nothing to even out: all stays where it is.
    falling = np.argsort(-loads_ni, -1, kind="stable")
    order_ni = falling if room > 1 else np.broadcast_to(np.arange(items), falling.shape)
    row_n = np.arange(rows)
    slot_ni = np.empty((rows, items), np.int64)
    pack_np, used_np = np.zeros((rows, packs)), np.zeros((rows, packs), np.int64)
    for item_n in order_ni.T:
        open_np = np.where(used_np < room, pack_np, np.inf)
        pack_n = open_np.argmin(-1)
        slot_ni[row_n, item_n] = pack_n * room + used_np[row_n, pack_n]
        pack_np[row_n, pack_n] += loads_ni[row_n, item_n]
        used_np[row_n, pack_n] += 1
    return slot_ni


def _replicate(
    loads_nE: Floats, places: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The expert of each copy [n, places] and the number of copies of each [n, E].

    A copy at a time, for the expert whose copies have the largest share of load.
    """
    rows, experts = loads_nE.shape
    row_n = np.arange(rows)
    counts_nE = np.ones((rows, experts), np.int64)
    expert_nP = np.empty((rows, places), np.int64)
    expert_nP[:, :experts] = np.arange(experts)
    for copy in range(experts, places):
        expert_nP[:, copy] = busiest_n = (loads_nE / counts_nE).argmax(-1)
        counts_nE[row_n, busiest_n] += 1
    return expert_nP, counts_nE


def _placement(phy2log: NDArray[np.integer], experts: int) -> Placement:
    """Adds the way back from experts to places."""
    layers, places = phy2log.shape
    row_R1 = np.arange(layers)[:, None]
    counts = np.zeros((layers, experts), np.int64)
    np.add.at(counts, (row_R1, phy2log), 1)
    place_RP = np.argsort(phy2log, -1, kind="stable")
    expert_RP = np.take_along_axis(phy2log, place_RP, -1)
    first_RE = counts.cumsum(-1) - counts
    copy_RP = np.arange(places) - np.take_along_axis(first_RE, expert_RP, -1)
    log2phy = np.full((layers, experts, counts.max()), -1, np.int32)
    log2phy[row_R1, expert_RP, copy_RP] = place_RP
    return Placement(phy2log.astype(np.int32), log2phy, counts.astype(np.int32))
