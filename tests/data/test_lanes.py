"""Lanes: dealing, shuffling by epoch, mixing by weights."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.lanes import RandomBlocks, deal, derive, lane_documents
from deepseek_jax.data.store import open_store
from tests.data.texts import BYTES, small_corpus

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(COUNTS, st.integers(0, 2**32 - 1))
def test_blocks_hold_their_counts_and_read_each_dataset_in_order(counts, seed):
    blocks = RandomBlocks(counts, seed)
    size = sum(counts)
    drawn = [blocks[i] for i in range(3 * size)]
    for first in range(0, 3 * size, size):
        block = Counter(dataset for dataset, _ in drawn[first : first + size])
        assert [block[d] for d in range(len(counts))] == list(counts)
    for dataset, count in enumerate(counts):
        own = [number for chosen, number in drawn if chosen == dataset]
        assert own == list(range(3 * count))
    assert [blocks[i] for i in (2 * size, 0, size)] == [
        drawn[i] for i in (2 * size, 0, size)
    ]


def test_blocks_differ_by_seed_and_from_one_to_the_next():
    def datasets(blocks, start):
        return [blocks[start + i][0] for i in range(40)]

    one, two = (RandomBlocks((20, 20), seed) for seed in (0, 1))
    assert datasets(one, 0) != datasets(two, 0)
    assert datasets(one, 0) != datasets(one, 40)


def test_dealing_is_even_and_leaves_nothing_out(tmp_path):
    _, corpus = small_corpus(tmp_path)
    store = open_store(corpus, BYTES)
    numbers = np.arange(7, 110)
    dealt = deal(store, numbers, 8)
    assert sorted(np.concatenate(dealt)) == numbers.tolist()
    for domain in range(3):
        counts = [(store.index.domain_N[lane] == domain).sum() for lane in dealt]
        assert max(counts) - min(counts) <= 1
    again = deal(store, np.random.default_rng(0).permutation(numbers), 8)
    for lane, other in zip(dealt, again):
        np.testing.assert_array_equal(lane, other)


def test_fewer_documents_than_lanes(tmp_path):
    _, corpus = small_corpus(tmp_path)
    store = open_store(corpus, BYTES)
    with pytest.raises(ValueError, match=r"data.lanes = 8: .* only 5 training"):
        deal(store, np.arange(5), 8)


def numbers_of(store, documents, n):
    """Which documents the first n of a lane's stream are."""
    known = {store.read(i).tobytes(): i for i in range(len(store.size))}
    stream = iter(documents)
    return [known[next(stream).tokens.tobytes()] for _ in range(n)]


def test_by_size_each_document_comes_once_an_epoch_in_a_new_order(tmp_path):
    _, corpus = small_corpus(tmp_path)
    store = open_store(corpus, BYTES)
    lane = np.arange(60)
    order = numbers_of(store, lane_documents(store, lane, None, seed=5), 180)
    epochs = [order[:60], order[60:120], order[120:]]
    for epoch in epochs:
        assert sorted(epoch) == lane.tolist()
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    for domain in range(3):
        own = [
            [number for number in epoch if store.index.domain_N[number] == domain]
            for epoch in epochs
        ]
        assert own[0] != own[1] != own[2], "the order within a domain"
    again = numbers_of(store, lane_documents(store, lane, None, seed=5), 180)
    other = numbers_of(store, lane_documents(store, lane, None, seed=6), 180)
    assert again == order != other


def test_weights_are_shares_of_tokens(tmp_path):
    _, corpus = small_corpus(tmp_path, documents=400)
    store = open_store(corpus, BYTES)
    weights = {0: 1.0, 1: 3.0, 2: 4.0}
    documents = iter(lane_documents(store, np.arange(400), weights, seed=0))
    sizes = np.zeros(3)
    for _ in range(4096):
        tokens, domain = next(documents)
        sizes[domain] += len(tokens)
    np.testing.assert_allclose(sizes / sizes.sum(), [1 / 8, 3 / 8, 4 / 8], atol=0.01)


def test_a_domain_that_the_lane_lacks_leaves_its_share_to_the_others(tmp_path):
    _, corpus = small_corpus(tmp_path, documents=400)
    store = open_store(corpus, BYTES)
    lane = np.flatnonzero(store.index.domain_N != 1)
    weights = {0: 1.0, 1: 100.0, 2: 1.0}
    documents = iter(lane_documents(store, lane, weights, seed=0))
    sizes = np.zeros(3)
    for _ in range(2048):
        tokens, domain = next(documents)
        sizes[domain] += len(tokens)
    np.testing.assert_allclose(sizes / sizes.sum(), [0.5, 0, 0.5], atol=0.02)


def test_derived_seeds():
    seeds = {derive(seed, name) for seed in range(20) for name in (0, 1, "order")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive(0, 1) == 2781527649, "runs made before would not go on as they did"
