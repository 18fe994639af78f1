"""A corpus folder: documents.jsonl, one document a line, and manifest.json.

The folder is named by its content, can be copied to another machine, and is checked
against its manifest whenever it is opened. A document is an object of `domain`, `text`,
`name` (where it came from) and `digest` (`documents.digest_of`); the held-out split is
a function of the digests and sizes alone, so every run on a corpus has the same one.

Validation has two sizes to keep apart. Few texts say little, however long they are: a
domain of speeches would be judged by three of them at 1 % of its bytes. So at least
`LEAST` texts are held out of training, and a part of each is validated on, until those
parts make up the 1 %: the evaluation sees more texts and takes no longer.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.cache import file_hash, publish, unfinished
from deepseek_jax.data.documents import Document
from deepseek_jax.files import write_text

FORMAT = 2  # of folders, of how files become one, and of the split; part of the hash
DOCUMENTS, MANIFEST = "documents.jsonl", "manifest.json"
MAX_DOMAINS = 64
LEAST = 12  # texts to hold out of a domain, as far as that is a tenth of them or less


@dataclass(frozen=True)
class Corpus:
    """An opened corpus: `domains` in order of their index, `hash` of all its text.

    `val_fraction`: how much of each domain is for validation, see `Index`.
    """

    root: Path
    domains: tuple[str, ...]
    hash: str
    val_fraction: float
    cache: Path  # where what is made from this corpus is kept

    def documents(self) -> Iterator[Document]:
        """All documents, in the order of the file."""
        with (self.root / DOCUMENTS).open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield Document(**json.loads(line))

    def sample(self, limit: int) -> Iterator[str]:
        """Training texts, about `limit` bytes of each domain, chosen by digest."""
        index = Index.of(self)
        held_out = index.held_out(self.val_fraction)
        total_D = np.bincount(index.domain_N, index.size_N, len(self.domains))
        share_N = (limit / np.maximum(total_D, 1))[index.domain_N]
        # The low half of the digest: the split goes by the high one.
        chance_N = (index.digest_N & np.uint64(0xFFFFFFFF)) / 2.0**32
        keep_N = (chance_N < share_N) & ~held_out
        for item, keep in zip(self.documents(), keep_N):
            if keep:
                yield item.text


@dataclass(frozen=True)
class Index:
    """What splitting and dealing documents needs to know of each."""

    digest_N: np.ndarray  # uint64
    domain_N: np.ndarray  # int32
    size_N: np.ndarray  # int64, bytes of UTF-8

    @classmethod
    def of(cls, corpus: Corpus) -> "Index":
        number = {name: i for i, name in enumerate(corpus.domains)}
        rows = [
            (int(item.digest, 16), number[item.domain], len(item.text.encode()))
            for item in corpus.documents()
        ]
        digest, domain, size = zip(*rows)
        return cls(
            np.array(digest, np.uint64),
            np.array(domain, np.int32),
            np.array(size, np.int64),
        )

    def held_out(self, fraction: float) -> np.ndarray:
        """Which documents are kept from training, bool [N].

        Of each domain the texts of smallest digest, until they hold `fraction` of its
        bytes and are `LEAST`, or a tenth of its texts if that is fewer: at least one,
        and never all. Equal texts are on one side, in any domain.
        """
        chosen = [
            _smallest(self.digest_N[rows], self.size_N[rows], fraction)
            for rows in (self.domain_N == d for d in np.unique(self.domain_N))
        ]
        return np.isin(self.digest_N, np.concatenate(chosen))

    def validation(self, fraction: float) -> np.ndarray:
        """Which of the held-out documents are validated on, bool [N].

        Of each domain a piece of every held-out text, then one more of each in turn,
        until they hold `fraction` of the domain's bytes.
        """
        held_out = self.held_out(fraction)
        chosen = np.zeros_like(held_out)
        for domain in np.unique(self.domain_N):
            rows = np.flatnonzero(self.domain_N == domain)
            held = rows[held_out[rows]]
            digest_n = self.digest_N[held]
            held = held[np.lexsort((digest_n, _turns(digest_n)))]
            needed = fraction * self.size_N[rows].sum()
            enough = np.searchsorted(self.size_N[held].cumsum(), needed) + 1
            chosen[held[: max(enough, len(np.unique(digest_n)))]] = True
        return chosen


def _smallest(digest_n: np.ndarray, size_n: np.ndarray, fraction: float) -> np.ndarray:
    digest_u, inverse_n = np.unique(digest_n, return_inverse=True)
    size_u = np.bincount(inverse_n, size_n)
    needed = int(np.searchsorted(size_u.cumsum(), fraction * size_u.sum())) + 1
    needed = max(needed, min(LEAST, len(digest_u) // 10))
    return digest_u[: min(needed, len(digest_u) - 1)]


def _turns(digest_n: np.ndarray) -> np.ndarray:
    """For each piece, how many pieces of its text go before it.

    They go from a piece that the digest decides to the last, then from the first on:
    openings, such as licences and greetings, would else be all that is seen.
    """
    _, text_n, count_u = np.unique(digest_n, return_inverse=True, return_counts=True)
    order = np.argsort(text_n, kind="stable")
    place_n = np.empty_like(order)
    first_u = count_u.cumsum() - count_u
    place_n[order] = np.arange(len(order)) - first_u[text_n[order]]
    count_n = count_u[text_n]
    start_n = (digest_n % count_n.astype(np.uint64)).astype(np.int64)
    return (place_n - start_n) % count_n


def write_corpus(
    documents: Iterable[Document], parent: Path, sources: Iterable[dict[str, str]] = ()
) -> Path:
    """Writes documents to a folder of `parent` named by their hash; returns the folder.

    Args:
      documents: read once, one at a time.
      parent: made if missing.
      sources: name, version and licence of what the text was taken from.

    Raises:
      ValueError: no documents, or more than 64 domains.
    """
    whole = hashlib.sha256()
    counts: dict[str, dict[str, int]] = {}
    with unfinished(parent) as folder:
        with (folder / DOCUMENTS).open("wb") as file:
            for item in documents:
                line = json.dumps(item._asdict(), ensure_ascii=False).encode() + b"\n"
                whole.update(line)
                file.write(line)
                count = counts.setdefault(item.domain, {"documents": 0, "bytes": 0})
                count["documents"] += 1
                count["bytes"] += len(item.text.encode())
                if len(counts) > MAX_DOMAINS:
                    raise ValueError(f"more than {MAX_DOMAINS} domains: {item.name}")
        if not counts:
            raise ValueError("no text in it")
        digest = hashlib.sha256(f"{FORMAT} {whole.hexdigest()}".encode()).hexdigest()
        manifest = {
            "format": FORMAT,
            "hash": digest,
            "files": {DOCUMENTS: whole.hexdigest()},
            "domains": dict(sorted(counts.items())),
            "sources": list(sources),
        }
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return publish(folder, parent / digest[:16])


def built_once(parent: Path, key: str, build: Callable[[], Path]) -> Path:
    """The corpus folder that `build` makes in `parent`, made at a key's first call.

    The key is of what the corpus is made from; a note beside the folders leads from it
    to the folder, whose name only its content decides.
    """
    note = parent / f"{key}.json"
    if note.is_file():
        known: str = json.loads(note.read_text(encoding="utf-8"))["corpus"]
        if (parent / known).is_dir():
            return parent / known
    folder = build()
    write_text(note, json.dumps({"corpus": folder.name}) + "\n")
    return folder


def read_manifest(root: Path) -> dict[str, Any]:
    """The checked manifest of a corpus folder.

    Raises:
      ValueError: no readable manifest, another format, or a file that isn't the one the
        manifest was written for.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"data.source = {str(root)!r}: a folder without {MANIFEST}; give a corpus "
            f"folder, or files by a pattern such as {str(root / '*.txt')!r}"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form, files = manifest["format"], manifest["files"]
        if not (manifest["domains"] and manifest["hash"] and DOCUMENTS in files):
            raise KeyError("domains, hash or documents")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.source: {path} is damaged ({error}); copy or build it again"
        ) from None
    if form != FORMAT:
        raise ValueError(
            f"data.source: {path} has format {form}, this version reads {FORMAT}; "
            "build it again"
        )
    for name, wanted in files.items():
        if not (root / name).is_file() or file_hash(root / name) != wanted:
            raise ValueError(
                f"data.source: {root / name} is missing or damaged (its hash is not "
                f"the one in {MANIFEST}); delete {root} and copy or build it again"
            )
    return manifest


def open_folder(root: Path, val_fraction: float, cache: Path) -> Corpus:
    """Opens and checks a corpus folder.

    Raises:
      ValueError: see `read_manifest`.
    """
    manifest = read_manifest(root)
    domains = tuple(sorted(manifest["domains"]))
    return Corpus(root, domains, manifest["hash"], val_fraction, cache)
