"""Placement of experts: DeepSeek's printed example, and what holds for all loads."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.ops.dispatch import experts_dense
from deepseek_jax.parallel import eplb
from pallas_kernels.grouped_matmul.reference import grouped_dot_oracle

# The example in the README of github.com/deepseek-ai/EPLB.
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    placed = eplb.place(LOADS, 16, devices=8, nodes=2, groups=4)
    assert placed.phy2log.tolist() == PLACED
    assert placed.counts[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placed.log2phy[0, :3].tolist() == [[12, -1], [13, 15], [11, -1]]
    # By hand: on device 0 of layer 0 half of expert 5's load and all of expert 6's.
    loads = eplb.device_loads(LOADS, placed, 8)
    by_hand = [165 / 2 + 39, 165 / 2 + 4, 73 + 104 / 2, 61 + 104 / 2]
    by_hand += [183 / 2 + 56, 183 / 2 + 40, 90 + 132 / 2, 86 + 132 / 2]
    assert loads[0].tolist() == by_hand
    ratios = [8 * 156 / sum(LOADS[0]), 8 * (187 / 2 + 172 / 2) / sum(LOADS[1])]
    np.testing.assert_allclose(eplb.imbalance(loads), ratios, rtol=1e-15)


@st.composite
def cases(draw):
    """Loads and the other arguments of `place`, which divide."""
    nodes, local = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = draw(st.integers(1, 8))
    experts = groups * draw(st.integers(1, 5))
    devices = nodes * local
    least = -(-experts // devices)
    replicas = devices * draw(st.integers(least, least + 3))
    layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    loads = {
        "counts": rng.integers(0, 100, (layers, experts)),
        "zipf": 1e4 / (1.0 + rng.permuted(np.arange(layers * experts))),
        "one": np.eye(layers, experts),
        "none": np.zeros((layers, experts)),
    }[draw(st.sampled_from(["counts", "zipf", "one", "none"]))]
    sizes = {"devices": devices, "nodes": nodes, "groups": groups}
    return loads.reshape(layers, experts), {"replicas": replicas, **sizes}


@given(cases())
@settings(max_examples=300)
def test_every_placement(case):
    loads, sizes = case
    replicas, _, nodes, groups = sizes.values()
    placed = eplb.place(loads, **sizes)
    layers, experts = loads.shape
    assert placed.phy2log.shape == (layers, replicas)
    for phy2log, log2phy, counts in zip(*placed, strict=True):
        assert counts.min() >= 1 and counts.sum() == replicas
        np.testing.assert_array_equal(
            counts, [(phy2log == e).sum() for e in range(experts)]
        )
        for expert in range(experts):
            places = log2phy[expert][: counts[expert]]
            np.testing.assert_array_equal(places, np.flatnonzero(phy2log == expert))
            assert (log2phy[expert][counts[expert] :] == -1).all()
        if groups % nodes == 0:  # hierarchical: a group's experts are all on one node
            by_node = phy2log.reshape(nodes, -1) // (experts // groups)
            homes = [set(row.tolist()) for row in by_node]
            assert sum(map(len, homes)) == groups
            assert all(len(home) == groups // nodes for home in homes)


@given(cases())
@settings(max_examples=300)
def test_what_is_guaranteed_about_balance(case):
    loads, sizes = case
    _, devices, nodes, groups = sizes.values()
    placed = eplb.place(loads, **sizes)
    device_Rg = eplb.device_loads(loads, placed, devices)
    np.testing.assert_allclose(device_Rg.sum(-1), loads.sum(-1), rtol=1e-12)
    hierarchical = groups % nodes == 0
    device_Rng = device_Rg.reshape(len(loads), nodes if hierarchical else 1, -1)
    share_RP = np.take_along_axis(loads / placed.counts, placed.phy2log, -1)
    largest_Rn = share_RP.reshape(*device_Rng.shape[:2], -1).max(-1)
    assert (np.ptp(device_Rng, -1) <= largest_Rn + 1e-9 * loads.max()).all()
    if hierarchical:
        group_R = loads.reshape(len(loads), groups, -1).sum(-1).max(-1)
        assert (np.ptp(device_Rng.sum(-1), -1) <= group_R + 1e-9 * loads.max()).all()


def test_no_other_copies_have_a_smaller_largest_share():
    rng = np.random.default_rng(0)
    for _ in range(50):
        loads, extra = rng.integers(1, 50, 5), int(rng.integers(1, 5))
        placed = eplb.place(loads[None], 5 + extra, devices=5 + extra)
        best = min(
            max(loads / (1 + np.bincount(more, minlength=5)))
            for more in itertools.combinations_with_replacement(range(5), extra)
        )
        assert (loads / placed.counts[0]).max() == best


def test_two_experts_a_device_are_paired_as_well_as_can_be():
    rng = np.random.default_rng(1)
    orders = np.array(list(itertools.permutations(range(6))))
    for _ in range(50):
        loads = rng.integers(0, 50, 6)
        placed = eplb.place(loads[None], 6, devices=3)
        best = loads[orders].reshape(-1, 3, 2).sum(-1).max(-1).min()
        assert eplb.device_loads(loads[None], placed, 3).max() == best


def test_with_one_place_a_device_nothing_moves():
    placed = eplb.place(LOADS, 12, devices=12)
    assert placed.phy2log.tolist() == [list(range(12))] * 2
    kept = eplb.contiguous(2, 12)
    assert all(map(np.array_equal, placed, kept))


def before_and_after(loads, replicas, devices, nodes=1, groups=1):
    as_is = eplb.contiguous(*loads.shape)
    placed = eplb.place(loads, replicas, devices=devices, nodes=nodes, groups=groups)
    return (
        eplb.imbalance(eplb.device_loads(loads, each, devices))
        for each in (as_is, placed)
    )


def test_loads_that_lie_evenly_may_come_out_less_even():
    """Why no test says that placing never makes it worse: it is not so."""
    loads = np.array([[3, 3, 0, 2, 2, 2]])
    before, after = before_and_after(loads, 6, devices=2)
    assert before == [1] and after == [7 / 6]
    before, after = before_and_after(loads, 8, devices=2)
    assert before == [1] and after == [6.5 / 6]


SIZES = [(256, 288, 32, 4, 8), (64, 72, 8, 2, 8), (16, 24, 8, 1, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_random_and_skewed_loads_come_out_more_even(sizes):
    experts, *rest = sizes
    rng = np.random.default_rng(2)
    before, after = before_and_after(rng.random((1000, experts)), *rest)
    assert (after > before).mean() <= 1e-3  # see above
    assert after.mean() - 1 < 0.3 * (before.mean() - 1)
    ranks = rng.permuted(np.tile(np.arange(1.0, experts + 1), (1000, 1)), axis=1)
    before, after = before_and_after(1 / ranks, *rest)
    assert (after < before).all()
    assert after.mean() - 1 < 0.3 * (before.mean() - 1)


def test_ratio_where_nothing_arrived():
    assert np.isnan(eplb.imbalance(np.zeros((1, 4)))).all()


def test_the_report_s_sizes_are_placed_at_once():
    loads = np.random.default_rng(3).random((58, 256))
    start = time.perf_counter()
    eplb.place(loads, 320, devices=64, nodes=8, groups=8)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 15}, "replicas = 15: must be a multiple of devices = 8"),
        ({"replicas": 8}, "replicas = 8: .* at least the 12 experts"),
        ({"groups": 5}, "groups = 5: must divide the 12 experts"),
        ({"groups": 0}, "groups = 0"),
        ({"nodes": 3}, "nodes = 3: must divide the 8 devices"),
        ({"devices": 0}, "devices = 0"),
        ({"loads_RE": [1.0, 2.0]}, r"shape \[2\]: must be \[layers, E\]"),
        ({"loads_RE": np.zeros((0, 12))}, r"shape \[0, 12\]"),
        ({"loads_RE": [[1.0, -1.0]]}, "at least 0"),
        ({"loads_RE": [[1.0, np.nan]]}, "finite"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    given = {"loads_RE": LOADS, "replicas": 16, "devices": 8, "nodes": 2, "groups": 4}
    with pytest.raises(ValueError, match=message):
        eplb.place(**(given | changes))


def test_loads_and_devices_of_another_placement():
    placed = eplb.place(LOADS, 16, devices=8)
    with pytest.raises(ValueError, match=r"shape \[1, 12\]: .* one of \[2, 12\]"):
        eplb.device_loads(LOADS[:1], placed, 8)
    with pytest.raises(ValueError, match="devices = 5: must divide the 16 places"):
        eplb.device_loads(LOADS, placed, 5)


def test_tokens_spread_evenly_over_an_expert_s_copies():
    placed = eplb.place([[90, 10, 10, 10]], 8, devices=4)
    _, log2phy, counts = (part[0] for part in placed)
    assert counts.tolist() == [5, 1, 1, 1]
    all_to_one = jnp.zeros((13, 1), jnp.int32)
    places = np.asarray(jax.jit(eplb.replica_of)(log2phy, counts, all_to_one, 2))
    used, times = np.unique(places, return_counts=True)
    assert used.tolist() == log2phy[0].tolist() and np.ptp(times) <= 1
    assert places[0, 0] == log2phy[0, 2]


def test_shards_of_tokens_that_say_where_they_begin_are_the_whole():
    rng = np.random.default_rng(4)
    placed = eplb.place(rng.random((1, 8)) ** 4, 16, devices=4)
    phy2log, log2phy, counts = (part[0] for part in placed)
    experts_TK = jnp.asarray(rng.integers(0, 8, (24, 3)), jnp.int32)
    whole = eplb.replica_of(log2phy, counts, experts_TK)
    shards = [
        eplb.replica_of(log2phy, counts, experts_TK[t : t + 6], t)
        for t in range(0, 24, 6)
    ]
    np.testing.assert_array_equal(whole, jnp.concatenate(shards))
    np.testing.assert_array_equal(phy2log[whole], experts_TK)
    assert whole.dtype == jnp.int32


def test_experts_at_their_places_compute_the_same():
    rng = np.random.default_rng(5)
    placed = eplb.place(rng.random((1, 8)) ** 4, 12, devices=4, nodes=2, groups=2)
    phy2log, log2phy, counts = (part[0] for part in placed)
    assert counts.max() > 1
    with jax.enable_x64(True):
        x_TD, weights_TK = rng.normal(size=(10, 6)), rng.random((10, 2))
        experts_TK = rng.permuted(np.tile(np.arange(8), (10, 1)), axis=1)[:, :2]
        stacks = [jnp.asarray(rng.normal(size=(8, 6, 5))) for _ in range(2)]
        stacks.append(jnp.asarray(rng.normal(size=(8, 5, 6))))

        def run(experts_TK, stacks):
            return experts_dense(
                jnp.asarray(x_TD),
                jnp.asarray(weights_TK),
                experts_TK,
                *stacks,
                grouped_dot=grouped_dot_oracle,
            )

        plain = run(jnp.asarray(experts_TK), stacks)
        places_TK = eplb.replica_of(log2phy, counts, jnp.asarray(experts_TK))
        placed_stacks = [eplb.expand(stack, phy2log) for stack in stacks]
        assert placed_stacks[0].shape == (12, 6, 5)
        np.testing.assert_allclose(run(places_TK, placed_stacks), plain, rtol=1e-12)
