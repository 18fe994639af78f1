"""Tables run tick by tick, and tables that cannot."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.parallel.pipeline import actions, check, schedules
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES

NAMED = re.compile(r"rank \d+, tick \d+, [FBIW]\d+:\d+")


def sizes_of(name, ranks):
    """Numbers of microbatches that a schedule may have, few and many."""
    kind = SCHEDULES[name]
    found = {1, ranks - 1, ranks, ranks + 1, 2 * ranks, 2 * ranks + 1, 2 * ranks + 2}
    found |= {3 * ranks, 5 * ranks + 4 * kind.even}
    step = 2 if kind.even else ranks if kind.divides else 1
    return sorted(c for c in found if c >= max(1, kind.least * ranks) and c % step == 0)


def ticks_of(ticks, marks):
    """(rank, digit, microbatch) -> the tick of the action of one of some kinds."""
    found = {}
    for tick, row in enumerate(ticks):
        for rank, op in enumerate(row):
            for kind, digit, microbatch in op or ():
                if kind in marks:
                    assert (rank, digit, microbatch) not in found
                    found[rank, digit, microbatch] = tick
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name):
    """Every microbatch goes down its path, and back, and all is done once."""
    for ranks in range(2, 17, 1 + SCHEDULES[name].even):
        for microbatches in sizes_of(name, ranks):
            schedule = schedules.build(name, ranks, microbatches)
            ticks = check.plan(schedule)
            order = [[op for op in column if op] for column in zip(*ticks)]
            assert order == [list(line) for line in schedule.table]
            f, i, w = (ticks_of(ticks, kinds) for kinds in ("F", "BI", "BW"))
            assert len(f) == len(i) == len(w) == microbatches * schedule.stages
            for path in schedule.paths:
                for m in range(schedule.per_path):
                    there = [f[*place, m] for place in path]
                    back = [i[*place, m] for place in path[::-1]]
                    assert np.diff(there + back).min() > 0
            assert all(w[each] >= i[each] for each in i)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_live_activations_are_the_same_on_every_rank(name):
    for ranks in range(2, 17, 2):
        for microbatches in sizes_of(name, ranks):
            schedule = schedules.build(name, ranks, microbatches)
            found = check.memory(schedule)
            half = ranks // 2 if name == "dualpipe" else ranks
            from_end = [min(r, schedule.stages - 1 - r) for r in range(ranks)]
            assert schedule.stages == 2 * half
            assert (found.live == schedule.stages + 1).all()
            assert found.deferred.tolist() == [h + 1 for h in from_end]


@pytest.mark.parametrize("microbatches", [8, 9, 24])
def test_memory_of_the_other_schedules(microbatches):
    def found(name, *chunks):
        return check.memory(schedules.build(name, 8, microbatches, *chunks))

    assert (found("gpipe").live == microbatches).all()
    for name in ("1f1b", "zb1p"):
        assert found(name).live.tolist() == [*range(8, 0, -1)]
    assert found("zb1p").deferred.tolist() == [*range(1, 9)]
    assert not found("1f1b").deferred.any()
    if microbatches == 24:
        assert found("interleaved", 3).live.tolist() == [*range(31, 16, -2)]


def test_ticks_of_a_small_table():
    ticks = check.plan(schedules.build("1f1b", 2, 2))
    shown = [[actions.op_text(op) if op else "." for op in row] for row in ticks]
    assert shown == [
        ["F0:0", "."],
        ["F0:1", "F0:0"],
        [".", "B0:0"],
        ["B0:0", "F0:1"],
        [".", "B0:1"],
        ["B0:1", "."],
    ]


# What is built, by rank what is edited there into what, and the error.
FAULTS = {
    "cycle": (
        ("1f1b", 2, 2),
        {0: ("F0:1 B0:0", "B0:0 F0:1"), 1: ("B0:0 F0:1", "F0:1 B0:0")},
        "rank 0, tick 2, B0:0: in a cycle, B0:0 of rank 0 waits for B0:0 of rank 1; "
        "F0:1 of rank 1 waits for F0:1 of rank 0",
    ),
    "cycle of two directions": (
        ("dualpipe", 2, 4),
        {0: ("F0:0 F1:0", "F1:0 F0:0"), 1: ("F1:0 F0:0", "F0:0 F1:0")},
        "rank 0, tick 0, F1:0: in a cycle, F1:0 of rank 0 waits for F1:0 of rank 1; "
        "F0:0 of rank 1 waits for F0:0 of rank 0",
    ),
    "twice": (
        ("1f1b", 3, 4),
        {1: ("F0:1", "F0:1 F0:1")},
        "rank 1, tick 3, F0:1: is done a second time",
    ),
    "twice, the first time in two parts": (
        ("zb1p", 2, 2),
        {0: ("W0:0", "B0:0")},
        "rank 0, tick 4, B0:0: is done a second time",
    ),
    "two forwards in a pair": (
        ("dualpipe", 4, 8),
        {0: ("F0:3+B1:1", "F0:3+F1:2")},
        "rank 0, tick 7, F0:3+F1:2: a pair is a forward and a full backward",
    ),
    "backward first": (
        ("dualpipe", 4, 8),
        {0: ("F0:3+B1:1", "B1:1+F0:3")},
        "rank 0, tick 7, B1:1+F0:3: a pair is a forward and a full backward, in this",
    ),
    "three in a pair": (
        ("dualpipe", 4, 8),
        {0: ("F0:3+B1:1", "F0:3+B1:1+W1:0")},
        "rank 0, tick 7, F0:3+B1:1+W1:0: a pair is",
    ),
    "a pair of one microbatch": (
        ("dualpipe", 4, 8),
        {0: ("F0:3+B1:1", "F0:3+B0:3")},
        "rank 0, tick 7, B0:3: must come after F0:3 on this rank",
    ),
    "forward missing, for another rank": (
        ("1f1b", 3, 4),
        {0: ("F0:2 ", "")},
        "rank 0, tick 7, F0:2: is missing, and rank 1 waits for it with F0:2",
    ),
    "forward missing, for its own rank": (
        ("1f1b", 3, 4),
        {1: ("F0:1 ", "")},
        "rank 1, tick 6, F0:1: is missing, and B0:1 is due",
    ),
    "backward missing": (
        ("gpipe", 2, 2),
        {0: (" B0:1", "")},
        "rank 0, tick 5, I0:1 (or B0:1): is missing",
    ),
    "weight gradient missing": (
        ("zb1p", 3, 3),
        {2: (" W0:1", "")},
        "rank 2, tick 11, W0:1 (or B0:1): is missing",
    ),
    "weight gradient too early": (
        ("zb1p", 3, 3),
        {2: ("I0:0 F0:1", "W0:0 I0:0 F0:1")},
        "rank 2, tick 3, W0:0: must come after I0:0 on this rank",
    ),
    "the way back before the way there": (
        ("dualpipev", 1, 3),
        {0: ("F0:0 F1:0", "F1:0 F0:0")},
        "rank 0, tick 0, F1:0: must come after F0:0 on this rank",
    ),
    "no such digit": (
        ("1f1b", 3, 4),
        {1: ("F0:2", "F1:2")},
        "rank 1, tick 5, F1:2: there is no digit 1: must be 0 to 0",
    ),
    "no such microbatch": (
        ("dualpipe", 2, 4),
        {1: ("W1:1", "W1:2")},
        "rank 1, tick 7, W1:2: there is no microbatch 2: must be 0 to 1",
    ),
}


def edited(schedule, edits):
    lines = actions.table_text(schedule.table).split("\n")
    for rank, (old, new) in edits.items():
        assert old in lines[rank], lines[rank]
        lines[rank] = lines[rank].replace(old, new, 1)
    return replace(schedule, table=actions.parse("\n".join(lines)))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    case, edits, message = FAULTS[fault]
    with pytest.raises(ValueError) as refused:
        check.plan(edited(schedules.build(*case), edits))
    assert message in str(refused.value)


def test_a_table_of_other_ranks():
    schedule = schedules.build("1f1b", 3, 4)
    with pytest.raises(ValueError, match="table of 2 ranks: must be of 3"):
        check.plan(replace(schedule, table=schedule.table[:2]))


@st.composite
def edits(draw):
    """A small table, and the same with one op gone, twice, moved or renamed."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    ranks = 2 * draw(st.integers(1, 2))
    microbatches = draw(st.sampled_from(sizes_of(name, ranks)[:2]))
    schedule = schedules.build(name, ranks, microbatches)
    rank = draw(st.integers(0, ranks - 1))
    line = list(schedule.table[rank])
    at = draw(st.integers(0, len(line) - 1))
    how = draw(st.sampled_from(["gone", "twice", "moved", "renamed"]))
    op = line.pop(at)
    if how == "renamed":
        other = draw(st.integers(0, schedule.per_path))
        op = (op[0]._replace(microbatch=other), *op[1:])
    for _ in range({"gone": 0, "twice": 2}.get(how, 1)):
        line.insert(at if how == "renamed" else draw(st.integers(0, len(line))), op)
    table = (*schedule.table[:rank], tuple(line), *schedule.table[rank + 1 :])
    return schedule, replace(schedule, table=table), how


@given(edits())
@settings(max_examples=300)
def test_no_edit_goes_unnoticed(case):
    """What is refused has its place named, and what is not is a table all the same."""
    schedule, changed, how = case
    try:
        ticks = check.plan(changed)
    except ValueError as error:
        assert NAMED.match(str(error)), error
        assert changed != schedule
    else:
        assert how == "moved" or changed == schedule
        for rank, line in enumerate(changed.table):
            done = [op for row in ticks if (op := row[rank])]
            assert sorted(done) == sorted(schedule.table[rank]) and done == list(line)
