"""Where a sweep's runs stand, wherever they run: their state, last sign of life, ETA.

All of it is read from the sweep's folder and, if it has a batch script, Slurm's queue.
"""

import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_jax.analysis import runs, seeds, tables
from deepseek_jax.analysis.runs import DONE, FAILED, PENDING, RUNNING, STOPPED, Run
from deepseek_jax.train import hooks
from experiments.launch import plan, script, slurm

PID = ".pid"  # in a sweep's folder while it runs here: HOST PROCESS
SIGNS = ("metrics.jsonl", "log.txt", "log.0.txt", script.EVENTS)
RECENT = 20  # records that a run's speed is measured over
POLL_S = 0.2


@contextmanager
def lock(workdir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Holds a sweep's folder, to write its files.

    Raises:
      hooks.InUse: another process still holds it after `patience_s` seconds.
    """
    until = time.monotonic() + patience_s
    while in_use(workdir) and time.monotonic() < until:
        time.sleep(POLL_S)
    with hooks.exclusive(workdir):
        yield


@contextmanager
def running(workdir: Path) -> Iterator[None]:
    """Holds the folder of a sweep that runs here, and says which process does.

    Raises:
      hooks.InUse: it runs already.
    """
    with lock(workdir, patience_s=1.0):
        (workdir / PID).write_text(f"{socket.gethostname()} {os.getpid()}\n")
        try:
            yield
        finally:
            (workdir / PID).unlink(missing_ok=True)


def in_use(workdir: Path) -> bool:
    """Whether a process holds this sweep's folder."""
    try:
        hooks.check_free(workdir)
    except hooks.InUse:
        return True
    return False


def runner(workdir: Path) -> tuple[str, int] | None:
    """Host and process of the sweep that runs outside of Slurm, None if none does."""
    if not in_use(workdir):
        return None
    try:
        host, pid = (workdir / PID).read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return host, int(pid)


@dataclass(frozen=True)
class Standing:
    """A run, its status in `run.status`."""

    run: Run
    note: str = ""  # where it runs, its loss, its last error
    task: slurm.Task | None = None  # in Slurm's queue

    @property
    def step_s(self) -> float | None:
        """Seconds that a step takes, by the run's last records."""
        rates = [r.get("tokens_per_s") for r in self.run.train[1:][-RECENT:]]
        rates = [rate for rate in rates if rate]
        tokens = self.run.get("data.batch", 0) * self.run.get("data.length", 0)
        return tokens / statistics.median(rates) if rates and tokens else None

    @property
    def start_s(self) -> float | None:
        """Seconds that the run's first step took, most of them to compile."""
        first = self.run.train[0] if self.run.train else {}
        return first.get("elapsed_s")

    @property
    def left(self) -> int:
        """Steps to come."""
        return max(0, (self.run.total_steps or 0) - (self.run.steps or 0))

    @property
    def silent_s(self) -> float | None:
        """Seconds since the run last wrote something, None if it never did."""
        files = (self.run.path / name for name in SIGNS)
        times = [file.stat().st_mtime for file in files if file.exists()]
        return max(0.0, time.time() - max(times)) if times else None


def look(workdir: Path) -> tuple[list[Standing], str]:
    """The runs in the sweep's order, and what could not be found out.

    Raises:
      ValueError: the folder holds no sweep, or a damaged run.
    """
    plan.stored(workdir)
    study, here = runs.read(workdir), runner(workdir)
    if here or not (workdir / script.NAME).exists():
        study = study if here else study.settled()
        return [Standing(run, _note(run)) for run in study.runs], ""
    tasks, unknown = {}, ""
    try:
        tasks = slurm.queue(workdir)
    except slurm.NoSlurm as error:
        unknown = f"Slurm can't be asked what waits or runs: {error}"
    standings = []
    for index, run in enumerate(study.runs):
        task = tasks.get(index)
        status, note = slurm.standing(run, task, asked=not unknown)
        run = replace(run, status=status)
        standings.append(Standing(run, note or _note(run), task))
    return standings, unknown


def _note(run: Run) -> str:
    if run.status == DONE and run.final:
        return f"validation loss {run.final['eval_ce']:.4f}"
    return run.error


def record(workdir: Path, standings: Sequence[Standing]) -> None:
    """Writes what `look` found to summary.json, unless another process does so."""
    with suppress(hooks.InUse), lock(workdir):
        rows = [seeds.summarize(each.run) for each in standings]
        tables.write_summaries(workdir, rows)


def eta_s(standings: Sequence[Standing]) -> float | None:
    """Seconds until nothing is left, if as many go on running as do now."""
    known = [each.step_s for each in standings if each.step_s]
    active = [each for each in standings if each.run.status not in (DONE, FAILED)]
    at_once = sum(each.run.status == RUNNING for each in active)
    if not known or not at_once:
        return None
    usual = statistics.mean(known)
    begun = [each.start_s for each in standings if each.start_s]
    to_start = statistics.mean(begun) if begun else 0.0
    times = [
        each.left * (each.step_s or usual) + (0.0 if each.run.steps else to_start)
        for each in active
    ]
    return max(sum(times) / at_once, max(times))


def text(standings: Sequence[Standing]) -> str:
    """A line for each run, and one for them all."""
    rows = [("run", "state", "step", "ETA", "silent", "")]
    for each in standings:
        run, active = each.run, each.run.status == RUNNING
        rate, silent = each.step_s, each.silent_s
        steps = f"{run.steps or 0}/{run.total_steps}"
        left = hooks.clock(each.left * rate) if active and rate else ""
        quiet = hooks.clock(silent) if active and silent is not None else ""
        rows.append((run.name, run.status, steps, left, quiet, each.note))
    widths = [max(map(len, column)) for column in zip(*rows)][:-1]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip()
        for row in rows
    ]
    counts = {
        status: sum(each.run.status == status for each in standings)
        for status in (DONE, RUNNING, STOPPED, PENDING, FAILED)
    }
    total = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    eta = eta_s(standings)
    end = "" if eta is None else f"; ETA {hooks.clock(eta)}"
    return "\n".join([*lines, "", f"{len(standings)} runs: {total}{end}"])
