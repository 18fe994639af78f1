"""What a rank of a pipeline does at a time, and the text form of a table of it.

A line a rank, ops separated by spaces: `F0:3 F1:2+B0:0 I1:3 W1:3`. An action is its
kind, a digit, a colon and the number of a microbatch. The digit tells apart what a rank
holds several of: directions, the legs of a V, chunks (`schedules` says which). Two
actions joined by `+` are a pair, a forward and a backward whose computation and
communication overlap (arXiv:2412.19437, section 3.2.1 and figure 4).
"""

import re
from typing import NamedTuple

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
}
FORM = re.compile(r"([FBIW])([0-9]+):([0-9]+)")


class Action(NamedTuple):
    kind: str  # of KINDS; a B is an I and its W in one
    digit: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.digit}:{self.microbatch}"


Op = tuple[Action, ...]  # one action, or the two of a pair, the forward first
Table = tuple[tuple[Op, ...], ...]  # of each rank, in the order in which it does them


def op_text(op: Op) -> str:
    return "+".join(map(str, op))


def table_text(table: Table) -> str:
    """The text form, without a line break at its end; `parse` inverts it."""
    return "\n".join(" ".join(map(op_text, line)) for line in table)


def parse(text: str) -> Table:
    """The table that a text is the form of; whether it makes sense `check` says.

    Raises:
      ValueError: something in it is no action; named by its rank and place.
    """
    lines = text.rstrip().split("\n")
    return tuple(
        tuple(_op(word, rank, at) for at, word in enumerate(line.split()))
        for rank, line in enumerate(lines)
    )


def _op(word: str, rank: int, at: int) -> Op:
    found = [FORM.fullmatch(part) for part in word.split("+")]
    if not all(found):
        raise ValueError(
            f"rank {rank}, op {at}, {word!r}: must be a kind ({', '.join(KINDS)}), a "
            "digit, a colon and a microbatch, as F0:3, or a pair of them, as F1:2+B0:0"
        )
    return tuple(Action(m[1], int(m[2]), int(m[3])) for m in found if m)
