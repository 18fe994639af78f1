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


def flip(content, place):
    changed = bytearray(content)
    changed[place] ^= 0xFF
    return bytes(changed)


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "start": lambda content: flip(content, 0),
    "middle": lambda content: flip(content, len(content) // 2),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
@pytest.mark.parametrize("name", [store.TOKENS, store.STARTS])
def test_damage_is_named(tmp_path, name, damage):
    _, corpus = small_corpus(tmp_path)
    open_store(corpus, BYTES)
    (file,) = (tmp_path / "cache").rglob(name)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=f"damaged .*; delete {file.parent}$"):
        open_store(corpus, BYTES)


def test_flags_of_the_archive_that_make_it_unreadable(tmp_path):
    """A flag of each member says that it is encrypted: zipfile's RuntimeError."""
    _, corpus = small_corpus(tmp_path)
    open_store(corpus, BYTES)
    (file,) = (tmp_path / "cache").rglob(store.STARTS)
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged .*encrypted.*; delete"):
        open_store(corpus, BYTES)
