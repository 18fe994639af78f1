"""What a tokenizer is to the rest, and the folder in which it is saved.

Beside pieces of text a tokenizer has control ids: bos, eos, pad and the three of
fill-in-the-middle (section 4.1 of arXiv:2412.19437). `encode` never gives one, whatever
the text says, and `decode` drops them: they are put in by number.

A folder holds tokenizer.json (format, kind, vocab_size, hash) and the files of its
kind; tokenizer.json is written last, so a half-written folder is seen to be none. Kind
"huggingface" keeps to Hugging Face's files instead, where tokenizer.json is the whole
tokenizer.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from deepseek_jax.files import write_text

FORMAT = 1
ABOUT = "tokenizer.json"
CONTROLS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")


class Tokenizer(Protocol):
    """decode(encode(text)) == text for every str that UTF-8 can hold."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Begin, hole, end."""

    @property
    def hash(self) -> str:
        """Equal for equal tokenizers, on any machine."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bad UTF-8 becomes U+FFFD. Control ids become nothing, and so
        do those of a model whose vocabulary is larger.
        """

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `tokenizer.load` reads."""


class TextSource(Protocol):
    """What training a tokenizer needs of a corpus (`data.corpus.Corpus` has it)."""

    @property
    def hash(self) -> str: ...

    @property
    def domains(self) -> tuple[str, ...]: ...

    @property
    def val_fraction(self) -> float: ...

    @property
    def cache(self) -> Path: ...

    def sample(self, limit: int) -> Iterator[str]:
        """Training texts, about `limit` bytes of each domain."""


def hash_of(kind: str, content: bytes = b"") -> str:
    return hashlib.sha256(
        f"{FORMAT} {kind} {CONTROLS}\n".encode() + content
    ).hexdigest()


def need_vocab(vocab_size: int, needed: int, why: str) -> None:
    """Raises ValueError if the model's vocabulary is too small for the tokenizer."""
    if vocab_size < needed:
        raise ValueError(
            f"model.vocab_size = {vocab_size}: must be at least {needed} for {why}"
        )


def need_package(name: str, what: str) -> None:
    """Raises ValueError, which says what to do, if an optional package is missing."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"{what} needs the package {name}, which is not installed: "
            "pip install 'deepseek_jax[parity]'"
        )


def write_about(
    folder: Path, kind: str, tokenizer: Tokenizer, name: str = ABOUT
) -> None:
    about = {
        "format": FORMAT,
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
    }
    write_text(folder / name, json.dumps(about, indent=1) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises:
      ValueError: no such folder, or it holds no tokenizer that this version can read.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(
            f"{folder} is no tokenizer folder: it has no {ABOUT}; data.tokenizer is "
            "'sentencepiece', 'bpe', 'bytes', a folder that a run has saved, or one in "
            "Hugging Face's format"
        )
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = about["format"] == FORMAT and about["hash"] and about["kind"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; copy it again") from None
    if not known:
        raise ValueError(
            f"{path} has format {about['format']}, this version reads {FORMAT}"
        )
    return about
