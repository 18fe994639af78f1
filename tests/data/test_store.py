"""Token files: content, reuse, damage."""

import numpy as np
import pytest

from deepseek_jax.data import store
from deepseek_jax.data.store import open_store
from tests.data.texts import BYTES, small_corpus


def test_documents_with_bos_and_eos(tmp_path):
    _, corpus = small_corpus(tmp_path)
    opened = open_store(corpus, BYTES)
    for number, item in enumerate(corpus.documents()):
        tokens = opened.read(number)
        assert tokens.dtype == np.int32
        assert tokens[0] == BYTES.bos_id
        assert tokens[-1] == BYTES.eos_id
        assert BYTES.decode(tokens[1:-1]) == item.text
        assert opened.size[number] == len(tokens)
        assert corpus.domains[opened.index.domain_N[number]] == item.domain
        assert opened.index.digest_N[number] == int(item.digest, 16)
        assert opened.index.size_N[number] == len(item.text.encode())


def test_large_vocabularies(tmp_path):
    class Far(type(BYTES)):
        vocab_size = 100_000
        hash = "far"

        def encode(self, text):
            return [90_000 + i for i in super().encode(text)]

    _, corpus = small_corpus(tmp_path)
    tokens = open_store(corpus, Far()).read(0)
    assert tokens[1:-1].min() > 90_000


def test_tokens_are_made_once_per_tokenizer(tmp_path, monkeypatch):
    class Other(type(BYTES)):
        hash = "other"

    _, corpus = small_corpus(tmp_path)
    open_store(corpus, BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_build", None)
        open_store(corpus, BYTES)
        with pytest.raises(TypeError):
            open_store(corpus, Other())


def test_damage_is_named(tmp_path):
    _, corpus = small_corpus(tmp_path)
    open_store(corpus, BYTES)
    (file,) = (tmp_path / "cache").rglob("tokens.bin")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"tokens.bin is damaged; delete"):
        open_store(corpus, BYTES)
