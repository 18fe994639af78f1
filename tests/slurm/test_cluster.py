"""Sweeps on a real Slurm, that of `cluster.sh`: `make test-slurm` runs this.

Two runs at a time, of two processes each. The long run's reference is a run that nobody
disturbed: records and parameters must come out the same to the last bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.analysis import runs
from deepseek_jax.checkpoint import folders
from tests.experiments.test_sweep import ROOT, points
from tests.train.corpus import write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("REQUIRE_SLURM"), reason="make test-slurm"),
]
PATIENCE_S = 1800  # of two cores that have other work
TIMED = ("tokens_per_s", "elapsed_s")
STEPS = 200
SMALL = {
    "data.tokenizer": "bytes",
    "data.batch": 4,
    "data.length": 32,
    "model.vocab_size": 264,
    "model.dim": 16,
    "model.num_layers": 2,
    "model.dense_dim": 16,
    "model.mtp.depth": 0,
    "model.moe.ffn_dim": 8,
    "runtime.block": 8,
    "mesh.data": 2,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": 100,
    "train.checkpoint_every": 50,
    "train.keep_last": 2,
}
SLURM = ("--launcher=slurm", "--gpus-per-run=0", "--processes-per-run=2")
MAIN = ("whole", "killed", "told", "failing")


def command(*arguments: object) -> str:
    """What `experiments.sweep` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(workdir: Path, *each: dict, options: tuple[str, ...]) -> str:
    """Submits runs of the small model that differ as said."""
    corpus = {"data.source": str(write_corpus(workdir.parent / "corpus"))}
    spec = workdir.parent / f"{workdir.name}.py"
    config = "experiments/configs/tiny.py:smoke"
    spec.write_text(points(*(corpus | SMALL | one for one in each), config=config))
    return command(f"--sweep={spec}", f"--workdir={workdir}", *SLURM, *options)


def events(run: Path) -> list[tuple[str, int]]:
    records = runs.read_records(run / "slurm.jsonl")
    return [(record["event"], record["code"]) for record in records]


def has_ended(run: Path) -> bool:
    return "end" in {event for event, _ in events(run)}


def records(run: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in TIMED}
        for record in runs.read_records(run / "metrics.jsonl")
    ]


def step(run: Path) -> int:
    found = records(run)
    return found[-1]["step"] if found else 0


def wait(run: Path, what: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        logs = sorted(run.glob("log*.txt"))
        said = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)
        assert time.monotonic() < until, f"{run.name}: {events(run)}\n{said}"
        time.sleep(0.2)


def process(run: Path, index: int) -> int:
    """The id of one of a run's processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = {f"--workdir={run}".encode(), b"experiments.train"}
        place = f"SLURM_PROCID={index}".encode()
        mine = words[0] == sys.executable.encode() and wanted <= set(words)
        if mine and place in environment:
            return int(folder.name)
    raise AssertionError(f"{run.name} has no process {index}")


def job(run: Path) -> str:
    return runs.read_records(run / "slurm.jsonl")[-1]["job"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of four runs, when all of them have ended."""
    workdir = tmp_path_factory.mktemp("slurm") / "a sweep"
    each = [{"name": name} for name in MAIN]
    each[-1] |= {"optim.lr": 1e30}
    said = submit(workdir, *each, options=("--time=30", "--array-parallelism=2"))
    assert "4 of 4 runs submitted" in said
    assert "0 of 4 runs submitted" in command("retry", workdir)
    killed, told = workdir / "killed", workdir / "told"
    wait(killed, lambda: step(killed) > 70)
    os.kill(process(killed, 1), signal.SIGKILL)
    wait(told, lambda: step(told) > 60)
    subprocess.run(["scancel", "--signal=TERM", job(told)], check=True)
    for name in MAIN:
        wait(workdir / name, partial(has_ended, workdir / name))
    last = workdir / "summary.csv"
    wait(workdir, lambda: "failed" in last.read_text())
    return workdir


def test_a_run_that_nobody_disturbed(sweep):
    assert events(sweep / "whole") == [("start", 0), ("end", 0)]
    assert [r["step"] for r in records(sweep / "whole") if "loss" in r] == [
        *range(1, STEPS + 1)
    ]
    saved = json.loads((sweep / "whole" / "config.json").read_text())
    assert saved["runtime"]["processes"] == 2


@pytest.mark.parametrize(("name", "code"), [("killed", 137), ("told", 130)])
def test_a_run_goes_on_to_the_same_end(sweep, name, code):
    assert events(sweep / name) == [
        *(("start", 0), ("requeue", code), ("start", 0), ("end", 0))
    ]
    assert records(sweep / name) == records(sweep / "whole")
    mine, whole = (deepseek_jax.load(sweep / each) for each in (name, "whole"))
    jax.tree.map(np.testing.assert_array_equal, mine[1:3], whole[1:3])
    log = (sweep / name / "log.0.txt").read_text()
    assert "going on after step " in log
    print(*(line for line in log.splitlines() if line[:2] != "$ "), sep="\n")


def test_a_run_that_fails_is_reported(sweep):
    assert events(sweep / "failing") == [("start", 0), ("end", 1)]
    said = command("status", sweep)
    print(said)
    [line] = [line for line in said.splitlines() if line.startswith("failing")]
    assert "failed" in line and "error: " in line and " at step " in line
    assert "4 runs: 3 done, 1 failed" in said
    rows = runs.read_json(sweep / "summary.json", [])
    assert [row["status"] for row in rows] == ["done", "done", "done", "failed"]
    assert len({row["eval_ce"] for row in rows[:3]}) == 1
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", f"--workdir={sweep}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert runs.read(sweep).runs[-1].error in line
    assert (sweep / "report.html").stat().st_size > 1e6


def test_retry_starts_what_has_failed_and_nothing_else(sweep):
    before = events(sweep / "failing")
    assert "1 of 4 runs submitted" in command("retry", sweep, "--failed")
    wait(sweep / "failing", lambda: len(events(sweep / "failing")) == 4)
    assert events(sweep / "failing") == [*before, ("start", 0), ("end", 1)]
    assert len(events(sweep / "whole")) == 2


def test_time_limit_preemption_and_cancel(tmp_path):
    """Each time the run saves, and goes on where it was; after a cancel, when told."""
    workdir = tmp_path / "long"
    run = workdir / "run"
    each = {"name": "run", "train.steps": 10**6, "train.checkpoint_every": 10**6}
    each |= {"train.eval_every": 10**6}
    submit(workdir, each, options=("--time=3", "--save-seconds=60"))
    wait(run, lambda: events(run)[-1:] == [("requeue", 130)])
    [first] = folders.steps(run / "checkpoints")
    assert step(run) == first
    wait(run, lambda: step(run) > first + 10)
    # All the processors, in a partition whose jobs go first.
    urgent = ["sbatch", "--partition=urgent", "--ntasks=4", "--output=/dev/null"]
    subprocess.run([*urgent, "--wrap=sleep 5"], check=True)
    expected = [("start", 0), ("requeue", 130)] * 2
    wait(run, lambda: events(run) == expected)
    second = folders.steps(run / "checkpoints")[-1]
    assert step(run) == second > first
    wait(run, lambda: step(run) > second + 10)
    assert "1 runs cancelled, of which 1 save and end" in command("cancel", workdir)
    wait(run, lambda: events(run)[-1] == ("end", 130))
    last = folders.steps(run / "checkpoints")[-1]
    assert step(run) == last > second
    # Its job runs on for a moment, to write the summary.
    wait(run, lambda: "stopped by a signal" in command("status", workdir))
    steps = [record["step"] for record in records(run)]
    assert steps == [*range(1, last + 1)]
    assert "nothing of" in command("cancel", workdir)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--partition=nowhere", "Slurm has no nowhere, but debug, urgent"),
        ("--nodes-per-run=2", "sbatch refuses: "),
        ("--sbatch=gres=unicorn", "sbatch refuses: "),
    ],
)
def test_what_slurm_refuses_leaves_nothing(option, message, tmp_path):
    with pytest.raises(AssertionError, match=f"error: .*{message}"):
        submit(tmp_path / "out", {"name": "run"}, options=(option,))
    assert not (tmp_path / "out").exists()
