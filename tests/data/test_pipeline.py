"""Batches: the same for any number of processes, exact resume, disjoint validation."""

import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax import tokenizer as tokenizers
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.pipeline import train_iterator, validation
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.data.store import open_store
from tests.data.texts import BYTES, small_corpus, write_jsonl

VARIANTS = {
    "concat": {},
    "segments": {"segment_mask": True, "length": 48},
    "best_fit": {"packing": "best_fit", "segment_mask": True, "lanes": 4, "batch": 16},
    "weights": {"weights": "few=3,some=0", "lanes": 4, "batch": 8},
}
STEPS = 40
variants = pytest.mark.parametrize("variant", VARIANTS)


def batches(config, corpus, n, state=None, **how):
    iterator = train_iterator(config, corpus, BYTES, **{"depth": 1, "seed": 0, **how})
    if state is not None:
        iterator.set_state(state)
    return [next(iterator) for _ in range(n)], iterator


def joined(parts):
    """The global batches of several processes' batches."""
    return [
        Batch(*(np.concatenate(arrays) for arrays in zip(*rows)))
        for rows in zip(*parts)
    ]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


@variants
def test_processes_share_the_same_global_batches(tmp_path, variant):
    config, corpus = small_corpus(tmp_path, **VARIANTS[variant])
    whole, _ = batches(config, corpus, STEPS)
    for count in (2, 4):
        parts = [
            batches(config, corpus, STEPS, process_index=i, process_count=count)[0]
            for i in range(count)
        ]
        assert_equal(joined(parts), whole)


@variants
def test_resume_on_another_number_of_processes(tmp_path, variant):
    config, corpus = small_corpus(tmp_path, **VARIANTS[variant])
    whole, _ = batches(config, corpus, STEPS)
    for before, after, step in ((1, 4, 1), (4, 2, 13), (2, 1, 29)):
        state = {}
        for i in range(before):
            how = {"process_index": i, "process_count": before}
            state |= batches(config, corpus, step, **how)[1].get_state()
        state = json.loads(json.dumps(state))
        parts = [
            batches(
                config,
                corpus,
                STEPS - step,
                state,
                process_index=i,
                process_count=after,
            )[0]
            for i in range(after)
        ]
        assert_equal(joined(parts), whole[step:])


@variants
def test_every_state_is_that_of_the_last_batch_handed_out(tmp_path, variant):
    config, corpus = small_corpus(tmp_path, **VARIANTS[variant])
    iterator = train_iterator(config, corpus, BYTES, depth=1, seed=0)
    states, expected = [], []
    for _ in range(STEPS):
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    # Beyond a lane's first epoch, and beyond its first window of best fit.
    if variant != "concat":
        lane = iterator.get_state()["0"]
        assert lane["parent"]["next_index"] > 96 / 4
        assert lane.get("window", 1) >= 1
    for step in range(0, STEPS, 9):
        again, _ = batches(config, corpus, 3, json.loads(states[step]))
        assert_equal(again, expected[step : step + 3])


def test_shape_and_rows_of_lanes(tmp_path):
    config, corpus = small_corpus(tmp_path, lanes=2)
    (first, second), _ = batches(config, corpus, 2, depth=3)
    for array in first:
        assert array.shape == (4, 16 + 1 + 3)
    # Rows of a lane follow each other, within a batch and from batch to batch.
    for before, after in (
        (first.tokens[0], first.tokens[1]),
        (first.tokens[1], second.tokens[0]),
        (first.tokens[2], first.tokens[3]),
        (first.tokens[3], second.tokens[2]),
    ):
        np.testing.assert_array_equal(before[16:], after[:4])


def test_training_reads_the_training_documents_and_no_others(tmp_path):
    config, corpus = small_corpus(tmp_path, lanes=1, batch=1, length=64)
    store = open_store(corpus, BYTES)
    held_out = store.index.held_out(0.2)
    training = {store.read(i).tobytes() for i in np.flatnonzero(~held_out)}
    epoch = int(store.size[~held_out].sum())
    rows, _ = batches(config, corpus, epoch // 64 + 1, depth=0)
    stream = np.concatenate([row.tokens[0, :64] for row in rows])[:epoch]
    ends = np.flatnonzero(stream == BYTES.eos_id) + 1
    read = [part.tobytes() for part in np.split(stream, ends[:-1])]
    assert sorted(read) == sorted(training)


def test_seeds_and_rows_differ(tmp_path):
    config, corpus = small_corpus(tmp_path)
    (one,), _ = batches(config, corpus, 1, seed=0)
    (two,), _ = batches(config, corpus, 1, seed=1)
    assert not np.array_equal(one.tokens, two.tokens)
    assert len({row.tobytes() for row in one.tokens}) == len(one.tokens)


def test_lanes_do_not_change_domain_together(tmp_path):
    """With texts of one length and equal shares, only the lanes' seeds can differ."""
    rows = ({"text": f"{i:020}", "domain": "ab"[i % 2]} for i in range(200))
    path = write_jsonl(tmp_path / "even.jsonl", rows)
    config, _ = small_corpus(tmp_path)
    config = dataclasses.replace(config, source=str(path), weights="a=1", length=200)
    corpus = open_corpus(config, tmp_path / "cache")
    (batch,), _ = batches(config, corpus, 1)
    assert len({row.tobytes() for row in batch.domain}) == len(batch.domain)


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("mask", [True, False])
def test_validation_predicts_every_held_out_token_once(tmp_path, depth, mask):
    config, corpus = small_corpus(tmp_path, segment_mask=mask)
    store = open_store(corpus, BYTES)
    numbers = np.flatnonzero(store.index.validation(0.2))
    held = validation(config, corpus, BYTES, depth=depth)
    got = list(held)
    assert len(got) == len(held)
    assert_equal(got, list(held))
    tokens, marks, domains = (
        np.stack(arrays, 1).reshape(-1, 17 + depth)  # in the order of the stream
        for arrays in zip(*((batch.tokens, batch.mask, batch.domain) for batch in got))
    )
    for j in range(depth + 1):
        chosen = marks[:, 1 + j : 17 + j]
        targets = tokens[:, 1 + j : 17 + j][chosen]
        stream = np.concatenate([tokens[0, : 1 + j], targets])
        parts = np.split(stream, np.flatnonzero(stream == BYTES.eos_id)[:-1] + 1)
        expected = [store.read(i) for i in numbers]
        assert sorted(p.tobytes() for p in parts) == sorted(
            e.tobytes() for e in expected
        )
    assert held.tokens == marks[:, 1:17].sum()
    sizes = np.bincount(store.index.domain_N[numbers], store.size[numbers])
    counted = np.bincount(domains[:, :16][marks[:, :16]])
    # A row's inputs miss at most the last token of all.
    assert 0 <= (sizes - counted).sum() <= 1
    for batch in got:
        np.testing.assert_array_equal(batch.mask, batch.segment > 0)
        np.testing.assert_array_equal(batch.mask, batch.domain >= 0)
        assert all(array.shape == (4, 17 + depth) for array in batch)


@pytest.mark.parametrize("batch", [3, 8])
def test_every_validation_batch_has_its_share_of_every_domain(tmp_path, batch):
    config, corpus = small_corpus(tmp_path, documents=400, batch=batch)
    parts = validation(config, corpus, BYTES, depth=0)
    tokens_ND = np.array(
        [np.bincount(part.domain[:, :16][part.mask[:, :16]]) for part in parts]
    )
    assert len(tokens_ND) > 5
    assert (abs(tokens_ND - tokens_ND.mean(0)) <= 16 + 1).all(), "to within a row"
    if batch == 8:
        assert (tokens_ND > 0).all()


def test_validation_is_the_same_for_every_way_of_training(tmp_path):
    config, corpus = small_corpus(tmp_path)
    expected = list(validation(config, corpus, BYTES, depth=1))
    other = dataclasses.replace(
        config, packing="best_fit", weights="few=9,some=0", lanes=2
    )
    assert_equal(list(validation(other, corpus, BYTES, depth=1)), expected)


def test_a_whole_pipeline_with_sentencepiece(tmp_path):
    config, corpus = small_corpus(tmp_path)
    tokenizer = tokenizers.build("sentencepiece", 400, corpus)
    batch = next(train_iterator(config, corpus, tokenizer, depth=1, seed=0))
    assert batch.tokens.max() < tokenizer.vocab_size
    assert (batch.tokens == tokenizer.eos_id).any()
    assert len(validation(config, corpus, tokenizer, depth=1)) > 0


def test_too_little_text_for_a_batch(tmp_path):
    config, corpus = small_corpus(tmp_path, documents=10, batch=64, lanes=1)
    with pytest.raises(
        ValueError, match=r"data.source.* \d+ training tokens.* the 1152"
    ):
        train_iterator(config, corpus, BYTES, depth=1, seed=0)


def test_more_lanes_than_documents(tmp_path):
    rows = ({"text": f"{i}" * 500} for i in range(6))
    path = write_jsonl(tmp_path / "few.jsonl", rows)
    config, _ = small_corpus(tmp_path, batch=8)
    config = dataclasses.replace(config, source=str(path))
    corpus = open_corpus(config, tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"data.lanes = 8: .* only 4 training documents"
    ):
        train_iterator(config, corpus, BYTES, depth=1, seed=0)


def test_processes_that_do_not_divide_the_lanes(tmp_path):
    config, corpus = small_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"data.lanes = 4: .* multiple of the 3 proc"):
        batches(config, corpus, 1, process_count=3)


def test_a_state_without_this_process_lanes(tmp_path):
    config, corpus = small_corpus(tmp_path)
    how = {"process_index": 0, "process_count": 2}
    state = batches(config, corpus, 1, **how)[1].get_state()
    assert state.keys() == {"0", "1"}
    with pytest.raises(ValueError, match="data state: no lane 2, 3; it has 2 lanes"):
        batches(config, corpus, 1, state)


@pytest.mark.parametrize("copies", [1, 50])
def test_one_text_can_not_be_held_out(tmp_path, copies):
    path = write_jsonl(tmp_path / "one.jsonl", [{"text": "word " * 500}] * copies)
    config, _ = small_corpus(tmp_path)
    config = dataclasses.replace(config, source=str(path), lanes=1)
    corpus = open_corpus(config, tmp_path / "cache")
    with pytest.raises(ValueError, match="at least two texts that differ"):
        validation(config, corpus, BYTES, depth=1)
