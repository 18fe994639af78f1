"""`experiments.sweep status|cancel|retry DIR`, for sweeps here and on Slurm."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

from deepseek_jax.analysis import report, runs, tables
from deepseek_jax.analysis.runs import DONE, FAILED
from experiments import common
from experiments.launch import local, plan, script, slurm, watch


def status(workdir: Path) -> int:
    """Where each run of a sweep stands: its steps, ETA, how long it has said nothing
    (silent), and its loss or last error. Also noted in summary.json, for the report.
    """
    standings, unknown = watch.look(workdir)
    if not unknown:
        watch.record(workdir, standings)
    print(watch.text(standings))
    if unknown:
        print(unknown, file=sys.stderr)
    return 0


def cancel(workdir: Path) -> int:
    """Ends a sweep; what runs saves first. On Slurm, `status` says when it has.

    Raises:
      ValueError: the sweep runs on another machine.
    """
    found = watch.runner(workdir)
    if not found:
        tasks = slurm.queue(workdir) if (workdir / script.NAME).exists() else {}
        if not tasks:
            print(f"nothing of {workdir} runs or waits")
            return 0
        slurm.cancel(tasks.values())
        running = sum(task.running for task in tasks.values())
        print(f"{len(tasks)} runs cancelled, of which {running} save and end")
        return 0
    host, pid = found
    if host != socket.gethostname():
        raise ValueError(f"workdir {workdir}: its sweep runs on {host}; cancel there")
    os.kill(pid, signal.SIGTERM)
    while watch.runner(workdir):
        time.sleep(watch.POLL_S)
    print("the sweep has ended; what was running is saved")
    return 0


def retry(workdir: Path, failed: bool, workers: int, vectorize: int) -> int:
    """Starts again what is unfinished, or only what has failed."""
    if (workdir / script.NAME).exists():
        return submit(workdir, failed)
    names = unfinished(watch.look(workdir)[0], failed)
    planned = plan.read(workdir)
    plan.check_folders(planned, workdir)
    with watch.running(workdir):
        code = local.run(planned, workdir, workers, only=names, vectorize=vectorize)
        return report_of(workdir, code)


def unfinished(standings: list[watch.Standing], failed: bool = False) -> list[str]:
    """The runs that may be started, or only those that have failed."""
    return [
        each.run.name
        for each in standings
        if not each.task
        and (each.run.status == FAILED if failed else each.run.status != DONE)
    ]


def submit(workdir: Path, failed: bool = False) -> int:
    """Submits the batch script for what is unfinished.

    Raises:
      ValueError: a run's folder is damaged, or Slurm refuses.
    """
    planned = plan.read(workdir)
    plan.check_folders(planned, workdir)
    slurm.queue(workdir)  # to be told if it can't be asked
    standings, _ = watch.look(workdir)
    watch.record(workdir, standings)
    names = unfinished(standings, failed)
    if names:
        job = slurm.submit(workdir, names, [item.name for item in planned.items])
        print(f"job {job}: {', '.join(names)}")
    print(f"{len(names)} of {len(standings)} runs submitted")
    return 0


def report_of(workdir: Path, code: int) -> int:
    """Writes and prints the report of a sweep that ended with `code`; that code."""
    if code == common.INTERRUPTED:
        return code
    study = runs.read(workdir)
    page = report.write(study)
    print(f"\n{tables.text_table(study)}\n\n{tables.verdict(study)}\n\nReport: {page}")
    return code


VERBS = {"status": status, "cancel": cancel, "retry": retry}
ABOUT = {
    "status": "Prints where each run stands: steps, ETA, for how long it has said "
    "nothing (silent), its loss or last error. Notes it for the report.",
    "cancel": "Ends a sweep; what runs saves first. On Slurm, status says when it has.",
    "retry": "Starts again what is not done and neither runs nor waits, as the sweep "
    "was started: on this machine, or with its batch script.",
}


def main(verb: str, *arguments: str) -> int:
    """Runs a verb with what stands after it on the command line."""
    parser = common.arguments(f"experiments.sweep {verb}", ABOUT[verb])
    parser.add_argument("workdir", type=Path, metavar="DIR")
    if verb == "retry":
        parser.add_argument(
            "--failed", action="store_true", help="only what has failed"
        )
        parser.add_argument(
            "--workers", type=int, default=1, help="runs at a time, on this machine"
        )
        parser.add_argument(
            "--vectorize", type=int, default=1, metavar="N", help="runs in one program"
        )
    options = vars(parser.parse_args(arguments))
    del options["traceback"]
    return VERBS[verb](**options)
