"""Documents: their digest, exact deduplication, and cutting the long ones.

A lane of the pipeline (`data.pipeline`) reads its documents one after another, so a
book would fill one row of every batch for a hundred steps. Long texts are therefore cut
when a corpus is built from them; the pieces keep the digest of the whole, by which the
held-out split goes, so no document is ever on both sides of it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE = 8192  # characters of a document before it is cut


class Document(NamedTuple):
    domain: str
    text: str
    name: str
    digest: str  # 16 hex digits, see `digest_of`; pieces of one text share it


def digest_of(text: str) -> str:
    """The first 64 bits of SHA-256 of a text whose runs of blanks count as one."""
    normal = " ".join(text.split()).encode()
    return hashlib.sha256(normal).hexdigest()[:16]


def document(domain: str, text: str, name: str) -> Document:
    return Document(domain, text, name, digest_of(text))


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Drops empty texts and texts equal to an earlier one up to blanks.

    Near-duplicates stay: a function that two packages carry with small changes, or the
    formulas that open every speech.
    """
    seen = {digest_of("")}
    for item in documents:
        if item.digest not in seen:
            seen.add(item.digest)
            yield item


def cut(lines: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """Joins lines into texts of at most `limit` characters, nothing lost.

    A text ends after the last blank line of its second half, else after its last line;
    a line longer than `limit` is cut anywhere. Lines keep their ends ("a\\n").
    """
    held: list[str] = []
    size = 0
    for line in lines:
        for start in range(0, len(line), limit):
            part = line[start : start + limit]
            while held and size + len(part) > limit:
                keep = _break(held, limit // 2)
                yield "".join(held[:keep])
                held = held[keep:]
                size = sum(map(len, held))
            held.append(part)
            size += len(part)
    if held:
        yield "".join(held)


def _break(lines: list[str], least: int) -> int:
    """How many of the lines come before the break."""
    size = sum(map(len, lines))
    for keep in range(len(lines), 0, -1):
        if size < least:
            break
        if not lines[keep - 1].strip():
            return keep
        size -= len(lines[keep - 1])
    return len(lines)


def cut_documents(
    documents: Iterable[Document], limit: int = PIECE
) -> Iterator[Document]:
    """Cuts long documents; the pieces keep domain, name and digest."""
    for item in documents:
        if len(item.text) <= limit:
            yield item
            continue
        for text in cut(item.text.splitlines(keepends=True), limit):
            yield item._replace(text=text)
