"""Documents to rows of L+1+J tokens, with a state from which the rows go on exactly.

* `ConcatRows`: all documents one after another, cut into rows that overlap by 1+J (our
  own, since Grain's ConcatThenSplit can't overlap rows);
* `BestFitRows`: whole documents packed by best fit, decreasing, within windows of some
  documents (arXiv:2404.10830), so that few are cut; what stays free is padding.

A state is {"parent": the state of the documents' iterator before the first document
still needed, ...}: restoring reads a few documents again and nothing else.
"""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax.data.batch import Batch

WINDOW = 64  # rows' worth of tokens that best fit chooses among


class Piece(NamedTuple):
    """A document, or a part of one, int32 [n]."""

    tokens: np.ndarray
    domain: int


@dataclass(frozen=True)
class Layout:
    """The shape of a row and how its padding and segments look."""

    length: int  # L
    depth: int  # J
    pad_id: int
    segment_mask: bool

    @property
    def width(self) -> int:
        return self.length + 1 + self.depth

    def row(self, pieces: Sequence[Piece]) -> Batch:
        """A row [L+1+J] of pieces that fit in it, padded."""
        sizes = [len(piece.tokens) for piece in pieces]
        used = sum(sizes)
        tokens = np.full(self.width, self.pad_id, np.int32)
        segment = np.zeros(self.width, np.int32)
        position = np.arange(self.width, dtype=np.int32)
        domain = np.full(self.width, -1, np.int32)
        start = 0
        for number, (piece, size) in enumerate(zip(pieces, sizes), 1):
            span = slice(start, start + size)
            tokens[span] = piece.tokens
            domain[span] = piece.domain
            segment[span] = number if self.segment_mask else 1
            if self.segment_mask:
                position[span] -= start
            start += size
        position[used:] = 0
        return Batch(tokens, segment, position, segment > 0, domain)


class ConcatRows(grain.IterDataset[Batch]):
    """Rows of the endless concatenation of an endless dataset of pieces."""

    def __init__(self, parent: grain.IterDataset[Piece], layout: Layout):
        super().__init__(parent)
        self._layout = layout

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _ConcatIterator(iter(self._parent), self._layout)


class _ConcatIterator(grain.DatasetIterator[Batch]):
    def __init__(self, parent: grain.DatasetIterator[Piece], layout: Layout):
        super().__init__(parent)
        self._layout = layout
        self._clear(0)

    def _clear(self, start: int) -> None:
        self._start = start  # of the next row, in the first piece that is held
        self._held: deque[tuple[Any, Piece]] = deque()  # with the parent's state before
        self._size = 0  # tokens held

    def __next__(self) -> Batch:
        end = self._start + self._layout.width
        while self._size < end:
            before = self._parent.get_state()
            piece = next(self._parent)
            self._held.append((before, piece))
            self._size += len(piece.tokens)
        row = self._layout.row(list(self._between(self._start, end)))
        self._start += self._layout.length
        while self._start >= (size := len(self._held[0][1].tokens)):
            self._held.popleft()
            self._start -= size
            self._size -= size
        return row

    def _between(self, start: int, end: int) -> Iterator[Piece]:
        for _, (tokens, domain) in self._held:
            if start < len(tokens) and end > 0:
                yield Piece(tokens[max(start, 0) : end], domain)
            start -= len(tokens)
            end -= len(tokens)

    def get_state(self) -> dict[str, Any]:
        parent = self._held[0][0] if self._held else self._parent.get_state()
        return {"parent": parent, "start": self._start}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._clear(state["start"])


class BestFitRows(grain.IterDataset[Batch]):
    """Rows of whole documents, in seeded random order within a window."""

    def __init__(self, parent: grain.IterDataset[Piece], layout: Layout, seed: int):
        super().__init__(parent)
        self._layout = layout
        self._seed = seed

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _BestFitIterator(iter(self._parent), self._layout, self._seed)


class _BestFitIterator(grain.DatasetIterator[Batch]):
    def __init__(self, parent: grain.DatasetIterator[Piece], layout: Layout, seed: int):
        super().__init__(parent)
        self._layout = layout
        self._seed = seed
        self._open(window=0, row=0)

    def _open(self, window: int, row: int) -> None:
        self._window, self._row = window, row
        self._before = self._parent.get_state()
        self._rows: list[list[Piece]] = []

    def __next__(self) -> Batch:
        if not self._rows:
            self._rows = self._read()
        if self._row == len(self._rows):
            self._open(self._window + 1, row=0)
            self._rows = self._read()
        self._row += 1
        return self._layout.row(self._rows[self._row - 1])

    def _read(self) -> list[list[Piece]]:
        """The rows of the window that starts where the parent stands."""
        capacity = self._layout.length + 1
        rows: list[list[Piece]] = []
        rests: list[Piece] = []
        size = 0
        while size < WINDOW * capacity:
            piece = next(self._parent)
            size += len(piece.tokens)
            full, rest = split_long(piece, self._layout)
            rows += [[part] for part in full]
            rests.append(rest)
        sizes = [len(rest.tokens) for rest in rests]
        rows += [[rests[i] for i in bin] for bin in best_fit(sizes, capacity)]
        order = np.random.default_rng([self._seed, self._window]).permutation(len(rows))
        return [rows[i] for i in order]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "window": self._window, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._open(state["window"], state["row"])


def split_long(piece: Piece, layout: Layout) -> tuple[list[Piece], Piece]:
    """Cuts a document into parts that fill a row and a rest of 2 to L+1 tokens.

    Part k starts at token k L and has up to L+1+J, so that all its inputs have full
    targets at every depth, and every token but the first is predicted exactly once.
    """
    tokens, full = piece.tokens, []
    while len(tokens) > layout.length + 1:
        full.append(Piece(tokens[: layout.width], piece.domain))
        tokens = tokens[layout.length :]
    return full, Piece(tokens, piece.domain)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers: by decreasing size, each into the fullest bin with room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, (sizes[item], -1))
        if at < len(rooms):
            room, chosen = rooms.pop(at)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if left := room - sizes[item]:
            bisect.insort(rooms, (left, chosen))
    return bins
