"""A table as what one SPMD program needs: per tick and rank, numbers to index with.

Every rank has rings of buffers, for inputs of stages (`x`), for what is kept of a
forward (`kept`) and for gradients of outputs (`g`). `assemble` follows each value from
the tick it is written in to the last one that reads it, and gives it a slot that no
other has meanwhile; in a tick everything is read before anything is written. What a
rank has no use for goes to a last slot that nobody reads, so that nothing needs a
conditional but the work itself.

Ticks come in runs. Where all ranks that are busy do the same kinds of work, a run needs
no conditional: idle ranks do the same on nothing. Of a DualPipe that is the middle,
which grows with the microbatches: 10 of 24 ticks on 4 ranks with 16, 114 of 146 on 8
with 128, and none with the fewest it takes. Ours.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_jax.parallel.pipeline.actions import Action, Op
from deepseek_jax.parallel.pipeline.check import Ticks, plan
from deepseek_jax.parallel.pipeline.schedules import Place, Schedule

NOTHING = ""
BACKWARDS = (NOTHING, "B", "I", "W")
WAYS = ("right", "left", "here")  # to the next rank, to the one before, to itself
Int = Any  # int, or an int32 array
SHORT = 3  # ticks; shorter uniform runs are not worth compiling for


class Row(NamedTuple):
    """What a rank does in a tick; of a program, arrays [T, R] of it."""

    forward: Int = 0  # 1 if there is one
    f_digit: Int = 0
    f_microbatch: Int = 0  # of all paths, counted through
    f_x: Int = 0  # the ring's slots it reads ..
    f_kept: Int = 0  # .. and writes
    backward: Int = 0  # of BACKWARDS
    b_digit: Int = 0
    b_microbatch: Int = 0
    b_kept: Int = 0
    b_g: Int = 0
    x_right: Int = 0  # where to put the output that comes each of the WAYS
    x_left: Int = 0
    x_here: Int = 0
    g_right: Int = 0  # and the gradient
    g_left: Int = 0
    g_here: Int = 0


# The ring of every slot in a row; "": of what a backward pass reads.
RINGS = {
    "f_x": "x",
    "f_kept": "kept",
    "b_kept": "",
    "b_g": "g",
    **{f"{ring}_{way}": ring for ring in "xg" for way in WAYS},
}


class Run(NamedTuple):
    """Ticks start .. stop-1, which one piece of the program does."""

    start: int
    stop: int
    forward: bool  # whether any rank does one
    backward: tuple[str, ...]  # kinds, NOTHING too if a busy rank does none
    uniform: bool  # all that are busy do all of this


@dataclass(frozen=True)
class Program:
    """A schedule, ready to be executed."""

    schedule: Schedule
    rows: Row  # of arrays [T, R]
    slots: dict[str, int]  # of each ring, the last one for what nobody reads
    runs: tuple[Run, ...]
    sends: dict[str, tuple[tuple[int, int], ...]]  # pairs of ranks by "x_right", ..

    @property
    def keeps_inputs(self) -> bool:
        """Whether there is no ring `kept`."""
        return not self.slots["kept"]

    def sends_of(self, run: Run) -> dict[str, tuple[tuple[int, int], ...]]:
        """Those of `sends` that bring anything to any rank in a run."""
        return {
            name: pairs
            for name, pairs in self.sends.items()
            if (
                getattr(self.rows, name)[run.start : run.stop] < self.slots[name[0]]
            ).any()
        }


class Life(NamedTuple):
    """From the tick in which a value is written to the last one that reads it."""

    start: int
    end: int


Key = tuple[int, int]  # digit and microbatch of a rank
Lives = dict[str, dict[Key, Life]]


def way(rank: int, to: int) -> str:
    """Which of the WAYS leads to a rank; the first and the last are neighbours."""
    return {0: "here", 1: "right", -1: "left"}.get(to - rank) or (
        "right" if to < rank else "left"
    )


def assemble(schedule: Schedule, keep_inputs: bool) -> Program:
    """Plans a schedule tick by tick, and who holds what in which slot.

    Args:
      keep_inputs: a backward pass reads the stage's input; there is no ring `kept`.

    Raises:
      ValueError: the table is wrong, as `check.plan`.
    """
    ticks = plan(schedule)
    lives = [_lives(schedule, ticks, rank, keep_inputs) for rank in _ranks(schedule)]
    places, slots = list[dict[str, dict[Key, int]]](), {"x": 0, "kept": 0, "g": 0}
    for of_rank in lives:
        places.append({})
        for ring, values in of_rank.items():
            places[-1][ring], used = _colour(values)
            slots[ring] = max(slots[ring], used)
    saved = "x" if keep_inputs else "kept"
    empty = {name: slots[ring or saved] for name, ring in RINGS.items()}
    cells: dict[tuple[int, int], dict[str, int]] = {
        (t, rank): _cell(schedule, op, places[rank], saved)
        for t, now in enumerate(ticks)
        for rank, op in enumerate(now)
        if op
    }
    sends = defaultdict[str, set[tuple[int, int]]](set)
    for t, rank, ring, to, key in _messages(schedule, ticks):
        name = f"{ring}_{way(rank, to)}"
        cells.setdefault((t, to), {})[name] = places[to][ring][key]
        sends[name].add((rank, to))
    base = Row()._replace(**empty)
    rows = [
        [base._replace(**cells.get((t, rank), {})) for rank in _ranks(schedule)]
        for t in range(len(ticks))
    ]
    packed = np.array(rows, np.int32)
    return Program(
        schedule,
        Row(*(packed[..., n] for n in range(len(Row._fields)))),
        slots,
        tuple(runs(ticks)),
        {name: tuple(sorted(pairs)) for name, pairs in sends.items()},
    )


def _ranks(schedule: Schedule) -> range:
    return range(schedule.ranks)


def _works(ticks: Ticks, rank: int) -> Iterator[tuple[int, Action]]:
    for t, now in enumerate(ticks):
        for action in now[rank] or ():
            yield t, action


def _messages(
    schedule: Schedule, ticks: Ticks
) -> Iterator[tuple[int, int, str, int, Key]]:
    """(tick, rank, ring, receiving rank, key there) of everything that is sent."""
    for rank in _ranks(schedule):
        for t, (kind, digit, microbatch) in _works(ticks, rank):
            ring, to = "x", schedule.after(rank, digit)
            if kind in "BI":
                ring, to = "g", schedule.before(rank, digit)
            if kind != "W" and to is not None:
                yield t, rank, ring, to.rank, (to.digit, microbatch)


def _lives(schedule: Schedule, ticks: Ticks, rank: int, keep_inputs: bool) -> Lives:
    """When the values of a rank must be there."""
    forward, last = dict[Key, int](), dict[Key, int]()
    arrives = dict[tuple[str, Key], int]()
    for t, (kind, digit, microbatch) in _works(ticks, rank):
        (forward if kind == "F" else last)[digit, microbatch] = t
    for t, _, ring, to, key in _messages(schedule, ticks):
        if to == rank:
            arrives[ring, key] = t
    lives: Lives = {"x": {}, "kept": {}, "g": {}}
    for key, t in forward.items():
        if ("x", key) in arrives:
            read = last[key] if keep_inputs else t
            lives["x"][key] = Life(arrives["x", key], read)
        if ("g", key) in arrives:
            lives["g"][key] = Life(arrives["g", key], last[key])
        if not keep_inputs:
            lives["kept"][key] = Life(t, last[key])
    return lives


def _colour(values: dict[Key, Life]) -> tuple[dict[Key, int], int]:
    """A slot for every value, and how many there are."""
    slot_of, free_at = dict[Key, int](), list[int]()
    for key, life in sorted(values.items(), key=lambda item: item[1]):
        slot = next((n for n, end in enumerate(free_at) if end <= life.start), None)
        if slot is None:
            slot, free_at = len(free_at), [*free_at, 0]
        free_at[slot], slot_of[key] = life.end, slot
    return slot_of, len(free_at)


def _cell(
    schedule: Schedule, op: Op, slots: dict[str, dict[Key, int]], saved: str
) -> dict[str, int]:
    """The fields of `Row` that an op decides, but for what comes in."""
    cell = dict[str, int]()
    for kind, digit, microbatch in op:
        which = "f" if kind == "F" else "b"
        first = schedule.path_of(digit) * schedule.per_path
        cell[f"{which}_digit"] = digit
        cell[f"{which}_microbatch"] = first + microbatch
        if kind == "F":
            cell["forward"] = 1
        else:
            cell["backward"] = BACKWARDS.index(kind)
        for name, ring in RINGS.items():
            slot = slots[ring or saved].get((digit, microbatch))
            # The first stage has no input, and the last no gradient.
            if name.startswith(f"{which}_") and slot is not None:
                cell[name] = slot
    return cell


Signature = tuple[bool, str]  # whether an op has a forward, and which backward


def _signature(op: Op) -> Signature:
    kinds = [action.kind for action in op]
    backward = [kind for kind in kinds if kind != "F"]
    return "F" in kinds, backward[0] if backward else NOTHING


def runs(ticks: Ticks) -> Iterator[Run]:
    """Consecutive ticks in which busy ranks do the same, and the ticks between these.

    Uniform runs of less than SHORT ticks count as not uniform, so that the number of
    runs does not grow with the number of microbatches.
    """
    done = [{_signature(op) for op in now if op} for now in ticks]
    same = [next(iter(each)) if len(each) == 1 else None for each in done]
    found, t = list[tuple[int, int, Signature | None]](), 0
    for each, group in itertools.groupby(same):
        size = len(list(group))
        found.append((t, t + size, each if size >= SHORT else None))
        t += size
    for each, pieces in itertools.groupby(found, key=lambda piece: piece[2]):
        parts = list(pieces)
        start, stop = parts[0][0], parts[-1][1]
        every = set().union(*done[start:stop])
        kinds = {kind for _, kind in every}
        yield Run(
            start,
            stop,
            any(forward for forward, _ in every),
            tuple(kind for kind in BACKWARDS if kind in kinds),
            each is not None,
        )


def flags(schedule: Schedule) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which places [R, digits] have the first stage, and which the last."""
    stage_Rd = np.array(
        [
            [schedule.stage_of(*Place(rank, digit)) for digit in range(schedule.digits)]
            for rank in _ranks(schedule)
        ]
    )
    return stage_Rd == 0, stage_Rd == schedule.stages - 1
