"""A corpus as token ids on disk, made once for a corpus and a tokenizer.

Every document is bos, its tokens, eos: bos opens a document as in DeepSeek-V3's own
tokenizer, eos is what generation stops at. All documents stand one after another in one
memory-mapped file, so that a run starts or resumes at once, and runs on one machine
share it. Its hash is checked whenever it is opened.
"""

import hashlib
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.cache import file_hash, publish, unfinished
from deepseek_jax.data.corpus import Corpus, Index

FORMAT = 2
TOKENS, STARTS = "tokens.bin", "starts.npz"
# What reading a damaged .npz may raise.
DAMAGE = (OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """Documents as tokens; document i is tokens[start[i]:start[i + 1]]."""

    tokens: np.ndarray  # all documents
    start: np.ndarray  # int64 [N + 1]
    index: Index

    @property
    def size(self) -> np.ndarray:
        """Tokens of each document, [N]."""
        return np.diff(self.start)

    def read(self, number: int) -> np.ndarray:
        """The tokens of a document, int32, with bos and eos."""
        return self.tokens[self.start[number] : self.start[number + 1]].astype(np.int32)


def open_store(corpus: Corpus, tokenizer: Any) -> Store:
    """Opens the tokens of a corpus, tokenizing it first if that has not been done.

    Raises:
      ValueError: the files are damaged.
    """
    key = hashlib.sha256(f"{FORMAT} {corpus.hash} {tokenizer.hash}".encode())
    folder = corpus.cache / "tokens" / key.hexdigest()[:16]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    if not folder.is_dir():
        _build(corpus, tokenizer, folder, dtype)
    try:
        with (folder / STARTS).open("rb") as file, np.load(file) as arrays:
            start, wanted = arrays["start"], str(arrays["sha256"])
            index = Index(arrays["digest"], arrays["domain"], arrays["size"])
        if file_hash(folder / TOKENS) != wanted:
            raise ValueError(f"{TOKENS} is not what {STARTS} was written for")
    except DAMAGE as error:
        raise ValueError(f"{folder} is damaged ({error}); delete {folder}") from None
    return Store(np.memmap(folder / TOKENS, dtype, mode="r"), start, index)


def _build(corpus: Corpus, tokenizer: Any, folder: Path, dtype: type) -> None:
    log.info("tokenizing the corpus %s, once", corpus.root)
    index = Index.of(corpus)
    start = np.zeros(len(index.digest_N) + 1, np.int64)
    whole = hashlib.sha256()
    with unfinished(folder.parent) as building:
        with (building / TOKENS).open("wb") as file:
            for i, item in enumerate(corpus.documents()):
                ids = [tokenizer.bos_id, *tokenizer.encode(item.text), tokenizer.eos_id]
                start[i + 1] = start[i] + len(ids)
                raw = np.array(ids, dtype).tobytes()
                whole.update(raw)
                file.write(raw)
        np.savez(
            building / STARTS,
            start=start,
            digest=index.digest_N,
            domain=index.domain_N,
            size=index.size_N,
            sha256=whole.hexdigest(),
        )
        publish(building, folder)
