"""Runs every configuration of a sweep, skips what is done, and writes a report.

  python -m experiments.sweep --sweep=experiments/sweeps/balancing.py --workdir=runs/b

--workdir gets a folder for each run, summary.json and summary.csv (after every change),
report.html and figures/. The same command goes on after a stop; it also takes new runs
that the sweep file has meanwhile. Ctrl-C lets the runs save, and exits with 130; a run
that failed does not stop the others, and makes the exit code 1.
"""

import shlex
import sys
from pathlib import Path

from deepseek_jax.analysis import report, runs, tables
from deepseek_jax.train import hooks
from experiments import common
from experiments.launch import local, plan


def main(arguments: list[str]) -> int:
    parser = common.arguments("experiments.sweep", __doc__)
    parser.add_argument("--sweep", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--config", help="the base config instead of the sweep's own")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise ValueError(f"--workers={options.workers}: must be 1 or more")
    command = shlex.join(["python", "-m", "experiments.sweep", *arguments])
    planned = plan.load(options.sweep, options.config, command)
    plan.open_corpora(planned)
    with hooks.exclusive(options.workdir):
        plan.save(planned, options.workdir)
        code = local.run(planned, options.workdir, options.workers)
        if code == common.INTERRUPTED:
            return code
        study = runs.read(options.workdir)
        page = report.write(study)
    print(f"\n{tables.text_table(study)}\n\n{tables.verdict(study)}\n\nReport: {page}")
    return code


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
