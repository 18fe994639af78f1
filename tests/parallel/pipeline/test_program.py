"""Programs do what their tables say: rings, simulated with what values are about.

A value in a ring is (what, stage, microbatch): the `output` of a stage, its `kept`, or
the `gradient` of its input. The simulation reads and writes by a program's rows alone,
as the executor does, and says what is not as the schedule has it.
"""

import functools

import numpy as np
import pytest

from deepseek_jax.parallel.pipeline import check, program, schedules
from deepseek_jax.parallel.pipeline.program import BACKWARDS, NOTHING, RINGS, Row
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES

KEEPS = (True, False)  # inputs; products
# Fields of a row that are of use in every schedule of several ranks.
USED = {"forward", "f_digit", "f_microbatch", "f_x", "x_right"}
USED |= {"backward", "b_digit", "b_microbatch", "b_kept", "b_g", "g_left"}


def sizes_of(name):
    """(ranks, microbatches, chunks) that a schedule may have."""
    kind = SCHEDULES[name]
    for ranks in (1, 2, 3, 4, 5, 8):
        for microbatches in (1, ranks, ranks + 1, 2 * ranks, 3 * ranks + 2, 5 * ranks):
            for chunks in (2, 3) if kind.chunks else (None,):
                sizes = ranks, microbatches, chunks
                try:
                    schedules.build(name, *sizes)
                except ValueError:
                    continue
                yield sizes


@functools.cache
def made(name, ranks, microbatches, chunks, keep_inputs):
    schedule = schedules.build(name, ranks, microbatches, chunks)
    return program.assemble(schedule, keep_inputs)


class Simulation:
    """The rings of all ranks, and when each value was written and read last."""

    def __init__(self, made, rows):
        self.program, self.schedule, self.rows = made, made.schedule, rows
        self.rings = [
            {ring: [None] * (size + 1) for ring, size in made.slots.items()}
            for _ in range(self.schedule.ranks)
        ]
        self.lives = [{ring: {} for ring in made.slots} for _ in self.rings]
        self.done = []

    def run(self):
        for run in self.program.runs:
            for t in range(run.start, run.stop):
                self.tick(t, run)
        return self

    def row(self, t, rank):
        return Row(*(int(field[t, rank]) for field in self.rows))

    def tick(self, t, run):
        """What all read first, then what they write."""
        found = [self.work(t, rank, run) for rank in range(self.schedule.ranks)]
        for rank, (kept, _) in enumerate(found):
            if run.forward and not self.program.keeps_inputs:
                self.write(t, rank, "kept", self.row(t, rank).f_kept, kept)
        for name, pairs in self.program.sends_of(run).items():
            came = {to: found[at][1][name[0]] for at, to in pairs}
            for to in range(self.schedule.ranks):
                slot = getattr(self.row(t, to), name)
                self.write(t, to, name[0], slot, came.get(to))

    def work(self, t, rank, run):
        """(what is kept, what is sent) of a rank's work."""
        row, kept, sent = self.row(t, rank), None, {"x": None, "g": None}
        kind = BACKWARDS[row.backward]
        signature = bool(row.forward), kind
        if signature != (False, NOTHING) and run.uniform:
            assert signature == (run.forward, run.backward[0])
        assert run.forward or not row.forward
        assert kind in run.backward or not row.forward
        if row.forward:
            stage = self.place("F", rank, row.f_digit, row.f_microbatch)
            if stage:
                self.read(
                    t, rank, "x", row.f_x, ("output", stage - 1, row.f_microbatch)
                )
            kept = "kept", stage, row.f_microbatch
            sent["x"] = "output", stage, row.f_microbatch
        if kind:
            assert kind in run.backward
            stage = self.place(kind, rank, row.b_digit, row.b_microbatch)
            if not self.program.keeps_inputs:
                saved = "kept", stage, row.b_microbatch
                self.read(t, rank, "kept", row.b_kept, saved)
            elif stage:
                saved = "output", stage - 1, row.b_microbatch
                self.read(t, rank, "x", row.b_kept, saved)
            if stage < self.schedule.stages - 1:
                after = "gradient", stage + 1, row.b_microbatch
                self.read(t, rank, "g", row.b_g, after)
            sent["g"] = None if kind == "W" else ("gradient", stage, row.b_microbatch)
        return kept, sent

    def place(self, kind, rank, digit, microbatch):
        """The stage at which this is done; noted, and of the digit's own path."""
        path = self.schedule.path_of(digit)
        assert path == microbatch // self.schedule.per_path
        stage = self.schedule.stage_of(rank, digit)
        self.done.append((kind, stage, microbatch))
        return stage

    def read(self, t, rank, ring, slot, wanted):
        assert slot < self.program.slots[ring], "what nobody writes to"
        assert self.rings[rank][ring][slot] == wanted
        self.lives[rank][ring][wanted].append(t)

    def write(self, t, rank, ring, slot, value):
        self.rings[rank][ring][slot] = value
        if slot < self.program.slots[ring]:
            assert value is not None, "nothing is written over something"
            self.lives[rank][ring][value] = [t]

    def most(self, rank, ring, read=-1):
        """Values at a time of a ring that wait for one of their reads, the last."""
        lives = [(each[0], each[read]) for each in self.lives[rank][ring].values()]
        return max((sum(a <= t < b for a, b in lives) for t, _ in lives), default=0)


@functools.cache
def simulated(*sizes):
    return Simulation(made(*sizes), made(*sizes).rows).run()


@pytest.mark.parametrize("keep_inputs", KEEPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_read_is_of_what_it_must_be(name, keep_inputs):
    """And everything is done once, in the table's ticks."""
    for sizes in sizes_of(name):
        done = simulated(name, *sizes, keep_inputs).done
        assert len(set(done)) == len(done)
        schedule = made(name, *sizes, keep_inputs).schedule
        assert sorted(done) == sorted(
            (kind, schedule.stage_of(rank, digit), first + microbatch)
            for rank, line in enumerate(schedule.table)
            for op in line
            for kind, digit, microbatch in op
            for first in [schedule.path_of(digit) * schedule.per_path]
        )


@pytest.mark.parametrize("keep_inputs", KEEPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_rings_are_as_small_as_they_can_be(name, keep_inputs):
    for sizes in sizes_of(name):
        found = simulated(name, *sizes, keep_inputs)
        for ring, slots in found.program.slots.items():
            ranks = range(found.schedule.ranks)
            assert slots == max(found.most(rank, ring) for rank in ranks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rings_hold_what_the_checker_counts(name):
    """Forwards at its peak; messages, too, that have come and nobody has read yet."""
    for sizes in sizes_of(name):
        kept, inputs = (simulated(name, *sizes, keep) for keep in (False, True))
        held, slots = check.memory(kept.schedule), inputs.program.slots
        ranks = range(kept.schedule.ranks)
        early = {ring: [kept.most(r, ring, 1) for r in ranks] for ring in "xg"}
        assert kept.program.slots["kept"] == held.live.max()
        assert kept.program.slots["x"] == max(early["x"])
        assert slots["kept"] == 0
        assert slots["x"] <= held.live.max() + max(early["x"])
        assert slots["g"] <= max(held.deferred + early["g"])
        if name in ("gpipe", "1f1b", "zb1p") and kept.schedule.ranks > 1:
            second = check.memory(kept.schedule).live[1]  # the first has no input
            assert second <= slots["x"] <= second + 1


@pytest.mark.parametrize("keep_inputs", KEEPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_program_does_not_grow_with_the_microbatches(name, keep_inputs):
    """Neither its runs, each of which is compiled, nor, but GPipe's, its rings."""
    for ranks in (1, 2, 4, 8):
        if SCHEDULES[name].even and ranks % 2:
            continue
        few, some, many = (
            made(name, ranks, n * ranks, None, keep_inputs) for n in (6, 16, 40)
        )
        assert len(few.runs) == len(some.runs) == len(many.runs) <= 4
        assert few.sends == some.sends == many.sends
        saved = "x" if keep_inputs else "kept"
        for ring in few.slots:
            same = few.slots[ring] == some.slots[ring] == many.slots[ring]
            grows = name == "gpipe" and ring == saved and many.slots[ring]
            assert same != bool(grows)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_send_to_their_neighbours(name):
    for sizes in sizes_of(name):
        for ring_way, pairs in made(name, *sizes, True).sends.items():
            step = {"right": 1, "left": -1, "here": 0}[ring_way.split("_")[1]]
            assert all((to - rank - step) % sizes[0] == 0 for rank, to in pairs)
            for ends in zip(*pairs):  # what a permute can do at once
                assert len(set(ends)) == len(ends)


@pytest.mark.parametrize("name", SCHEDULES)
def test_runs_follow_one_another_and_have_all_ticks(name):
    for sizes in sizes_of(name):
        runs, rows = made(name, *sizes, True).runs, made(name, *sizes, True).rows
        starts, stops = ([run[n] for run in runs] for n in (0, 1))
        assert [*starts, len(rows.forward)] == [0, *stops]
        assert all(len(run.backward) == 1 for run in runs if run.uniform)
        assert (rows.forward | rows.backward).any(1).all()


def test_most_of_a_long_dualpipe_is_without_conditionals():
    long = made("dualpipe", 8, 128, None, True)
    alike = [
        r.stop - r.start for r in long.runs if r.uniform and r.forward and r.backward
    ]
    assert sum(alike) > 0.75 * len(long.rows.forward)


def corruptions(made):
    """Rows in which one number is another one, of those that matter."""
    for field, array in made.rows._asdict().items():
        ring = RINGS.get(field)
        if ring is None:
            bound = {"forward": 2, "backward": len(BACKWARDS)}.get(field)
            bound = bound or (
                made.schedule.digits if "digit" in field else made.schedule.microbatches
            )
            work = made.rows.forward if field[0] == "f" else made.rows.backward
            cells = np.argwhere(work > 0)
        else:
            bound = made.slots[ring or ("x" if made.keeps_inputs else "kept")] + 1
            cells = np.argwhere(array < bound - 1)
        for cell in map(tuple, cells if bound > 1 else ()):
            changed = array.copy()
            changed[cell] = (changed[cell] + 1) % bound
            yield field, cell, made.rows._replace(**{field: changed})


@pytest.mark.parametrize("keep_inputs", KEEPS)
@pytest.mark.parametrize(
    "sizes", [("dualpipe", 4, 8, None), ("interleaved", 2, 4, 2), ("zb1p", 3, 4, None)]
)
def test_a_wrong_number_is_found(sizes, keep_inputs):
    """Any number of any row: the simulation reads something else, or misses work."""
    right = made(*sizes, keep_inputs)
    want, seen = sorted(simulated(*sizes, keep_inputs).done), set()
    for field, cell, rows in corruptions(right):
        seen.add(field)
        try:
            done = sorted(Simulation(right, rows).run().done)
        except (AssertionError, KeyError):
            continue
        assert done != want, (field, cell)
    one_stage = {"f_digit", "b_digit"} if right.schedule.digits == 1 else set()
    assert seen >= USED - one_stage


def test_a_slot_given_to_two_at_once_is_found():
    """Where a program saves a slot too much, what was there is lost."""
    right = made("1f1b", 4, 8, None, True)
    fewer = np.minimum(right.rows.x_right, right.slots["x"] - 2)
    here = right.rows.x_right < right.slots["x"]
    rows = right.rows._replace(x_right=np.where(here, fewer, right.slots["x"]))
    with pytest.raises(AssertionError):
        Simulation(right, rows).run()
