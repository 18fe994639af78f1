"""What is wrong with a table, when its ops run tick by tick, and what ranks hold.

`plan` walks a table: in every tick each rank does its next op if all that it needs was
finished in an earlier tick, on whichever rank. A table is right when everything gets
done that way, and once. Otherwise the error names rank, tick (from 0) and action. Ours;
what needs what is the same in all schedules (arXiv:2401.10241, section 2): a forward
the forward of the stage before, a backward its own forward and the backward of the
stage after, a weight gradient its own input gradient.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepseek_jax.parallel.pipeline.actions import Action, Op, op_text
from deepseek_jax.parallel.pipeline.schedules import Schedule

Ticks = tuple[tuple[Op | None, ...], ...]  # [T][R], None where a rank is idle
Work = tuple[int, Action]  # of a rank: an F, I or W

DOES = {"F": "F", "B": "IW", "I": "I", "W": "W"}
PAIR = "FB"


class Memory(NamedTuple):
    """Most that each rank holds at a time, in microbatches of one stage."""

    live: NDArray[np.int64]  # [R] from a forward's start to its backward's end
    deferred: NDArray[np.int64]  # [R] from there to the end of its weight gradient


def does(action: Action) -> list[Action]:
    """What an action does, a full backward being an I and a W."""
    return [action._replace(kind=kind) for kind in DOES[action.kind]]


def needs(schedule: Schedule, rank: int, action: Action) -> list[Work]:
    """What must be finished before an action of a rank may start."""
    kind, digit, microbatch = action
    if kind == "W":
        return [(rank, action._replace(kind="I"))]
    if kind == "F":
        own, other = [], schedule.before(rank, digit)
    else:
        own, other = [(rank, action._replace(kind="F"))], schedule.after(rank, digit)
    if other is None:
        return own
    kind = "F" if kind == "F" else "I"
    return [*own, (other.rank, Action(kind, other.digit, microbatch))]


def plan(schedule: Schedule) -> Ticks:
    """The table tick by tick.

    Raises:
      ValueError: the table is wrong, as the module says.
    """
    table, ticks, done = schedule.table, list[tuple[Op | None, ...]](), set[Work]()
    if len(table) != schedule.ranks:
        raise ValueError(f"table of {len(table)} ranks: must be of {schedule.ranks}")
    at = [0] * schedule.ranks
    while any(i < len(line) for i, line in zip(at, table)):
        now: list[Op | None] = []
        for rank, line in enumerate(table):
            op = line[at[rank]] if at[rank] < len(line) else None
            waits = op and _waits(schedule, done, rank, len(ticks), op)
            now.append(None if waits else op)
        if not any(now):
            raise _stuck(schedule, done, at, len(ticks))
        for rank, op in enumerate(now):
            at[rank] += op is not None
            done |= {(rank, each) for action in op or () for each in does(action)}
        ticks.append(tuple(now))
    for rank in range(schedule.ranks):
        for missing in _all(schedule):
            if (rank, missing) not in done:
                raise _missing(rank, len(ticks), missing)
    return tuple(ticks)


def memory(schedule: Schedule) -> Memory:
    """What ranks hold at most; it follows from the order of their ops alone."""
    peaks = np.zeros((2, schedule.ranks), np.int64)
    for rank, line in enumerate(schedule.table):
        held = np.zeros(2, np.int64)
        for op in line:
            kinds = [action.kind for action in op]
            held += kinds.count("F"), kinds.count("I")
            peaks[:, rank] = np.maximum(peaks[:, rank], held)
            held -= kinds.count("B") + kinds.count("I"), kinds.count("W")
    return Memory(*peaks)


def _all(schedule: Schedule) -> list[Action]:
    """What every rank has to do."""
    digits, microbatches = range(schedule.digits), range(schedule.per_path)
    return [Action(k, d, m) for k in "FIW" for d in digits for m in microbatches]


def _unmet(
    schedule: Schedule, done: set[Work], rank: int, op: Op
) -> list[tuple[Action, Work]]:
    """What the actions of an op wait for."""
    every = [(action, work) for action in op for work in needs(schedule, rank, action)]
    return [(action, work) for action, work in every if work not in done]


def _waits(schedule: Schedule, done: set[Work], rank: int, tick: int, op: Op) -> bool:
    """Whether the op that is next has to wait; refused if it is wrong at any time."""

    def refuse(what: object, text: str) -> None:
        raise ValueError(f"rank {rank}, tick {tick}, {what}: {text}")

    kinds = "".join(action.kind for action in op)
    if kinds != PAIR and len(op) != 1:
        refuse(op_text(op), "a pair is a forward and a full backward, in this order")
    sizes = {"digit": schedule.digits, "microbatch": schedule.per_path}
    for action in op:
        for field, size in sizes.items():
            if (value := getattr(action, field)) >= size:
                refuse(action, f"there is no {field} {value}: must be 0 to {size - 1}")
        if any((rank, each) in done for each in does(action)):
            refuse(action, "is done a second time: must be done once")
    unmet = _unmet(schedule, done, rank, op)
    for action, (other, wanted) in unmet:
        if other == rank:
            line = (does(each) for op in schedule.table[rank] for each in op)
            if not any(wanted in each for each in line):
                raise _missing(rank, tick, wanted, f", and {action} is due")
            refuse(action, f"must come after {wanted} on this rank")
    return bool(unmet)


def _missing(rank: int, tick: int, action: Action, waits: str = "") -> ValueError:
    kind, digit, microbatch = action
    full = f" (or B{digit}:{microbatch})" if kind != "F" else ""
    return ValueError(f"rank {rank}, tick {tick}, {action}{full}: is missing{waits}")


def _stuck(schedule: Schedule, done: set[Work], at: list[int], tick: int) -> ValueError:
    """Why no rank can go on: something is missing, or they wait for one another."""
    left = [
        {each: action for op in line[i:] for action in op for each in does(action)}
        for i, line in zip(at, schedule.table)
    ]
    rank = next(rank for rank, works in enumerate(left) if works)
    waiting: dict[int, tuple[Action, str]] = {}
    while rank not in waiting:
        op = schedule.table[rank][at[rank]]
        action, (other, wanted) = _unmet(schedule, done, rank, op)[0]
        if wanted not in left[other]:
            waits = f", and rank {rank} waits for it with {action}"
            return _missing(other, tick, wanted, waits)
        text = (
            f"{action} of rank {rank} waits for {left[other][wanted]} of rank {other}"
        )
        waiting[rank], rank = (action, text), other
    ranks = list(waiting)
    cycle = [waiting[each] for each in ranks[ranks.index(rank) :]]
    texts = "; ".join(text for _, text in cycle)
    return ValueError(f"rank {rank}, tick {tick}, {cycle[0][0]}: in a cycle, {texts}")
