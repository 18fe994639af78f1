"""Held-out documents: what training never sees, of every domain, all texts first."""

import numpy as np

from deepseek_jax.config import DataConfig
from deepseek_jax.data import heldout
from deepseek_jax.data.corpus import Index
from deepseek_jax.data.sources import open_corpus
from tests.data.texts import BYTES, small_corpus, write_jsonl


def test_they_are_the_held_out_documents(tmp_path):
    _, corpus = small_corpus(tmp_path)
    found = heldout.documents(corpus, BYTES, 1000)
    chosen = Index.of(corpus).held_out(corpus.val_fraction)
    wanted = {name: set() for name in corpus.domains}
    for item, keep in zip(corpus.documents(), chosen, strict=True):
        if keep:
            wanted[item.domain].add(item.text)
    assert all(wanted.values())
    for name, each in found.items():
        assert all(one[0] == BYTES.bos_id and one[-1] == BYTES.eos_id for one in each)
        texts = [BYTES.decode(one) for one in each]
        assert len(texts) == len(set(texts)) and set(texts) == wanted[name]
    assert found == heldout.documents(corpus, BYTES, 1000)


def test_count_and_least(tmp_path):
    _, corpus = small_corpus(tmp_path)
    every = heldout.documents(corpus, BYTES, 1000)
    few = heldout.documents(corpus, BYTES, 3, least=30)
    for name, each in few.items():
        long = [one for one in every[name] if len(one) >= 30]
        assert each == long[:3]
    assert few["many"] != every["many"][:3] and len(few["many"]) == 3


def test_every_text_comes_before_the_second_piece_of_one(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc \n"), 20_000)) for _ in range(12)]
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    config = DataConfig(source=str(path), val_fraction=0.25)
    corpus = open_corpus(config, tmp_path / "cache")
    (each,) = heldout.documents(corpus, BYTES, 1000).values()
    pieces = [BYTES.decode(one) for one in each]
    of = [next(i for i, text in enumerate(texts) if one in text) for one in pieces]
    count = len(set(of))
    assert count > 1 and len(of) >= 2 * count
    assert len(set(of[:count])) == len(set(of[count : 2 * count])) == count
