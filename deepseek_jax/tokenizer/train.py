"""Trains the SentencePiece tokenizer.

Training is deterministic: the sample is chosen by the documents' digests, not by
SentencePiece, and one thread is used (the number of threads stands in the model file).
"""

import io
import re
from collections.abc import Iterable
from typing import Any

import sentencepiece

from deepseek_jax.tokenizer.base import CONTROLS, need_vocab
from deepseek_jax.tokenizer.sentencepiece import SentencePiece

SAMPLE = 20_000_000  # bytes of text to train on, the same from every domain
SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,  # indentation is one token
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "character_coverage": 0.9995,
    "hard_vocab_limit": False,  # a small corpus gives a smaller vocabulary
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "control_symbols": list(CONTROLS),
    "user_defined_symbols": ["\n"],  # the trainer ends a sentence at one
    "max_sentence_length": 1 << 24,
    "num_threads": 1,
    "minloglevel": 2,
}


def train(texts: Iterable[str], vocab_size: int) -> SentencePiece:
    """Trains on texts; the vocabulary may come out smaller than asked for.

    Raises:
      ValueError: `vocab_size` can't hold bytes, control symbols and the common
        characters, or there is no text.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            **SETTINGS,
        )
    except RuntimeError as error:
        if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            need_vocab(
                vocab_size,
                int(found[1]),
                "a SentencePiece tokenizer of this corpus: control symbols, bytes and "
                "its common characters",
            )
        if "sentences_.empty()" in str(error):
            raise ValueError(
                "data.source: no training text to make a tokenizer of"
            ) from None
        raise
    return SentencePiece(model.getvalue())
