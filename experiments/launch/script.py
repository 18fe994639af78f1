"""The batch script of a sweep: an array of runs for Slurm, to be read and edited.

Nothing else is needed to run it. Slurm sends SIGTERM some time before the time limit
and on preemption; the run saves and exits with 130, and the script puts its job back in
the queue, where it goes on from the checkpoint. `sweep.sbatch` beside this file is all
of it but the names.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.launch.local import CACHE
from experiments.launch.plan import Item, Plan, flag

NAME = "sweep.sbatch"  # of the script in a sweep's folder
EVENTS = "slurm.jsonl"  # in a run's folder: a line at each start and end of its job
N = r"(\d+)"
# As sbatch reads them: minutes, minutes:seconds, hours:minutes:seconds, and with days.
TIMES = {
    N: (60,),
    f"{N}:{N}": (60, 1),
    f"{N}:{N}:{N}": (3600, 60, 1),
    f"{N}-{N}": (86400, 3600),
    f"{N}-{N}:{N}": (86400, 3600, 60),
    f"{N}-{N}:{N}:{N}": (86400, 3600, 60, 1),
}


@dataclass(frozen=True)
class Resources:
    """What each run gets."""

    gpus: int = 1  # of a run, over all its nodes; 0: it runs on CPUs
    nodes: int = 1
    processes: int = 0  # 0: one a GPU, or one
    cpus: int = 0  # of a process; 0: Slurm's default
    time: str = "4:00:00"  # after which a job goes back in the queue
    save_s: int = 120  # before that: when a run is told to save
    partition: str = ""  # "": Slurm's default
    parallel: int = 0  # runs at a time; 0: as many as fit
    options: tuple[str, ...] = ()  # more of sbatch's, as "account=lab"

    def __post_init__(self) -> None:
        for name, flag_, least in (
            ("gpus", "--gpus-per-run", 0),
            ("nodes", "--nodes-per-run", 1),
            ("processes", "--processes-per-run", 0),
            ("cpus", "--cpus-per-process", 0),
            ("save_s", "--save-seconds", 1),
            ("parallel", "--array-parallelism", 0),
        ):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"{flag_}={value}: must be {least} or more")
        if self.processes and self.gpus:
            raise ValueError(
                f"--processes-per-run={self.processes}: is for --gpus-per-run=0; with "
                "GPUs there is a process for each"
            )
        if self.tasks % self.nodes:
            what = "gpus" if self.gpus else "processes"
            raise ValueError(
                f"--{what}-per-run={self.tasks}: must be a multiple of "
                f"--nodes-per-run={self.nodes}, over which they are spread"
            )
        if seconds(self.time) <= self.save_s:
            raise ValueError(
                f"--time={self.time}: is {seconds(self.time)} s, and must be more than "
                f"--save-seconds={self.save_s}"
            )
        for option in self.options:
            if not re.fullmatch(r"[a-z][a-z-]*(=\S.*)?", option):
                raise ValueError(
                    f"--sbatch={option!r}: must be an option of sbatch without its "
                    "dashes, as --sbatch=account=lab"
                )

    @property
    def tasks(self) -> int:
        """Processes of a run."""
        return self.gpus or self.processes or 1

    @property
    def devices(self) -> int:
        """JAX devices of a run; of a CPU process as many as JAX_NUM_CPU_DEVICES."""
        return self.gpus or self.tasks * int(os.environ.get("JAX_NUM_CPU_DEVICES", 1))

    def directives(self) -> list[str]:
        """As sbatch takes them."""
        per_node = self.tasks // self.nodes
        wanted = [
            f"nodes={self.nodes}",
            f"ntasks-per-node={per_node}",
            f"gpus-per-node={per_node}" if self.gpus else "",
            f"cpus-per-task={self.cpus}" if self.cpus else "",
            f"partition={self.partition}" if self.partition else "",
            f"time={self.time}",
            f"signal=TERM@{self.save_s}",
            *self.options,
        ]
        return [option for option in wanted if option]


def seconds(time: str) -> int:
    """A time limit as sbatch reads it: "4:00:00" is four hours, "4:00" four minutes.

    Raises:
      ValueError: it is none.
    """
    for form, units in TIMES.items():
        if found := re.fullmatch(form, time):
            return sum(int(n) * unit for n, unit in zip(found.groups(), units))
    raise ValueError(
        f"--time={time}: must be minutes, minutes:seconds, hours:minutes:seconds or "
        "days-hours:minutes:seconds"
    )


def in_words(seconds: int) -> str:
    """As "4 h 30 min", without the parts that are 0."""
    sizes = {"h": 3600, "min": 60, "s": 1}
    parts = []
    for unit, size in sizes.items():
        if count := seconds // size:
            parts.append(f"{count} {unit}")
        seconds %= size
    return " ".join(parts)


def ranges(numbers: Sequence[int], parallel: int = 0) -> str:
    """0, 1, 2, 5 -> "0-2,5", with "%4" if only four may run at a time."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    text = ",".join("-".join(map(str, part)) for part in parts)
    return f"{text}%{parallel}" if parallel else text


def comment(workdir: Path) -> str:
    """What marks a job as one of the sweep's."""
    return str(workdir.resolve())


def write(plan: Plan, workdir: Path, resources: Resources) -> str:
    """The text of the script."""
    workdir = workdir.absolute()
    directives = [
        f"job-name={shlex.quote(workdir.name)}",
        f"comment={shlex.quote(comment(workdir))}",
        f"array={ranges(range(len(plan.items)), resources.parallel)}",
        *resources.directives(),
        "requeue",
        "open-mode=append",
        f"output={shlex.quote(str(workdir / 'slurm.out').replace('%', '%%'))}",
    ]
    values = {
        "count": str(len(plan.items)),
        "script": shlex.quote(str(workdir / NAME)),
        "directives": "\n".join(f"#SBATCH --{each}" for each in directives),
        "root": shlex.quote(os.getcwd()),
        "python": shlex.quote(sys.executable),
        "workdir": shlex.quote(str(workdir)),
        "platforms": "cuda,cpu" if resources.gpus else "cpu",
        "cache": CACHE,
        "cases": "\n".join(_case(i, item) for i, item in enumerate(plan.items)),
        "events": EVENTS,
        "base": shlex.quote(plan.base),
    }
    template = Path(__file__).with_name(NAME).read_text()
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], template)


def _case(index: int, item: Item) -> str:
    flags = [shlex.quote(flag(key, value)) for key, value in item.overrides.items()]
    return f"    {index}) name={item.name} flags=({' '.join(flags)}) ;;"


def parallelism(text: str) -> int:
    """How many tasks a script lets run at a time; 0: as many as fit."""
    found = re.search(r"^#SBATCH --array=\S*%(\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0
