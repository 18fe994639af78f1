"""Reads a user's own files: .txt, .jsonl, .jsonl.gz and .parquet, a document at a time.

* .jsonl(.gz): one object a line, with `text` and, if you like, `domain`;
* .parquet: a column `text` and, if you like, a column `domain`;
* .txt among others of its domain: a document;
* .txt alone in its domain: documents of at most `documents.PIECE` characters, cut at
  blank lines where there are some, since with one there would be none to hold out. If
  the file is a book, validation is on passages of the book that is trained on; if it is
  a collection, give its texts as lines of .jsonl to keep each on one side.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.data.documents import Document, cut, document


def suffix_of(path: Path) -> str:
    """The suffix by which a file is read.

    Raises:
      ValueError: none of those that can be read.
    """
    for suffix in READERS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(
        f"data.source: {path} is not one of {', '.join(READERS)}; give a pattern that "
        "only matches those"
    )


def read(path: Path, domain: str, *, alone: bool) -> Iterator[Document]:
    """The documents of a file, of any length, blank ones too.

    Args:
      domain: of the documents that don't name one.
      alone: no other file is of this domain.

    Raises:
      ValueError: text that is not UTF-8 (with its byte offset), a line or row without
        text (with its number), or a file that is not what its suffix says.
    """
    suffix = suffix_of(path)
    texts = _txt_pieces if alone and suffix == ".txt" else READERS[suffix]
    for text, own_domain, place in texts(path):
        yield document(own_domain or domain, text, f"{path.name}:{place}")


type _Texts = Iterator[tuple[str, str, int]]  # text, domain or "", place in the file


def _lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    offset = 0
    for line in file:
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.source: {path} is not UTF-8: byte {line[error.start]:#04x} at "
                f"offset {offset + error.start}; convert it, for example with iconv"
            ) from None
        offset += len(line)


def _txt(path: Path) -> _Texts:
    with path.open("rb") as file:
        yield "".join(_lines(file, path)), "", 1


def _txt_pieces(path: Path) -> _Texts:
    with path.open("rb") as file:
        for number, text in enumerate(cut(_lines(file, path)), 1):
            yield text, "", number


def _jsonl(path: Path) -> _Texts:
    with path.open("rb") as file:
        yield from _objects(file, path)


def _jsonl_gz(path: Path) -> _Texts:
    try:
        with gzip.open(path) as file:
            yield from _objects(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"data.source: {path} is a damaged gzip file: {error}"
        ) from None


def _objects(file: Iterable[bytes], path: Path) -> _Texts:
    for number, line in enumerate(_lines(file, path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data.source: {path}:{number} is no JSON: {error}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f'data.source: {path}:{number}: want {{"text": ...}}')
        yield *_checked(row.get("text"), row.get("domain"), path, number), number


def _parquet(path: Path) -> _Texts:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"data.source: {path} is no Parquet file: {error}") from None
    names = file.schema_arrow.names
    if "text" not in names:
        raise ValueError(
            f"data.source: {path} has no column 'text', only {', '.join(names)}"
        )
    number = 0
    for batch in file.iter_batches(1024, columns=[n for n in names if n in FIELDS]):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.source: {path} is not UTF-8 within {batch.num_rows} rows after "
                f"row {number}: {error}"
            ) from None
        for row in rows:
            number += 1
            yield *_checked(row["text"], row.get("domain"), path, number), number


def _checked(text: Any, domain: Any, path: Path, number: int) -> tuple[str, str]:
    place = f"data.source: {path}:{number}"
    if not isinstance(text, str):
        raise ValueError(f"{place}: 'text' is missing or no string ({text!r})")
    if not isinstance(domain, str | None):
        raise ValueError(f"{place}: 'domain' must be a string, not {domain!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: 'text' has half a surrogate pair at character {error.start}"
        ) from None
    return text, domain or ""


FIELDS = ("text", "domain")
READERS: dict[str, Callable[[Path], _Texts]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".parquet": _parquet,
}
