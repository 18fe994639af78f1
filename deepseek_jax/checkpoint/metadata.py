"""`config.json`: what a run is, and whether another start may continue it.

The same object goes into every checkpoint. A run continues only under the fields that
change its mathematics (`config.signature`), on the same corpus and tokenizer. Where the
corpus and the tokenizer lie may change: their hashes decide. `optim.ema` only follows
the parameters, so a mean of them may begin or end at any start; but one that goes on
keeps its decay. This is ours; the report (arXiv:2412.19437) says nothing about it.
"""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config, flatten, from_dict, signature, to_dict
from deepseek_jax.files import write_text

FILE = "config.json"
SWEEP = "sweep.json"  # in a sweep's folder, which has a folder for each of its runs
KIND = "train"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
BY_HASH = (
    "data.source",
    "data.tokenizer",
)  # places, judged by the hash of what is there
EMA = "optim.ema"

Description = dict[str, Any]


def describe(
    config: Config,
    corpus_hash: str,
    domains: tuple[str, ...],
    tokenizer_hash: str,
    kernels: Mapping[str, Any] | None = None,
) -> Description:
    """The content of `config.json`, fit for JSON.

    Args:
      kernels: which implementation computes what. Another start may have others.
    """
    devices = jax.devices()
    return {
        "kind": KIND,
        "config": json.loads(json.dumps(to_dict(config))),
        "corpus": {"hash": corpus_hash, "domains": list(domains)},
        "tokenizer": {"hash": tokenizer_hash},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "runtime": {
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "processes": jax.process_count(),
            "kernels": dict(kernels or {}),
        },
    }


def write(workdir: Path, description: Description) -> None:
    """Writes `config.json`, whole or not at all."""
    write_text(workdir / FILE, json.dumps(description, indent=2) + "\n")


def read(workdir: Path) -> Description | None:
    """`config.json` of the training run in `workdir`, None where there is none.

    Raises:
      ValueError: the folder holds something else than a training run.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is a file, not a folder")
    if (workdir / SWEEP).exists():
        raise ValueError(
            f"workdir {workdir} holds a sweep; a run needs a folder of its own"
        )
    try:
        saved = json.loads((workdir / FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{workdir / FILE} is damaged ({error})") from error
    if not isinstance(saved, dict) or saved.get("kind") != KIND:
        raise ValueError(
            f"workdir {workdir} holds another kind of run: {FILE} has no "
            f'"kind": "{KIND}"'
        )
    return saved


def resolve_horizon(config: Config, saved: Description | None) -> Config:
    """Fixes a horizon of 0: the saved run's, else this start's `train.steps`."""
    if config.optim.horizon:
        return config
    horizon = config.train.steps
    if saved:
        horizon = saved["config"]["optim"]["horizon"]
    optim = dataclasses.replace(config.optim, horizon=horizon)
    return dataclasses.replace(config, optim=optim)


def check_same(saved: Description, now: Mapping[str, Any], where: Path) -> None:
    """Refuses to continue `saved`, found at `where`, as `now`.

    `now` needs "config"; "corpus" and "tokenizer" are compared when it has them.

    Raises:
      ValueError: names every differing field with both values.
    """
    there, here = _mathematics(saved["config"]), _mathematics(now["config"])
    if not (there[EMA] and here[EMA]):
        here[EMA] = there[EMA]
    changed = differences(there, here)
    for name in ("corpus", "tokenizer"):
        if name in now and saved[name]["hash"] != now[name]["hash"]:
            both = f"{saved[name]['hash']!r} there, {now[name]['hash']!r} here"
            changed.append(f"{name} hash = {both}")
    if changed:
        raise ValueError(
            f"{where} holds another run: {'; '.join(changed)}. Go on with its values, "
            "or choose another --workdir"
        )


def _mathematics(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = flatten(signature(from_dict(Config, config)))
    return {name: value for name, value in fields.items() if name not in BY_HASH}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Fields of two flat dicts that differ, each as text with both values."""

    def show(values: Mapping[str, Any], name: str) -> str:
        return repr(values[name]) if name in values else "absent"

    return [
        f"{name} = {show(there, name)} there, {show(here, name)} here"
        for name in sorted(there.keys() | here.keys())
        if show(there, name) != show(here, name)
    ]
