"""Tokenizers: lossless, deaf to control symbols in text, reproducible, saved whole."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_jax import tokenizer as tokenizers
from deepseek_jax.tokenizer import bpe
from deepseek_jax.tokenizer.base import CONTROLS
from deepseek_jax.tokenizer.bytes import Bytes
from deepseek_jax.tokenizer.huggingface import HuggingFace
from deepseek_jax.tokenizer.sentencepiece import SentencePiece
from deepseek_jax.tokenizer.train import train

WORDS = [
    *("=", "+", "(", ")", ":", "été", "the", "of", "and", "to", "state", "union"),
    *("def", "return", "self", "import", "12", "345"),
]
RNG = random.Random(0)
TEXTS = ["    " + " ".join(RNG.choices(WORDS, k=30)) + "\n" for _ in range(300)]
TOKENIZERS = {
    "sentencepiece": train(TEXTS, 360),
    "bpe": bpe.train(TEXTS, 360),
    "bytes": Bytes(),
}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)

TRICKY = (
    "\u2581",
    "a\u2581\u2581 b\u2581",
    "\n\n \n",
    "   leading and trailing   ",
    "\x00\r\n\t\x7f\ufeff",
    "<s></s><unk><pad><0x0A><0xE2>",
    "".join(CONTROLS),
    "".join(bpe.MARKERS),
    "日本語 🙂 \U0010ffff",
    "\u2028\u0085\u00a0\u3000",
    "",
)
HOSTILE = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [
                *TRICKY,
                *WORDS,
                *CONTROLS,
                *bpe.MARKERS,
                " ",
                "\n",
                "<s>",
                "</s>",
                "<pad>",
            ]
        )
    ).map("".join),
)


def control_ids(tokenizer):
    return {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.fim_ids}


def with_examples(test):
    for text in TRICKY:
        test = example(text=text)(test)
    return test


@kinds
@with_examples
@given(text=HOSTILE)
def test_lossless_and_no_control_ids(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & control_ids(tokenizer)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    if kind == "sentencepiece":
        assert 0 not in ids, "the unknown token"


@kinds
def test_control_ids_are_distinct_and_decode_to_nothing(kind):
    tokenizer = TOKENIZERS[kind]
    controls = control_ids(tokenizer)
    assert len(controls) == 6
    assert all(0 <= i < tokenizer.vocab_size for i in controls)
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "a b"


@kinds
@given(st.lists(st.integers(0, 5000)))
def test_any_ids_decode(kind, ids):
    assert isinstance(TOKENIZERS[kind].decode(ids), str)


def test_bytes_that_are_no_text_become_a_replacement_character():
    assert Bytes().decode([0x61, 0xE2, 0x96, 0x62]) == "a\ufffdb"


def test_training_learns_the_words_and_keeps_digits_single():
    tokenizer = TOKENIZERS["sentencepiece"]
    assert len(tokenizer.encode(" union")) == 1
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("345")) == 3
    assert len(tokenizer.encode("\n")) == 1
    text = "".join(TEXTS)
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2


def test_training_twice_gives_the_same_tokenizer():
    again, other = train(TEXTS, 360), train(TEXTS, 359)
    assert again.hash == TOKENIZERS["sentencepiece"].hash != other.hash


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert train(["ab ab\n"], 4096).vocab_size < 300


def test_a_vocabulary_too_small_is_named():
    with pytest.raises(
        ValueError, match=r"model.vocab_size = 270: must be at least \d{3}"
    ):
        train(TEXTS, 270)


def test_no_text_to_train_on():
    with pytest.raises(ValueError, match="no training text"):
        train(["\n"], 400)


@kinds
def test_saved_and_loaded(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path / "new" / "tokenizer")
    loaded = tokenizers.load(tmp_path / "new" / "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("to the \u2581 union") == tokenizer.encode(
        "to the \u2581 union"
    )


def about(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), "no tokenizer folder"),
    "no about": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer folder"),
    "bad about": (lambda f: (f / "tokenizer.json").write_text("{"), "is damaged"),
    "list": (lambda f: (f / "tokenizer.json").write_text("[]"), "is damaged"),
    "format": (lambda f: about(f, format=9), "has format 9"),
    "kind": (lambda f: about(f, kind="wordpiece"), "unknown kind 'wordpiece'"),
    "hash": (lambda f: about(f, hash="0"), "is damaged"),
    "no model": (lambda f: (f / "sentencepiece.model").unlink(), "missing or damaged"),
    "cut model": (
        lambda f: (f / "sentencepiece.model").write_bytes(b"abc"),
        "missing or damaged",
    ),
    "other model": (
        lambda f: (f / "sentencepiece.model").write_bytes(train(TEXTS, 350)._model),
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(case, tmp_path):
    damage, message = DAMAGE[case]
    folder = tmp_path / "tokenizer"
    TOKENIZERS["sentencepiece"].save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(folder)


def test_foreign_sentencepiece_models_are_refused():
    with pytest.raises(ValueError, match="no SentencePiece model"):
        SentencePiece(b"nonsense")


@dataclass
class Source:
    """A corpus as training sees it, which counts how often it is read."""

    cache: Path
    hash: str = "corpus"
    domains: tuple[str, ...] = ("a", "b")
    val_fraction: float = 0.1
    reads: int = 0

    def sample(self, limit):
        self.reads += 1
        return iter(TEXTS)


def test_build_trains_once_for_a_corpus_and_a_size(tmp_path):
    corpus = Source(tmp_path)
    first = tokenizers.build("sentencepiece", 360, corpus)
    assert first.hash == TOKENIZERS["sentencepiece"].hash
    assert tokenizers.build("sentencepiece", 360, corpus).hash == first.hash
    assert corpus.reads == 1
    assert tokenizers.build("sentencepiece", 350, corpus).vocab_size == 350
    assert corpus.reads == 2
    corpus.hash = "another"
    tokenizers.build("sentencepiece", 360, corpus, cache_dir=tmp_path / "elsewhere")
    assert corpus.reads == 3
    assert (tmp_path / "elsewhere" / "tokenizers").is_dir()


def test_a_name_is_trained_on_the_corpus_and_kept_apart(tmp_path):
    corpus = Source(tmp_path)
    built = {
        name: tokenizers.build(name, 360, corpus) for name in ("bpe", "sentencepiece")
    }
    assert corpus.reads == 2
    assert built["bpe"].hash == TOKENIZERS["bpe"].hash
    assert isinstance(tokenizers.build("bpe", 360, corpus), HuggingFace)
    assert corpus.reads == 2


def test_build_by_name_or_folder(tmp_path):
    corpus = Source(tmp_path)
    assert isinstance(tokenizers.build("bytes", 300, corpus), Bytes)
    TOKENIZERS["sentencepiece"].save(tmp_path / "saved")
    saved = tokenizers.build(str(tmp_path / "saved"), 360, corpus)
    assert saved.hash == TOKENIZERS["sentencepiece"].hash
    assert corpus.reads == 0


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("bytes", 261, "model.vocab_size = 261: must be at least 262 for .*'bytes'"),
        ("bpe", 265, "model.vocab_size = 265: must be at least 266 for .*byte-level"),
        ("saved", 359, "model.vocab_size = 359: must be at least 360"),
        (
            "sentencepeice",
            360,
            "no tokenizer folder.* data.tokenizer is 'sentencepiece'",
        ),
    ],
)
def test_bad_choices(name, size, message, tmp_path):
    TOKENIZERS["sentencepiece"].save(tmp_path / "saved")
    name = str(tmp_path / "saved") if name == "saved" else name
    with pytest.raises(ValueError, match=message):
        tokenizers.build(name, size, Source(tmp_path))
