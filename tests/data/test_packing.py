"""Packing: overlap, coverage, padding, and going on from any row."""

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.packing import (
    BestFitRows,
    ConcatRows,
    Layout,
    Piece,
    best_fit,
    split_long,
)

SIZES = st.lists(st.integers(2, 60), min_size=1, max_size=30)
PAD = -7


def pieces_of(sizes):
    """Documents whose tokens are all different: 0, 1, 2, ... over all of them."""
    ends = np.cumsum(sizes)
    return [
        Piece(np.arange(end - size, end, dtype=np.int32), i % 3)
        for i, (size, end) in enumerate(zip(sizes, ends))
    ]


def endless(pieces):
    dataset = grain.MapDataset.source(pieces).repeat(None)
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )


def take(rows, n):
    return [next(rows) for _ in range(n)]


@given(SIZES, st.integers(1, 20), st.integers(0, 4))
def test_concat_predicts_every_token_once_at_each_depth(sizes, length, depth):
    pieces = pieces_of(sizes)
    rows = iter(ConcatRows(endless(pieces), Layout(length, depth, PAD, False)))
    stream = np.concatenate(
        [piece.tokens for piece in pieces] * (1 + 200 // sum(sizes))
    )
    got = take(rows, 60 // length + 2)
    for number, row in enumerate(got):
        start = number * length
        expected = np.take(
            stream, range(start, start + length + 1 + depth), mode="wrap"
        )
        np.testing.assert_array_equal(row.tokens, expected)
        assert row.mask.all()
    for j in range(depth + 1):  # the targets of depth j are the stream from 1 + j on
        targets = np.concatenate([row.tokens[1 + j : 1 + j + length] for row in got])
        expected = np.take(stream, np.arange(len(targets)) + 1 + j, mode="wrap")
        np.testing.assert_array_equal(targets, expected)


@pytest.mark.parametrize("make", [ConcatRows, lambda *a: BestFitRows(*a, seed=3)])
@given(sizes=SIZES, length=st.integers(1, 20))
def test_inputs_do_not_depend_on_the_depth(make, sizes, length):
    rows = [
        take(iter(make(endless(pieces_of(sizes)), Layout(length, j, PAD, True))), 70)
        for j in (0, 1, 4)
    ]
    for shallow, *deeper in zip(*rows):
        for row in deeper:
            for a, b in zip(shallow, row):
                np.testing.assert_array_equal(a, b[: length + 1])


@pytest.mark.parametrize("make", [ConcatRows, lambda *a: BestFitRows(*a, seed=3)])
@given(sizes=SIZES, length=st.integers(1, 20), depth=st.integers(0, 4))
def test_marks(make, sizes, length, depth):
    """Segments, positions, domains and padding, against the tokens themselves."""
    pieces = pieces_of(sizes)
    document_of = np.concatenate([np.full(n, i) for i, n in enumerate(sizes)])
    for row in take(iter(make(endless(pieces), Layout(length, depth, PAD, True))), 70):
        real = row.tokens != PAD
        np.testing.assert_array_equal(row.mask, real)
        np.testing.assert_array_equal(row.segment > 0, real)
        np.testing.assert_array_equal(row.domain[~real], -1)
        assert not real[np.argmin(real) :].any() or real.all(), "padding is at the end"
        owner = document_of[row.tokens[real]]
        np.testing.assert_array_equal(row.domain[real], owner % 3)
        # A document starts where the token before is not the one before in the text.
        new = np.diff(row.tokens[real], prepend=PAD) != 1
        new |= np.diff(owner, prepend=-1) != 0
        np.testing.assert_array_equal(row.segment[real], np.cumsum(new))
        starts = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
        np.testing.assert_array_equal(row.position[real], np.arange(len(new)) - starts)
        assert all(array.dtype == np.int32 for array in row if array.dtype != bool)


def test_without_segment_mask_a_row_is_one_document():
    rows = iter(ConcatRows(endless(pieces_of([3, 4])), Layout(8, 1, PAD, False)))
    row = next(rows)
    np.testing.assert_array_equal(row.segment, 1)
    np.testing.assert_array_equal(row.position, range(10))


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_takes_every_item_once_and_wastes_little(sizes, capacity):
    bins = best_fit(sizes, capacity)
    assert sorted(item for bin in bins for item in bin) == list(range(len(sizes)))
    filled = sorted(sum(sizes[item] for item in bin) for bin in bins)
    assert not filled or filled[-1] <= capacity
    assert len(filled) < 2 or filled[0] + filled[1] > capacity, "two bins fit in one"


@given(st.integers(2, 200), st.integers(1, 20), st.integers(0, 4))
def test_parts_of_long_documents_predict_every_token_once(size, length, depth):
    layout = Layout(length, depth, PAD, True)
    full, rest = split_long(Piece(np.arange(size), 0), layout)
    assert 2 <= len(rest.tokens) <= length + 1
    predicted = [part.tokens[1 : length + 1] for part in [*full, rest]]
    np.testing.assert_array_equal(np.concatenate(predicted), range(1, size))
    for part in full:  # and as far as the text goes, there are targets at each depth
        assert len(part.tokens) == min(layout.width, size - part.tokens[0])


def test_a_window_of_best_fit_holds_each_document_once():
    sizes = np.random.default_rng(0).integers(2, 50, 400).tolist()
    pieces = pieces_of(sizes)
    rows = iter(BestFitRows(endless(pieces), Layout(16, 2, PAD, True), seed=0))
    window, predicted = [], []
    for _ in range(1000):
        row = next(rows)
        if rows.get_state()["window"] == 1:
            break
        window.append(row)
        same = row.segment[1:17] == row.segment[:16]
        predicted += row.tokens[1:17][row.mask[1:17] & same].tolist()
    read = rows.get_state()["parent"]["next_index"]
    assert len(window) >= 64
    assert read < len(pieces)
    expected = [token for piece in pieces[:read] for token in piece.tokens[1:]]
    assert sorted(predicted) == expected
    padding = np.mean([~row.mask[:17] for row in window])
    assert padding < 0.06
    first_tokens = [row.tokens[0] for row in window]
    assert first_tokens != sorted(first_tokens), "rows are shuffled"


@pytest.mark.parametrize("make", [ConcatRows, lambda *a: BestFitRows(*a, seed=3)])
def test_every_state_is_gone_on_from_exactly(make):
    sizes = np.random.default_rng(1).integers(2, 90, 60).tolist()
    dataset = make(endless(pieces_of(sizes)), Layout(8, 1, PAD, True))
    rows = iter(dataset)
    states, expected = [], []
    for _ in range(150):
        states.append(rows.get_state())
        expected.append(next(rows))
    for start in range(0, 150, 7):
        fresh = iter(dataset)
        next(fresh)  # a used iterator can be set back, too
        fresh.set_state(states[start])
        assert fresh.get_state() == states[start]
        for row, again in zip(expected[start : start + 20], fresh):
            for a, b in zip(row, again):
                np.testing.assert_array_equal(a, b)
