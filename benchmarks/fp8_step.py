"""A training step under precision policies on this CPU, against float32's.

  python -m benchmarks.fp8_step --json experiments/results/fp8/step.json

The model in `config_a.py`, each policy in a process of its own. All take turns, step by
step, and a ratio is the median over the turns of a policy's step over float32's of the
same turn, so that a busy machine slows all alike.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.train_cpu import Failed, alternate, median, start_ours
from deepseek_jax.files import write_text
from deepseek_jax.precision.policy import POLICIES

DEFAULT = ("bf16", "fp8_v3", "fp8_v3_hopper")


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for float32 and for each policy."""
    names = ["f32", *(name for name in names if name != "f32")]
    workers = [start_ours(name)[0] for name in names]
    try:
        answers = alternate(workers, rounds)
    finally:
        for worker in workers:
            worker.stop()
    rows = []
    for name, own in zip(names, answers, strict=True):
        pairs = zip(own, answers[0], strict=True)
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
        rows.append(
            {
                "policy": name,
                "step_ms": 1e3 * median(own, "seconds"),
                "ratio_to_f32": statistics.median(ratios),
                "least_ratio": ratios[0],
                "largest_ratio": ratios[-1],
                "peak_rss_mb": max(answer["peak_rss_mb"] for answer in own),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'policy':18}  step ms   over f32's (least, largest)  peak MB")
    for row in rows:
        print(
            f"{row['policy']:18} {row['step_ms']:8.0f} {row['ratio_to_f32']:12.2f}"
            f"  ({row['least_ratio']:.2f}, {row['largest_ratio']:.2f})"
            f" {row['peak_rss_mb']:14.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "policies",
        nargs="*",
        default=DEFAULT,
        metavar="POLICY",
        help=f"some of {', '.join(POLICIES)}; {', '.join(DEFAULT)}",
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed steps; 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    if wrong := [name for name in args.policies if name not in POLICIES]:
        parser.error(f"{wrong[0]}: must be one of {', '.join(POLICIES)}")
    try:
        rows = measure(list(args.policies), args.rounds)
    except Failed as failure:
        sys.exit(f"fp8_step: {failure}")
    show(rows)
    if args.json:
        command = shlex.join(["python", "-m", "benchmarks.fp8_step", *sys.argv[1:]])
        cores = len(os.sched_getaffinity(0))
        report = {"command": command, "cores": cores, "rows": rows}
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
