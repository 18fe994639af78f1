"""Makes the page, pictures and tables of a sweep or a run again, also while it runs.

  python -m experiments.report --workdir=runs/balancing
  python -m experiments.report --workdir=runs/a runs/b --out=runs/both
  python -m experiments.report --workdir=runs/a --out=runs/v3 --only balance.strategy=v3

A folder gets report.html (the page, which needs no network), figures/*.png, summary.md,
summary.csv and summary.json.
"""

import sys
from pathlib import Path

from deepseek_jax.analysis import precision, report, runs, seeds, selection, tables
from deepseek_jax.analysis.runs import Study
from deepseek_jax.checkpoint import metadata
from deepseek_jax.train import hooks
from experiments import common


def main(arguments: list[str]) -> None:
    parser = common.arguments("experiments.report", __doc__)
    parser.add_argument(
        "--workdir", required=True, nargs="+", type=Path, help="of sweeps or runs"
    )
    parser.add_argument(
        "--out", type=Path, help="another folder for the report; of several: needed"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with these settings, such as seed=0; of a KEY given twice "
        "either VALUE; needs --out",
    )
    given = parser.parse_args(arguments)
    wanted: dict[str, list[str]] = {}
    for key, value in map(_setting, given.only):
        wanted.setdefault(key, []).append(value)
    study = chosen(given.workdir, given.out, wanted)
    try:
        with hooks.exclusive(study.path):
            study = study.settled() if given.out is None else study
            rows = [seeds.summarize(run) for run in study.runs]
            tables.write_summaries(study.path, rows)
    except hooks.InUse:
        print("still running: the summary is left to the sweep", file=sys.stderr)
    page = report.write(study)
    print(f"{tables.text_table(study)}\n\n{tables.verdict(study)}")
    print(f"{precision.markdown(study)}\nReport: {page}")


def chosen(
    workdirs: list[Path], out: Path | None, wanted: dict[str, list[str]]
) -> Study:
    """The runs that a report is about, with the folder it goes to.

    Raises:
      ValueError: there is none such, or it would go over a sweep's own report.
    """
    if out is None and (len(workdirs) > 1 or wanted):
        raise ValueError(
            "--out is missing: a report of several folders, or with --only, needs a "
            "folder of its own"
        )
    if out is not None and (out / metadata.SWEEP).exists():
        raise ValueError(f"--out {out}: holds a sweep, whose own report this is not")
    studies = [runs.read(workdir) for workdir in workdirs]
    study = selection.together(studies, out or workdirs[0])
    return selection.only(study, wanted)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--only {text}: must be KEY=VALUE, such as seed=0")
    return key, value


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
