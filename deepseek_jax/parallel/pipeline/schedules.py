"""Pipeline schedules as tables: which rank does what, in which order.

Of each rank a schedule says only a sequence of words such as F0, I1 or F0+B1. Which
microbatch a word is about follows: on a rank those of a digit come in ascending order,
and a W is of the oldest input gradient whose weight gradient is due. `build` makes the
table; `SCHEDULES` lists what there is and what each asks for.

Sources: GPipe arXiv:1811.06965 (whose figure runs backwards through the microbatches;
here they come in the same order each time, so that gradients sum in one order under all
schedules); 1F1B and interleaved 1F1B arXiv:2104.04473, sections 2.2.1 and 2.2.2; ZB1P,
which is the ZB-H1 of arXiv:2401.10241, section 2.1; DualPipe arXiv:2412.19437, section
3.2.1, in the eight steps of github.com/deepseek-ai/DualPipe; DualPipeV, half of it,
from there too.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from deepseek_jax.parallel.pipeline.actions import Action, Op, Table


class Place(NamedTuple):
    """Where a stage lies."""

    rank: int
    digit: int


Path = tuple[Place, ...]


@dataclass(frozen=True)
class Schedule:
    """A table and the way of microbatches through the ranks that it is for.

    Ranks hold a stage for every digit. A microbatch takes one path, from its first
    place to its last and back; a path's place number i holds stage i of the model.
    Schedules of two directions have two paths, so each stage lies in two places, and
    each path has microbatches 0, 1, .. of its own.
    """

    name: str  # of SCHEDULES
    ranks: int
    microbatches: int  # on all paths together
    paths: tuple[Path, ...]
    table: Table

    @property
    def stages(self) -> int:
        """That the model is cut into."""
        return len(self.paths[0])

    @property
    def digits(self) -> int:
        """Stages that a rank holds."""
        return self.stages * self.copies // self.ranks

    @property
    def copies(self) -> int:
        """Places of every stage, whose gradients are to be summed."""
        return len(self.paths)

    @property
    def per_path(self) -> int:
        """Microbatches of a path; the p-th path's number m is p * per_path + m."""
        return self.microbatches // self.copies

    @property
    def forwards_first(self) -> bool:
        """Whether every rank does all its forwards before its first backward."""
        kinds = ("".join(a.kind for op in line for a in op) for line in self.table)
        return all("F" not in line.lstrip("F") for line in kinds)

    @cached_property
    def _found(self) -> dict[Place, tuple[int, int]]:
        return {
            place: (number, stage)
            for number, path in enumerate(self.paths)
            for stage, place in enumerate(path)
        }

    def path_of(self, digit: int) -> int:
        """The path that a digit's places are on."""
        return self._found[Place(0, digit)][0]

    def stage_of(self, rank: int, digit: int) -> int:
        return self._found[Place(rank, digit)][1]

    def before(self, rank: int, digit: int) -> Place | None:
        """Where a place's input comes from, and its input gradient goes."""
        number, stage = self._found[Place(rank, digit)]
        return self.paths[number][stage - 1] if stage else None

    def after(self, rank: int, digit: int) -> Place | None:
        """Where a place's output goes, and its output's gradient comes from."""
        number, stage = self._found[Place(rank, digit)]
        return self.paths[number][stage + 1] if stage + 1 < self.stages else None


class Size(NamedTuple):
    """What a rank's words depend on, besides the rank."""

    ranks: int
    microbatches: int
    chunks: int


def gpipe(rank: int, size: Size) -> list[str]:
    """All forwards, then all backwards."""
    return ["F0"] * size.microbatches + ["B0"] * size.microbatches


def one_f_one_b(rank: int, size: Size) -> list[str]:
    """As many forwards as ranks are to come, then one more before each backward."""
    ahead = min(size.ranks - 1 - rank, size.microbatches)
    steady = ["F0", "B0"] * (size.microbatches - ahead)
    return ["F0"] * ahead + steady + ["B0"] * ahead


def interleaved(rank: int, size: Size) -> list[str]:
    """1F1B in rounds: of as many microbatches as ranks, one round a chunk."""
    ranks, microbatches, chunks = size
    chunk_of = [i // ranks % chunks for i in range(microbatches * chunks)]
    forwards = [f"F{chunk}" for chunk in chunk_of]
    backwards = [f"B{chunks - 1 - chunk}" for chunk in chunk_of]
    ahead = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, len(chunk_of))
    steady = [word for pair in zip(forwards[ahead:], backwards) for word in pair]
    return forwards[:ahead] + steady + backwards[len(chunk_of) - ahead :]


def zb1p(rank: int, size: Size) -> list[str]:
    """1F1B whose rank r lets r weight gradients wait, and does them at the end."""
    waiting, words = 0, []
    for word in one_f_one_b(rank, size):
        words += ["I0"] if word == "B0" else [word]
        if word == "B0" and waiting < rank:
            waiting += 1
        elif word == "B0":
            words.append("W")
    return words + ["W"] * waiting


def dualpipe(rank: int, size: Size) -> list[str]:
    """Half of the microbatches enter at either end; ranks past the middle mirror."""
    half = size.ranks // 2
    from_end = min(rank, size.ranks - 1 - rank)
    words = eight_steps(from_end, half, size.microbatches // 2)
    return words if rank < half else [word.translate(SWAP) for word in words]


def dualpipev(rank: int, size: Size) -> list[str]:
    """One half of a DualPipe, whose other direction comes back from the last rank."""
    return eight_steps(rank, size.ranks, size.microbatches)


SWAP = str.maketrans("01", "10")
# What is repeated in each of the eight steps; 0 is a rank's own direction.
STEPS = ("F0", "F0 F1", "I1 W F1", "F0+B1 F1+B0", "B1 F1+B0", "B1 B0", "W I0", "W")


def step_counts(rank: int, half: int, microbatches: int) -> tuple[int, ...]:
    """How often, on a rank of the first half, with as many microbatches either way."""
    to, past = half - 1 - rank, rank + 1
    return (2 * to, past, to, microbatches - 2 * half + past, to, past, to, past)


def eight_steps(rank: int, half: int, microbatches: int) -> list[str]:
    """The words of a rank of the first half, with as many microbatches either way."""
    counts = step_counts(rank, half, microbatches)
    steps = [step.split() * count for step, count in zip(STEPS, counts, strict=True)]
    # From the middle of step 6 on, weight gradients wait.
    steps[5][rank + 1 :] = [word.replace("B", "I") for word in steps[5][rank + 1 :]]
    # The middle does not overlap its first pair, so that the forward leaves earlier.
    if rank == half - 1:
        steps[3][:1] = steps[3][0].split("+")
    return [word for step in steps for word in step]


def one_way(size: Size) -> tuple[Path, ...]:
    ranks, chunks = range(size.ranks), range(size.chunks)
    return (tuple(Place(rank, chunk) for chunk in chunks for rank in ranks),)


def both_ways(size: Size) -> tuple[Path, ...]:
    ranks = range(size.ranks)
    return tuple(Place(r, 0) for r in ranks), tuple(Place(r, 1) for r in ranks[::-1])


def there_and_back(size: Size) -> tuple[Path, ...]:
    there, back = both_ways(size)
    return (there + back,)


class Kind(NamedTuple):
    """What a schedule is, and what it asks of its sizes."""

    about: str
    words: Callable[[int, Size], list[str]]  # of a rank
    paths: Callable[[Size], tuple[Path, ...]] = one_way
    chunks: int = 0  # by default; 0: it has none
    least: int = 0  # microbatches for each rank
    even: bool = False  # ranks and microbatches
    divides: bool = False  # ranks, the microbatches


SCHEDULES = {
    "gpipe": Kind("all forwards, then all backwards", gpipe),
    "1f1b": Kind("forward and backward in turn", one_f_one_b),
    "interleaved": Kind(
        "1F1B, a rank having several chunks; digit: the chunk",
        interleaved,
        chunks=2,
        divides=True,
    ),
    "zb1p": Kind("1F1B, weight gradients late (ZB-H1)", zb1p),
    "dualpipe": Kind(
        "from both ends, in pairs; digit: the direction, 0 enters at rank 0",
        dualpipe,
        both_ways,
        least=2,
        even=True,
    ),
    "dualpipev": Kind(
        "there and back, in pairs; digit: the leg, 0 there and 1 back",
        dualpipev,
        there_and_back,
        least=2,
    ),
}


def build(
    name: str, ranks: int, microbatches: int, chunks: int | None = None
) -> Schedule:
    """A schedule of some size.

    Args:
      name: of SCHEDULES.
      microbatches: of an optimizer step, both directions together.
      chunks: stages a rank holds of an interleaved schedule; 2 by default.

    Raises:
      ValueError: there is no such schedule, or not for these sizes.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name = {name!r}: must be one of {', '.join(SCHEDULES)}")
    kind = SCHEDULES[name]
    size = Size(ranks, microbatches, _chunks(name, kind, chunks))
    _check(name, kind, size)
    table = tuple(tuple(numbered(kind.words(rank, size))) for rank in range(ranks))
    return Schedule(name, ranks, microbatches, kind.paths(size), table)


def numbered(words: Iterable[str]) -> Iterator[Op]:
    """The ops of a rank, each word with its microbatch."""
    seen: Counter[tuple[bool, str]] = Counter()
    deferred: deque[tuple[int, int]] = deque()
    for word in words:
        op = []
        for part in word.split("+"):
            kind, digit = part[0], part[1:]
            if kind == "W":
                op.append(Action("W", *deferred.popleft()))
                continue
            op.append(Action(kind, int(digit), seen[kind == "F", digit]))
            seen[kind == "F", digit] += 1
            if kind == "I":
                deferred.append(op[-1][1:])
        yield tuple(op)


def _chunks(name: str, kind: Kind, chunks: int | None) -> int:
    if chunks is None:
        return max(1, kind.chunks)
    if not kind.chunks:
        raise ValueError(f"chunks = {chunks}: {name} has none; interleaved has")
    if chunks < 2:
        raise ValueError(f"chunks = {chunks}: must be at least 2; 1 is 1f1b")
    return chunks


def _check(name: str, kind: Kind, size: Size) -> None:
    ranks, microbatches, _ = size
    for field, value, least in (
        ("ranks", ranks, 2 if kind.even else 1),
        ("microbatches", microbatches, 1),
    ):
        if value < least:
            raise ValueError(f"{field} = {value}: must be at least {least} for {name}")
        if kind.even and value % 2:
            raise ValueError(f"{field} = {value}: must be even for {name}")
    if microbatches < kind.least * ranks:
        raise ValueError(
            f"microbatches = {microbatches}: must be at least {kind.least * ranks} for "
            f"{name} on {ranks} ranks, {kind.least} for each"
        )
    if kind.divides and microbatches % ranks:
        raise ValueError(
            f"microbatches = {microbatches}: must be a multiple of ranks = {ranks} for "
            f"{name}"
        )
