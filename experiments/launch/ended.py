"""Notes how a run's job on Slurm ended: why, in its log; its line in summary.json.

  python -m experiments.launch.ended RUN_FOLDER EXIT_CODE

The last command of a sweep's batch script, so that `experiments.report` shows the run
as it shows those of this machine.
"""

import re
import sys
from contextlib import suppress
from pathlib import Path

from deepseek_jax.analysis import runs, seeds, tables
from deepseek_jax.analysis.runs import DONE, FAILED
from deepseek_jax.train.hooks import InUse
from experiments import common
from experiments.launch import watch
from experiments.launch.local import NO_RESULT
from experiments.launch.slurm import STOP_CODES

PATIENCE_S = 60.0  # to wait for others who write the summary
ERROR = re.compile(r"(error:|[\w.]*Error\b)")
SRUN = re.compile(r"^srun: error: (.*)$", re.MULTILINE)


def reason(run: runs.Run, code: int) -> str:
    """Why a run has failed, "" if it has not."""
    if code in STOP_CODES or (code == 0 and run.final):
        return ""
    if code == 0:
        return f"error: {NO_RESULT}"
    main = run.path / "log.txt"
    for log in sorted(run.path.glob("log.*.txt")) or [main]:
        told = runs.last_error(log)
        if ERROR.match(told) and common.GONE not in told:
            return told
    attempt = main.read_text(errors="replace").rpartition(f"\n{runs.LOG_START}")[2]
    killed = SRUN.findall(attempt)
    return f"error: {killed[0] if killed else f'exit code {code}'}"


def note(folder: Path, code: int) -> None:
    """Writes what `reason` says, and the run's row of the sweep's summary.

    Raises:
      ValueError: the folder is no run of a sweep.
    """
    workdir, log = folder.parent, folder / "log.txt"
    sweep = runs.read_json(workdir / "sweep.json", {"runs": []})
    known = {record["name"]: record for record in sweep["runs"]}
    if folder.name not in known:
        raise ValueError(f"{folder}: is no run of a sweep in {workdir}")
    record = known[folder.name]
    run = runs.read_run(folder, record["config"], overrides=record["overrides"])
    why = reason(run, code)
    if why and runs.last_error(log) != why:
        with log.open("a") as file:
            file.write(f"\n{why}\n")
    status = FAILED if why else runs.at_rest(run.steps) if code else DONE
    # A sweep that runs beside Slurm keeps the lock, and writes the summary itself.
    with suppress(InUse), watch.lock(workdir, PATIENCE_S):
        rows = runs.read_json(workdir / "summary.json", [])
        rows = {row["name"]: row for row in rows}
        rows[run.name] = seeds.summarize(run) | {"status": status}
        tables.write_summaries(workdir, [rows[n] for n in known if n in rows])


def main(arguments: list[str]) -> None:
    parser = common.arguments("experiments.launch.ended", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int)
    options = parser.parse_args(arguments)
    note(options.folder.absolute(), options.code)


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
