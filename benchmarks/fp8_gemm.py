"""One FP8 product: how wrong each model of the accumulator makes it, and what it costs.

    python -m benchmarks.fp8_gemm --json experiments/results/fp8/gemm_error.json

Operands are numbers of E4M3, those nearest to standard normal ones, or their
magnitudes, without scales: what differs from float64 is the sum's doing alone. Errors
are Frobenius norms over the product's, and the largest error over the product's
standard deviation, which for K = 4096 without promotion is what arXiv:2412.19437,
section 3.3.2, calls a maximum relative error of nearly 2%. Times have a scale for each
tile and are ratios to a float32 product of the same shape in the same round, medians.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.files import write_text
from deepseek_jax.precision.accumulate import MODELS, Accumulator, Scales
from deepseek_jax.typing import Array
from pallas_kernels.matmul.reference import product

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BITS = (14, 13)
PROMOTE = (32, 64, 128, 256, None)
SIGNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda x: x,
    "one sign": np.abs,
}
# Rows, K and columns: a square one, and an expert's or projection's of a small replica.
SHAPES = ((512, 512, 512), (4096, 512, 1024))
TIMED = {
    **MODELS,
    "f32_promoted": Accumulator(None, 128),
}
TILE = 128


def operands(rows: int, width: int, columns: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (rows, width), (width, columns)
    return [rng.normal(size=s).astype(jnp.float8_e4m3fn) for s in shapes]


def error(model: Accumulator, x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Frobenius, relative; the largest over the standard deviation."""
    want = x.astype(np.float64) @ w.astype(np.float64)
    off = np.asarray(jax.jit(model)(x, w)) - want
    norm = np.linalg.norm(off) / np.linalg.norm(want)
    return float(norm), float(np.abs(off).max() / want.std())


def errors(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of operands, K, bits and promotion."""
    rows = []
    for sign, apply in SIGNS.items():
        for width in LENGTHS:
            drawn = operands(args.side, width, args.side, args.seed)
            x, w = (apply(each.astype(np.float32)) for each in drawn)
            plain = error(MODELS["f32"], x, w)
            for bits in BITS:
                for promote in PROMOTE:
                    row: dict[str, Any] = {"operands": sign, "K": width, "bits": bits}
                    row |= {"promote": promote, "f32": plain[0]}
                    for name, exact in (("exact", True), ("cheap", False)):
                        model = Accumulator(bits, promote, exact)
                        norm, largest = error(model, x, w)
                        row |= {name: norm, f"{name}_max_over_std": largest}
                    rows.append(row | {"cheap_over_exact": row["cheap"] / row["exact"]})
    return rows


def timed(function: Callable[..., Array], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def times(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each shape and model."""
    rows = []
    for shape in SHAPES:
        x, w = map(jnp.asarray, operands(*shape, args.seed))
        tiles = shape[1] // TILE
        scales = Scales(jnp.ones((shape[0], tiles)), jnp.ones((tiles, shape[2])))
        wide = x.astype(jnp.float32), w.astype(jnp.float32)
        plain = jax.jit(product)
        for name, model in TIMED.items():
            run = jax.jit(model)
            timed(plain, *wide), timed(run, x, w, scales)
            pairs = [
                (timed(plain, *wide), timed(run, x, w, scales))
                for _ in range(args.rounds)
            ]
            rows.append(
                {
                    "shape": list(shape),
                    "model": name,
                    "f32_ms": 1e3 * statistics.median(first for first, _ in pairs),
                    "ratio": statistics.median(b / a for a, b in pairs),
                }
            )
    return rows


def show(report: dict[str, Any]) -> None:
    """Prints what was measured."""
    head = "bits   N_C     exact  max/std     cheap  max/std  cheap/exact"
    before = None
    for row in report["errors"]:
        if before != (row["operands"], row["K"]):
            before = row["operands"], row["K"]
            print(f"\n{before[0]}, K = {before[1]} (float32 {row['f32']:.1e})\n{head}")
        print(
            f"{row['bits']:4} {row['promote'] or 'K':>5}"
            f" {row['exact']:9.2e} {100 * row['exact_max_over_std']:7.3f}%"
            f" {row['cheap']:9.2e} {100 * row['cheap_max_over_std']:7.3f}%"
            f" {row['cheap_over_exact']:12.2f}"
        )
    for row in report["times"]:
        rows, width, columns = row["shape"]
        print(
            f"\n{rows} x {width} x {columns} {row['model']:20}"
            f" {row['ratio']:6.2f} times float32's {row['f32_ms']:.1f} ms",
            end="",
        )
    print()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = (
        ("side", 128, 1, "rows and columns whose errors are measured; 128"),
        ("rounds", 15, 0, "of times; 15, none with 0"),
        ("seed", 0, 0, "of the operands; 0"),
    )
    for name, default, _, about in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    for name, _, least, _ in numbers:
        if getattr(args, name) < least:
            parser.error(f"--{name}={getattr(args, name)}: must be at least {least}")
    if args.json and args.json.is_dir():
        parser.error(f"--json={args.json}: is a folder, must be a file")
    return args


def main() -> None:
    args = arguments()
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.fp8_gemm", *sys.argv[1:]]),
        "errors": errors(args),
        "times": times(args) if args.rounds else [],
    }
    show(report)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
