"""A killed run, started again by the same command, ends bit for bit like a whole one.

Real processes on the real model, compiled as for use and not as for other tests. They
share a compilation cache, which saves most of their time; a slow test goes on with a
program of its own.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import folders, manager
from deepseek_jax.checkpoint.metadata import resolve_horizon
from deepseek_jax.tokenizer.bytes import Bytes
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.writers import read
from tests.train.child import STEPS, config
from tests.train.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("tokens_per_s", "elapsed_s")
LONGEST_S = 2.5  # about what is left of a run after its first step


class Command:
    """`tests.train.child` on one corpus, with one cache."""

    def __init__(self, folder):
        self.corpus = str(write_corpus(folder / "corpus"))
        flags = os.environ.get("XLA_FLAGS", "").split()
        self.environment = os.environ | {
            "XLA_FLAGS": " ".join(f for f in flags if "optimization_level" not in f),
            "DEEPSEEK_JAX_CACHE": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir, *stop, **environment):
        """A process; `stop` is a signal's name and the step it comes at."""
        arguments = [self.corpus, str(workdir), *map(str, stop)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.train.child", *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, workdir, *stop, **environment):
        """Exit code and stderr of a process that is left alone."""
        process = self.start(workdir, *stop, **environment)
        _, errors = process.communicate(timeout=600)
        return process.returncode, errors

    def kill_after(self, workdir, seconds):
        """Kills a process so long after its first step, whatever it is doing then."""
        process = self.start(workdir)
        errors = ""
        while line := process.stderr.readline():
            errors += line
            if line.startswith("step "):
                break
        time.sleep(seconds)
        process.kill()
        _, rest = process.communicate(timeout=600)
        return process.returncode, errors + rest

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


def assert_same(command, workdir, whole, story=""):
    assert records(workdir) == records(whole), story
    for got, expected in zip(command.state(workdir), command.state(whole), strict=True):
        same = got.dtype == expected.dtype and got.tobytes() == expected.tobytes()
        assert same, story


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


def test_load_refuses_another_tokenizer(whole, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(Bytes, "hash", "another")
    Bytes().save(workdir / "tokenizer")
    with pytest.raises(ValueError, match=r"another tokenizer \(hash another\) than"):
        deepseek_jax.load(workdir)
    (workdir / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="is no tokenizer folder"):
        deepseek_jax.load(workdir)


def test_kills_at_random_moments_change_nothing(command, whole, tmp_path):
    seed = int(os.environ.get("RESUME_SEED") or random.SystemRandom().randrange(10**6))
    rng = random.Random(seed)
    step, delays = rng.randrange(1, STEPS), [rng.uniform(0, LONGEST_S) for _ in "12"]
    story = f"RESUME_SEED={seed}: killed in step {step}, then after {delays} s"
    code, errors = command(tmp_path, "SIGKILL", step)
    assert code == -9, f"{story}\n{errors}"
    for delay in delays:  # also amid an evaluation or a save
        code, errors = command.kill_after(tmp_path, delay)
        assert code in (-9, 0), f"{story}\n{errors}"
    code, errors = command(tmp_path)
    assert code == 0, f"{story}\n{errors}"
    assert_same(command, tmp_path, whole, story)


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


@pytest.mark.slow
def test_a_program_compiled_anew_goes_on_bit_for_bit(command, whole, tmp_path):
    code, errors = command(tmp_path, "SIGINT", 12)
    assert code == 130, errors
    code, errors = command(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert code == 0, errors
    assert_same(command, tmp_path, whole)
