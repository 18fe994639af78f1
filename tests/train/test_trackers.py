"""Trackers, played by modules that remember what they are told."""

import sys
import types

import pytest

from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.train import trackers

VALUES = {"loss": 2.5, "load": [1, 3], "table": [[1, 2]], "eval": {"ce": 2.0}}
SEEN = {"loss": 2.5, "load/0": 1.0, "load/1": 3.0, "eval/ce": 2.0}


def module(monkeypatch, name, **functions):
    """Installs a module whose functions are recorded as (name, args, kwargs)."""
    calls, fake = [], types.ModuleType(name)

    def recorder(function, result):
        def call(*args, **kwargs):
            calls.append((function, args, kwargs))
            return result

        return call

    for function, result in functions.items():
        setattr(fake, function, recorder(function, result))
    monkeypatch.setitem(sys.modules, name, fake)
    return calls


def record(listed, workdir):
    config = Config(train=TrainConfig(trackers=listed))
    for writer in trackers.build(config, workdir):
        writer.write(7, VALUES)
        writer.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_is_logged(monkeypatch, tmp_path, name):
    calls = module(monkeypatch, name, init=None, log=None, finish=None)
    record(name, tmp_path / "sweep" / "v3-s0")
    (init, _, given), logged, finished = calls
    assert (init, given["project"], given["name"]) == (
        "init",
        "deepseek_jax",
        "sweep/v3-s0",
    )
    assert given["resume"] == "allow" and given["config"]["model.dim"] == 7168
    assert logged == ("log", (SEEN,), {"step": 7})
    assert finished == ("finish", (), {})


def test_a_folder_is_one_run_of_wandb(monkeypatch, tmp_path):
    calls = module(monkeypatch, "wandb", init=None, log=None, finish=None)
    for folder in ("a", "a", "b"):
        record("wandb", tmp_path / folder)
    first, again, other = (given["id"] for name, _, given in calls if name == "init")
    assert first == again != other


MLFLOW = dict.fromkeys(
    ("set_experiment", "start_run", "log_params", "log_metrics", "end_run")
)


def test_a_folder_is_one_run_of_mlflow(monkeypatch, tmp_path):
    calls = module(monkeypatch, "mlflow", search_runs=[], **MLFLOW)
    record("mlflow", tmp_path / "a")
    names = [name for name, _, _ in calls]
    assert names == [
        *("set_experiment", "search_runs", "start_run", "log_params"),
        *("log_metrics", "end_run"),
    ]
    assert calls[4][1:] == ((SEEN,), {"step": 7})
    there = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    calls = module(monkeypatch, "mlflow", search_runs=[there], **MLFLOW)
    record("mlflow", tmp_path / "a")
    assert ("start_run", (), {"run_id": "r1"}) in calls
    assert "log_params" not in [name for name, _, _ in calls]


def test_none_is_asked_for_by_default(tmp_path):
    assert trackers.build(Config(), tmp_path) == []


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("wandb,neptune", "'neptune' must be of wandb, trackio, mlflow"),
        ("trackio", "trackio is not installed .*pip install trackio"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, listed, message):
    module(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=message):
        trackers.names(listed)
