"""From a sweep file to checked runs, and the record of them in a sweep's folder.

A sweep file has a docstring (its first paragraph is the report's title, the second its
introduction), `CONFIG` (the base config), `sweep()` or `sweep(arg)`, which yields flat
dicts of overrides with an optional `name`, and `metrics()`, the names to watch.
Every config is checked before the first run starts, its balancing strategy is built and
its corpus opened, so that run 30 does not fail on a typo after a night. What only a run
can see, such as its devices and its tokenizer, it checks itself.
"""

import importlib.util
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_jax.analysis import runs
from deepseek_jax.checkpoint import metadata
from deepseek_jax.checkpoint.metadata import SWEEP as FILE
from deepseek_jax.config import Config, flatten, from_dict, signature, to_dict
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.files import write_text
from deepseek_jax.ops import balancing
from experiments import common

WATCHED = ("loss", "maxvio_batch")
SAFE_NAME = re.compile(r"\w[\w.+=,-]*")


@dataclass(frozen=True)
class Item:
    """One run: its folder's name, what it overrides, and the whole config."""

    name: str
    overrides: dict[str, Any]
    config: Config

    def record(self) -> dict[str, Any]:
        """The run in sweep.json."""
        config = json.loads(json.dumps(to_dict(self.config)))
        return {"name": self.name, "overrides": self.overrides, "config": config}


@dataclass(frozen=True)
class Plan:
    """A sweep, checked."""

    title: str
    about: str
    command: str
    base: str  # the base config as --config takes it
    metrics: tuple[str, ...]
    items: tuple[Item, ...]


def load(spec: str, base: str | None = None, command: str = "") -> Plan:
    """The runs of a sweep file, `spec` = FILE.py or FILE.py:ARG.

    Args:
      spec: the sweep file, and what its `sweep` is called with.
      base: the config to override, instead of the file's `CONFIG`.
      command: what makes this sweep, for the report.

    Raises:
      ValueError: no such file, an unknown key, an impossible config, two runs of one
        name, or nothing to run; the message names the run.
    """
    file, _, arg = spec.partition(":")
    module = _import(file)
    base = base or getattr(module, "CONFIG", None)
    if base is None:
        raise ValueError(f"{file}: names no CONFIG, and there is no --config")
    title, about, *_ = [*inspect.cleandoc(module.__doc__ or file).split("\n\n"), ""]
    watched = tuple(module.metrics()) if hasattr(module, "metrics") else WATCHED
    items = tuple(_item(dict(each), base, file) for each in _points(module, file, arg))
    names = [item.name for item in items]
    if not names:
        raise ValueError(f"{spec}: sweep() yields nothing to run")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{spec}: {names.count(name)} runs are named {name!r}; give them "
                "another 'name' or let them differ"
            )
    title, about = (" ".join(text.split()) for text in (title, about))
    return Plan(title, about, command, base, watched, items)


def _import(file: str) -> ModuleType:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _points(module: ModuleType, file: str, arg: str) -> list[Mapping[str, Any]]:
    sweep = getattr(module, "sweep", None)
    if sweep is None:
        raise ValueError(f"{file}: has no function sweep()")
    if arg and not inspect.signature(sweep).parameters:
        raise ValueError(f"{file}:{arg}: its sweep() takes no argument")
    try:
        return list(sweep(arg) if arg else sweep())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def base_config(spec: str) -> Any:
    """The ConfigDict of FILE.py or FILE.py:ARG."""
    file, _, arg = spec.partition(":")
    get_config = _import(file).get_config
    return get_config(arg) if arg else get_config()


def _item(overrides: dict[str, Any], base: str, file: str) -> Item:
    name = overrides.pop("name", None) or default_name(overrides)
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(
            f"{file}: run name {name!r} must be a folder's name of letters, digits and "
            "_.+=,-"
        )
    values = base_config(base)
    try:
        for key, value in overrides.items():
            common.check_field(key)
            values.update_from_flattened_dict({key: value})
        config = common.from_config_dict(values)
        balancing.build(config.balance, config.model.moe)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}, run {name}: {error}") from None
    return Item(name, overrides, config)


def default_name(overrides: Mapping[str, Any]) -> str:
    """A folder's name from overrides: the strategy, then field=value of the others."""
    parts = [
        str(value) if key == "balance.strategy" else f"{key.split('.')[-1]}={value}"
        for key, value in overrides.items()
    ]
    return re.sub(r"[^\w.+=-]+", "_", "-".join(parts)) or "base"


def flag(key: str, value: Any) -> str:
    """An override as the command line of `experiments.train` takes it."""
    return f"--config.{key}={value}"


def check_sweep(plan: Plan, workdir: Path) -> None:
    """Refuses a folder that is not this sweep's.

    Raises:
      ValueError: it holds a single run, or a sweep of which a run is missing here, or
        differs.
    """
    if (workdir / FILE).exists():
        here = {item.name: item.record() for item in plan.items}
        for there in stored(workdir)["runs"]:
            _check_same(workdir, there, here.get(there["name"]))
    elif (workdir / "metrics.jsonl").exists():
        raise ValueError(f"workdir {workdir} holds a single run, not a sweep")


def save(plan: Plan, workdir: Path) -> None:
    """Writes sweep.json, or extends the one that is there by new runs.

    Raises:
      ValueError: see `check_sweep`.
    """
    check_sweep(plan, workdir)
    path, records = workdir / FILE, [item.record() for item in plan.items]
    workdir.mkdir(parents=True, exist_ok=True)
    content = {
        "title": plan.title,
        "about": plan.about,
        "command": plan.command,
        "base": plan.base,
        "metrics": plan.metrics,
        "runs": records,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def read(workdir: Path) -> Plan:
    """The plan that `save` wrote.

    Raises:
      ValueError: the folder holds no sweep, or a damaged one.
    """
    saved = stored(workdir)
    items = tuple(
        Item(
            record["name"],
            {key: _tuples(value) for key, value in record["overrides"].items()},
            from_dict(Config, record["config"]),
        )
        for record in saved["runs"]
    )
    texts = (saved[name] for name in ("title", "about", "command", "base"))
    return Plan(*texts, tuple(saved["metrics"]), items)


def stored(workdir: Path) -> dict[str, Any]:
    """What sweep.json holds.

    Raises:
      ValueError: it is not there, or damaged.
    """
    path = workdir / FILE
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"workdir {workdir} holds no sweep: no {FILE}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away") from None
    return saved


def _tuples(value: Any) -> Any:
    """A value as it was before JSON made lists of its tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check_folders(plan: Plan, workdir: Path) -> None:
    """Looks at what is in the runs' folders already, and changes nothing.

    Raises:
      ValueError: a folder is a file, or holds another run or a damaged one.
    """
    for item in plan.items:
        folder = workdir / item.name
        try:
            if saved := metadata.read(folder):
                config = metadata.resolve_horizon(item.config, saved)
                metadata.check_same(saved, {"config": to_dict(config)}, folder)
            runs.read_records(folder / "metrics.jsonl")
        except (ValueError, NotADirectoryError) as error:
            raise ValueError(f"run {item.name}: {error}") from None


def open_corpora(plan: Plan) -> None:
    """Opens every corpus of the runs once; builds or imports what is not there yet.

    Raises:
      ValueError: as `data.sources.open_corpus`; the message names the run.
    """
    seen = set()
    for item in plan.items:
        data = item.config.data
        if (key := (data.source, data.weights, data.val_fraction)) in seen:
            continue
        seen.add(key)
        try:
            open_corpus(data)
        except ValueError as error:
            raise ValueError(f"run {item.name}: {error}") from None


def _check_same(workdir: Path, there: dict[str, Any], here: dict[str, Any] | None):
    name = there["name"]
    if here is None:
        raise ValueError(
            f"workdir {workdir} holds another sweep: its run {name!r} isn't in this one"
        )
    old, new = (_fixed(record["config"]) for record in (there, here))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    if keys:
        raise ValueError(
            f"workdir {workdir} holds another sweep: run {name!r} has {keys[0]} = "
            f"{old.get(keys[0])!r} there and {new.get(keys[0])!r} here"
            + (f", and {len(keys) - 1} more fields differ" if keys[1:] else "")
        )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """What must not change within a sweep: the mathematics, and the steps compared."""
    kept = {name: config[name] for name in signature(Config())}
    return flatten(kept) | {"train.steps": config["train"]["steps"]}
