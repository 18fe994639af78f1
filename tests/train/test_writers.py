"""Records on disk: their order, their cuts, and what survives a crash."""

import json
import os

import numpy as np
import pytest

from deepseek_jax.checkpoint.disk import DiskFull
from deepseek_jax.train import writers
from deepseek_jax.train.writers import JsonlWriter, TensorBoardWriter, cut_after, read


def write(path, *steps):
    writer = JsonlWriter(path)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def test_numbers_come_back_exactly_and_lists_stay_nested(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    loss = float(np.float32(1) / np.float32(3))
    values = {"loss": loss, "load": np.arange(6).reshape(2, 3), "cv": [np.float32(0.5)]}
    writer = JsonlWriter(path)
    writer.write(1, values | {"flips": None, "by": {"code": 1.5}})
    assert read(path) == [
        {
            "step": 1,
            "loss": loss,
            "load": [[0, 1, 2], [3, 4, 5]],
            "cv": [0.5],
            "flips": None,
            "by": {"code": 1.5},
        }
    ]
    writer.write(2, {})  # a reader sees every line at once, without a close
    assert [record["step"] for record in read(path)] == [1, 2]
    writer.close()


def test_what_is_not_finite_is_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"a": float("nan"), "b": [np.inf, 1.0], "c": {"d": -np.inf}})
    writer.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": [None, 1.0],
        "c": {"d": None},
    }


def test_a_cut_drops_later_records_and_a_half_written_line(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3, 3, 4)
    before = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    cut_after(path, 3)
    assert path.read_text() == "".join(before[:4])
    write(path, 4)
    assert path.read_text().splitlines()[-1] == '{"step": 4, "loss": 0.25}'
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_half_written_line_that_is_json_is_no_record(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n12\n\xff\xfe\n{"step": 2}')
    assert [record["step"] for record in read(path)] == [1, 2]
    cut_after(path, 9)
    write(path, 3)
    assert (
        path.read_text()
        == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.3333333333333333}\n'
    )


def test_a_cut_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    write(path, 1, 2)
    before = path.read_text()

    def fail(_):
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        cut_after(path, 1)
    assert path.read_text() == before


def test_without_a_file_there_is_nothing_to_cut(tmp_path):
    cut_after(tmp_path / "m.jsonl", 3)
    assert read(tmp_path / "m.jsonl") == [] and not list(tmp_path.iterdir())


def test_a_full_disk_is_told():
    from pathlib import Path

    writer = JsonlWriter(Path("/dev/full"))
    with pytest.raises(DiskFull, match=r"disk is full: step 7 .*run the same command"):
        writer.write(7, {"loss": 1.0})
    writer.close()


def test_tensorboard_gets_scalars_lists_and_dicts_but_no_tables():
    values = {
        "loss": 1.5,
        "cv": [1, 2.0],
        "load": [[1], [2]],
        "by": {"a": 3},
        "n": None,
    }
    assert list(writers.scalars(values)) == [
        ("loss", 1.5),
        ("cv/0", 1.0),
        ("cv/1", 2.0),
        ("by/a", 3.0),
    ]


def test_tensorboard_files_hold_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = TensorBoardWriter(tmp_path, first=4)
    writer.write(4, {"loss": 2.5, "cv": [0.25]})
    writer.close()
    [file] = tmp_path.iterdir()
    data, found, at, start = file.read_bytes(), {}, 0, None
    while at < len(data):  # length, its CRC, the event, its CRC
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
        if event.HasField("session_log"):
            start = event.step
    assert found == {"loss": (4, 2.5), "cv/0": (4, 0.25)}
    assert start == 4  # TensorBoard hides what an earlier start wrote from here on


def test_probes_are_looked_up_strictly_before_a_step(tmp_path):
    assert writers.previous_probe(tmp_path, 5) is None
    for step in (10, 9, 100):
        writers.save_probe(tmp_path, step, np.full((1, 2, 2), step, np.int16))
    assert writers.previous_probe(tmp_path, 9) is None
    assert writers.previous_probe(tmp_path, 10).max() == 9
    assert writers.previous_probe(tmp_path, 100).max() == 10
    assert writers.previous_probe(tmp_path, 101).max() == 100
    writers.cut_probes(tmp_path, 10)
    assert writers.previous_probe(tmp_path, 1000).max() == 10
