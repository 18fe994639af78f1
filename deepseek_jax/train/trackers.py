"""Trackers that a run may write to beside its own files, if they are installed.

Weights & Biases (docs.wandb.ai), trackio (github.com/gradio-app/trackio, with the same
functions) and MLflow (mlflow.org). Each keeps one run for a folder: what is started
again goes on there, and steps that a killed run recorded after its last checkpoint stay
as they were first written. Their own environment variables say where things go
(WANDB_MODE=offline, MLFLOW_TRACKING_URI, ..).
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config, flatten, to_dict
from deepseek_jax.train.writers import Writer, scalars

PROJECT = "deepseek_jax"


class _Logged:
    """A tracker with the functions of Weights & Biases."""

    def __init__(self, module: Any, config: Config, workdir: Path, **where: Any):
        self.module = module
        settings = flatten(to_dict(config))
        module.init(
            project=PROJECT,
            name=_name(workdir),
            config=settings,
            resume="allow",
            **where,
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.module.log(dict(scalars(values)), step=step)

    def close(self) -> None:
        self.module.finish()


class _Wandb(_Logged):
    def __init__(self, module: Any, config: Config, workdir: Path):
        super().__init__(module, config, workdir, id=_key(workdir), dir=str(workdir))


class _MLflow:
    def __init__(self, module: Any, config: Config, workdir: Path):
        self.module = module
        module.set_experiment(PROJECT)
        key, tag = _key(workdir), f"{PROJECT}.folder"
        found = module.search_runs(
            filter_string=f"tags.`{tag}` = '{key}'", output_format="list"
        )
        if found:
            module.start_run(run_id=found[0].info.run_id)
            return
        module.start_run(run_name=_name(workdir), tags={tag: key})
        module.log_params(flatten(to_dict(config)))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.module.log_metrics(dict(scalars(values)), step=step)

    def close(self) -> None:
        self.module.end_run()


TRACKERS = {"wandb": _Wandb, "trackio": _Logged, "mlflow": _MLflow}


def names(listed: str) -> tuple[str, ...]:
    """The trackers in a setting such as "wandb,mlflow", all of them installed.

    Raises:
      ValueError: one is not known, or not installed.
    """
    found = tuple(name.strip() for name in listed.split(",") if name.strip())
    for name in found:
        if name not in TRACKERS:
            raise ValueError(
                f"train.trackers = {listed!r}: {name!r} must be of "
                f"{', '.join(TRACKERS)}"
            )
        _module(name, listed)
    return found


def build(config: Config, workdir: Path) -> list[Writer]:
    """A writer for each tracker that `train.trackers` names.

    Raises:
      ValueError: as `names`.
    """
    listed = config.train.trackers
    return [
        TRACKERS[name](_module(name, listed), config, workdir) for name in names(listed)
    ]


def _module(name: str, listed: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"train.trackers = {listed!r}: {name} is not installed ({error}); "
            f"pip install {name}"
        ) from None


def _name(workdir: Path) -> str:
    """What people see: the sweep's folder, if there is one, and the run's."""
    return "/".join(workdir.parts[-2:])


def _key(workdir: Path) -> str:
    """What a tracker knows the run of a folder by."""
    return hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
