"""Files that are whole or not there, and the reading of files that are still growing.

Every package may import it, so it needs only the standard library and orjson. Ours.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its name when all went well.

    The content is on the disk before it has the name, so that a crash leaves the old
    file or the new one. Temporary names are unique: of two writers the later one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file as a whole; makes its folder if there is none."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, in UTF-8."""
    write_bytes(path, text.encode())


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a .jsonl file, each with its object, or None if it holds no object.

    The last line may be half written. Empty lines are left out; a missing file has
    none. Strict JSON: a line with NaN holds no object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except ValueError:
            value = None
        yield line, value if isinstance(value, dict) else None
