"""What a table costs: how long ranks work and idle, and what papers say they would.

`simulate` runs a table on ranks that wait for nothing but what they need. `expected` is
table 2 of arXiv:2412.19437 and what other schedules' papers say: arXiv:1811.06965,
section 2.3 (GPipe); arXiv:2104.04473, section 2.2.2, and arXiv:2205.05198, section
4.2.3 (interleaved: bubble, activations); arXiv:2401.10241, section 2.3 (ZB1P).

A formula of a bubble is exact, and on every rank, where what `FORMULAS` says it assumes
is so. The report does not say what its own assumes; this was found by simulation. If
only its pairs take less than their parts, but no less than their backward alone, it is
still exact for the rank that idles most. Elsewhere it is an estimate, either way.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_jax.parallel.pipeline.actions import Action, Op
from deepseek_jax.parallel.pipeline.check import Work, does, needs, plan
from deepseek_jax.parallel.pipeline.schedules import Schedule

Floats = NDArray[np.float64]
Cost = dict[str, float]  # time of F, I, W and B, of a pair, and of a transfer: comm

NAMES = ("F", "I", "W", "B", "pair", "comm")


class Timing(NamedTuple):
    """When ranks do their ops, a number for each op of the table, and what remains."""

    start: tuple[Floats, ...]
    end: tuple[Floats, ...]
    makespan: float
    idle: Floats  # [R] of the makespan
    lockstep: float  # makespan if each tick takes as long as its longest op

    @property
    def share(self) -> float:
        """Of the makespan, that the rank which idles most idles."""
        return float(self.idle.max()) / self.makespan


class Block(NamedTuple):
    """Of a picture: an action of a rank, from when to when."""

    action: Action
    start: float
    end: float


class Expected(NamedTuple):
    bubble: float  # idle time of a rank
    activations: int  # most that a rank holds, as `check.Memory.live` counts


class Formula(NamedTuple):
    """Of R ranks, PP stages, C microbatches, v chunks; F&B is a pair."""

    bubble: str
    bubble_of: Callable[[Schedule, Cost], float]
    assumes: tuple[str, ...]  # of ASSUMPTIONS
    activations: str
    activations_of: Callable[[Schedule], int]


def costs(**given: float) -> Cost:
    """A cost model: F, I, W are 1 unless given, B is I + W, pair F + B, and comm 0.

    Raises:
      ValueError: another name, or a time that is none.
    """
    for name, value in given.items():
        if name not in NAMES:
            raise ValueError(f"cost {name}: must be one of {', '.join(NAMES)}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"cost {name} = {value:g}: must be a time, at least 0")
    cost = dict.fromkeys("FIW", 1.0) | given
    if not cost["F"]:
        raise ValueError(f"cost F = {cost['F']:g}: must be more than 0")
    cost = {"B": cost["I"] + cost["W"], "comm": 0.0} | cost
    cost = {"pair": cost["F"] + cost["B"]} | cost
    return {name: float(cost[name]) for name in NAMES}


def duration(op: Op, cost: Cost) -> float:
    return cost["pair" if len(op) > 1 else op[0].kind]


def simulate(schedule: Schedule, cost: Cost) -> Timing:
    """Runs the table: an op starts when its rank is free and what it needs is there.

    Raises:
      ValueError: as `check.plan`.
    """
    ticks, ranks = plan(schedule), range(schedule.ranks)
    finished: dict[Work, float] = {}
    start: list[list[float]] = [[] for _ in ranks]
    end: list[list[float]] = [[] for _ in ranks]
    for ops in ticks:
        for rank, op in enumerate(ops):
            if op is None:
                continue
            free = end[rank][-1] if end[rank] else 0.0
            there = [
                finished[work] + cost["comm"] * (work[0] != rank)
                for action in op
                for work in needs(schedule, rank, action)
            ]
            start[rank].append(max([free, *there]))
            end[rank].append(start[rank][-1] + duration(op, cost))
            for action in op:
                finished |= {(rank, each): end[rank][-1] for each in does(action)}
    longest = [max(duration(op, cost) for op in ops if op) for ops in ticks]
    makespan = max(each[-1] for each in end)
    busy = [sum(duration(op, cost) for op in line) for line in schedule.table]
    return Timing(
        tuple(map(np.array, start)),
        tuple(map(np.array, end)),
        makespan,
        makespan - np.array(busy),
        sum(longest),
    )


def blocks(schedule: Schedule, cost: Cost, timing: Timing) -> list[list[Block]]:
    """The actions of every rank in time; a pair's two share its time as their own."""
    made: list[list[Block]] = [[] for _ in schedule.table]
    for row, line, starts, ends in zip(made, schedule.table, timing.start, timing.end):
        for op, start, end in zip(line, starts.tolist(), ends.tolist()):
            edges = [start, end]
            if len(op) > 1:
                first, second = (cost[action.kind] for action in op)
                edges.insert(1, start + (end - start) * first / (first + second))
            row += map(Block, op, edges, edges[1:])
    return made


def _plain(schedule: Schedule, cost: Cost) -> float:
    return (schedule.ranks - 1) * (cost["F"] + cost["B"])


def _zero(schedule: Schedule, cost: Cost) -> float:
    return (schedule.ranks - 1) * (cost["F"] + cost["B"] - 2 * cost["W"])


def _dual(schedule: Schedule, cost: Cost) -> float:
    each = cost["pair"] + cost["B"] - 3 * cost["W"]
    return (schedule.stages / 2 - 1) * each


ASSUMPTIONS: dict[str, Callable[[Schedule, Cost], bool]] = {
    "comm = 0": lambda s, t: t["comm"] == 0,
    "C >= R": lambda s, t: s.microbatches >= s.ranks,
    "I = F": lambda s, t: math.isclose(t["I"], t["F"]),
    "W <= F": lambda s, t: t["W"] <= t["F"],
    "W <= I": lambda s, t: t["W"] <= t["I"],
    "B = I + W": lambda s, t: math.isclose(t["B"], t["I"] + t["W"]),
    "F&B = F + B": lambda s, t: math.isclose(t["pair"], t["F"] + t["B"]),
}
PLAIN = "(PP - 1)(F + B)", _plain, ("comm = 0",)
ROUNDS = "(R - 1)(F + B)", _plain, ("comm = 0",)
ZERO = (
    "(PP - 1)(F + B - 2W)",
    _zero,
    ("comm = 0", "C >= R", "W <= F", "W <= I", "B = I + W"),
)
DUAL = (
    "(PP/2 - 1)(F&B + B - 3W)",
    _dual,
    ("comm = 0", "I = F", "W <= F", "B = I + W", "F&B = F + B"),
)
FORMULAS = {
    "gpipe": Formula(*PLAIN, "C", lambda s: s.microbatches),
    "1f1b": Formula(*PLAIN, "PP", lambda s: s.stages),
    "interleaved": Formula(*ROUNDS, "(v + 1) R - 1", lambda s: s.stages + s.ranks - 1),
    "zb1p": Formula(*ZERO, "PP", lambda s: s.stages),
    "dualpipe": Formula(*DUAL, "PP + 1", lambda s: s.stages + 1),
    "dualpipev": Formula(*DUAL, "PP + 1", lambda s: s.stages + 1),
}


def expected(schedule: Schedule, cost: Cost) -> Expected:
    """What papers say of a schedule of this size."""
    formula = FORMULAS[schedule.name]
    every = schedule.per_path * schedule.digits  # few microbatches can't fill it
    activations = min(formula.activations_of(schedule), every)
    return Expected(formula.bubble_of(schedule, cost), activations)


def unmet(schedule: Schedule, cost: Cost) -> list[str]:
    """What the formula of the bubble assumes and is not so."""
    assumed = FORMULAS[schedule.name].assumes
    return [text for text in assumed if not ASSUMPTIONS[text](schedule, cost)]
