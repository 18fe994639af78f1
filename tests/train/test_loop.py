"""The loop around a toy step: order of records, checkpoints, stops and restarts.

The toy's loss depends on its whole state and on the batch, so a lost or repeated batch,
or a state of another step, shows in every later loss.
"""

import dataclasses
import json
import os
import signal
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import tokenizer as tokenizers
from deepseek_jax import train
from deepseek_jax.checkpoint import disk, folders, manager, metadata
from deepseek_jax.config import OptimConfig, TrainConfig
from deepseek_jax.tokenizer.bytes import Bytes
from deepseek_jax.train import hooks, loop, start
from deepseek_jax.train.hooks import Interrupted
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import refused
from deepseek_jax.train.writers import read
from tests.factory import small

TRAIN = TrainConfig(steps=12, routing_every=4, eval_every=6, checkpoint_every=4)


class Rows:
    """Row numbers without end, with the state of the last one handed out."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return np.float32(self.number)

    def get_state(self):
        return {"0": self.number}

    def set_state(self, state):
        self.number = state["0"]


def init_state(parts, seed):
    return TrainState(
        jnp.zeros((), jnp.int32),
        {"w": jnp.full(3, seed, float)},
        (jnp.zeros(3),),
        (),
        jax.random.PRNGKey(seed),
        {},
    )


def compile_step(parts, state, batch):
    del parts, state, batch

    def step(state, row):
        w = jnp.sin(3 * state.params["w"] + row + state.opt_state[0])
        metrics = {
            "loss": w.sum() / (row != POISON["row"]),
            "ce": w[0],
            "mtp_ce": w[:1],
            "penalty": w[1],
            "lr": w[2],
            "grad_norm": jnp.float32(1),
            "speed": jnp.float32(0),
            "load": jnp.ones((3, 8), jnp.int32),
        }
        w = w.at[0].add(jnp.where(row == POISON["weight"], jnp.inf, 0))
        memory = (0.5 * state.opt_state[0] + w,)
        new = state._replace(step=state.step + 1, params={"w": w}, opt_state=memory)
        sound = jnp.isfinite(metrics["loss"]) & (state.step >= 0)
        kept = refused(state)
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, kept), metrics

    return jax.jit(step, donate_argnums=0)


POISON = {"row": -1, "weight": -1}


def open_run(config, workdir):
    def evaluate(state, step):
        ce = float(state.params["w"].sum()) + 10 / step
        return {"eval_ce": ce, "eval_maxvio_global": 0.0}

    description = metadata.describe(config, "corpus", ("code",), "tokenizer")
    parts = SimpleNamespace(config=config)
    return start.Run(parts, description, Bytes(), Rows(), evaluate)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(start, "open_run", open_run)
    monkeypatch.setattr(start, "init_state", init_state)
    monkeypatch.setattr(loop, "compile_step", compile_step)
    POISON.update(row=-1, weight=-1)


def config(**fields):
    optim = OptimConfig(horizon=0, schedule="wsd", warmup=0)
    return small(train=dataclasses.replace(TRAIN, **fields), optim=optim)


def losses(records):
    """What must not depend on interruptions; times do."""
    timed = ("tokens_per_s", "elapsed_s")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def final_params(workdir):
    zero = init_state(None, 0)
    return np.asarray(manager.restore(workdir / "checkpoints", zero).state.params["w"])


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run: its records and final parameters."""
    records = train.run(config(), tmp_path / "whole")
    return losses(records), final_params(tmp_path / "whole")


def assert_whole(workdir, whole):
    assert losses(read(workdir / "metrics.jsonl")) == whole[0]
    assert final_params(workdir).tobytes() == whole[1].tobytes()


def test_records_come_in_order_and_say_what_they_must(tmp_path, whole):
    seen = []
    records = train.run(config(), tmp_path / "run", seen.append)
    kinds = [(r["step"], "eval_ce" in r) for r in records]
    expected = [(k, False) for k in range(1, 13)]
    expected.insert(6, (6, True))
    assert kinds == [*expected, (12, True)]
    assert losses(seen) == losses(records) == whole[0]
    assert [r["step"] for r in records if "load" in r] == [4, 8, 12]
    assert (tmp_path / "run" / "tensorboard").is_dir()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["optim"]["horizon"] == 12
    assert saved["corpus"] == {"hash": "corpus", "domains": ["code"]}


def test_the_newest_and_the_best_checkpoint_stay(tmp_path):
    train.run(config(checkpoint_every=3, keep_last=2), tmp_path)
    # eval_ce at 6 and 12; 6 is the best or 12 is both
    ces = {
        r["step"]: r["eval_ce"]
        for r in read(tmp_path / "metrics.jsonl")
        if "eval_ce" in r
    }
    best = min(ces, key=ces.get)
    assert folders.steps(tmp_path / "checkpoints") == sorted({9, 12, best})


def test_a_finished_run_returns_at_once(tmp_path, monkeypatch, capsys):
    records = train.run(config(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(start, "open_run", pytest.fail)
    assert train.run(config(), tmp_path) == records
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().err


class Crash(Exception):
    pass


def crash_at(step):
    def callback(record):
        if record["step"] == step:
            raise Crash

    return callback


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 8, 11, 12])
def test_a_crash_at_any_step_changes_nothing(tmp_path, whole, step):
    with pytest.raises(Crash):
        train.run(config(), tmp_path / "run", crash_at(step))
    assert max(folders.steps(tmp_path / "run" / "checkpoints"), default=0) < step
    train.run(config(), tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


def test_two_crashes_and_a_half_written_line_change_nothing(tmp_path, whole):
    for step in (7, 10):
        with pytest.raises(Crash):
            train.run(config(), tmp_path / "run", crash_at(step))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 0.')
    train.run(config(), tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, whole, number, capsys):
    def callback(record):
        if record["step"] == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="stopped after step 6, which is saved"):
        train.run(config(), tmp_path / "run", callback)
    assert folders.steps(tmp_path / "run" / "checkpoints") == [4, 6]
    train.run(config(), tmp_path / "run")
    assert "going on after step 6" in capsys.readouterr().err
    assert_whole(tmp_path / "run", whole)


def test_a_signal_between_evaluations_saves_that_step(tmp_path, whole):
    def callback(record):
        if record["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 9"):
        train.run(config(), tmp_path / "run", callback)
    assert folders.steps(tmp_path / "run" / "checkpoints") == [8, 9]
    train.run(config(), tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, capsys):
    with pytest.raises(Crash):
        train.run(config(), tmp_path / "run", crash_at(11))
    root = tmp_path / "run" / "checkpoints"
    assert folders.steps(root) == [4, 8]
    os.remove(root / "8" / "state" / "manifest.ocdbt")
    train.run(config(), tmp_path / "run")
    error = capsys.readouterr().err
    assert f"{root / '8'} is damaged" in error and "going on after step 4" in error
    assert_whole(tmp_path / "run", whole)


def test_a_damaged_last_checkpoint_is_not_taken_for_a_finished_run(tmp_path, whole):
    train.run(config(), tmp_path / "run")
    os.remove(tmp_path / "run" / "checkpoints" / "12" / "state" / "manifest.ocdbt")
    train.run(config(), tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


def test_more_steps_go_on_under_the_first_horizon(tmp_path, whole, capsys):
    train.run(config(steps=8), tmp_path / "run")
    assert "horizon" not in capsys.readouterr().err
    records = train.run(config(), tmp_path / "run")
    assert "keeps the horizon of the first start, 8 steps" in capsys.readouterr().err
    got = [r for r in losses(records) if "eval_ce" not in r]
    assert got == [r for r in whole[0] if "eval_ce" not in r]
    assert [r["step"] for r in records if "eval_ce" in r] == [6, 8, 12]
    assert final_params(tmp_path / "run").tobytes() == whole[1].tobytes()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["optim"]["horizon"] == 8
    assert saved["config"]["train"]["steps"] == 12


def test_fewer_steps_than_were_done_are_evaluated_and_kept(tmp_path):
    def callback(record):
        if record["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train.run(config(), tmp_path, callback)
    records = train.run(config(steps=5), tmp_path)
    assert (records[-1]["step"], "eval_ce" in records[-1]) == (9, True)
    assert train.run(config(steps=5), tmp_path) == records


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoints(
    tmp_path, whole, monkeypatch
):
    def explained(parts, state, batch):
        return f"row {batch:g} was looked at, {-1 - state.step} steps were done"

    monkeypatch.setattr(loop.numerics, "explained", explained)
    POISON["row"] = 7
    with pytest.raises(
        FloatingPointError, match=r"loss is -?inf at step 7.*; row 7 .*, 6 steps"
    ):
        train.run(config(), tmp_path / "run")
    assert folders.steps(tmp_path / "run" / "checkpoints") == [4]
    assert max(r["step"] for r in read(tmp_path / "run" / "metrics.jsonl")) == 6
    POISON["row"] = -1
    train.run(config(), tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


def test_a_state_with_infinite_parameters_is_not_saved(tmp_path):
    POISON["weight"] = 8
    with pytest.raises(
        FloatingPointError, match="parameter is not finite after step 8"
    ):
        train.run(config(), tmp_path)
    assert folders.steps(tmp_path / "checkpoints") == [4]


def test_another_run_in_the_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    train.run(config(), tmp_path)
    monkeypatch.setattr(start, "open_run", pytest.fail)
    other = dataclasses.replace(config(steps=20), seed=1)
    with pytest.raises(ValueError, match="seed = 0 there, 1 here"):
        train.run(other, tmp_path)
    os.remove(tmp_path / "config.json")  # the checkpoints still know
    with pytest.raises(ValueError, match="seed = 0 there, 1 here"):
        train.run(other, tmp_path)


def test_another_corpus_is_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    train.run(config(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def other_corpus(config, workdir):
        opened = open_run(config, workdir)
        return opened._replace(
            description=opened.description
            | {"corpus": {"hash": "other", "domains": []}}
        )

    monkeypatch.setattr(start, "open_run", other_corpus)
    for file in (None, "config.json"):  # without it the checkpoints still know
        if file:
            os.remove(tmp_path / file)
            del before[tmp_path / file]
        with pytest.raises(ValueError, match="hash = 'corpus' there, 'other' here"):
            train.run(config(steps=20), tmp_path)
        after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert after == before


def test_a_refused_start_changes_nothing(tmp_path, monkeypatch):
    """Not even what the next good start will clean up."""
    with pytest.raises(Crash):
        train.run(config(), tmp_path / "run", crash_at(11))
    root = tmp_path / "run" / "checkpoints"
    (root / "12.orbax-checkpoint-tmp").mkdir()
    os.remove(root / "8" / "state" / "manifest.ocdbt")
    os.remove(tmp_path / "run" / ".lock")
    before = sorted(tmp_path.rglob("*"))

    def refuse(config, workdir):
        raise ValueError("no such corpus")

    for workdir in ("run", "new"):
        with monkeypatch.context() as patch:
            patch.setattr(start, "open_run", refuse)
            with pytest.raises(ValueError, match="no such corpus"):
                train.run(config(), tmp_path / workdir)
        assert sorted(tmp_path.rglob("*")) == before
    train.run(config(), tmp_path / "run")
    assert (root / "8.damaged").is_dir()
    assert not (root / "12.orbax-checkpoint-tmp").exists()


def test_a_folder_in_use_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "open_run", pytest.fail)
    with hooks.exclusive(tmp_path), pytest.raises(hooks.InUse, match="is in use"):
        train.run(config(), tmp_path)


def test_checkpoints_that_are_all_damaged_are_refused_before_any_work(
    tmp_path, monkeypatch
):
    train.run(config(), tmp_path)
    for step in folders.steps(tmp_path / "checkpoints"):
        os.remove(tmp_path / "checkpoints" / str(step) / folders.DIGESTS)
    monkeypatch.setattr(start, "open_run", pytest.fail)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be restored"):
        train.run(config(steps=20), tmp_path)


def test_a_tokenizer_that_an_earlier_start_left_is_replaced(tmp_path):
    folder = tmp_path / "tokenizer"
    Bytes().save(folder)
    about = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(about | {"hash": "another"}))
    (folder / "of_the_other").write_text("")
    train.run(config(steps=2), tmp_path)
    assert tokenizers.load(folder).hash == Bytes().hash
    assert [file.name for file in folder.iterdir()] == ["tokenizer.json"]
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    train.run(config(steps=3), tmp_path)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before


def test_the_best_checkpoint_outlives_a_restart(tmp_path, monkeypatch):
    def first_is_best(config, workdir):
        opened = open_run(config, workdir)
        return opened._replace(
            evaluate=lambda _, step: {"eval_ce": step / 10, "eval_maxvio_global": 0.0}
        )

    monkeypatch.setattr(start, "open_run", first_is_best)
    every = {"eval_every": 2, "checkpoint_every": 2, "keep_last": 1}
    for steps in (4, 8):
        train.run(config(steps=steps, **every), tmp_path)
    assert folders.steps(tmp_path / "checkpoints") == [2, 8]


def test_how_a_run_is_computed_and_logged_may_change(tmp_path):
    train.run(config(steps=4), tmp_path)
    changed = config(steps=8, accumulation=2, log_every=2, eval_every=3)
    records = train.run(changed, tmp_path)
    assert [r["step"] for r in records if "eval_ce" not in r] == [1, 2, 3, 4, 6, 8]


def test_a_full_disk_is_found_before_the_first_step(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(manager.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(disk.DiskFull, match="are free at"):
        train.run(config(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_runs_in_a_thread_where_signals_cannot_be_caught(tmp_path, whole):
    thread = threading.Thread(target=train.run, args=(config(), tmp_path / "run"))
    thread.start()
    thread.join()
    assert_whole(tmp_path / "run", whole)
