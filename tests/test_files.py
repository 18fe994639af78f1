"""Files that are replaced as a whole, and lines of files that are still growing."""

import json
import os
import threading

import pytest

from deepseek_jax.files import read_lines, replacing, write_bytes, write_text


def test_a_failed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_the_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    seen = []
    fsync = os.fsync

    def spy(number):
        fsync(number)
        seen.append((os.fstat(number).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", spy)
    write_bytes(path, b"12345")
    assert seen == [(5, False)]


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    path = tmp_path / "file"
    contents = [str(n) * 10_000 for n in range(8)]

    def write(content):
        for _ in range(20):
            write_text(path, content)

    threads = [threading.Thread(target=write, args=(text,)) for text in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_every_line_comes_with_its_object_or_none(tmp_path):
    path = tmp_path / "m.jsonl"
    assert list(read_lines(path)) == []
    lines = [b'{"step": 1}', b"12", b"[]", b"\xff\xfe", b'{"a": "\xff"}', b'{"step": 2']
    path.write_bytes(b"\n\n".join(lines))
    read = dict(read_lines(path))
    assert list(read) == lines
    assert [*read.values()] == [{"step": 1}, None, None, None, None, None]


def test_a_line_may_hold_the_other_separators_of_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    record = {"text": "a\u2028b\x85c"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n", "utf-8")
    assert [found for _, found in read_lines(path)] == [record]
