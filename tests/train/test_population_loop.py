"""Runs that train as one program: folders, failures, stops and restarts.

Around the toy step of `test_loop`, in whose losses a lost batch or state would show; a
single run of it, by `loop.run`, is what each member must equal, and can go on with.
"""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from deepseek_jax import train
from deepseek_jax.train import hooks, loop, population, population_loop, start
from deepseek_jax.train.writers import read
from tests.train import test_loop
from tests.train.test_loop import POISON, Rows, config, losses

NAMES = ("a", "b", "c")


def configs(**fields):
    return [dataclasses.replace(config(**fields), seed=i + 1) for i in range(3)]


class Shifted(Rows):
    """A seed's own rows."""

    def __init__(self, seed):
        super().__init__()
        self.shift = 1000 * seed

    def __next__(self):
        return super().__next__() + np.float32(self.shift)


def open_run(config, workdir, like=None):
    opened = test_loop.open_run(config, workdir)
    return opened._replace(rows=Shifted(config.seed))


def make_step(config, mesh):
    def member(values, state, row):
        del values
        return test_loop.compile_step(None, state, row)(state, row)

    return jax.jit(population.one_by_one(member), donate_argnums=1)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(start, "open_run", open_run)
    monkeypatch.setattr(start, "init_state", test_loop.init_state)
    monkeypatch.setattr(loop, "compile_step", test_loop.compile_step)
    monkeypatch.setattr(population, "make_step", make_step)
    one = jax.sharding.Mesh(jax.devices()[:1], (population.AXIS,))
    monkeypatch.setattr(population, "make_mesh", lambda members: one)
    monkeypatch.setattr(population, "shardings", lambda parts, state: None)
    explained = lambda parts, state, batch: f"in row {batch:g}"  # noqa: E731
    monkeypatch.setattr(loop.numerics, "explained", explained)
    POISON.update(row=-1, weight=-1)


def together(folder, stop=None, **fields):
    """Why each run failed; a signal comes with a's record of step `stop`."""

    class Teller(hooks.Progress):
        def update(self, step, values, step_s):
            super().update(step, values, step_s)
            if step == stop and self is tellers[0]:
                signal.raise_signal(signal.SIGTERM)

    logs = []
    for name in NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        logs.append((folder / name / "log.txt").open("a", buffering=1))
    tellers = [Teller(12, log) for log in logs]
    try:
        folders = [folder / name for name in NAMES]
        return population_loop.run(configs(**fields), folders, tellers)
    finally:
        for log in logs:
            log.close()


def records(folder, name):
    return losses(read(folder / name / "metrics.jsonl"))


def files(folder):
    """What a run's folder holds, but for names that tell the time."""
    return {
        path.relative_to(folder).parts[0]
        for path in folder.rglob("*")
        if path.name != "log.txt"
    }


@pytest.fixture
def alone(tmp_path):
    for name, each in zip(NAMES, configs(), strict=True):
        train.run(each, tmp_path / "alone" / name)
    return tmp_path / "alone"


def assert_same(folder, alone, names=NAMES):
    for name in names:
        assert records(folder, name) == records(alone, name)
        mine, theirs = map(test_loop.final_params, (folder / name, alone / name))
        assert mine.tobytes() == theirs.tobytes()
        assert files(folder / name) == files(alone / name)


def test_each_run_has_the_folder_of_a_run_alone(tmp_path, alone):
    assert together(tmp_path) == ["", "", ""]
    assert_same(tmp_path, alone)
    assert "step 12: eval_ce" in (tmp_path / "b" / "log.txt").read_text()
    assert together(tmp_path) == ["", "", ""]  # nothing to do
    assert_same(tmp_path, alone)


def test_a_signal_saves_all_and_all_go_on_exactly(tmp_path, alone):
    with pytest.raises(hooks.Interrupted, match="stopped after step 6"):
        together(tmp_path, stop=5)
    assert [records(tmp_path, name)[-1]["step"] for name in NAMES] == [6, 6, 6]
    assert together(tmp_path) == ["", "", ""]
    assert_same(tmp_path, alone)


def test_a_run_alone_goes_on_with_what_they_saved(tmp_path, alone):
    with pytest.raises(hooks.Interrupted):
        together(tmp_path, stop=5)
    train.run(configs()[1], tmp_path / "b")
    assert_same(tmp_path, alone, ["b"])
    assert together(tmp_path) == ["", "", ""]  # the others, b being done
    assert_same(tmp_path, alone)


def test_runs_at_different_steps_go_on_together(tmp_path, alone):
    with pytest.raises(hooks.Interrupted):
        together(tmp_path, stop=3)
    with pytest.raises(test_loop.Crash):
        train.run(configs()[0], tmp_path / "a", test_loop.crash_at(10))
    assert together(tmp_path) == ["", "", ""]
    assert_same(tmp_path, alone)


@pytest.mark.parametrize("poison", ["row", "weight"])
def test_a_number_that_is_not_finite_ends_its_own_run_alone(poison, tmp_path, alone):
    POISON[poison] = 2007  # the seventh row of b
    first, failure, last = together(tmp_path)
    assert (first, last) == ("", "")
    # A weight shows in the loss of the step after; b's own row is looked at.
    step = 7 + (poison == "weight")
    assert f"at step {step}" in failure and failure.endswith(f"in row {2000 + step}")
    assert_same(tmp_path, alone, ["a", "c"])
    log = (tmp_path / "b" / "log.txt").read_text()
    assert f"error: {failure}" in log
    assert "error" not in (tmp_path / "a" / "log.txt").read_text()
    POISON[poison] = -1
    assert together(tmp_path) == ["", "", ""]
    assert_same(tmp_path, alone)


def test_a_folder_of_another_run_ends_that_run_alone(tmp_path, alone):
    train.run(dataclasses.replace(configs()[1], seed=9), tmp_path / "b")
    first, failure, last = together(tmp_path)
    assert (first, last) == ("", "") and "seed = 9 there" in failure
    assert_same(tmp_path, alone, ["a", "c"])


def test_more_steps_are_asked_for_later(tmp_path):
    together(tmp_path)
    longer = together(tmp_path, steps=14)
    assert longer == ["", "", ""]
    assert [records(tmp_path, name)[-1]["step"] for name in NAMES] == [14] * 3
