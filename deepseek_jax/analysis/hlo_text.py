"""Reads the text of a scheduled XLA program: computations, operations, replica groups.

The syntax is what XLA's printer writes (openxla.org/xla); it has no other description.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np

PRODUCTS = {"dot", "ragged-dot", "scaled-dot"}
LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(gemm|matmul)', re.IGNORECASE)

COMMENT = re.compile(r"/\*.*?\*/")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
NAME = re.compile(r"%([\w.\-]+)|\b([A-Za-z_][\w.\-]*)(?=\s*(?:,|$))")
ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\]")  # f8e4m3fn[128,64]
CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
# Of an operation; of a call of a library.
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
GROUPS = re.compile(r"\b(?:replica_groups|source_target_pairs)=(.*)")
MESH = re.compile(r"mesh\[([^\]]*)\] \{([^}]*)\}")
AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")

Groups = tuple[tuple[int, ...], ...]


class Op(NamedTuple):
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """Its place in the source, as in "jit(step)/layer/shared/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def calls(self) -> list[str]:
        """The computations it calls."""
        found = CALLS.findall(self.attributes)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]

    @property
    def trips(self) -> int | None:
        """How often a loop runs; None when the compiler did not find out."""
        found = TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def arrays(self) -> list[str]:
        """The types of all arrays that it gives, as f32[128,64]."""
        return [found[0] for found in ARRAY.finditer(self.type)]

    @property
    def is_product(self) -> bool:
        """Whether it is itself a matrix product, ours or a library's."""
        library = self.opcode.startswith("custom-call")
        return self.opcode in PRODUCTS or (
            library and LIBRARY_PRODUCT.search(self.attributes) is not None
        )


class Text(NamedTuple):
    """A program: its computations' operations, in order of launch."""

    entry: str
    devices: int
    ops: dict[str, list[Op]]


def parse(text: str) -> Text:
    """Reads a program.

    Raises:
      ValueError: it is no scheduled program.
    """
    head = text[: text.find("\n")]
    if "HloModule" not in head or "is_scheduled=true" not in head:
        raise ValueError(
            f"text = {head[:60]!r}: must be the text of a compiled program, "
            "whose first line has HloModule and is_scheduled=true"
        )
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)
    entry, ops = "", dict[str, list[Op]]()
    body: list[Op] = []
    for line in text.splitlines()[1:]:
        if header := HEADER.match(line):
            body = ops.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif operation := OPERATION.match(COMMENT.sub("", line)):
            body.append(_op(operation[1], operation[2]))
    return Text(entry, math.prod(map(int, counts)), ops)


def _op(name: str, text: str) -> Op:
    kind, rest = _split(text)
    opcode, bracket, rest = rest.partition("(")
    operands, attributes = _split(bracket + rest)
    names = tuple(percent or bare for percent, bare in NAME.findall(operands[1:-1]))
    return Op(name, kind, opcode, names, attributes)


def _split(text: str) -> tuple[str, str]:
    """What opens a text, and the rest: a bracketed part, or all to the first space."""
    closing = {"(": ")", "{": "}"}.get(text[:1], " ")
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char == closing:
            return text[: i + 1].strip(), text[i + 1 :].strip()
    return text, ""


def _sizes(listed: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", listed)]


def nbytes(kind: str) -> int:
    """Of all arrays in a type; numbers of less than a byte are packed."""
    bits = sum(
        math.prod(_sizes(listed)) * (8 if letters == "pred" else int(width or 0))
        for letters, width, listed in ARRAY.findall(kind)
    )
    return -(-bits // 8)


def flops(op: Op, left: str) -> int:
    """Of a product: twice its numbers times what each sums; `left`: type of operand 0.

    0 where the text does not tell.
    """
    result, operand = ARRAY.search(op.type), ARRAY.search(left)
    contracted = CONTRACTED.search(op.attributes)
    if not (result and operand and contracted):
        return 0
    sizes = _sizes(operand[3])
    summed = [sizes[dimension] for dimension in _sizes(contracted[1])]
    return 2 * math.prod(_sizes(result[3])) * math.prod(summed)


def replica_groups(attributes: str, devices: int) -> Groups:
    """Who talks to whom; (source, target) pairs of a permutation, () of a send.

    Raises:
      ValueError: the groups are written in a form that is not known here.
    """
    found = GROUPS.search(attributes)
    if not found:
        return ()
    text = found[1]
    if named := MESH.match(text):
        return _along(named[1], named[2])
    if iota := IOTA.match(text):
        shape, dims = _sizes(iota[1]), _sizes(iota[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        order = _sizes(iota[3]) if iota[3] else None
        return _tuples(ids.transpose(order).reshape(shape))
    if text.startswith("{"):
        listed = re.findall(r"\{([\d,]+)\}", _split(text)[0])
        return tuple(tuple(_sizes(each)) for each in listed) or (tuple(range(devices)),)
    raise ValueError(f"replica_groups={text[:60]!r}: a form that is not known here")


@functools.cache
def _along(mesh: str, axes: str) -> Groups:
    """Groups of the devices of a mesh along some axes, or parts of axes.

    `axes` is as in "'node','expert':(2)4": of the second the 4 parts below the first 2.
    """
    whole = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh)}
    wanted = [
        (name, int(above or 1), int(n or whole[name]))
        for name, above, n in AXIS.findall(axes)
    ]
    cuts = {name: {1, n} for name, n in whole.items()}
    for name, above, n in wanted:
        cuts[name] |= {above, above * n}
    pieces = [
        (name, low, high // low)
        for name in whole
        for low, high in itertools.pairwise(sorted(cuts[name]))
    ]
    inner = [
        i
        for name, above, n in wanted
        for i, (other, low, _) in enumerate(pieces)
        if other == name and above <= low < above * n
    ]
    outer = [i for i in range(len(pieces)) if i not in inner]
    ids = np.arange(math.prod(whole.values())).reshape([n for _, _, n in pieces])
    size = math.prod(pieces[i][2] for i in inner)
    return _tuples(ids.transpose(outer + inner).reshape(-1, size))


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(group) for group in groups.tolist())
