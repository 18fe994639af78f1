"""What a scheduled XLA program multiplies while its collectives are under way.

The text of a compiled program (`compiled.as_text()`) stands in the order of launch. An
asynchronous collective is one operation that starts it and one that waits for it; the
matrix products launched between the two are what may hide it. That shows opportunity,
not time: no order tells how fast a link is.

Only products that are sure to run count: those of a loop as often as its known trip
count says, never when there is none, and of a conditional those of its least branch.
A kernel of our own does not show what it multiplies and does not count.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deepseek_jax.analysis.hlo_text import (
    Groups,
    Op,
    flops,
    nbytes,
    parse,
    replica_groups,
)

COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
COPIES = {"copy", "copy-start"}
POINT_TO_POINT = {"send", "recv"}  # always asynchronous, without a "-start"


class Matmul(NamedTuple):
    """A matrix product; `flops` of all the times it is launched between the two."""

    name: str
    op_name: str  # its place in the source: "jit(step)/layer/shared/dot_general"
    flops: int  # 0 where the text does not tell


class Collective(NamedTuple):
    """A collective, with the products launched between its start and its done."""

    computation: str
    name: str
    kind: str  # "all-to-all"
    op_name: str
    bytes: int  # on each device, of what it gives or what it gets, the larger
    groups: Groups  # of devices; of a permutation (source, target) pairs
    asynchronous: bool
    times: int | None  # launches; None where a condition or an unknown count decides
    under: tuple[Matmul, ...]

    @property
    def exposed(self) -> bool:
        """Whether no product hides it."""
        return not self.under

    def within(self, scope: str) -> bool:
        """Whether the source has it in this named scope."""
        return in_scope(self.op_name, scope)

    def under_scope(self, scope: str) -> tuple[Matmul, ...]:
        """The products of `under` that the source has in this named scope."""
        return tuple(m for m in self.under if in_scope(m.op_name, scope))


class Copy(NamedTuple):
    """A copy, in the body of a loop, of an array such as the loop carries."""

    computation: str
    name: str
    bytes: int


def in_scope(op_name: str, scope: str) -> bool:
    """Whether a path of scopes holds one, also as "jvp(scope)" or "scope.method"."""
    method = r"(\.[A-Za-z_]\w*)?"
    found = re.search(rf"(^|[/(]){re.escape(scope)}{method}($|[/)])", op_name)
    return found is not None


def collectives(text: str, loops: bool = False) -> list[Collective]:
    """All collectives of a program, computation by computation, in order of launch.

    A start without a done in its computation is under way until that ends.

    Args:
      loops: count the products of a loop of unknown length, too, as if it ran once.

    Raises:
      ValueError: the text is no scheduled program, or it names the devices of a
        collective in a form that is not known.
    """
    return list(_Program(text, loops).collectives())


def carried_copies(text: str) -> list[Copy]:
    """Copies, in the bodies of loops, of arrays of a type and shape that these carry.

    Raises:
      ValueError: the text is no scheduled program.
    """
    return list(_Program(text, False).copies())


def table(found: Iterable[Collective], scope: str = "shared") -> str:
    """A line for each collective; `scope` has a column of its own.

    `groups` is number x size. A star for the times it is launched means that a
    condition, or a loop of unknown length, decides.
    """
    lines = [
        f"{'collective':18} {'MB':>9} {'times':>5}  {'groups':>8}"
        f"  {'under it':24} {scope:>8}  source"
    ]
    for each in found:
        if not each.asynchronous:
            under = "SYNCHRONOUS"
        elif each.exposed:
            under = "EXPOSED"
        else:
            gflop = _flops(each.under) / 1e9
            under = f"{len(each.under)} matmuls, {gflop:.3g} GFLOP"
        groups = f"{len(each.groups)} x {len(each.groups[0])}" if each.groups else "-"
        times = "*" if each.times is None else each.times
        lines.append(
            f"{each.kind:18} {each.bytes / 1e6:9.2f} {times:>5}  {groups:>8}"
            f"  {under:24} {len(each.under_scope(scope)):8}  {each.op_name}"
        )
    return "\n".join(lines)


class _Program:
    """The computations of a program, and what each of them is sure to multiply."""

    def __init__(self, text: str, loops: bool) -> None:
        self.least = 1 if loops else 0  # turns of a loop whose number is not known
        self.entry, self.devices, self.ops = parse(text)
        self.types = {
            name: {op.name: op.type for op in ops} for name, ops in self.ops.items()
        }
        self.known: dict[str, tuple[Matmul, ...]] = {}
        self.launches: dict[str, int | None] = {}
        self._count(self.entry, 1)

    def _count(self, computation: str, times: int | None) -> None:
        """Adds to how often a computation and all that it calls are launched."""
        before = self.launches.get(computation, 0)
        total = None if times is None or before is None else before + times
        self.launches[computation] = total
        for op in self.ops.get(computation, []):
            factor = {"while": op.trips, "conditional": None}.get(op.opcode, 1)
            inner = None if times is None or factor is None else times * factor
            for name in op.calls:
                self._count(name, inner)

    def matmuls(self, computation: str, op: Op) -> tuple[Matmul, ...]:
        """The products that launching an operation is sure to launch."""
        if op.is_product:
            left = self.types[computation].get(op.operands[0], "")
            return (Matmul(op.name, op.op_name, flops(op, left)),)
        if op.opcode.endswith(("-done", "-update")):
            return ()  # its start counts
        called = [self.inside(name) for name in op.calls]
        if op.opcode == "conditional":
            return min(called, key=lambda found: (len(found), _flops(found)))
        found = tuple(matmul for each in called for matmul in each)
        if op.opcode == "while":
            trips = op.trips or self.least
            return tuple(m._replace(flops=trips * m.flops) for m in found if trips)
        return found

    def inside(self, computation: str) -> tuple[Matmul, ...]:
        """The products that a computation is sure to launch."""
        if computation not in self.known:
            ops = self.ops.get(computation, [])
            found = [m for op in ops for m in self.matmuls(computation, op)]
            self.known[computation] = tuple(found)
        return self.known[computation]

    def collectives(self) -> Iterator[Collective]:
        """Every collective that can be reached from the entry."""
        every = [op for ops in self.ops.values() for op in ops]
        wraps = [op for op in every if op.opcode == "async-start"]
        wrapped = {name for op in wraps for name in op.calls}
        for name, ops in self.ops.items():
            if name in self.launches and name not in wrapped:
                for i in range(len(ops)):
                    yield from self._collective(name, i)

    def copies(self) -> Iterator[Copy]:
        """See `carried_copies`."""
        loops = [op for ops in self.ops.values() for op in ops if op.opcode == "while"]
        for name in dict.fromkeys(name for op in loops for name in op.calls):
            ops = self.ops[name]
            carried = {a for op in ops if op.opcode == "parameter" for a in op.arrays}
            for op in ops:
                if op.opcode in COPIES and carried.intersection(op.arrays):
                    yield Copy(name, op.name, nbytes(op.arrays[0]))

    def _collective(self, computation: str, i: int) -> Iterator[Collective]:
        """The collective that operation i of a computation starts or is, if any."""
        ops = self.ops[computation]
        op, home = ops[i], computation
        if op.opcode == "async-start":
            (home,) = op.calls
            inner = [o for o in self.ops[home] if o.opcode in COLLECTIVES]
        else:
            kind = op.opcode.removesuffix("-start")
            inner = [op] if kind in COLLECTIVES | POINT_TO_POINT else []
        if not inner:
            return
        starts = op.opcode.endswith("-start") or op.opcode in POINT_TO_POINT
        asynchronous = starts and '"is_sync":true' not in op.attributes
        done = _done(ops, i) if starts else i
        types = self.types[home]
        given = sum(nbytes(types.get(n, "")) for o in inner for n in o.operands)
        gotten = nbytes(ops[done].type) if done < len(ops) else 0
        between = ops[i + 1 : done] if asynchronous else []
        yield Collective(
            computation,
            op.name,
            inner[0].opcode.removesuffix("-start"),
            op.op_name or inner[0].op_name,
            max(given, gotten),
            replica_groups(inner[0].attributes, self.devices),
            asynchronous,
            self.launches[computation],
            tuple(m for each in between for m in self.matmuls(computation, each)),
        )


def _flops(found: Iterable[Matmul]) -> int:
    return sum(matmul.flops for matmul in found)


def _done(ops: list[Op], start: int) -> int:
    """Where what starts there is waited for; past the end when nowhere."""
    names = {ops[start].name}
    for j in range(start + 1, len(ops)):
        if names & set(ops[j].operands):
            if ops[j].opcode.endswith("-done"):
                return j
            if ops[j].opcode.endswith("-update"):
                names.add(ops[j].name)
    return len(ops)
