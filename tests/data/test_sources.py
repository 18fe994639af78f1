"""From `data.source` to a corpus: every kind of file, and every way to get it wrong."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_jax.config import DataConfig
from deepseek_jax.data.cache import default_cache
from deepseek_jax.data.documents import PIECE, digest_of
from deepseek_jax.data.sources import open_corpus, parse_weights
from tests.data.texts import write_jsonl

ROWS = [{"text": "one é\n", "domain": "d"}, {"text": "two"}, {"text": " \n"}]


def opened(source, tmp_path, **settings):
    return open_corpus(DataConfig(source=str(source), **settings), tmp_path / "cache")


def texts(corpus):
    return [(item.domain, item.text) for item in corpus.documents()]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_tables_of_texts(tmp_path, kind):
    path = tmp_path / f"notes.v1.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "jsonl.gz":
        lines = "\n\n".join(map(json.dumps, ROWS))
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        columns = {
            "text": [row["text"] for row in ROWS],
            "domain": [row.get("domain") for row in ROWS],
            "other": [1, 2, 3],
        }
        pq.write_table(pa.table(columns), path)
    corpus = opened(path, tmp_path)
    assert texts(corpus) == [("d", "one é\n"), ("notes.v1", "two")]
    assert corpus.domains == ("d", "notes.v1")


def test_text_files_by_pattern(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"in {name}\r\n".encode())
    (tmp_path / "other.md").write_text("not matched")
    flat = opened(tmp_path / "*.txt", tmp_path)
    assert texts(flat) == [("a", "in a.txt\r\n"), ("b", "in b.txt\r\n")]
    deep = opened(tmp_path / "**/*.txt", tmp_path)
    assert deep.domains == ("a", "b", "c")


LONG = "".join(f"paragraph {i}\n\n" for i in range(5000))


def write_many_texts(folder):
    """Twenty files, too many for a domain each, so that each is a document."""
    for i in range(19):
        (folder / f"{i}.txt").write_text(f"text {i}")
    (folder / "long.txt").write_text(LONG)
    return folder / "*.txt"


WITH_LONG_TEXT = {
    "alone.txt": lambda f: put(f / "alone.txt", LONG.encode()),
    "many.txt": write_many_texts,
    "x.jsonl": lambda f: write_jsonl(f / "x.jsonl", [{"text": LONG}, *ROWS]),
    "x.parquet": lambda f: table(f / "x.parquet", text=["a", LONG]),
}


@pytest.mark.parametrize("case", WITH_LONG_TEXT)
def test_long_texts_are_cut_and_nothing_is_lost(tmp_path, case):
    corpus = opened(WITH_LONG_TEXT[case](tmp_path), tmp_path)
    pieces = [item for item in corpus.documents() if "paragraph" in item.text]
    assert "".join(item.text for item in pieces) == LONG
    assert PIECE // 2 < max(len(item.text) for item in pieces) <= PIECE
    digests = {item.digest for item in pieces}
    if case == "alone.txt":
        assert len(digests) == len(pieces), "else there were nothing to hold out"
    else:
        assert digests == {digest_of(LONG)}, "the split keeps a document together"


def test_equal_texts_are_kept_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": LONG}, {"text": "x  y"}] * 25)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "z"}, {"text": "x\ny"}])
    found = texts(opened(tmp_path / "*.jsonl", tmp_path))
    assert "".join(text for _, text in found) == LONG + "x  y" + "z"
    assert found[-2:] == [("a", "x  y"), ("b", "z")]


def test_many_files_are_of_the_domain_of_their_folder(tmp_path):
    for i in range(20):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.txt").write_text(f"text {i}")
    assert opened(tmp_path / "*/*.txt", tmp_path).domains == ("a", "b")


def test_the_same_files_elsewhere_are_the_same_corpus(tmp_path):
    hashes = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "f.jsonl", ROWS)
        hashes.add(opened(tmp_path / name / "f.jsonl", tmp_path / name).hash)
    assert len(hashes) == 1


def test_import_happens_once_and_again_after_a_change(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    first = opened(path, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("deepseek_jax.data.readers.read", None)
        assert opened(path, tmp_path) == first
    write_jsonl(path, [*ROWS, {"text": "three"}])
    assert opened(path, tmp_path).hash != first.hash
    assert len(texts(first)) == 2, "the first corpus is still whole"


def test_a_corpus_folder_is_opened_as_it_is(tmp_path):
    corpus = opened(write_jsonl(tmp_path / "f.jsonl", ROWS), tmp_path)
    again = opened(corpus.root, tmp_path / "other")
    assert (again.root, again.hash) == (corpus.root, corpus.hash)


BAD = {
    "nowhere": (lambda f: f / "none*.txt", "none.*no such file"),
    "no_manifest": (lambda f: f, "without manifest.json.*pattern such as"),
    "suffix": (lambda f: put(f / "x.csv", b"a"), "x.csv is not one of .txt, .jsonl"),
    "empty": (lambda f: put(f / "x.txt", b""), "x.txt'?: no text"),
    "blank": (lambda f: put(f / "x.txt", b" \n"), "x.txt'?: no text"),
    "latin1": (
        lambda f: put(f / "x.txt", b"ab\ncaf\xe9 x"),
        "x.txt is not UTF-8.*0xe9.* 6",
    ),
    "jsonl_latin1": (
        lambda f: put(f / "x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}'),
        "x.jsonl is not UTF-8.* 24",
    ),
    "no_json": (
        lambda f: put(f / "x.jsonl", b'{"text": "a"}\n{'),
        "x.jsonl:2 is no JSON",
    ),
    "no_object": (lambda f: put(f / "x.jsonl", b'"a"'), "x.jsonl:1"),
    "no_text": (
        lambda f: put(f / "x.jsonl", b'{"text": "a"}\n{"txt": 1}'),
        "x.jsonl:2: 'text' is missing",
    ),
    "text_number": (
        lambda f: put(f / "x.jsonl", b'{"text": 3}'),
        "x.jsonl:1: 'text'.*3",
    ),
    "domain_number": (
        lambda f: put(f / "x.jsonl", b'{"text": "a", "domain": 3}'),
        "x.jsonl:1: 'domain' must be a string",
    ),
    "surrogate": (
        lambda f: put(f / "x.jsonl", b'{"text": "a\\ud800"}'),
        "x.jsonl:1: 'text' has half a surrogate",
    ),
    "no_gzip": (
        lambda f: put(f / "x.jsonl.gz", b"plain"),
        "x.jsonl.gz is a damaged gzip",
    ),
    "cut_gzip": (
        lambda f: put(f / "x.jsonl.gz", gzip.compress(os.urandom(99))[:-20]),
        "x.jsonl.gz is (a damaged gzip|not UTF-8)",
    ),
    "no_parquet": (lambda f: put(f / "x.parquet", b"plain"), "x.parquet is no Parquet"),
    "no_column": (
        lambda f: table(f / "x.parquet", body=["a"]),
        "x.parquet has no column 'text', only body",
    ),
    "null_row": (
        lambda f: table(f / "x.parquet", text=["a", None]),
        "x.parquet:2: 'text' is missing",
    ),
}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def table(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path, case):
    make, message = BAD[case]
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"(?s)data.source.*{message}"):
        opened(make(folder), tmp_path)
    assert not list((tmp_path / "cache").rglob(".building*"))


def test_weights():
    domains = ("a", "b", "c")
    assert parse_weights("", domains) is None
    assert parse_weights("b=2.5, c = 0", domains) == {"a": 1, "b": 2.5, "c": 0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("a", "must look like domain=2.5"),
        ("a=x", "must look like domain=2.5"),
        ("a=-1", "must look like domain=2.5"),
        ("a=inf", "must look like domain=2.5"),
        ("d=1", "no domain 'd'; the corpus has a, b"),
        ("a=0,b=0", "one must be positive"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=f"data.weights.*{message}"):
        parse_weights(weights, ("a", "b"))


def test_bad_weights_are_seen_when_the_corpus_is_opened(tmp_path):
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    with pytest.raises(ValueError, match="no domain 'code'; the corpus has d, f"):
        opened(path, tmp_path, weights="code=2")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == Path.home() / ".cache" / "deepseek_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/deepseek_jax")
    monkeypatch.setenv("DEEPSEEK_JAX_CACHE", "/y")
    assert default_cache() == Path("/y")
