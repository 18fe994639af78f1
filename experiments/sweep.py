"""Runs every configuration of a sweep, skips what is done, and writes a report.

  python -m experiments.sweep --sweep=experiments/sweeps/balancing.py --workdir=runs/b
  python -m experiments.sweep status|cancel|retry runs/b

--workdir gets a folder for each run, summary.json and summary.csv (after every change),
report.html and figures/. The same command goes on after a stop; it also takes new runs
that the sweep file has meanwhile. Ctrl-C lets the runs save, and exits with 130; a run
that failed does not stop the others, and makes the exit code 1.

`status` says where each run stands, with its last error or the time it still needs;
`cancel` lets what runs save and end; `retry` starts again what is not done, and with
--failed only what has failed.

--vectorize=N trains runs that differ only in scalars (learning rate, bias speed, weight
of a loss) and seed as one program, N at a time. Folders are those of runs alone, and so
are numbers, but for rounding. On a CPU each core is a device then. tokens/s are a run's
share.

--launcher=slurm makes a batch script in --workdir, an array with a task for each run,
and submits it. Runs save before their time is over, or when another job takes their
place, and go on by themselves. With --dry-run the script is written and not submitted;
it is there to be read and edited, and sbatch alone starts it. On this machine --dry-run
says the budget and the runs, and starts nothing.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from experiments import common
from experiments.launch import (
    budget,
    control,
    local,
    plan,
    population,
    script,
    slurm,
    watch,
)

MODULE = "experiments.sweep"
LOCAL, SLURM = "local", "slurm"
# Of --launcher=slurm: the field of script.Resources, its type, what it means.
OPTIONS = {
    "--gpus-per-run": ("gpus", int, "over all its nodes, a process each; 0: CPUs"),
    "--nodes-per-run": ("nodes", int, "over which its processes are spread"),
    "--processes-per-run": ("processes", int, "of a run on CPUs"),
    "--cpus-per-process": ("cpus", int, "else what Slurm gives"),
    "--time": ("time", str, "h:mm:ss after which a run goes back in the queue"),
    "--save-seconds": ("save_s", int, "seconds before that, when it is told to save"),
    "--partition": ("partition", str, "else Slurm's default"),
    "--array-parallelism": ("parallel", int, "runs at a time"),
}


def parser() -> common.Parser:
    """The command line without a verb."""
    made = common.arguments(MODULE, __doc__)
    made.add_argument("--sweep", required=True, metavar="FILE.py[:ARG]")
    made.add_argument("--workdir", required=True, type=Path)
    made.add_argument("--config", help="the base config instead of the sweep's own")
    made.add_argument("--launcher", choices=[LOCAL, SLURM], default=LOCAL)
    made.add_argument(
        "--workers", type=int, default=1, help="runs at a time, here (default 1)"
    )
    made.add_argument(
        "--vectorize",
        type=int,
        default=1,
        metavar="N",
        help="runs in one program, here (default 1)",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="start nothing; write Slurm's script"
    )
    group = made.add_argument_group("with --launcher=slurm")
    for flag, (field, kind, text) in OPTIONS.items():
        usual = getattr(slurm.Resources, field)
        about = f"{text} (default {usual})" if usual else text
        group.add_argument(
            flag, dest=field, type=kind, help=about, default=argparse.SUPPRESS
        )
    group.add_argument(
        "--sbatch",
        dest="options",
        action="append",
        metavar="OPTION",
        help="one more for sbatch, as --sbatch=account=lab; may be repeated",
        default=argparse.SUPPRESS,
    )
    return made


def resources(options: argparse.Namespace) -> slurm.Resources | None:
    """What a run gets on Slurm, None for this machine.

    Raises:
      ValueError: an option is of the other launcher, or impossible.
    """
    flags = {field: flag for flag, (field, *_) in OPTIONS.items()}
    flags["options"] = "--sbatch"
    given = {name: getattr(options, name) for name in flags if name in options}
    if options.launcher == SLURM:
        if options.workers != 1:
            raise ValueError("--workers is for --launcher=local: --array-parallelism")
        if options.vectorize != 1:
            raise ValueError(
                "--vectorize is for --launcher=local: on Slurm every run is a task"
            )
        if "options" in given:
            given["options"] = tuple(given["options"])
        return slurm.Resources(**given)
    if given:
        raise ValueError(f"{flags[next(iter(given))]}: needs --launcher=slurm")
    return None


def main(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in control.VERBS:
        return control.main(*arguments)
    for argument in arguments:
        if re.match(r"--?config\.", argument):
            raise ValueError(
                f"{argument}: overrides of a sweep are in its file, or in the base "
                "that --config=FILE.py names"
            )
    options = parser().parse_args(arguments)
    for name in ("workers", "vectorize"):
        if (given := getattr(options, name)) < 1:
            raise ValueError(f"--{name}={given}: must be 1 or more")
    wanted, workdir = resources(options), options.workdir
    command = shlex.join(["python", "-m", MODULE, *arguments])
    planned = plan.load(options.sweep, options.config, command)
    plan.check_folders(planned, workdir)
    names = [item.name for item in planned.items]
    if options.vectorize > 1:
        teams = population.teams(planned, names, options.vectorize)
    if wanted is None:
        slurm.check_idle(workdir)
        plan.check_sweep(planned, workdir)
        plan.open_corpora(planned)
        print(budget.text(planned.items, workdir, workers=options.workers), flush=True)
        if options.dry_run:
            if options.vectorize > 1:
                print(population.told(teams, options.vectorize))
            print("runs:", *names)
            return 0
        with watch.running(workdir):
            plan.save(planned, workdir)
            code = local.run(
                planned, workdir, options.workers, vectorize=options.vectorize
            )
            return control.report_of(workdir, code)
    text = slurm.check(planned, workdir, wanted, dry=options.dry_run)
    plan.open_corpora(planned)
    print(budget.text(planned.items, workdir, wanted), flush=True)
    print(
        f"  in the queue: each run for {script.in_words(script.seconds(wanted.time))}, "
        f"told to save {script.in_words(wanted.save_s)} before, then again",
        flush=True,
    )
    if note := slurm.no_cuda(wanted):
        print(note, file=sys.stderr)
    with watch.lock(workdir, patience_s=5.0):
        plan.save(planned, workdir)
        path = slurm.write(text, workdir)
    if options.dry_run:
        print(f"{len(planned.items)} runs, to be submitted with: sbatch {path}")
        return 0
    return control.submit(workdir)


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
