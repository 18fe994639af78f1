"""Folders that are built once, may be built by two processes at a time, and never half.

A folder is filled under a temporary name beside its final one and then renamed. Whoever
renames first wins; the loser throws its own copy away, which holds the same bytes.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def default_cache() -> Path:
    """$DEEPSEEK_JAX_CACHE, else deepseek_jax in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("DEEPSEEK_JAX_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "deepseek_jax"


@contextlib.contextmanager
def unfinished(parent: Path) -> Iterator[Path]:
    """A fresh folder inside `parent`, removed at the end unless it was published."""
    folder = parent / f".building-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> Path:
    """Renames a finished folder to `target`, or keeps the one that is there already."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
