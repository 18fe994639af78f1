"""Batches for training and validation.

Documents are dealt to a fixed number of packing lanes; each lane shuffles, mixes and
packs by itself (modules `lanes`, `packing`) and gives the same number of rows to every
global batch. A process owns a contiguous slice of the lanes. So the global batch of
step k follows from corpus, config and seed alone, whatever the number of processes, and
so does the state, which is kept per lane and may be restored on another number of them.

There is no prefetching: a batch costs far less than a step, and the state after a batch
is then simply that of the iterator.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from deepseek_jax.config import DataConfig
from deepseek_jax.data import packing
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.lanes import deal, derive, lane_documents
from deepseek_jax.data.packing import Layout, Piece
from deepseek_jax.data.sources import parse_weights
from deepseek_jax.data.store import Store, open_store


class TrainIterator:
    """This process's rows of each global batch, forever.

    `get_state()` is a dict for JSON, keyed by lane, from which the batch after the last
    one handed out follows. The states of several processes together are one dict.
    """

    def __init__(self, lanes: dict[str, grain.DatasetIterator[Batch]], rows: int):
        self._lanes = lanes
        self._rows = rows  # of a lane in a batch

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        rows = [next(lane) for lane in self._lanes.values() for _ in range(self._rows)]
        return stack(rows)

    def get_state(self) -> dict[str, Any]:
        return {name: lane.get_state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state; lanes of other processes in it are ignored.

        Raises:
          ValueError: it lacks one of this process's lanes.
        """
        if missing := self._lanes.keys() - state.keys():
            raise ValueError(
                f"data state: no lane {', '.join(sorted(missing, key=int))}; it has "
                f"{len(state)} lanes. Merge the states of all processes, and keep "
                "data.lanes as it was"
            )
        for name, lane in self._lanes.items():
            lane.set_state(state[name])


def train_iterator(
    config: DataConfig,
    corpus: Corpus,
    tokenizer: Any,
    *,
    depth: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """The training batches of one process.

    Args:
      depth: J, the MTP depth.
      process_index, process_count: this process gets rows
        [index * batch / count, (index + 1) * batch / count) of the global batch.

    Raises:
      ValueError: the corpus is shorter than one batch, has fewer documents than lanes,
        or `process_count` doesn't divide the lanes.
    """
    lanes = config.lanes or config.batch
    if lanes % process_count:
        raise ValueError(
            f"data.lanes = {lanes}: must be a multiple of the {process_count} processes"
        )
    store = open_store(corpus, tokenizer)
    weights = _weights(config, corpus)
    numbers = np.flatnonzero(~store.index.held_out(config.val_fraction))
    if weights is not None:
        used = [domain for domain, weight in weights.items() if weight > 0]
        numbers = numbers[np.isin(store.index.domain_N[numbers], used)]
    _enough(config, store, numbers, depth)
    dealt = deal(store, numbers, lanes)
    layout = Layout(config.length, depth, tokenizer.pad_id, config.segment_mask)
    own = range(
        process_index * lanes // process_count,
        (process_index + 1) * lanes // process_count,
    )
    iterators = {}
    for lane in own:
        lane_seed = derive(seed, lane)
        documents = lane_documents(store, dealt[lane], weights, lane_seed)
        iterators[str(lane)] = iter(_packed(documents, layout, config, lane_seed))
    return TrainIterator(iterators, config.batch // lanes)


def _packed(
    documents: grain.IterDataset[Piece], layout: Layout, config: DataConfig, seed: int
) -> grain.IterDataset[Batch]:
    if config.packing == "best_fit":
        return packing.BestFitRows(documents, layout, seed)
    return packing.ConcatRows(documents, layout)


def _weights(config: DataConfig, corpus: Corpus) -> dict[int, float] | None:
    named = parse_weights(config.weights, corpus.domains)
    if named is None:
        return None
    return {corpus.domains.index(name): weight for name, weight in named.items()}


def _enough(config: DataConfig, store: Store, numbers: np.ndarray, depth: int) -> None:
    have = int(store.size[numbers].sum())
    need = config.batch * (config.length + 1 + depth)
    if have < need:
        raise ValueError(
            f"data.source = {config.source!r}: {have} training tokens are fewer than "
            f"the {need} of one batch ({config.batch} rows of data.length + 1 + "
            f"{depth}); give more text, or lower data.batch or data.length"
        )


def stack(rows: list[Batch]) -> Batch:
    """Rows [L+1+J] to a batch [B, L+1+J]."""
    return Batch(*map(np.stack, zip(*rows)))


class Validation:
    """The validation documents, by domain, as one stream of overlapping rows.

    Every token but the very first is predicted exactly once, at every depth. Of n
    batches, batch k has rows k, k + n, k + 2n ... of the stream: of every domain its
    share of the whole set, to within a row, so that what is read off one batch, like
    the routing flips off the first, is about all of them. Rows of padding fill up the
    last places. Packing is by concatenation whatever `data.packing` says, so that
    losses of runs that differ in it can be compared.
    """

    def __init__(self, store: Store, numbers: np.ndarray, layout: Layout, batch: int):
        self._store, self._layout, self._batch = store, layout, batch
        index = store.index
        order = np.lexsort((index.digest_N[numbers], index.domain_N[numbers]))
        self._numbers = numbers[order]
        self._start = np.concatenate([[0], store.size[self._numbers].cumsum()])
        self.tokens = int(self._start[-1]) - 1  # to predict
        self._rows = -(-self.tokens // layout.length)

    def __len__(self) -> int:
        """Batches."""
        return -(-self._rows // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(len(self)):
            rows = range(first, len(self) * self._batch, len(self))
            yield stack([self._row(number) for number in rows])

    def _row(self, number: int) -> Batch:
        start = number * self._layout.length
        end = start + self._layout.width
        if number >= self._rows:
            return self._layout.row([])
        pieces = []
        first = int(np.searchsorted(self._start, start, "right")) - 1
        for i in range(first, len(self._numbers)):
            if self._start[i] >= end:
                break
            tokens = self._store.read(self._numbers[i])
            span = slice(max(start - int(self._start[i]), 0), end - int(self._start[i]))
            domain = int(self._store.index.domain_N[self._numbers[i]])
            pieces.append(Piece(tokens[span], domain))
        return self._layout.row(pieces)


def validation(
    config: DataConfig, corpus: Corpus, tokenizer: Any, *, depth: int
) -> Validation:
    """The validation batches, global, the same for every run on this corpus.

    Raises:
      ValueError: no text was held out, because no domain has two different ones.
    """
    store = open_store(corpus, tokenizer)
    numbers = np.flatnonzero(store.index.validation(config.val_fraction))
    if not len(numbers):
        raise ValueError(
            f"data.source = {config.source!r}: there is nothing to hold out for "
            "validation; give a domain at least two texts that differ"
        )
    layout = Layout(config.length, depth, tokenizer.pad_id, config.segment_mask)
    return Validation(store, numbers, layout, config.batch)
