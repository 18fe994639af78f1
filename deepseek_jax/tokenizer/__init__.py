"""Tokenizers: `build` one for a run, `load` one that a run has saved."""

import hashlib
import logging
from pathlib import Path

from deepseek_jax.tokenizer import bytes as byte_level
from deepseek_jax.tokenizer import sentencepiece as pieces
from deepseek_jax.tokenizer import train
from deepseek_jax.tokenizer.base import (
    ABOUT,
    TextSource,
    Tokenizer,
    need_vocab,
    read_about,
)

__all__ = ["Tokenizer", "build", "load"]
log = logging.getLogger(__name__)


def build(
    name: str, vocab_size: int, corpus: TextSource, cache_dir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      name: "sentencepiece" (trained on the corpus's training split, once), "bytes", or
        the folder of a saved tokenizer.
      vocab_size: `model.vocab_size`. The tokenizer has at most as many ids; it has
        fewer if it is of bytes, or if the corpus is too small for that many pieces.
      cache_dir: where trained tokenizers are kept; None takes the corpus's cache.

    Raises:
      ValueError: `vocab_size` is too small, or the folder holds no tokenizer.
    """
    if name == byte_level.KIND:
        need_vocab(vocab_size, byte_level.Bytes.vocab_size, "data.tokenizer = 'bytes'")
        return byte_level.Bytes()
    if name == pieces.KIND:
        return _trained(vocab_size, corpus, Path(cache_dir or corpus.cache))
    tokenizer = load(name)
    need_vocab(vocab_size, tokenizer.vocab_size, f"data.tokenizer = {name!r}")
    return tokenizer


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to a folder.

    Raises:
      ValueError: no tokenizer there, of an unknown kind, or its files are damaged.
    """
    folder = Path(folder).expanduser()
    about = read_about(folder)
    tokenizer: Tokenizer
    if about["kind"] == byte_level.KIND:
        tokenizer = byte_level.Bytes()
    elif about["kind"] == pieces.KIND:
        tokenizer = _read_pieces(folder / pieces.MODEL)
    else:
        raise ValueError(
            f"{folder / ABOUT}: unknown kind {about['kind']!r}; this version knows "
            f"{byte_level.KIND!r} and {pieces.KIND!r}"
        )
    if tokenizer.hash != about["hash"]:
        raise ValueError(
            f"{folder} is damaged: its files don't have the hash that {ABOUT} names; "
            "copy it again"
        )
    return tokenizer


def _read_pieces(path: Path) -> Tokenizer:
    try:
        return pieces.SentencePiece(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None


def _trained(vocab_size: int, corpus: TextSource, cache: Path) -> Tokenizer:
    settings = f"{sorted(train.SETTINGS.items())} {train.SAMPLE} {vocab_size}"
    key = f"{corpus.hash} {corpus.val_fraction} {settings}"
    folder = cache / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / ABOUT).is_file():
        log.info("training a tokenizer of %d pieces, once", vocab_size)
        sample = corpus.sample(train.SAMPLE // len(corpus.domains))
        train.train(sample, vocab_size).save(folder)
    return load(folder)
