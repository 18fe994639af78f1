"""Reads runs and sweeps from their folders into plain data.

A run is a folder with the `config.json` and `metrics.jsonl` of `experiments.train`; a
sweep is a folder of runs with a `sweep.json` (what was asked for) and a `summary.json`
(what came of it). All of it may still be growing: a half-written last line, a run that
has not started and a missing file give less data, not an error.
"""

import contextlib
import functools
import gc
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import flatten
from deepseek_jax.files import read_lines

Record = dict[str, Any]

LOG_START = "$ "  # before the command of each start in a run's log.txt
PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"
STOPPED = "stopped"  # has made steps; nothing runs it, and it waits for no turn


def at_rest(steps: int | None) -> str:
    """The status of a run that neither runs nor has ended, by the steps it has made."""
    return STOPPED if steps else PENDING


def read_records(path: Path) -> list[Record]:
    """The objects of a .jsonl file; none if it is missing.

    The last line may be half written and is then left out.

    Raises:
      ValueError: another line is no JSON object.
    """
    records = [record for _, record in read_lines(path)]
    if None in records[:-1]:
        line = records.index(None) + 1
        raise ValueError(f"{path}, line {line}: no JSON object")
    return [record for record in records if record is not None]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage meanwhile: runs are millions of objects, all in use."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_json(path: Path, default: Any) -> Any:
    """A JSON file's value, or `default` if the file is missing or half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return default


@dataclass(frozen=True)
class Run:
    """One run: what was asked for and what was measured.

    `train` and `evals` are the two kinds of lines of `metrics.jsonl` in the order of
    their steps; `config` is the nested dict of `config.json`.
    """

    name: str
    path: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    train: list[Record] = field(default_factory=list)
    evals: list[Record] = field(default_factory=list)
    status: str = PENDING
    error: str = ""
    label: str = ""  # the setting that a figure compares; seeds of it share a label

    def get(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key: from config.json, else from the overrides."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return self.overrides.get(key, default)
            value = value[part]
        return value

    @property
    def strategy(self) -> str | None:
        return self.get("balance.strategy")

    @property
    def seed(self) -> int | None:
        return self.get("seed")

    @property
    def steps(self) -> int | None:
        """Optimizer steps recorded so far."""
        return self.train[-1]["step"] if self.train else None

    @property
    def total_steps(self) -> int | None:
        return self.get("train.steps")

    @property
    def num_moe(self) -> int:
        """MoE layers of the main model; the routers after them are the MTP modules'."""
        layers, dense = self.get("model.num_layers"), self.get("model.num_dense")
        if layers is not None and dense is not None:
            return int(layers - dense)
        record = self.evals[-1] if self.evals else {}
        return len(record.get("eval_load", ())) - len(record.get("eval_mtp_ce", ()))

    @functools.cached_property
    def final(self) -> Record | None:
        """The evaluation after the last step, None until it is there."""
        steps = self.total_steps
        if not self.evals or steps is None or self.evals[-1]["step"] < steps:
            return None
        return self.evals[-1]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and values [n, ...] of a metric, from the lines that have it."""
        if key not in self._series:
            records = self.evals if key.startswith("eval_") else self.train
            found = [r for r in records if r.get(key) not in (None, [])]
            steps = np.array([r["step"] for r in found], int)
            values = np.array([r[key] for r in found], float)
            steps.flags.writeable = values.flags.writeable = False
            self._series[key] = steps, values
        return self._series[key]

    @functools.cached_property
    def _series(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What `series` has found: a report asks for the same ones over and over."""
        return {}

    def router_names(self, count: int | None = None) -> list[str]:
        """Names of the routers by their place in the model: 'layer 3', 'MTP 1'."""
        first, main = int(self.get("model.num_dense", 0)), self.num_moe
        names = [f"layer {first + i + 1}" for i in range(main)]
        mtp = int(self.get("model.mtp.depth", 0)) if count is None else count - main
        return names + [f"MTP {j + 1}" for j in range(mtp)]


def _by_step(records: Iterable[Record]) -> list[Record]:
    """In the order of steps; a step that was written twice keeps its later line."""
    return [
        r for _, r in sorted({r["step"]: r for r in records if "step" in r}.items())
    ]


def read_run(path: Path, config: dict[str, Any] | None = None, **known: Any) -> Run:
    """Reads one run's folder.

    Args:
      path: the folder, which need not exist yet.
      config: the config, as long as there is no config.json.
      known: other fields, those that only the run's sweep knows.

    Raises:
      ValueError: a line of metrics.jsonl that is not the last is no JSON object.
    """
    saved = read_json(path / "config.json", {})
    records = read_records(path / "metrics.jsonl")
    run = Run(
        path=path,
        config=saved.get("config") or config or {},
        domains=tuple(saved.get("corpus", {}).get("domains", ())),
        train=_by_step(r for r in records if "loss" in r),
        evals=_by_step(r for r in records if "eval_ce" in r),
        **({"name": path.name} | known),
    )
    if "status" in known:
        return run
    return replace(run, status=DONE if run.final else RUNNING if records else PENDING)


@dataclass(frozen=True)
class Study:
    """What a report is about: the runs of a sweep, or a single run."""

    path: Path
    title: str
    runs: list[Run]
    about: str = ""  # the sweep file's docstring
    command: str = ""
    watched: tuple[str, ...] = ()  # the sweep file's metrics()

    @property
    def labels(self) -> list[str]:
        """The compared settings in the order of the sweep."""
        return list(dict.fromkeys(run.label for run in self.runs))

    def settled(self) -> "Study":
        """The same study when nothing runs any more: what did was cut off."""
        runs = [
            run
            if run.status in (DONE, FAILED)
            else replace(run, status=at_rest(run.steps))
            for run in self.runs
        ]
        return replace(self, runs=runs)

    def of(self, label: str) -> list[Run]:
        """The runs, one a seed, of one setting."""
        return [run for run in self.runs if run.label == label]


@uncollected()
def read(path: Path) -> Study:
    """Reads a sweep's folder, or the folder of a single run.

    Raises:
      ValueError: the folder holds neither.
    """
    sweep = read_json(path / "sweep.json", None)
    if sweep is None:
        if not (path / "metrics.jsonl").exists():
            raise ValueError(
                f"workdir = {str(path)!r}: holds neither a sweep nor a run"
            )
        run = read_run(path, name=path.resolve().name)
        return Study(path, run.name, with_labels([run]))
    rows = read_json(path / "summary.json", [])
    states = {row["name"]: row["status"] for row in rows}
    found = []
    for item in sweep["runs"]:
        folder, status = path / item["name"], states.get(item["name"], PENDING)
        run = read_run(
            folder,
            item.get("config"),
            overrides=item["overrides"],
            status=status,
            error=last_error(folder / "log.txt") if status == FAILED else "",
        )
        found.append(run)
    return Study(
        path,
        sweep["title"],
        with_labels(found),
        sweep.get("about", ""),
        sweep.get("command", ""),
        tuple(sweep.get("metrics", ())),
    )


def gather(paths: Iterable[Path], title: str) -> Study:
    """Single runs, wherever they lie, as one study of what their configs differ in.

    Raises:
      ValueError: there is no run, or two are in folders of one name.
    """
    found = [read_run(Path(path)) for path in paths]
    if len({run.name for run in found}) < max(1, len(found)):
        raise ValueError(f"{title}: needs runs in folders of different names")
    flat = [flatten(run.config) for run in found]
    differing = [
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if any(config.get(key) != flat[0].get(key) for config in flat)
    ]
    runs = [
        replace(run, overrides={key: config.get(key) for key in differing})
        for run, config in zip(found, flat, strict=True)
    ]
    return Study(runs[0].path.parent, title, with_labels(runs))


def last_error(log: Path) -> str:
    """What the last start of a run ended with, from its log; "" if it says nothing.

    The line of an error, if there is one, or else the last line.
    """
    try:
        text = log.read_bytes()[-20_000:].decode(errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    starts = [i + 1 for i, line in enumerate(lines) if line.startswith(LOG_START)]
    lines = lines[starts[-1] if starts else 0 :]
    named = [line for line in lines if re.match(r"(error:|[\w.]*Error\b)", line)]
    return (named or lines or [""])[-1]


def with_labels(runs: Sequence[Run]) -> list[Run]:
    """Gives every run the label of its setting: what it differs in, without the seed.

    That is the strategy alone where each strategy has one setting; else the strategy
    and the overrides that vary within it, or these alone if there is one strategy.
    """
    seen: dict[tuple[str | None, str], set[str]] = {}  # values by strategy and key
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    for run in runs:
        for key in keys:
            value = repr(run.overrides.get(key))
            seen.setdefault((run.strategy, key), set()).add(value)
    strategies = {run.strategy for run in runs}
    labelled = []
    for run in runs:
        parts = [
            f"{key.split('.')[-1]}={_short(value)}"
            for key, value in run.overrides.items()
            if key not in ("seed", "balance.strategy")
            and len(seen[run.strategy, key]) > 1
        ]
        if not parts or len(strategies) > 1:
            parts.insert(0, run.strategy or run.name)
        labelled.append(replace(run, label=" ".join(parts)))
    return labelled


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
