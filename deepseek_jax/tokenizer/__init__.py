"""Tokenizers: `build` one for a run, `load` one that a run or another library saved."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.tokenizer import bpe, huggingface, train
from deepseek_jax.tokenizer import bytes as byte_level
from deepseek_jax.tokenizer import sentencepiece as pieces
from deepseek_jax.tokenizer.base import (
    ABOUT,
    TextSource,
    Tokenizer,
    need_vocab,
    read_about,
)

__all__ = ["Tokenizer", "build", "load"]
log = logging.getLogger(__name__)

Train = Callable[[Iterable[str], int], Tokenizer]
TRAINERS: dict[str, tuple[Train, Mapping[str, Any]]] = {
    pieces.KIND: (train.train, train.SETTINGS),
    bpe.NAME: (bpe.train, bpe.SETTINGS),
}


def build(
    name: str, vocab_size: int, corpus: TextSource, cache_dir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      name: "sentencepiece" or "bpe" (trained on the corpus's training split, once),
        "bytes", or the folder of a tokenizer (see `load`).
      vocab_size: `model.vocab_size`. The tokenizer has at most as many ids; it has
        fewer if it is of bytes, or if the corpus is too small for that many pieces.
      cache_dir: where trained tokenizers are kept; None takes the corpus's cache.

    Raises:
      ValueError: `vocab_size` is too small, the folder holds no tokenizer, or a package
        is missing.
    """
    if name == byte_level.KIND:
        need_vocab(vocab_size, byte_level.Bytes.vocab_size, "data.tokenizer = 'bytes'")
        return byte_level.Bytes()
    if name in TRAINERS:
        return _trained(name, vocab_size, corpus, Path(cache_dir or corpus.cache))
    tokenizer = load(name)
    need_vocab(vocab_size, tokenizer.vocab_size, f"data.tokenizer = {name!r}")
    return tokenizer


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that `Tokenizer.save` or Hugging Face's library wrote.

    Args:
      folder: a folder, or a file in the format of Hugging Face's tokenizer.json.

    Raises:
      ValueError: no tokenizer there, of an unknown kind, or its files are damaged.
    """
    folder = Path(folder).expanduser()
    if folder.is_file() or huggingface.recognises(folder / ABOUT):
        return huggingface.read(folder)
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


def _trained(name: str, vocab_size: int, corpus: TextSource, cache: Path) -> Tokenizer:
    trainer, settings = TRAINERS[name]
    made_of = f"{sorted(settings.items())} {train.SAMPLE} {vocab_size}"
    key = f"{corpus.hash} {corpus.val_fraction} {made_of}"
    folder = cache / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / ABOUT).is_file():
        log.info("training a tokenizer of %d pieces, once", vocab_size)
        sample = corpus.sample(train.SAMPLE // len(corpus.domains))
        trainer(sample, vocab_size).save(folder)
    return load(folder)
