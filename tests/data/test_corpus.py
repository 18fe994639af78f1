"""Corpus folders: content addressing, checking, the held-out split."""

import dataclasses
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data import corpus as corpus_module
from deepseek_jax.data.corpus import (
    DOCUMENTS,
    LEAST,
    MANIFEST,
    Index,
    open_folder,
    write_corpus,
)
from deepseek_jax.data.documents import document

TEXTS = [
    document("b" if i % 3 else "a", f"text {i}\n\u2028é" * (1 + i % 7), f"n{i}")
    for i in range(50)
]


def opened(folder, fraction=0.1):
    return open_folder(folder, fraction, folder.parent)


def test_round_trip_and_manifest(tmp_path):
    folder = write_corpus(iter(TEXTS), tmp_path, [{"name": "x", "licence": "MIT"}])
    corpus = opened(folder)
    assert list(corpus.documents()) == TEXTS
    assert corpus.domains == ("a", "b")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert folder.name == corpus.hash[:16]
    content = (folder / DOCUMENTS).read_bytes()
    assert manifest["files"] == {DOCUMENTS: hashlib.sha256(content).hexdigest()}
    for name, count in manifest["domains"].items():
        texts = [item.text for item in TEXTS if item.domain == name]
        assert count["documents"] == len(texts)
        assert count["bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["sources"] == [{"name": "x", "licence": "MIT"}]


def test_a_copied_folder_is_the_same_corpus(tmp_path):
    folder = write_corpus(TEXTS, tmp_path / "here")
    shutil.copytree(folder, tmp_path / "there")
    assert opened(tmp_path / "there").hash == opened(folder).hash


def test_content_decides_the_hash(tmp_path):
    changed = [*TEXTS[:-1], TEXTS[-1]._replace(text=TEXTS[-1].text + "!")]
    assert write_corpus(changed, tmp_path) != write_corpus(TEXTS, tmp_path)


def test_so_does_the_format_by_which_content_is_split(tmp_path, monkeypatch):
    first = write_corpus(TEXTS, tmp_path)
    monkeypatch.setattr(corpus_module, "FORMAT", 99)
    second = write_corpus(TEXTS, tmp_path)
    assert opened(second).hash.startswith(second.name)
    assert second != first


def test_many_builders_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: write_corpus(TEXTS, tmp_path), range(16)))
    assert len(folders) == 1
    assert list(opened(folders.pop()).documents()) == TEXTS
    assert len(list(tmp_path.iterdir())) == 1, "temporary folders left behind"


def test_a_failed_build_leaves_nothing(tmp_path):
    def failing():
        yield TEXTS[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_corpus(failing(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / DOCUMENTS).write_text("x"),
            "documents.jsonl is missing or dam",
        ),
        (lambda f: (f / DOCUMENTS).unlink(), "documents.jsonl is missing or damaged"),
        (lambda f: (f / MANIFEST).unlink(), "without manifest.json"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    folder = write_corpus(TEXTS, tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_another_format_is_refused(tmp_path):
    folder = write_corpus(TEXTS, tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text()) | {"format": 99}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="format 99"):
        opened(folder)


def test_no_documents_and_too_many_domains(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        write_corpus([], tmp_path)
    many = (document(f"host{i}", f"text {i}", "n") for i in range(100))
    with pytest.raises(ValueError, match="more than 64 domains"):
        write_corpus(many, tmp_path)


@st.composite
def indices(draw):
    n = draw(st.integers(1, 40))
    few = draw(st.integers(1, 40))

    def ints(low, high):
        return st.lists(st.integers(low, high), min_size=n, max_size=n)

    return Index(
        np.array(draw(ints(0, few)), np.uint64),
        np.array(draw(ints(0, 2)), np.int32),
        np.array(draw(ints(1, 100)), np.int64),
    )


@given(indices(), st.floats(0.001, 0.999))
def test_split_properties(index, fraction):
    held_out = index.held_out(fraction)
    assert not set(index.digest_N[held_out]) & set(index.digest_N[~held_out])
    if len(np.unique(index.domain_N)) == 1:
        assert not held_out.all()
    for domain in np.unique(index.domain_N):
        rows = index.domain_N == domain
        texts = np.unique(index.digest_N[rows])
        assert held_out[rows].any() or len(texts) == 1
        share = index.size_N[rows & held_out].sum() / index.size_N[rows].sum()
        assert share >= fraction or len(set(texts) - set(index.digest_N[held_out])) <= 1


@given(indices(), st.floats(0.001, 0.999))
def test_validation_properties(index, fraction):
    held_out, validation = index.held_out(fraction), index.validation(fraction)
    assert not (validation & ~held_out).any()
    for domain in np.unique(index.domain_N):
        rows = index.domain_N == domain
        texts = set(index.digest_N[rows & held_out])
        assert set(index.digest_N[rows & validation]) == texts
        sizes = index.size_N[rows & validation]
        needed = fraction * index.size_N[rows].sum()
        assert sizes.sum() >= needed or not (rows & held_out & ~validation).any()
        # No more than it takes: without its largest piece it falls short.
        if len(sizes) > len(texts):
            assert sizes.sum() - sizes.max() < needed


@pytest.mark.parametrize(("texts", "held"), [(1, 0), (2, 1), (60, 6), (999, LEAST)])
def test_some_texts_are_held_out_however_few_bytes_that_takes(texts, held):
    rng = np.random.default_rng(0)
    index = Index(
        np.repeat(rng.integers(0, 2**63, texts).astype(np.uint64), 5),
        np.zeros(5 * texts, np.int32),
        np.full(5 * texts, 100),
    )
    assert index.held_out(1e-6).sum() == 5 * held
    assert index.validation(1e-6).sum() == held


def test_validation_is_on_every_part_of_a_text(monkeypatch):
    monkeypatch.setattr(corpus_module, "LEAST", 200)
    rng = np.random.default_rng(0)
    digest_N = np.repeat(rng.integers(0, 2**63, 2000).astype(np.uint64), 4)
    index = Index(digest_N, np.zeros(8000, np.int32), np.full(8000, 100))
    for pieces in (200, 360):
        parts = np.bincount(np.flatnonzero(index.validation((pieces - 0.5) / 8000)) % 4)
        assert parts.sum() == pieces
        assert parts.min() > 0.75 * pieces / 4


def test_split_is_near_the_fraction_and_grows_with_it(tmp_path):
    many = [document("d", f"{i} {'x' * (i % 90)}", "n") for i in range(4000)]
    index = Index.of(opened(write_corpus(many, tmp_path)))
    small, large = index.held_out(0.05), index.held_out(0.2)
    assert abs(index.size_N[small].sum() / index.size_N.sum() - 0.05) < 0.001
    assert not (small & ~large).any()


def test_the_sample_is_of_training_text_and_of_every_domain(tmp_path):
    many = [document("ab"[i % 9 == 0], f"{i} {'x' * 50}", "n") for i in range(4000)]
    corpus = opened(write_corpus(many, tmp_path), fraction=0.3)
    sample = list(corpus.sample(10_000))
    held_out = Index.of(corpus).held_out(0.3)
    domain_of = {item.text: item.domain for item in many}
    assert sample == list(corpus.sample(10_000))
    assert not set(sample) & {t.text for t, held in zip(many, held_out) if held}
    for domain in "ab":
        size = sum(len(text) for text in sample if domain_of[text] == domain)
        assert 5_000 < size < 9_000  # 0.7 of 10,000
    everything = dataclasses.replace(corpus, val_fraction=1e-9)
    assert len(list(everything.sample(10**9))) == len(many) - 2 * LEAST
