"""A real run under one schedule, killed, goes on under another like on one device."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.checkpoint import folders
from deepseek_jax.train.writers import read

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 100, 20
SETTINGS = (
    "--config.train.checkpoint_every=20",
    "--config.train.eval_every=100",
    # At the 3e-3 of tiny.py rounding grows faster: two runs on one device, with 1 and 8
    # micro-batches, are 3.7e-3 apart by step 89.
    "--config.optim.lr=1e-3",
)


def start(workdir, devices, *words):
    flags = os.environ.get("XLA_FLAGS", "").split()
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.train"),
            *("--config=experiments/configs/tiny.py", f"--workdir={workdir}"),
            *(f"--config.train.steps={STEPS}", *SETTINGS, *words),
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": " ".join(f for f in flags if "optimization_level" not in f),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def piped(workdir, schedule):
    words = ("--config.mesh.pipe=4", "--config.pipeline.microbatches=8")
    return start(workdir, 4, *words, f"--config.pipeline.schedule={schedule}")


def losses(workdir):
    records = read(workdir / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def finish(process):
    _, errors = process.communicate(timeout=3000)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_tiny_under_dualpipe_killed_and_resumed_under_1f1b(tmp_path):
    """The demo's model and text, in float32."""
    finish(start(tmp_path / "plain", 1))
    workdir = tmp_path / "piped"
    process = piped(workdir, "dualpipe")
    while EVERY not in folders.steps(workdir / folders.FOLDER):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.kill()
    process.communicate()
    assert max(losses(workdir)) < STEPS
    assert "going on after step" in finish(piped(workdir, "1f1b"))
    want, got = losses(tmp_path / "plain"), losses(workdir)
    assert sorted(got) == sorted(want) == list(range(1, STEPS + 1))
    apart = {step: abs(got[step] / want[step] - 1) for step in want}
    assert max(apart.values()) < 1e-3, apart
