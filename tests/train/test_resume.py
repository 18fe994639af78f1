"""A killed run, started again by the same command, ends bit for bit like a whole one.

Real processes on the real model. They share a compilation cache, which saves most of
their time; that compiling anew gives the same program is not what is tested here.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import folders, manager
from deepseek_jax.checkpoint.metadata import resolve_horizon
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.writers import read
from tests.train.child import STEPS, config
from tests.train.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("tokens_per_s", "elapsed_s")


class Command:
    """`tests.train.child` on one corpus, with one cache."""

    def __init__(self, folder):
        self.corpus = str(write_corpus(folder / "corpus"))
        self.environment = os.environ | {
            "DEEPSEEK_JAX_CACHE": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def __call__(self, workdir, *stop):
        """Exit code and stderr; `stop` is a signal's name and the step it comes at."""
        arguments = [self.corpus, str(workdir), *map(str, stop)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.train.child", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stderr

    def state(self, workdir):
        """The final state as plain arrays."""
        parts = assemble(resolve_horizon(config(self.corpus), None))
        like = jax.eval_shape(lambda: init_state(parts, 0))
        restored = manager.restore(workdir / "checkpoints", like)
        assert restored.step == STEPS
        return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state)]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    code, errors = command(workdir)
    assert code == 0, errors
    return workdir


def records(workdir):
    lines = read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def assert_same(command, workdir, whole):
    assert records(workdir) == records(whole)
    for got, expected in zip(command.state(workdir), command.state(whole), strict=True):
        assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes()


def test_the_whole_run_learns(command, whole):
    lines = [r for r in records(whole) if "loss" in r]
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["ce"] < 0.8 * lines[0]["ce"]
    loaded, params, balance, tokenizer = deepseek_jax.load(whole)
    assert loaded.data.source == command.corpus and loaded.optim.horizon == STEPS
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
    [bias_RE, _] = balance
    np.testing.assert_array_equal(bias_RE, np.float32(lines[-1]["bias"]))
    parts = assemble(loaded)
    like = jax.eval_shape(lambda: init_state(parts, 0)).params
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), like)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes


def test_kills_at_random_steps_change_nothing(command, whole, tmp_path):
    choose = random.SystemRandom().randrange
    # At 11 the save of step 10 has begun, so that of step 5 is whole.
    for step in (choose(1, 11), choose(11, STEPS)):
        code, errors = command(tmp_path, "SIGKILL", step)
        assert code == -9, errors
    code, errors = command(tmp_path)
    assert code == 0 and "going on after step" in errors, errors
    assert_same(command, tmp_path, whole)


def test_an_interrupt_saves_and_a_damaged_checkpoint_is_passed_over(
    command, whole, tmp_path
):
    code, errors = command(tmp_path, "SIGINT", 12)
    assert code == 130 and "stopped after step 13, which is saved" in errors, errors
    root = tmp_path / "checkpoints"
    assert folders.steps(root) == [10, 13]
    largest = max((root / "13").rglob("*"), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    code, errors = command(tmp_path)
    assert code == 0, errors
    assert f"{root / '13'} is damaged" in errors and "going on after step 10" in errors
    assert_same(command, tmp_path, whole)
