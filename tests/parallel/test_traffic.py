"""Counted traffic: against plain loops over tokens, and against the device programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax import runtime
from deepseek_jax.config import PAYLOADS, TRANSPORTS, MeshConfig
from deepseek_jax.parallel import expert, traffic, wire
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.traffic import Layout, Links
from deepseek_jax.parallel.transport import Leg, plan_route
from tests.parallel.test_training import MOE, config_of

HERE = Layout(nodes=2, local=4, experts=16)
WIDE = Layout(nodes=4, local=2, experts=32)
SPEED = Links(160e9, 50e9)  # of an H800's links, bytes/s
LEGS = {"two_hop": (("node",), ("expert",))}
ONE_LEG = (meshes.EXPERTS,)


def routing(layout: Layout, tokens: int, top_k: int, nodes: int | None = None):
    """Random experts, distinct within a token, on at most `nodes` nodes."""
    rng = np.random.default_rng(tokens + top_k)
    score_TE = rng.random((tokens, layout.experts))
    if nodes is not None:
        shut_TN = np.argsort(rng.random((tokens, layout.nodes)), 1) >= nodes
        score_TE[np.repeat(shut_TN, layout.experts // layout.nodes, 1)] = 2
    return np.argsort(score_TE, 1)[:, :top_k].astype(np.int32)


def place(expert: int, layout: Layout) -> tuple[int, int]:
    """The node and device of a node that have an expert."""
    return divmod(expert * layout.devices // layout.experts, layout.local)


def by_hand(transport: str, experts_TK, layout: Layout) -> tuple[int, int]:
    """Copies over links inside nodes and between them, one token after another."""
    intra = inter = 0
    for token, experts in enumerate(experts_TK.tolist()):
        node, own = divmod(token * layout.devices // len(experts_TK), layout.local)
        there = {place(e, layout) for e in experts}
        if transport == "ring":
            at = node * layout.local + own
            for _ in range(layout.devices - 1):
                following = (at + 1) % layout.devices
                crosses = at // layout.local != following // layout.local
                inter, intra, at = inter + crosses, intra + (not crosses), following
        elif transport == "two_hop":
            inter += len({n for n, _ in there} - {node})
            intra += len({(n, at) for n, at in there if at != own})
        else:
            inter += len({where for where in there if where[0] != node})
            intra += len({where for where in there - {(node, own)} if where[0] == node})
    return intra, inter


@pytest.mark.parametrize("layout", [HERE, WIDE, Layout(1, 8, 16), Layout(8, 1, 16)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_copies_are_those_counted_token_by_token(transport, layout):
    experts_TK = routing(layout, 64, 4)
    sent = traffic.copies(transport, experts_TK, layout)
    total = np.add.reduce([traffic.crossing(one, layout) for one in sent])
    assert tuple(total) == by_hand(transport, experts_TK, layout)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_two_hop_sends_a_copy_to_each_remote_node(payload):
    """The inter-node bytes, exactly: distinct remote nodes times bytes per copy."""
    experts_TK, dim = routing(WIDE, 96, 6), 300
    remote = 0
    for token, experts in enumerate(experts_TK.tolist()):
        nodes = {e // (WIDE.experts // WIDE.nodes) for e in experts}
        remote += len(nodes - {token // (len(experts_TK) // WIDE.nodes)})
    row = jnp.zeros((1, dim), jnp.float32)
    there = sum(part.nbytes for part in wire.PAYLOADS[payload][0](row))
    back = dim * (4 if payload == "exact" else 2)
    got = traffic.count("two_hop", experts_TK, WIDE, dim=dim, payload=payload)
    assert got.dispatch.inter == remote * there
    assert got.combine.inter == remote * back
    assert got.metadata.inter == remote * 6 * 8


def test_traffic_between_nodes_shrinks_with_the_node_limit():
    layout = Layout(nodes=8, local=2, experts=64)
    inter = []
    for nodes in (8, 4, 2, 1):
        experts_TK = routing(layout, 256, 8, nodes)
        got = traffic.count("two_hop", experts_TK, layout, dim=16, reach=nodes)
        most = nodes * len(experts_TK) * traffic.row_bytes("fp8", 16)[0]
        assert 0 < got.dispatch.inter <= most
        direct = traffic.count("all_to_all", experts_TK, layout, dim=16)
        assert got.dispatch.inter <= direct.dispatch.inter
        inter.append(got.dispatch.inter)
    assert inter == sorted(set(inter), reverse=True)


@functools.cache
def planned(transport: str, capacity: float, tokens: int, keep: int):
    """Random routing on `HERE`, and what the device program plans for it."""
    experts_TK = routing(HERE, tokens, MOE.top_k, keep)
    return experts_TK, *plan_of(transport, capacity, keep, experts_TK)


def plan_of(transport: str, capacity: float, keep: int, experts_TK):
    """What the device program plans.

    Returns:
      By exchange, copies [devices, ranks] that have a place, and a device's places to
      send and for what comes in; whether all fits.
    """
    config = config_of(MeshConfig(node=2, expert=4, capacity=capacity))
    mesh = meshes.make(config.mesh)
    group = expert.on_mesh(runtime.build(config.runtime), config, mesh)
    group = dataclasses.replace(group.experts.keywords["group"], reach=min(2, keep))
    legs, rest = [], HERE.experts
    for axes in LEGS.get(transport, ONE_LEG):
        rest //= group.size(axes)
        legs.append(Leg(axes, group.size(axes), rest))
    places = []

    def plan(experts_tK):
        hops, _, _, fits = plan_route(group, experts_tK, legs, transport == "ragged")
        filled, rows = [], len(experts_tK)
        for (hop, way), leg in zip(hops, legs):
            if hop.sizes_RR is None:
                row_Rc = hop.row_s.reshape(leg.ranks, -1)
                filled.append((row_Rc < rows).sum(1))
            else:
                filled.append(hop.sizes_RR[jax.lax.axis_index(leg.axes)])
            rows = way.room
        places[:] = [(len(hop.row_s), way.room) for hop, way in hops]
        return [one[None] for one in filled], jnp.asarray(fits is None or fits)[None]

    rows = P(mesh.axis_names)
    filled, fits = jax.jit(
        jax.shard_map(plan, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    )(experts_TK)
    return [np.asarray(one) for one in filled], places, bool(fits.all())


def to_devices(filled, transport: str) -> list[np.ndarray]:
    """Copies to ranks of the exchange's axes as copies to devices."""
    if transport != "two_hop":
        return filled
    first, second = np.zeros((2, 8, 8), int)
    for device in range(8):
        node, local = divmod(device, 4)
        for rank in range(2):
            first[device, rank * 4 + local] = filled[0][device, rank]
        for rank in range(4):
            second[device, node * 4 + rank] = filled[1][device, rank]
    return [first, second]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("transport", ["all_to_all", "two_hop", "ragged"])
def test_copies_are_those_that_the_device_program_sends(transport, keep):
    """Filled places of `wire.plan`'s buffers, device by device, on 8 devices."""
    experts_TK, filled, _, fits = planned(transport, 4.0, 64, keep)
    assert fits
    sent = traffic.copies(transport, experts_TK, HERE)
    np.testing.assert_array_equal(sent, to_devices(filled, transport))
    assert sum(one.sum() for one in sent) > 0


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("transport", ["all_to_all", "two_hop", "ragged"])
def test_room_is_that_of_the_device_program(transport, capacity, keep):
    """Padded bytes, and whether all fits: never at 0.5, always at 4."""
    dim, there = 16, traffic.row_bytes("fp8", 16)[0]
    experts_TK, _, places, fits = planned(transport, capacity, 64, keep)
    got = traffic.count(
        transport, experts_TK, HERE, dim=dim, capacity=capacity, reach=keep
    )
    assert got.fits == fits
    assert fits == (capacity > 1) or 0.5 < capacity < 4
    if transport == "ragged":
        assert got.padded_dispatch == got.dispatch
        return
    rooms = [s // ranks for (s, _), ranks in zip(places, (2, 4))]
    if transport == "two_hop":
        intra, inter = 8 * 3 * rooms[1], 8 * 1 * rooms[0]
    else:
        room = places[0][0] // 8
        intra, inter = 8 * 3 * room, 8 * 4 * room
    assert got.padded_dispatch == Links(intra * there, inter * there)
    assert got.padded_combine == Links(intra * dim * 2, inter * dim * 2)


def test_room_of_ragged_exchanges_is_that_of_the_device_program():
    for capacity in (0.5, 1.5, 4.0):
        _, _, places, _ = planned("ragged", capacity, 64, 2)
        [room] = traffic.rooms((8,), (8,), 8, MOE.top_k, capacity=capacity, ragged=True)
        assert places[0][1] == room.room


def test_an_overflow_is_seen():
    """All tokens to one device: no transport with room for an even load does."""
    experts_TK = np.broadcast_to(np.arange(2), (64, 2))
    for transport in ("all_to_all", "two_hop", "ragged"):
        assert not traffic.count(transport, experts_TK, HERE, dim=16).fits
    assert traffic.count("ring", experts_TK, HERE, dim=16).fits


def test_slots_may_have_no_room_where_rows_do():
    """Three of eight tokens have two experts on device 0: 24 rows, 48 slots."""
    first = [0, 0, 0, 3, 4, 5, 6, 7]
    experts_TK = np.array([(2 * d, 2 * d + 1) for d in first * 8], np.int32)
    for transport in ("all_to_all", "ragged"):
        [sent] = traffic.copies(transport, experts_TK, HERE)
        filled, [(_, came)], fits = plan_of(transport, 1.5, 2, experts_TK)
        np.testing.assert_array_equal(sent, filled[0])
        assert sent.sum(0).max() == came
        got = traffic.count(transport, experts_TK, HERE, dim=16)
        assert not fits and not got.fits


@pytest.mark.parametrize(
    ("payload", "there", "back"),
    [("bf16", 14336, 14336), ("fp8", 7392, 14336), ("fp8_ue8m0", 7224, 14336)],
)
def test_bytes_of_a_copy_at_the_width_of_v3(payload, there, back):
    assert traffic.row_bytes(payload, 7168) == (there, back)
    assert traffic.row_bytes("exact", 7168) == (28672, 28672)
    assert traffic.row_bytes("exact", 7168, 2) == (14336, 14336)


def test_the_ring_sends_rows_as_they_are():
    got = traffic.count("ring", routing(HERE, 64, 4), HERE, dim=16, payload="fp8")
    assert got.dispatch == got.combine == got.padded_dispatch
    assert got.dispatch == Links(64 * 7 * 6 // 8 * 64, 64 * 7 * 2 // 8 * 64)


def test_thirteen_experts_on_four_nodes_are_as_cheap_as_the_nodes():
    """Section 3.2.2: 3.2 experts a node, none of them where the token passes anyway.

    Every token of the first node chooses from four others' devices, never from the
    place that its copy arrives at.
    """
    layout, times = Layout(nodes=5, local=8, experts=40), {}
    for top_k in range(4, 17):
        chosen = []
        for token in range(layout.devices):
            own, node = token % 8, token // 8
            others = [n for n in range(5) if n != node]
            slots = range(top_k)
            chosen.append([others[k % 4] * 8 + (own + 1 + k // 4) % 8 for k in slots])
        got = traffic.count("two_hop", np.array(chosen), layout, dim=7168)
        times[top_k] = traffic.seconds(got.dispatch, SPEED)
    assert all(time.inter == times[4].inter for time in times.values())
    free = [k for k, time in times.items() if time.intra <= time.inter]
    assert max(free) == 12  # of 4 x 3.2 = 12.8
    assert times[13].intra / times[13].inter == pytest.approx(13 / 12.8)


@pytest.mark.parametrize(
    ("experts", "layout", "message"),
    [
        (np.zeros((7, 1), int), HERE, "7 tokens"),
        (np.zeros((8, 1), int), Layout(2, 4, 12), "12 experts"),
        (np.full((8, 1), 16), HERE, "16 to 16: must be 0 to 15"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(experts, layout, message):
    with pytest.raises(ValueError, match=message):
        traffic.copies("two_hop", experts, layout)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'hop'.*ring, all_to_all, ragged, two_hop"):
        traffic.copies("hop", routing(HERE, 8, 2), HERE)
    with pytest.raises(ValueError, match=r"'fp4'.*exact, bf16, fp8, fp8_ue8m0"):
        traffic.row_bytes("fp4", 16)
