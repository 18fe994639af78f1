"""From `data.source` to an opened corpus: the builtin one, a folder, or a user's files.

Files are imported once into a corpus folder in the cache, found again by the hash of
their bytes, so a run goes on with the same text even when a file is edited meanwhile.
"""

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.config import DataConfig
from deepseek_jax.data import corpora, readers
from deepseek_jax.data.cache import default_cache, file_hash
from deepseek_jax.data.corpus import (
    FORMAT,
    Corpus,
    built_once,
    open_folder,
    write_corpus,
)
from deepseek_jax.data.documents import PIECE, Document, cut_documents, deduplicate

MANY = 16  # files; more don't make a domain each


def open_corpus(config: DataConfig, cache_dir: str | Path | None = None) -> Corpus:
    """Opens the corpus of `config.source`, building or importing it at the first call.

    A file's documents (`readers` says what they are) are of the domain that they name,
    else of the one named like the file, or like its folder when there are more than 16
    files. Long ones are cut, equal ones are dropped, in any domain.

    Args:
      cache_dir: where corpora, tokenizers and token files are kept; None takes
        `cache.default_cache()`.

    Raises:
      ValueError: nothing there, text that can't be read (file and place are named), a
        damaged corpus folder, or `data.weights` that don't fit its domains.
    """
    cache = Path(cache_dir) if cache_dir else default_cache()
    if config.source == "builtin":
        root = corpora.build(cache)
    elif (folder := Path(config.source).expanduser()).is_dir():
        root = folder.resolve()
    else:
        root = _import_files(config.source, cache)
    corpus = open_folder(root, config.val_fraction, cache)
    parse_weights(config.weights, corpus.domains)
    return corpus


def parse_weights(weights: str, domains: tuple[str, ...]) -> dict[str, float] | None:
    """The weight of every domain, or None for "": by size.

    Raises:
      ValueError: not of the form "code=2,speech=1", an unknown domain, a negative
        weight, or no positive one.
    """
    if not weights.strip():
        return None
    parsed = dict.fromkeys(domains, 1.0)
    for part in weights.split(","):
        name, _, value = (side.strip() for side in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"data.weights = {weights!r}: {part.strip()!r} must look like "
                "domain=2.5"
            )
        if name not in parsed:
            raise ValueError(
                f"data.weights = {weights!r}: no domain {name!r}; the corpus has "
                f"{', '.join(domains)}"
            )
        parsed[name] = weight
    if not any(parsed.values()):
        raise ValueError(f"data.weights = {weights!r}: one must be positive")
    return parsed


def _import_files(source: str, cache: Path) -> Path:
    files = _files(source)
    parent = cache / "corpora"
    described = [
        {"name": path.name, "version": "", "licence": "the user's own"}
        for path in files
    ]
    try:
        return built_once(
            parent,
            f"files-{_key(files)}",
            lambda: write_corpus(_read_all(files), parent, described),
        )
    except ValueError as error:
        if str(error).startswith("data.source"):
            raise
        raise ValueError(f"data.source = {source!r}: {error}") from None


def _files(source: str) -> dict[Path, str]:
    """The files that a path or pattern means, in order, with their domains."""
    path = Path(source).expanduser()
    found = (
        [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
    )
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(
            f"data.source = {source!r}: no such file; give 'builtin', a corpus folder, "
            f"or a path or pattern of {', '.join(readers.READERS)} files"
        )
    suffixes = [readers.suffix_of(file) for file in files]
    if len(files) > MANY:
        return {file: file.resolve().parent.name or "text" for file in files}
    return {
        file: file.name[: -len(end)] or "text" for file, end in zip(files, suffixes)
    }


def _key(files: dict[Path, str]) -> str:
    key = hashlib.sha256(f"{FORMAT} {PIECE}".encode())
    for path, domain in files.items():
        key.update(f"\n{path.name}\n{domain}\n{file_hash(path)}".encode())
    return key.hexdigest()[:16]


def _read_all(files: dict[Path, str]) -> Iterator[Document]:
    files_of = Counter(files.values())
    whole = (
        item
        for path, domain in files.items()
        for item in readers.read(path, domain, alone=files_of[domain] == 1)
    )
    return cut_documents(deduplicate(whole))
