"""The tables: by hand where they are small, by their steps and stages where not."""

import subprocess
import sys
from collections import Counter

import pytest

from deepseek_jax.parallel.pipeline import actions, schedules
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, Place

# (ranks, microbatches): what is repeated in steps 1 to 8, by rank of the first half.
STEPS = {
    (8, 20): [
        (6, 1, 3, 3, 3, 1, 3, 1),
        (4, 2, 2, 4, 2, 2, 2, 2),
        (2, 3, 1, 5, 1, 3, 1, 3),
        (0, 4, 0, 6, 0, 4, 0, 4),
    ],
    (16, 32): [(14, 1, 7, 1, 7, 1, 7, 1)],
}
BY_HAND = {
    ("gpipe", 2, 2): "F0:0 F0:1 B0:0 B0:1\nF0:0 F0:1 B0:0 B0:1",
    ("1f1b", 3, 3): (
        "F0:0 F0:1 F0:2 B0:0 B0:1 B0:2\n"
        "F0:0 F0:1 B0:0 F0:2 B0:1 B0:2\n"
        "F0:0 B0:0 F0:1 B0:1 F0:2 B0:2"
    ),
    ("1f1b", 3, 1): "F0:0 B0:0\nF0:0 B0:0\nF0:0 B0:0",
    ("interleaved", 2, 2): (
        "F0:0 F0:1 F1:0 F1:1 B1:0 B1:1 B0:0 B0:1\n"
        "F0:0 F0:1 F1:0 B1:0 F1:1 B1:1 B0:0 B0:1"
    ),
    ("zb1p", 3, 3): (
        "F0:0 F0:1 F0:2 I0:0 W0:0 I0:1 W0:1 I0:2 W0:2\n"
        "F0:0 F0:1 I0:0 F0:2 I0:1 W0:0 I0:2 W0:1 W0:2\n"
        "F0:0 I0:0 F0:1 I0:1 F0:2 I0:2 W0:0 W0:1 W0:2"
    ),
    ("dualpipe", 2, 4): (
        "F0:0 F1:0 F0:1 B1:0 F1:1+B0:0 B1:1 I0:1 W0:1\n"
        "F1:0 F0:0 F1:1 B0:0 F0:1+B1:0 B0:1 I1:1 W1:1"
    ),
    ("dualpipev", 1, 3): (
        "F0:0 F1:0 F0:1 B1:0 F1:1+B0:0 F0:2+B1:1 F1:2+B0:1 B1:2 I0:2 W0:2"
    ),
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_by_hand(case):
    assert actions.table_text(schedules.build(*case).table) == BY_HAND[case]


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_steps_of_dualpipe(sizes):
    ranks, microbatches = sizes
    found = [
        schedules.step_counts(rank, ranks // 2, microbatches // 2)
        for rank in range(ranks // 2)
    ]
    assert found[: len(STEPS[sizes])] == STEPS[sizes]
    assert schedules.step_counts(7, 8, 16) == (0, 8, 0, 8, 0, 8, 0, 8)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 2, 12])
def test_what_ranks_of_dualpipe_do(ranks, more):
    schedule = schedules.build("dualpipe", ranks, 2 * ranks + more)
    each, half = ranks + more // 2, ranks // 2
    for rank, line in enumerate(schedule.table):
        from_end = min(rank, ranks - 1 - rank)
        kinds = Counter(action.kind for op in line for action in op)
        assert kinds["F"] == 2 * each and kinds["B"] + kinds["I"] == 2 * each
        assert kinds["I"] == kinds["W"] == ranks - from_end - 1
        pairs = 2 * (each - ranks + from_end + 1) + half - from_end - 1
        middle = from_end == half - 1
        assert sum(len(op) == 2 for op in line) == pairs - middle
        mirror = schedule.table[ranks - 1 - rank]
        swapped = [[a._replace(digit=1 - a.digit) for a in op] for op in mirror]
        assert [list(op) for op in line] == swapped


def test_dualpipev_is_the_first_half_of_a_dualpipe():
    v, dual = schedules.build("dualpipev", 4, 9), schedules.build("dualpipe", 8, 18)
    assert v.table == dual.table[:4]


def test_where_stages_lie():
    plain = schedules.build("1f1b", 3, 4)
    assert [plain.stage_of(rank, 0) for rank in range(3)] == [0, 1, 2]
    assert (plain.stages, plain.digits, plain.copies, plain.per_path) == (3, 1, 1, 4)
    rounds = schedules.build("interleaved", 3, 6, 4)
    assert [rounds.stage_of(1, chunk) for chunk in range(4)] == [1, 4, 7, 10]
    assert rounds.after(2, 0) == Place(0, 1) and rounds.before(0, 1) == Place(2, 0)
    assert (rounds.stages, rounds.digits, rounds.copies) == (12, 4, 1)
    dual = schedules.build("dualpipe", 4, 8)
    assert [dual.stage_of(rank, 0) for rank in range(4)] == [0, 1, 2, 3]
    assert [dual.stage_of(rank, 1) for rank in range(4)] == [3, 2, 1, 0]
    assert dual.before(3, 1) is None and dual.after(0, 1) is None
    assert (dual.path_of(0), dual.path_of(1)) == (0, 1)
    assert (dual.stages, dual.digits, dual.copies, dual.per_path) == (4, 2, 2, 4)
    v = schedules.build("dualpipev", 4, 8)
    assert [v.stage_of(rank, 0) for rank in range(4)] == [0, 1, 2, 3]
    assert [v.stage_of(rank, 1) for rank in range(4)] == [7, 6, 5, 4]
    assert v.after(3, 0) == Place(3, 1) and v.path_of(1) == 0
    assert (v.stages, v.digits, v.copies, v.per_path) == (8, 2, 1, 8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_paths_and_places(name):
    schedule = schedules.build(name, 4, 8)
    places = [place for path in schedule.paths for place in path]
    every = {Place(r, d) for r in range(4) for d in range(schedule.digits)}
    assert len(places) == len(every) and set(places) == every
    for path in schedule.paths:
        for stage, place in enumerate(path):
            assert schedule.stage_of(*place) == stage
            before = path[stage - 1] if stage else None
            assert schedule.before(*place) == before
            assert before is None or schedule.after(*before) == place
        assert schedule.after(*path[-1]) is None


def test_only_gpipe_does_all_forwards_first():
    found = {name: schedules.build(name, 4, 8).forwards_first for name in SCHEDULES}
    assert [name for name, first in found.items() if first] == ["gpipe"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("dual", 4, 8), "name = 'dual': must be one of gpipe, 1f1b,"),
        (("1f1b", 0, 8), "ranks = 0: must be at least 1 for 1f1b"),
        (("dualpipe", 0, 8), "ranks = 0: must be at least 2 for dualpipe"),
        (("gpipe", 4, 0), "microbatches = 0: must be at least 1 for gpipe"),
        (("dualpipe", 5, 20), "ranks = 5: must be even for dualpipe"),
        (("dualpipe", 4, 9), "microbatches = 9: must be even for dualpipe"),
        (("dualpipe", 4, 6), "microbatches = 6: must be at least 8 for dualpipe on 4"),
        (("dualpipev", 4, 7), "microbatches = 7: must be at least 8 for dualpipev"),
        (("interleaved", 4, 6), "microbatches = 6: must be a multiple of ranks = 4"),
        (("interleaved", 4, 8, 1), "chunks = 1: must be at least 2"),
        (("1f1b", 4, 8, 2), "chunks = 2: 1f1b has none"),
    ],
    ids=str,
)
def test_sizes_that_a_schedule_does_not_have(case, message):
    with pytest.raises(ValueError, match=message):
        schedules.build(*case)


def test_without_jax():
    program = (
        "import sys, experiments.schedule as s; s.main(sys.argv[1:]); "
        "assert not {'jax', 'matplotlib'} & set(sys.modules)"
    )
    words = ["--name=1f1b", "--ranks=2", "--microbatches=2", "--text"]
    command = [sys.executable, "-c", program, *words]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.stdout == "F0:0 F0:1 B0:0 B0:1\nF0:0 B0:0 F0:1 B0:1\n"
