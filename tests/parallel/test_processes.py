"""Real processes, joined by gloo, train in float64 like one; how they stop and fail."""

import shutil
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint import folders
from deepseek_jax.parallel import processes
from deepseek_jax.train.writers import read
from experiments.launch.processes import run
from tests.parallel.child import STEPS
from tests.train.corpus import write_corpus

TIMED = ("tokens_per_s", "elapsed_s")
WHOLE = ("load", "bias", "eval_load", "dead_experts", "eval_tokens")  # exact
CLOSE = 1e-9


class Command:
    """`tests.parallel.child` on one corpus; whole runs are kept by their number."""

    def __init__(self, folder):
        self.folder = folder
        self.corpus = write_corpus(folder / "corpus")
        self.whole = {}

    def __call__(self, workdir, count, *mishap, schedule="none"):
        words = (sys.executable, "-m", "tests.parallel.child", self.corpus, workdir)
        return run([*map(str, (*words, count, schedule, *mishap))], count, workdir)

    def records(self, count):
        """Of an uninterrupted run of so many processes."""
        if count not in self.whole:
            workdir = self.folder / f"whole{count}"
            assert self(workdir, count) == 0
            self.whole[count] = records(workdir)
        return self.whole[count]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_X64", "1")
        patch.setenv("DEEPSEEK_JAX_CACHE", str(folder / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
        yield Command(folder)


def records(workdir):
    lines = read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def log(workdir, index):
    return (workdir / f"log.{index}.txt").read_text()


def leaves(value, at=""):
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from leaves(entry, f"{at}{name}.")
    elif value is not None:
        yield at, np.asarray(value, np.float64)


def assert_close(got, expected):
    """Counts and biases exactly, the rest to within `CLOSE` of a field's largest."""
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        flat, reference = dict(leaves(mine)), dict(leaves(other))
        assert flat.keys() == reference.keys()
        for name, a in flat.items():
            b = reference[name]
            where = f"{name} of step {mine['step']}"
            if name.split(".")[0] in WHOLE:
                np.testing.assert_array_equal(a, b, where)
            else:
                most = CLOSE * np.abs(b).max(initial=0)
                assert np.abs(a - b).max(initial=0) <= most, where


@pytest.mark.slow
def test_two_processes_train_like_one(command):
    got, expected = command.records(2), command.records(1)
    assert [r["step"] for r in expected if "loss" in r] == list(range(1, STEPS + 1))
    assert_close(got, expected)
    assert folders.steps(command.folder / "whole2" / "checkpoints") == [15, 20]
    first, second = (log(command.folder / "whole2", i) for i in range(2))
    assert f"step {STEPS}: eval_ce" in first and "step" not in second


@pytest.mark.slow
def test_four_processes_train_like_one(command):
    assert_close(command.records(4), command.records(1))


@pytest.mark.slow
def test_two_processes_are_ranks_of_a_pipeline(command, tmp_path):
    assert command(tmp_path, 2, schedule="dualpipe") == 0
    assert "pipeline dualpipe over 2 ranks" in log(tmp_path, 0)
    assert_close(records(tmp_path), command.records(1))


@pytest.mark.slow
def test_a_checkpoint_of_four_goes_on_in_one_and_in_two(command, tmp_path):
    assert command(tmp_path / "four", 4, "SIGTERM", 2, 8) == 130
    [*_, step] = folders.steps(tmp_path / "four" / "checkpoints")
    assert step in (9, 10)
    for count in (1, 2):
        workdir = shutil.copytree(tmp_path / "four", tmp_path / str(count))
        assert command(workdir, count) == 0
        assert f"going on after step {step}" in log(workdir, 0)
        assert_close(records(workdir), command.records(1))


@pytest.mark.slow
def test_a_stop_signal_to_one_stops_both_and_the_run_goes_on(command, tmp_path, capfd):
    assert command(tmp_path, 2, "SIGINT", 1, 7) == 130
    [*_, step] = folders.steps(tmp_path / "checkpoints")
    assert step in (8, 9)
    for index in range(2):
        assert f"stopped after step {step}, which is saved" in log(tmp_path, index)
    assert command(tmp_path, 2) == 0
    assert records(tmp_path) == command.records(2)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_soon(command, tmp_path, capfd, killed):
    assert command(tmp_path, 2, "SIGKILL", killed, 12) == 1
    assert f"process {killed} of 2 ended (killed by SIGKILL)" in capfd.readouterr().err
    last_record = (tmp_path / "metrics.jsonl").stat().st_mtime
    assert time.time() - last_record < 30
    assert "another" in log(tmp_path, 1 - killed)
    assert folders.newest_good(tmp_path / "checkpoints") in (5, 10)
    if killed:
        assert command(tmp_path, 2) == 0
        assert records(tmp_path) == command.records(2)


@pytest.mark.slow
def test_a_full_disk_leaves_none_waiting(command, tmp_path, capfd):
    assert command(tmp_path, 2, "full", 0, 0) == 1
    said = capfd.readouterr().err
    assert "process 0 of 2 ended (exit code 1): error: the disk is full" in said
    assert not folders.steps(tmp_path / "checkpoints")
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_processes_that_disagree_are_refused(command, tmp_path, capfd):
    assert command(tmp_path, 2, "seed", 1, 0) == 2
    for index in range(2):
        wrong = "processes disagree: seed = 0 in process 0, 7 in process 1. Give all"
        assert wrong in log(tmp_path, index)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["log.0.txt", "log.1.txt"]


def test_alone_everything_is_the_plain_call():
    def fail():
        raise KeyError("mine")

    assert not processes.several() and processes.is_first()
    for call in (processes.first, processes.together, processes.first_then_all):
        assert call(lambda: 5) == 5
        with pytest.raises(KeyError, match="mine"):
            call(fail)
    batch = [np.arange(4)]
    assert processes.to_global(None, batch) is processes.share(None, batch) is batch
    processes.check_same({"a": 1})
    processes.wait()


def test_a_vote_is_heard_a_step_later():
    vote = processes.Vote()
    assert [vote(mine) for mine in (False, True, False, False)] == [
        False,
        False,
        True,
        False,
    ]


def test_only_the_loss_of_another_process_counts_as_one():
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: closed by peer")
    caused = TimeoutError("barrier")
    caused.__cause__ = lost
    assert processes.is_loss(lost) and processes.is_loss(caused)
    for other in (jax.errors.JaxRuntimeError("out of memory"), ValueError("Gloo")):
        assert not processes.is_loss(other)
