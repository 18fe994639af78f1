"""How tokens reach experts on other devices, and come back.

Each transport computes what `Runtime.experts` does for the rows of a device, where the
experts are split over `node` x `expert`. No token is ever dropped.

* `ring`: every device's tokens go round by all the others, and what these add to the
  result goes with them. It moves all of the tokens whatever the routing, as they are,
  and computes a device's share of them at a time; the backward pass keeps them all.
* `all_to_all`: a token is copied once to each device that has one of its experts, into
  room for `capacity` times an even load. `ragged` sends only what there is.
* `two_hop`: a token is copied once to each node that has one of its experts, to the
  device at the sender's place there, and from there inside the node; results are added
  up on the way back at each step (arXiv:2412.19437, section 3.2.2).

Should the room not do, for a routing as uneven as that, the result is the ring's, which
is then computed too: exact, only slower. Routing weights and expert numbers travel with
the rows, and do so exactly.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel import traffic, wire
from deepseek_jax.parallel.mesh import EXPERTS
from deepseek_jax.parallel.wire import Hop, Wire
from deepseek_jax.runtime import Experts, GroupedDot
from deepseek_jax.typing import Array


class Slots(NamedTuple):
    """Tokens and where they go: what an `Experts` callable takes first."""

    x_tD: Array
    weights_tK: Array
    experts_tK: Array


class Weights(NamedTuple):
    """The experts of a device."""

    gate_eDF: Array
    up_eDF: Array
    down_eFD: Array


@dataclass(frozen=True)
class Group:
    """The devices that share the experts, and how they compute and talk."""

    local: Experts  # `Runtime.experts` on one device
    node: int
    expert: int
    reach: int  # nodes that a token has experts on, at most
    capacity: float
    payload: str
    native: bool
    spare: "Transport"  # what does where the room does not do
    same: tuple[str, ...]  # the axes whose devices decide so together

    def size(self, axes: tuple[str, ...]) -> int:
        """Ranks along some of the two axes."""
        return math.prod({"node": self.node, "expert": self.expert}[a] for a in axes)


def own(slots: Slots, rank: Array, experts: int) -> Slots:
    """The slots of the experts of a rank, counted from its first; others nowhere."""
    first_tK = slots.experts_tK - rank * experts
    here = (first_tK >= 0) & (first_tK < experts)
    return Slots(
        slots.x_tD,
        jnp.where(here, slots.weights_tK, 0),
        jnp.where(here, first_tK, experts),
    )


def ring(
    group: Group,
    slots: Slots,
    weights: Weights,
    dot: GroupedDot,
    beside: Array | None = None,
) -> tuple[Array, Array | None]:
    """Tokens visit every device; see the module."""
    size, experts = group.size(EXPERTS), len(weights.gate_eDF)
    following = [(rank, (rank + 1) % size) for rank in range(size)]
    forward = functools.partial(lax.ppermute, axis_name=EXPERTS, perm=following)
    me = lax.axis_index(EXPERTS)

    def here(slots: Slots) -> Array:
        mine = own(slots, me, experts)
        return group.local(*mine, *weights, grouped_dot=dot)[0]

    y_tD = here(slots)
    if size == 1:
        return y_tD, beside
    slots = jax.tree.map(forward, slots)
    away = slots, here(slots)

    def visit(at: tuple[Slots, Array], _: None) -> tuple[tuple[Slots, Array], None]:
        slots, y_tD = jax.tree.map(forward, at)
        return (slots, y_tD + here(slots)), None

    # What a visit computes would be kept size - 2 times for the backward pass.
    visit = jax.checkpoint(visit, prevent_cse=False)
    if size > 2:  # XLA:CPU (jax 0.11.2) may crash on a loop of no turns
        away, _ = lax.scan(visit, away, length=size - 2)
    return y_tD + forward(away[1]), beside


def gather(
    group: Group,
    slots: Slots,
    weights: Weights,
    dot: GroupedDot,
    beside: Array | None = None,
) -> tuple[Array, Array | None]:
    """The ring at once: every device has all tokens, and results are added up.

    XLA exchanges these between the devices of a group, and what a ring sends between
    all of them at once, so that in a pipeline a rank could not do it alone.
    """
    collect = functools.partial(lax.all_gather, axis_name=EXPERTS, tiled=True)
    mine = own(
        jax.tree.map(collect, slots), lax.axis_index(EXPERTS), len(weights.gate_eDF)
    )
    y_tD, _ = group.local(*mine, *weights, grouped_dot=dot)
    return lax.psum_scatter(y_tD, EXPERTS, tiled=True), beside


class Leg(NamedTuple):
    """One exchange of a transport: over which axes, how many ranks and experts."""

    axes: tuple[str, ...]
    ranks: int
    experts: int  # of one rank


def exchange(
    group: Group,
    slots: Slots,
    weights: Weights,
    dot: GroupedDot,
    beside: Array | None = None,
    *,
    route: tuple[tuple[str, ...], ...],
    ragged: bool = False,
) -> tuple[Array, Array | None]:
    """Tokens are copied to the devices of their experts over one leg after another."""
    legs, experts = [], len(weights.gate_eDF) * group.size(EXPERTS)
    for axes in route:
        experts //= group.size(axes)
        if group.size(axes) > 1:  # within a device nothing is sent
            legs.append(Leg(axes, group.size(axes), experts))
    with jax.named_scope("dispatch"):
        hops, experts_rK, most, fits = plan_route(group, slots.experts_tK, legs, ragged)
        x_rD, weights_rK = slots.x_tD, slots.weights_tK
        for hop, way in hops:
            x_rD = wire.send(x_rD, hop, way)
            weights_rK = wire.send(weights_rK, hop, replace(way, payload="exact"))
        weights_rK = jnp.where(experts_rK < experts, weights_rK, 0)
    # Without this XLA leaves all of it for the way back.
    x_rD, beside = lax.optimization_barrier((x_rD, beside))
    y_rD, _ = group.local(
        x_rD, weights_rK, experts_rK, *weights, grouped_dot=dot, most=most
    )
    with jax.named_scope("combine"):
        for hop, way in reversed(hops):
            y_rD = wire.collect(y_rD, hop, way)
    if fits is None:
        return y_rD, beside
    # The rows above are on their way whatever it says, so that they need not wait. All
    # devices do the same: XLA may make one exchange of those of several groups.
    again = jax.checkpoint(functools.partial(group.spare, group, dot=dot))
    y_tD = lax.cond(
        lax.pmin(fits.astype(jnp.int32), group.same) > 0,
        lambda y_tD, *_: y_tD,
        lambda _, slots, weights: again(slots, weights)[0],
        y_rD,
        slots,
        weights,
    )
    return y_tD, beside


def plan_route(
    group: Group, experts_tK: Array, legs: list[Leg], ragged: bool
) -> tuple[list[tuple[Hop, Wire]], Array, int, Array | None]:
    """Sends expert numbers ahead, so that all places are known before any row goes.

    Returns:
      The hops; the experts [r, K] of the rows that arrive, counted from the device's
      first; the most slots that have one; and whether everything has a place, None if
      it always has.
    """
    tokens, top_k = experts_tK.shape
    rows, checks, hops = tokens, [], []
    ranks_of = tuple(leg.ranks for leg in legs)
    reach = tuple(group.reach if a == ("node",) else n for a, n, _ in legs)
    rooms = traffic.rooms(
        ranks_of, reach, tokens, top_k, capacity=group.capacity, ragged=ragged
    )
    for (axes, ranks, experts), (_, room, ceiling) in zip(legs, rooms, strict=True):
        rank_tK = experts_tK // experts
        if ragged:
            hop, fits = wire.plan_ragged(rank_tK, ranks, room, axes)
        else:
            hop, fits = wire.plan(rank_tK, ranks, room)
        checks += [fits] if room < ceiling else []
        rows = room if ragged else ranks * room
        way = Wire(axes, group.payload, rows, group.native)
        hops.append((hop, way))
        came_rK = wire.numbers_out(experts_tK, hop, way)
        came_rK = came_rK - lax.axis_index(axes) * experts
        here = (came_rK >= 0) & (came_rK < experts)
        experts_tK = jnp.where(here, came_rK, experts)
    most = min(rows * min(top_k, experts), math.ceil(group.capacity * tokens * top_k))
    if most < rows * min(top_k, experts):
        checks.append((experts_tK < experts).sum() <= most)
    return hops, experts_tK, most, jnp.stack(checks).all() if checks else None


Transport = Callable[..., tuple[Array, Array | None]]

TRANSPORTS: dict[str, Transport] = {
    "ring": ring,
    "all_to_all": functools.partial(exchange, route=(EXPERTS,)),
    "two_hop": functools.partial(exchange, route=(("node",), ("expert",))),
    "ragged": functools.partial(exchange, route=(EXPERTS,), ragged=True),
}
