"""Runs a sweep's runs as processes on this machine, a folder each.

Finished runs are skipped, the others start or go on; one that fails does not stop the
rest. Some may share a process, as one program (`launch.population`). Workers share the
CPU's cores evenly: XLA sizes its thread pools by the cores that a process may use. Runs
share a compilation cache, since those that differ only in a seed are the same program;
results do not depend on it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from deepseek_jax.analysis import runs, seeds, tables
from deepseek_jax.analysis.runs import DONE, FAILED, PENDING, RUNNING
from deepseek_jax.train.hooks import STEP, Interrupt
from experiments.common import INTERRUPTED, PARENT
from experiments.launch import population
from experiments.launch.plan import Item, Plan, flag
from experiments.launch.progress import Progress

POLL_S = 0.5
LOG_TAIL = 1000  # bytes of a log that its last line is looked for in
LAST_WORDS = ("error:", "nothing to do")
CACHE = ".jax_cache"
NO_RESULT = "ended without a final evaluation"

Command = Callable[[Plan, Item, Path], list[str]]


def train_command(plan: Plan, item: Item, folder: Path) -> list[str]:
    """The command of one run."""
    flags = [flag(key, value) for key, value in item.overrides.items()]
    command = [sys.executable, "-m", "experiments.train", f"--config={plan.base}"]
    return [*command, f"--workdir={folder}", *flags]


@dataclass
class Follower:
    """Reads the training records that a run appends, as they come."""

    path: Path
    offset: int = 0
    inode: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    def latest(self) -> dict[str, Any]:
        """The newest training record, {} before there is one."""
        try:
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self.inode or state.st_size < self.offset:
                    self.offset, self.inode = 0, state.st_ino
                file.seek(self.offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return self.last
        self.offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self.last = record if "loss" in record else self.last
        return self.last


class State:
    """Which run stands where, as summary.json says it."""

    def __init__(self, plan: Plan, workdir: Path):
        self.plan, self.workdir = plan, workdir
        self.items = {item.name: item for item in plan.items}
        self.followers = {
            name: Follower(workdir / name / "metrics.jsonl") for name in self.items
        }
        rows = runs.read_json(workdir / "summary.json", [])
        before = {row["name"]: row["status"] for row in rows}
        self.status = dict.fromkeys(self.items, PENDING)
        self.rows = {name: self.row(name) for name in self.items}
        for name, row in self.rows.items():
            if before.get(name) == FAILED:  # until it starts anew
                self._set(name, FAILED)
            elif before.get(name) == DONE and row["eval_ce"] is not None:
                self._set(name, DONE)
        self.write()

    def row(self, name: str) -> runs.Record:
        """A run's entry in summary.json by what its folder holds now."""
        item = self.items[name]
        run = runs.read_run(
            self.workdir / name,
            overrides=item.overrides,
            status=self.status[name],
            config=item.record()["config"],
        )
        return seeds.summarize(run)

    def _set(self, name: str, status: str) -> None:
        self.status[name] = status
        self.rows[name] = self.row(name)

    def set(self, name: str, status: str) -> None:
        """Notes a change and writes it."""
        self._set(name, status)
        self.write()

    def write(self) -> None:
        """Writes summary.json and summary.csv."""
        tables.write_summaries(self.workdir, [*self.rows.values()])

    def named(self, *status: str) -> list[str]:
        """The runs in one of these states."""
        return [name for name, each in self.status.items() if each in status]

    def doing(self, name: str) -> str:
        """What a run does besides steps, by the last line of its log; "": steps, or
        nothing more.
        """
        try:
            with (self.workdir / name / "log.txt").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
                said = log.read().decode(errors="replace").rstrip().splitlines()
        except FileNotFoundError:
            return ""
        line = said[-1] if said else ""
        return "" if line.startswith((runs.LOG_START, STEP, *LAST_WORDS)) else line

    def steps(self) -> dict[str, int]:
        """Steps done by each run."""
        return {n: f.latest().get("step", 0) for n, f in self.followers.items()}


@dataclass
class Job:
    """A process that makes a run, or several as one program."""

    names: list[str]
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    cores: list[int]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None


def run(
    plan: Plan,
    workdir: Path,
    workers: int = 1,
    command: Command = train_command,
    only: Collection[str] | None = None,
    vectorize: int = 1,
) -> int:
    """Runs what is not done yet; the exit code: 0, 1 if a run failed, 130 on Ctrl-C.

    Args:
      workers: processes at a time.
      only: the runs to look at, None for all.
      vectorize: runs that differ only in scalars and seed and become one program.

    Raises:
      ValueError: such a run needs more than a device.
    """
    state = State(plan, workdir)
    progress = Progress(state)
    names = [n for n in state.named(PENDING, FAILED) if only is None or n in only]
    waiting = [[name] for name in names]
    if finished := state.named(DONE):
        progress.say(f"{len(finished)} of {len(plan.items)} runs are done already")
    if vectorize > 1 and names:
        waiting = population.teams(plan, names, vectorize)
        progress.say(population.told(waiting, vectorize))
    free = shares(max(1, min(workers, len(waiting))))
    jobs: list[Job] = []
    with Interrupt(progress.say) as interrupt:
        try:
            while (waiting or jobs) and not interrupt.received:
                while waiting and free:
                    jobs.append(start(state, waiting.pop(0), free.pop(0), command))
                time.sleep(POLL_S)
                for job in [job for job in jobs if job.ended]:
                    jobs.remove(job)
                    free.append(job.cores)
                    finish(state, job, progress)
                progress.show([job.names for job in jobs])
        finally:
            stop(jobs)
    for job in jobs:
        if job.process.returncode == 0:
            finish(state, job, progress)
    for name in state.named(PENDING, RUNNING):
        state.set(name, runs.at_rest(state.row(name)["steps"]))
    if interrupt.received:
        progress.say("stopped; the same command goes on from here")
        return INTERRUPTED
    return 1 if set(names) & set(state.named(FAILED)) else 0


def start(state: State, names: list[str], cores: list[int], command: Command) -> Job:
    """Starts a run on some cores, its output going to the end of its log.txt.

    Several are one process: each core is a device, and output is in the first's log.
    """
    name, *others = names
    folder = state.workdir / name
    words = command(state.plan, state.items[name], folder)
    pid = str(os.getpid())
    own = {"JAX_COMPILATION_CACHE_DIR": str(state.workdir.absolute() / CACHE)}
    if others:
        words = population.command(names, state.workdir)
        own["JAX_NUM_CPU_DEVICES"] = str(len(cores or os.sched_getaffinity(0)))
    logs = []
    for each in names:
        (state.workdir / each).mkdir(parents=True, exist_ok=True)
        logs.append((state.workdir / each / "log.txt").open("ab", buffering=0))
        logs[-1].write(f"{runs.LOG_START}{shlex.join(words)}\n".encode())
    for unused in logs[1:]:
        unused.close()
    log = logs[0]
    with on_cores(cores):
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=own | os.environ | {PARENT: pid},
            start_new_session=True,  # Ctrl-C reaches it once, from here
        )
    for each in names:
        state.set(each, RUNNING)
    return Job(names, process, log, cores)


def finish(state: State, job: Job, progress: Progress) -> None:
    """Notes how a process ended, for each of its runs."""
    job.log.close()
    code, several = job.process.returncode, len(job.names) > 1
    last = runs.last_error(state.workdir / job.names[0] / "log.txt")
    for name in job.names:
        row = state.row(name)
        if (code == 0 or several) and row["eval_ce"] is not None:
            state.set(name, DONE)
            violation = row["maxvio_global"]
            shown = "" if violation is None else f", MaxVio_global {violation:.3f}"
            progress.say(f"{name}: done, validation loss {row['eval_ce']:.4f}{shown}")
            continue
        state.set(name, FAILED)
        log = state.workdir / name / "log.txt"
        why = ""
        if code <= 0:  # a process that ends so says nothing itself
            why = f"killed by {signal.Signals(-code).name}" if code else NO_RESULT
        elif several and not runs.last_error(log).startswith("error:"):
            why = last.removeprefix("error: ")
        if why:
            with log.open("a") as file:
                file.write(f"\nerror: {why}\n")
        progress.say(f"{name}: FAILED: {runs.last_error(log)}")


def stop(jobs: Sequence[Job]) -> None:
    """Asks runs to save and end, and waits; another Ctrl-C kills them."""
    try:
        for job in jobs:
            if not job.ended:
                job.process.send_signal(signal.SIGINT)
        for job in jobs:
            job.process.wait()
    except KeyboardInterrupt:
        for job in jobs:
            job.process.kill()
            job.process.wait()


def shares(workers: int) -> list[list[int]]:
    """The cores of each worker; [] = all: there is one, or the system can't do it."""
    if workers == 1 or not hasattr(os, "sched_setaffinity"):
        return [[] for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        return [[cores[i % len(cores)]] for i in range(workers)]
    return [cores[i::workers] for i in range(workers)]


@contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """A process that is started inside may use these cores only; [] = all."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
