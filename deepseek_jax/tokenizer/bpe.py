"""Trains a byte-level BPE with DeepSeek-V3's own pre-tokenizer (section 4.1 of
arXiv:2412.19437).

The patterns are those of the released tokenizer.json; a test compares them. They group
up to three digits, keep Chinese and kana apart, and let punctuation take line breaks
along, which is what the report says of its pre-tokenizer. Our vocabulary begins with
the markers, theirs ends with most of them. The report also splits some combined tokens
at random in training; that is not done here.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from deepseek_jax.tokenizer.base import need_package, need_vocab
from deepseek_jax.tokenizer.chat import TURNS
from deepseek_jax.tokenizer.huggingface import FIM, SPECIAL, HuggingFace

NAME = "bpe"
DIGITS = r"\p{N}{1,3}"
CHINESE_AND_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = (DIGITS, CHINESE_AND_KANA, WORDS)
MARKERS = (
    *SPECIAL.values(),
    *FIM,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
SMALLEST = 256 + len(MARKERS)
CONFIG: dict[str, Any] = SPECIAL | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "chat_template": TURNS,
}
SETTINGS: dict[str, Any] = {"min_frequency": 2, "patterns": PATTERNS, "config": CONFIG}


def train(texts: Iterable[str], vocab_size: int) -> HuggingFace:
    """Trains on texts; the vocabulary may come out smaller than asked for.

    Raises:
      ValueError: `vocab_size` can't hold the bytes and markers, there is no text, or
        the package tokenizers is missing.
    """
    need_vocab(vocab_size, SMALLEST, "a byte-level BPE: 256 bytes and its markers")
    need_package("tokenizers", "data.tokenizer = 'bpe'")
    import tokenizers

    before = tokenizers.pre_tokenizers
    splits = [before.Split(tokenizers.Regex(p), "isolated") for p in PATTERNS]
    level = before.ByteLevel(add_prefix_space=False, use_regex=False)
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = before.Sequence([*splits, level])
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=SETTINGS["min_frequency"],
        initial_alphabet=level.alphabet(),
        special_tokens=[tokenizers.AddedToken(m, normalized=False) for m in MARKERS],
        show_progress=False,
    )
    found = False

    def shown() -> Iterator[str]:
        nonlocal found
        for text in texts:
            found = found or bool(text.strip())
            yield text

    raw.train_from_iterator(shown(), trainer)
    if not found:
        raise ValueError("data.source: no training text to make a tokenizer of")
    content = json.loads(raw.to_str())
    for token in content["added_tokens"]:  # "special" ones vanish when text is shown
        token["special"] = token["content"] in SPECIAL.values()
    return HuggingFace(json.dumps(content, ensure_ascii=False).encode(), CONFIG)
