"""How long does the report of many runs take?

The runs of a finished sweep, repeated under other names and seeds until there are so
many, in a folder that is removed afterwards. Reading is `analysis.runs.read`, the page
is report.html, and pictures are what is written after it: figures/*.png. Medians over
rounds.

  python -m benchmarks.report_time --sweep runs/u --runs 24 500
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from deepseek_jax.analysis import plots, report, runs
from deepseek_jax.files import write_text


def repeated(sweep: Path, folder: Path, count: int) -> Path:
    """Makes a sweep of `count` runs in `folder`, whose files are those of `sweep`'s.

    Raises:
      ValueError: `sweep` has no run that is done.
    """
    stored = runs.read_json(sweep / "sweep.json", {"runs": []})
    rows = runs.read_json(sweep / "summary.json", [])
    done = {row["name"] for row in rows if row["status"] == runs.DONE}
    if not (items := [item for item in stored["runs"] if item["name"] in done]):
        raise ValueError(f"--sweep {sweep}: needs a sweep with a run that is done")
    made = []
    for i in range(count):
        item, again = items[i % len(items)], i // len(items)
        name, source = f"{item['name']}-{again}", (sweep / item["name"]).absolute()
        saved = json.loads((source / "config.json").read_text())
        saved["config"]["seed"] += 1000 * again
        write_text(folder / name / "config.json", json.dumps(saved))
        (folder / name / "metrics.jsonl").symlink_to(source / "metrics.jsonl")
        seed = {"seed": saved["config"]["seed"]}
        made.append({"name": name, "overrides": item["overrides"] | seed})
    write_text(folder / "sweep.json", json.dumps(stored | {"runs": made}))
    rows = [{"name": item["name"], "status": runs.DONE} for item in made]
    write_text(folder / "summary.json", json.dumps(rows))
    return folder


def measure(sweep: Path, rounds: int) -> dict[str, float]:
    """Median seconds of each part of one report."""
    found: dict[str, list[float]] = {"read": [], "page": [], "pictures": []}
    for _ in range(rounds):
        clock = [time.perf_counter()]
        study = runs.read(sweep)
        clock.append(time.perf_counter())
        report.page(study)
        clock.append(time.perf_counter())
        with tempfile.TemporaryDirectory() as folder:
            for stem, chart in report.pictures(study).items():
                plots.save(chart, Path(folder) / f"{stem}.png")
        clock.append(time.perf_counter())
        for part, start, end in zip(found, clock, clock[1:], strict=False):
            found[part].append(end - start)
    return {part: statistics.median(each) for part, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=Path, required=True, metavar="DIR")
    parser.add_argument("--runs", type=int, nargs="+", default=[24, 500], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("seconds          read      page   pictures")
    for count in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = repeated(options.sweep, Path(folder), count)
            except ValueError as error:
                parser.error(str(error))
            took = measure(made, options.rounds)
        print(f"{count:5} runs " + " ".join(f"{each:9.2f}" for each in took.values()))


if __name__ == "__main__":
    main()
