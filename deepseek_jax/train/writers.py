"""Where records go: `metrics.jsonl`, TensorBoard, and the probes of routing flips.

A record is one flat dict of Python values per line, with its `step`. JSON has no NaN or
infinity, so they are written as null. After a restart everything later than the
restored step is cut away before the first new record. Formats of our own.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX import SummaryWriter

from deepseek_jax.checkpoint.disk import DiskFull, is_disk_full
from deepseek_jax.files import read_lines, replacing, write_bytes

METRICS = "metrics.jsonl"
PROBES = "routing"

Record = dict[str, Any]


class Writer(Protocol):
    """Takes records in the order of their steps."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records `values`: numbers, nested lists, or dicts of either, by name."""

    def close(self) -> None:
        """Everything written is on its way to the disk."""


class JsonlWriter:
    """Appends one JSON object a line and hands each line to the system at once."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        record = plain({"step": step} | dict(values))
        rest = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise DiskFull(
                f"the disk is full: step {step} could not be recorded in {self.path}. "
                "The checkpoints before it are kept: free space, then run the same "
                "command again"
            ) from error

    def close(self) -> None:
        self.file.close()


class TensorBoardWriter:
    """Scalars by their name, lists as name/0, name/1, ..., dicts as name/key.

    Tables (lists of lists) stay in `metrics.jsonl`. Steps from `first` on that an
    interrupted run left behind are hidden.
    """

    def __init__(self, folder: Path, first: int):
        self.writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for tag, value in scalars(values):
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self.writer.close()


def scalars(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    """(tag, number) of every scalar, of the entries of lists, and of those in dicts."""
    for name, value in values.items():
        tag = f"{at}/{name}" if at else name
        if isinstance(value, Mapping):
            yield from scalars(value, tag)
        elif isinstance(value, int | float):
            yield tag, float(value)
        elif isinstance(value, list) and not any(isinstance(v, list) for v in value):
            yield from ((f"{tag}/{i}", float(v)) for i, v in enumerate(value))


def plain(value: Any) -> Any:
    """Python values fit for JSON: arrays become lists, what is not finite None."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: Path) -> list[Record]:
    """The records of a file, without a half-written last line; [] without a file."""
    return [record for record, _ in _lines(path)]


def cut_after(path: Path, step: int) -> None:
    """Drops every record after `step` and what is no record; whole or not at all."""
    kept = [line for record, line in _lines(path) if record["step"] <= step]
    content = b"".join(kept)
    if path.exists() and path.read_bytes() != content:
        write_bytes(path, content)


def _lines(path: Path) -> Iterator[tuple[Record, bytes]]:
    for line, record in read_lines(path):
        if record is not None and isinstance(record.get("step"), int):
            yield record, line + b"\n"


def save_probe(workdir: Path, step: int, probe: np.ndarray) -> None:
    """Keeps an evaluation's selections in DIR/routing/probe_<step>.npy."""
    with (
        replacing(workdir / PROBES / f"probe_{step}.npy") as temporary,
        temporary.open("wb") as file,
    ):
        np.save(file, probe)


def previous_probe(workdir: Path, step: int) -> np.ndarray | None:
    """The selections of the newest evaluation before `step`."""
    before = [(at, file) for at, file in _probes(workdir) if at < step]
    return np.load(max(before)[1]) if before else None


def cut_probes(workdir: Path, step: int) -> None:
    """Removes the probes of evaluations after `step`."""
    for at, file in _probes(workdir):
        if at > step:
            file.unlink()


def _probes(workdir: Path) -> Iterator[tuple[int, Path]]:
    for file in (workdir / PROBES).glob("probe_*.npy"):
        if number := re.fullmatch(r"probe_(\d+)\.npy", file.name):
            yield int(number[1]), file
