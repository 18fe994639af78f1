"""Sweeps on a Slurm cluster: what is refused, submitted, and found in the queue.

Plain sbatch with the script of `launch.script`. submitit would hide the command in a
pickle that only its own runner can start, and requeue a job from inside a handler of
the signal at which the training loop still has a step to finish. A sweep's jobs are
those of this user whose comment is its folder, also when the script was submitted by
hand. What happened to a run is in its own folder (slurm.jsonl, metrics.jsonl, log.txt),
so that nothing depends on Slurm's accounting, which may be off.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deepseek_jax.analysis import runs
from deepseek_jax.analysis.runs import DONE, FAILED, PENDING, RUNNING, Run
from deepseek_jax.files import read_lines, write_text
from experiments import common
from experiments.launch import script
from experiments.launch.plan import Plan
from experiments.launch.script import Resources

QUEUE = "%K|%F|%T|%N|%r|%k"  # task, array, state, node, reason, comment
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
STOP_CODES = (common.INTERRUPTED, 143)  # saved, or had nothing to save yet


class NoSlurm(ValueError):
    """There is no Slurm here, or it does not answer."""


@dataclass(frozen=True)
class Task:
    """A task of an array, in the queue or running."""

    job: str  # "12_3"
    state: str
    node: str
    reason: str

    @property
    def running(self) -> bool:
        return self.state not in WAITING

    def __str__(self) -> str:
        if self.running:
            return f"job {self.job} on {self.node}"
        return f"job {self.job} in the queue ({self.reason})"


def call(*words: str, text: str | None = None) -> str:
    """What a command of Slurm's prints.

    Raises:
      NoSlurm: it is not there.
      ValueError: it ends with an error, which the message repeats.
    """
    if not shutil.which(words[0]):
        raise NoSlurm(
            f"there is no {words[0]} on the PATH: run this where Slurm is, or write "
            "the script alone with --dry-run"
        )
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    if done.returncode:
        said = (line.removeprefix(f"{words[0]}: ") for line in done.stderr.splitlines())
        raise ValueError(f"{words[0]} refuses: {'; '.join(said)}")
    return done.stdout


def queue(workdir: Path) -> dict[int, Task]:
    """The sweep's tasks that wait or run, by their number in the array.

    Raises:
      NoSlurm: Slurm can't be asked.
    """
    try:
        lines = call("squeue", "--me", "--array", "--noheader", f"--format={QUEUE}")
    except ValueError as error:
        raise NoSlurm(str(error)) from None
    tasks = {}
    for line in lines.splitlines():
        number, array, state, node, reason, where = line.split("|", 5)
        if where == script.comment(workdir) and number.isdigit():
            tasks[int(number)] = Task(f"{array}_{number}", state, node, reason)
    return tasks


def check(plan: Plan, workdir: Path, resources: Resources, *, dry: bool) -> str:
    """The script, if the runs and the cluster can do with the resources.

    Raises:
      ValueError: a mesh has not the devices, or Slurm does not take the job; or the
        sweep is in its queue in another form.
    """
    for item in plan.items:
        if item.config.mesh.size != resources.devices:
            raise ValueError(
                f"run {item.name}: its mesh has {item.config.mesh.size} devices, and "
                f"it would get {resources.devices}; change mesh in the sweep, or "
                + ("--gpus-per-run" if resources.gpus else "--processes-per-run")
            )
    text = script.write(plan, workdir, resources)
    if dry:
        return text
    if resources.partition:
        known = call("sinfo", "--noheader", "--format=%R").split()
        if missing := set(resources.partition.split(",")) - set(known):
            raise ValueError(
                f"--partition={resources.partition}: Slurm has no {min(missing)}, but "
                f"{', '.join(sorted(set(known)))}"
            )
    call("sbatch", "--test-only", text=text)
    names = [item.name for item in plan.items]
    here = runs.read_json(workdir / "sweep.json", {"runs": []})["runs"]
    if queue(workdir) and [record["name"] for record in here] != names:
        raise ValueError(
            f"workdir {workdir}: the sweep has other runs than those in Slurm's queue; "
            f"wait for them, or end them with {common.command('experiments.sweep')} "
            "cancel"
        )
    return text


def no_cuda(resources: Resources) -> str:
    """What to say of GPUs that this environment's JAX can't use; "" if all is well."""
    if not resources.gpus or any(map(importlib.util.find_spec, CUDA)):
        return ""
    return (
        "note: JAX has no CUDA in this environment, so the runs would end at once; "
        "install it for the GPUs' machines: pip install 'jax[cuda13]'"
    )


def check_idle(workdir: Path) -> None:
    """Refuses a sweep that waits or runs in Slurm, as far as that can be asked.

    Slurm may be installed without a cluster: where it does not answer, a sweep whose
    script alone was written is taken as idle, and that is said.

    Raises:
      ValueError: it waits or runs; or it may, as runs of it have been in Slurm before.
    """
    if not (workdir / script.NAME).exists() or not shutil.which("squeue"):
        return
    try:
        tasks = queue(workdir)
    except NoSlurm as error:
        if any(workdir.glob(f"*/{script.EVENTS}")):
            raise ValueError(
                f"workdir {workdir}: runs of it have been in Slurm, which can't be "
                f"asked whether they still are: {error}"
            ) from None
        print(
            f"note: not known if the sweep is in Slurm's queue: {error}",
            file=sys.stderr,
        )
        return
    if tasks:
        raise ValueError(
            f"workdir {workdir}: {len(tasks)} of its runs are in Slurm's queue; wait "
            f"for them, or end them with {common.command('experiments.sweep')} cancel"
        )


def write(text: str, workdir: Path) -> Path:
    """Writes the script into the sweep's folder."""
    path = workdir / script.NAME
    write_text(path, text)
    return path


def submit(workdir: Path, names: Iterable[str], order: Iterable[str]) -> str:
    """Submits some runs of the sweep's script, `order` being all; the job's number."""
    path = workdir / script.NAME
    wanted = set(names)
    numbers = [i for i, name in enumerate(order) if name in wanted]
    array = script.ranges(numbers, script.parallelism(path.read_text()))
    said = call("sbatch", "--parsable", f"--array={array}", str(path.absolute()))
    return said.strip().partition(";")[0]


def cancel(tasks: Iterable[Task]) -> None:
    """Ends tasks; those that run are told to save, and have the time they need.

    scancel alone would send SIGTERM twice at once, and the second one kills a run.
    """
    tasks = list(tasks)
    if waiting := [task.job for task in tasks if not task.running]:
        call("scancel", *waiting)
    if running := [task.job for task in tasks if task.running]:
        for job in running:
            call("scontrol", "update", f"JobId={job}", "Requeue=0")
        call("scancel", "--signal=TERM", *running)


def standing(run: Run, task: Task | None, *, asked: bool) -> tuple[str, str]:
    """A run's status and what there is to say of it.

    Args:
      task: of the run in the queue, if there is one.
      asked: whether Slurm could be asked.
    """
    if task:
        return (RUNNING if task.running else PENDING), str(task)
    if run.final:
        return DONE, ""
    events = [event for _, event in read_lines(run.path / script.EVENTS) if event]
    if not events:
        return runs.at_rest(run.steps), "" if run.steps else "not started"
    last: Mapping[str, object] = events[-1]
    if last["event"] == "requeue":
        return runs.at_rest(run.steps), "cancelled while it waited to go on"
    if last["event"] == "end":
        if last["code"] in STOP_CODES:
            return runs.at_rest(run.steps), "stopped by a signal"
        return FAILED, runs.last_error(run.path / "log.txt")
    if not asked:
        return RUNNING, f"job {last['job']} on {last['node']}, by its last word"
    return FAILED, f"job {last['job']} is gone without a word: killed with its node?"
