"""Makes the page, pictures and tables of a sweep or a run again, also while it runs.

  python -m experiments.report --workdir=runs/balancing

--workdir is a sweep's folder or a single run's.
"""

import sys
from pathlib import Path

from deepseek_jax.analysis import report, runs, seeds, tables
from deepseek_jax.train import hooks
from experiments import common


def main(arguments: list[str]) -> None:
    parser = common.arguments("experiments.report", __doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    workdir = parser.parse_args(arguments).workdir
    study = runs.read(workdir)
    try:
        with hooks.exclusive(workdir):
            study = study.settled()
            rows = [seeds.summarize(run) for run in study.runs]
            tables.write_summaries(workdir, rows)
    except hooks.InUse:
        print("still running: the summary is left to the sweep", file=sys.stderr)
    page = report.write(study)
    print(f"{tables.text_table(study)}\n\n{tables.verdict(study)}\n\nReport: {page}")


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
