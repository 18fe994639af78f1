"""Time and bubbles of tables against the report's numbers, formulas, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.parallel.pipeline import check, cost, schedules
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES

MAKESPANS = {
    (2, 4): 12,
    (4, 8): 26,
    (8, 16): 54,
    (8, 20): 66,
    (8, 40): 126,
    (16, 32): 110,
    (16, 120): 374,
}


def simulated(name, ranks, microbatches, *chunks, **given):
    schedule = schedules.build(name, ranks, microbatches, *chunks)
    costs = cost.costs(**given)
    return cost.simulate(schedule, costs), cost.expected(schedule, costs)


def microbatches_of(name, ranks):
    kind = SCHEDULES[name]
    found = [2 * ranks, 3 * ranks + ranks % 2]
    if not kind.least:
        found += [ranks]
    if not kind.divides:
        found += [2 * ranks + 1 + kind.even]
    return [c for c in found if not kind.divides or c % ranks == 0]


@pytest.mark.parametrize("sizes", MAKESPANS, ids=str)
def test_makespan_of_dualpipe(sizes):
    timing, expected = simulated("dualpipe", *sizes)
    assert timing.makespan == MAKESPANS[sizes]
    assert (timing.idle == sizes[0] - 2).all() and expected.bubble == sizes[0] - 2


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_idle_is_the_formula_s(name, weight):
    for ranks in (*range(2, 8), 12):
        if ranks % 2 and SCHEDULES[name].even:
            continue
        for microbatches in microbatches_of(name, ranks):
            timing, expected = simulated(name, ranks, microbatches, W=weight)
            np.testing.assert_allclose(timing.idle, expected.bubble, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_are_the_formula_s(name):
    for ranks in (2, 4, 8, 16):
        for microbatches in microbatches_of(name, ranks):
            schedule = schedules.build(name, ranks, microbatches)
            expected = cost.expected(schedule, cost.costs())
            assert check.memory(schedule).live.max() == expected.activations


TIMES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0])


@given(
    st.sampled_from(list(SCHEDULES)),
    st.integers(1, 6),
    st.integers(1, 14),
    st.fixed_dictionaries(dict.fromkeys(("F", "I", "W", "B", "pair", "comm"), TIMES)),
    st.sets(st.sampled_from(["I", "W", "B", "pair", "comm"])),
)
def test_where_its_assumptions_hold_a_formula_is_exact(
    name, ranks, microbatches, times, given
):
    times = {key: time for key, time in times.items() if key in given or key == "F"}
    times["F"] = times["F"] or 1.0
    costs = cost.costs(**times)
    try:
        schedule = schedules.build(name, ranks, microbatches)
    except ValueError:
        return
    timing = cost.simulate(schedule, costs)
    expected = cost.expected(schedule, costs)
    if not cost.unmet(schedule, costs):
        np.testing.assert_allclose(timing.idle, expected.bubble, atol=1e-9)
    assert timing.lockstep >= timing.makespan - 1e-9 or costs["comm"]


@pytest.mark.parametrize(
    ("name", "ranks", "given", "text"),
    [
        ("1f1b", 4, {"comm": 0.5}, "comm = 0"),
        ("zb1p", 4, {"W": 1.5}, "W <= F"),
        ("zb1p", 4, {"I": 0.5, "W": 0.75}, "W <= I"),
        ("dualpipe", 4, {"W": 1.5}, "W <= F"),
        ("dualpipe", 4, {"I": 1.5}, "I = F"),
        ("dualpipe", 6, {"pair": 2.5}, "F&B = F + B"),
        ("zb1p", 4, {"B": 1.5}, "B = I + W"),
    ],
    ids=str,
)
def test_each_assumption_is_needed(name, ranks, given, text):
    schedule, costs = schedules.build(name, ranks, 2 * ranks), cost.costs(**given)
    assert text in cost.unmet(schedule, costs)
    timing, expected = simulated(name, ranks, 2 * ranks, **given)
    assert np.abs(timing.idle - expected.bubble).max() > 0.2


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_a_cheaper_pair_leaves_the_formula_the_largest_idle(name, weight, share):
    pair = 1 + weight + share  # backward alone, and some of the forward
    for ranks in (2, 4, 6, 10):
        for microbatches in microbatches_of(name, ranks):
            given = {"W": weight, "pair": pair}
            timing, expected = simulated(name, ranks, microbatches, **given)
            assert timing.idle.max() == pytest.approx(expected.bubble)


@pytest.mark.parametrize(
    "given", [{}, {"F": 1.3, "W": 0.4}, {"pair": 2.1, "comm": 0.3}], ids=str
)
def test_dualpipev_takes_as_long_as_dualpipe_on_twice_the_ranks(given):
    for ranks, microbatches in [(1, 2), (2, 4), (2, 5), (4, 8), (4, 10), (8, 21)]:
        v, v_expected = simulated("dualpipev", ranks, microbatches, **given)
        dual, expected = simulated("dualpipe", 2 * ranks, 2 * microbatches, **given)
        assert v_expected == expected
        if not given.get("comm"):  # the turn of a V needs no transfer
            assert v.makespan == pytest.approx(dual.makespan)
            np.testing.assert_allclose(v.idle, dual.idle[:ranks])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("comm", [0.0, 0.3])
def test_an_op_starts_as_soon_as_it_can(name, comm):
    schedule = schedules.build(name, 4, 8)
    costs = cost.costs(F=1.1, I=1.3, W=0.7, pair=2.5, comm=comm)
    timing = cost.simulate(schedule, costs)
    there, back, gone = {}, {}, {}
    for rank, line in enumerate(schedule.table):
        for op, end in zip(line, timing.end[rank], strict=True):
            for kind, digit, m in op:
                if kind == "W":
                    gone[rank, digit, m] = end
                else:
                    (there if kind == "F" else back)[rank, digit, m] = end
    for rank, line in enumerate(schedule.table):
        free = 0.0
        for op, start, end in zip(line, timing.start[rank], timing.end[rank]):
            ready = [free]
            for kind, digit, m in op:
                before, after = (
                    way(rank, digit) for way in (schedule.before, schedule.after)
                )
                if kind == "F" and before:
                    ready.append(there[*before, m] + comm * (before.rank != rank))
                if kind in "BI" and after:
                    ready.append(back[*after, m] + comm * (after.rank != rank))
                ready.append(
                    {"F": {}, "W": back}.get(kind, there).get((rank, digit, m), 0)
                )
            assert start == max(ready)
            free = end
            assert end - start == pytest.approx(
                costs["pair" if len(op) == 2 else op[0].kind]
            )
    assert timing.makespan == max(end[-1] for end in timing.end)


def test_by_hand_with_transfers():
    """F at 0, 1.5 there, B until 4.5, back at 5: two ranks, one microbatch."""
    timing, _ = simulated("1f1b", 2, 1, comm=0.5)
    assert [each.tolist() for each in timing.start] == [[0, 5], [1.5, 2.5]]
    assert timing.makespan == 7 and timing.idle.tolist() == [4, 4]


def test_blocks_split_pairs():
    schedule, costs = schedules.build("dualpipe", 2, 4), cost.costs(pair=2.4)
    timing = cost.simulate(schedule, costs)
    rows = cost.blocks(schedule, costs, timing)
    for rank, line in enumerate(schedule.table):
        assert [block.action for block in rows[rank]] == [a for op in line for a in op]
        busy = sum(block.end - block.start for block in rows[rank])
        assert busy == pytest.approx(timing.makespan - timing.idle[rank])
    forward, backward = rows[0][4:6]
    assert forward.end == backward.start == pytest.approx(forward.start + 0.8)


def test_every_schedule_has_a_formula():
    assert set(cost.FORMULAS) == set(SCHEDULES)
    used = {text for formula in cost.FORMULAS.values() for text in formula.assumes}
    assert used == set(cost.ASSUMPTIONS)


def test_costs_that_are_not_given():
    assert cost.costs(F=2, W=0.5) == {
        "F": 2,
        "I": 1,
        "W": 0.5,
        "B": 1.5,
        "pair": 3.5,
        "comm": 0,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"G": 1}, "cost G: must be one of F, I, W, B, pair, comm"),
        ({"W": -1}, "cost W = -1: must be a time, at least 0"),
        ({"comm": float("nan")}, "cost comm = nan"),
        ({"pair": float("inf")}, "cost pair = inf"),
        ({"F": 0}, "cost F = 0: must be more than 0"),
    ],
    ids=str,
)
def test_costs_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        cost.costs(**given)
