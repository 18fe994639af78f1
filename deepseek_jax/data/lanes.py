"""A lane's endless stream of documents, with Grain: dealt, shuffled, repeated, mixed.

Documents are dealt to the lanes in turn, in order of domain and digest: by hash, then,
but by its rank, not by the digest modulo the number of lanes. That would leave lanes of
unequal size, and as each lane repeats its own documents, those of a small lane would be
seen more often; in turn, the lanes' numbers of each domain differ by at most one, and
the pieces of a long text go to different lanes. The price is that one document more
moves others to another lane; but such a corpus has another hash, which no run resumes
on.
"""

import functools
import hashlib
import sys

import grain
import numpy as np

from deepseek_jax.data.packing import Piece
from deepseek_jax.data.store import Store

BLOCK = 1024  # documents over which weights hold exactly


def deal(store: Store, numbers_n: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Splits document numbers over lanes.

    Raises:
      ValueError: fewer documents than lanes.
    """
    if len(numbers_n) < lanes:
        raise ValueError(
            f"data.lanes = {lanes}: the corpus has only {len(numbers_n)} training "
            "documents, and a lane needs one; set data.lanes to at most that, or give "
            "more documents"
        )
    index = store.index
    order = np.lexsort((index.digest_N[numbers_n], index.domain_N[numbers_n]))
    return [numbers_n[order[lane::lanes]] for lane in range(lanes)]


def lane_documents(
    store: Store, numbers_n: np.ndarray, weights: dict[int, float] | None, seed: int
) -> grain.IterDataset[Piece]:
    """The endless stream of a lane: each domain shuffled anew each epoch, then mixed.

    Args:
      numbers_n: the lane's documents, of domains with a positive weight.
      weights: per domain, the share of tokens to give it; shares of domains that the
        lane doesn't have fall to the others. None: each document once an epoch.
      seed: of this lane.
    """
    domain_n = store.index.domain_N[numbers_n]
    parts, counts, shares = [], [], []
    for domain in np.unique(domain_n).tolist():
        own = numbers_n[domain_n == domain]
        shuffled = grain.MapDataset.source(own).shuffle(seed=derive(seed, domain))
        parts.append(shuffled.repeat(None))
        counts.append(len(own))
        shares.append((weights or {}).get(domain, 1.0) / store.size[own].mean())
    if weights is not None:
        scale = BLOCK / sum(shares)
        counts = [max(1, round(scale * share)) for share in shares]
    order = RandomBlocks(tuple(counts), derive(seed, "order"))
    mixed = grain.MapDataset.select_from_datasets(parts, order)
    read = mixed.map(functools.partial(_read, store))
    # The tokens are in memory: threads would cost more than they save.
    return read.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )


def derive(seed: int, *names: object) -> int:
    """A seed of 32 bits for a part of what a seed decides, the same on any machine."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _read(store: Store, number: int) -> Piece:
    return Piece(store.read(number), int(store.index.domain_N[number]))


class RandomBlocks(grain.transforms.DatasetSelectionMap):
    """Mixes datasets: every block takes counts[d] elements of d, in random order.

    Grain's own mix takes turns in a fixed pattern, the same in every lane, so that all
    rows of a batch would come from one domain at a time.
    """

    def __init__(self, counts: tuple[int, ...], seed: int):
        self._counts = counts
        self._seed = seed
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        block, place = divmod(index, sum(self._counts))
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._shuffled(block))
        _, dataset_n, rank_n = self._block
        dataset = int(dataset_n[place])
        return dataset, block * self._counts[dataset] + int(rank_n[place])

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each element of a block, and its number within that one."""
        dataset_n = np.repeat(np.arange(len(self._counts)), self._counts)
        dataset_n = np.random.default_rng([self._seed, block]).permutation(dataset_n)
        rank_n = np.empty_like(dataset_n)
        for dataset, count in enumerate(self._counts):
            rank_n[dataset_n == dataset] = np.arange(count)
        return dataset_n, rank_n
