"""Runs of a GPU beside a CPU's losses: how far apart, how fast, how much of the GPU.

    python -m benchmarks.gpu_training RUN .. --reference FILE --bench DIR --json FILE
    python -m benchmarks.gpu_training RUN --keep FILE

RUN is a folder of `experiments.train`. `--keep` writes the losses of the first 200
steps as a reference. A comparison needs the same text; it looks at the mean over the
last 20 steps, whose batches are the same ones, and wants it within 1%. Utilisation is
the model's FLOPs (`config_a.flops`: no recomputation) over the rate of a bfloat16
product that the kernels' benchmark measured on the same machine.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import config_a
from deepseek_jax.analysis import kernels
from deepseek_jax.config import Config, from_dict
from deepseek_jax.files import read_lines, write_text

STEPS = 200
LAST = 20  # steps whose mean loss is compared
WARM = 10  # steps that do not count as speed
CLOSE = 0.01


def losses(run: Path) -> list[float]:
    """Of the first steps, in order.

    Raises:
      ValueError: the folder holds no records of steps.
    """
    records = [record for _, record in read_lines(run / "metrics.jsonl") if record]
    found = [record["loss"] for record in records if "loss" in record][:STEPS]
    if not found:
        raise ValueError(f"{run} has no metrics.jsonl with steps: must be a run")
    return found


def description(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "config.json").read_text())
    return found


def measured(run: Path, rate: float | None) -> dict[str, Any]:
    """A run's speed, and its share of `rate`, the FLOP/s of a product."""
    about = description(run)
    config = from_dict(Config, about["config"])
    records = [record for _, record in read_lines(run / "metrics.jsonl") if record]
    rates = [r["tokens_per_s"] for r in records if r.get("tokens_per_s")]
    speed = statistics.median(rates[WARM:] or rates)
    tokens = config.data.batch * config.data.length
    flops = sum(config_a.flops(config)) / tokens * speed
    return {
        "run": run.name,
        "steps": len(losses(run)),
        "runtime": about.get("runtime"),
        "tokens_per_s": speed,
        "tflops": flops / 1e12,
        "utilisation": flops / rate if rate else None,
    }


def apart(run: Path, reference: dict[str, Any]) -> dict[str, float]:
    """Mean losses of the last steps that both have, and how far they are apart.

    Raises:
      ValueError: the run is of another text, or neither has so many steps.
    """
    corpus = description(run)["corpus"]["hash"]
    if corpus != reference["corpus"]:
        raise ValueError(
            f"{run} read the corpus {corpus[:12]}: must be {reference['corpus'][:12]}, "
            "that of the reference"
        )
    own, want = losses(run), reference["loss"]
    steps = min(len(own), len(want))
    if steps < LAST:
        raise ValueError(f"{run} has {len(own)} steps: must have at least {LAST}")
    own, want = (statistics.mean(each[steps - LAST : steps]) for each in (own, want))
    return {"loss": own, "reference_loss": want, "apart": abs(own - want) / want}


def rate_of(folder: Path | None) -> float | None:
    """FLOP/s of a product, from a file of `pallas_kernels.bench`; None without one."""
    found = kernels.benches(folder) if folder else []
    return float(found[0]["rates"]["flops"]) if found else None


def keep(run: Path, file: Path) -> None:
    """Writes a run's losses as a reference."""
    about = description(run)
    kept = {
        "of": f"the first {STEPS} steps of experiments.train with this config",
        "config": about["config"],
        "corpus": about["corpus"]["hash"],
        "device": about["runtime"]["device"],
        "loss": losses(run),
    }
    write_text(file, json.dumps(kept, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--reference", type=Path, metavar="FILE", help="losses to compare with")
    add("--bench", type=Path, metavar="FOLDER", help="where the kernels' rates are")
    add("--json", type=Path, metavar="FILE", help="write the numbers")
    add("--keep", type=Path, metavar="FILE", help="write RUN's losses, as a reference")
    args = parser.parse_args()
    try:
        if args.keep:
            keep(args.runs[0], args.keep)
            return 0
        rate = rate_of(args.bench)
        rows = [measured(run, rate) for run in args.runs]
        if args.reference:
            reference = json.loads(args.reference.read_text())
            for run, row in zip(args.runs, rows, strict=True):
                row |= apart(run, reference)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for row in rows:
        line = f"{row['run']:10} {row['steps']:4} steps, {row['tokens_per_s']:9,.0f} "
        line += f"tokens/s, {row['tflops']:.2f} TFLOP/s"
        if row["utilisation"] is not None:
            line += f", {row['utilisation']:.2%} of the product's rate"
        if "apart" in row:
            line += f"; loss {row['loss']:.4f}, {row['apart']:.2%} from the reference"
        print(line)
    if args.json:
        write_text(args.json, json.dumps({"runs": rows}, indent=1) + "\n")
    return int(any(row.get("apart", 0) > CLOSE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
