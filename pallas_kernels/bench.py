"""Times every kernel, and whatever else does the same, against the machine's own rates.

The rates are taken in the same run: bytes per second of a copy, and operations per
second of a large product in bfloat16. A roofline is the time in which the work (see
`bench_cases`) could be done at these; `share` is that over the time measured. FP8 may
pass 1: its tensor cores are twice as fast as bfloat16's. After warm-up, calls are timed
in batches, each long enough that starting a call counts for nothing; the median over
batches is reported. Writes one file for each device.

  python -m pallas_kernels.bench --sizes v3 --out results/kernels
"""

import argparse
import functools
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_cases import OPERATIONS, Case, Run

Row = dict[str, Any]

BATCH, BATCHES = 0.02, 15  # seconds at least, and how many
# Side of the product and numbers of the copy, by what JAX calls the machine.
LARGE = {"cpu": (512, 1 << 22), "gpu": (8192, 1 << 29)}


def wait(result: Any) -> None:
    """Until what was started is done, JAX's or torch's."""
    if "torch" in type(result).__module__:
        result.cpu() if result.numel() < 2 else result.flatten()[0].item()
    else:
        jax.block_until_ready(result)


def seconds(run: Run, batches: int = BATCHES) -> float:
    """Median time of a call."""
    for _ in range(2):
        start = time.perf_counter()
        wait(run())
        once = time.perf_counter() - start
    calls = max(1, round(BATCH / once))
    times = []
    for _ in range(batches if once < 1 else 1):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def rates() -> dict[str, float]:
    """Bytes per second of a copy, operations per second of a product."""
    side, numbers = LARGE.get(jax.default_backend(), LARGE["cpu"])
    x = jnp.ones((numbers,), jnp.bfloat16)
    a = jnp.ones((side, side), jnp.bfloat16)
    copy = seconds(functools.partial(jax.jit(lambda x: x + 1), x))
    product = seconds(functools.partial(jax.jit(jnp.dot), a, a))
    return {"bytes": 2 * x.nbytes / copy, "flops": 2 * side**3 / product}


def measured(case: Case, start: Callable[[], Run], rate: dict[str, float]) -> Row:
    """Time, speed and share of the roofline of one candidate, or why it has none."""
    try:
        taken = seconds(start())
    except (NotImplementedError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return {"skipped": f"{type(error).__name__}: {reason}"[:200]}
    roof = max(case.flops / rate["flops"], case.bytes / rate["bytes"])
    return {
        "seconds": taken,
        "tflops": case.flops / taken / 1e12,
        "gbytes": case.bytes / taken / 1e9,
        "share": roof / taken,
    }


def rows(name: str, size: str, rate: dict[str, float]) -> Iterator[Row]:
    """A row for every candidate of an operation, printed as it is measured."""
    shapes, cases = OPERATIONS[name]
    for at, shape in shapes[size].items():
        for part, case in cases(shape):
            for who, start in case.candidates.items():
                row = {"op": name, "size": size, "shape": at, "pass": part}
                row |= {"by": who, **measured(case, start, rate)}
                print(line(row), flush=True)
                yield row
            jax.clear_caches()


def line(row: Row) -> str:
    what = f"{row['op']:19}{row['size'] + ', ' + row['shape']:36}{row['pass']:19}"
    what += f"{row['by']:19}"
    if "skipped" in row:
        return f"{what}{row['skipped']}"
    return (
        f"{what}{1e6 * row['seconds']:10.1f} us {row['tflops']:9.3f} TFLOP/s "
        f"{row['gbytes']:8.1f} GB/s {100 * row['share']:6.1f}%"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    small = jax.default_backend() == "cpu"
    parser.add_argument(
        "--sizes", nargs="+", default=["ci"] if small else ["replica", "v3"]
    )
    parser.add_argument("--ops", nargs="+", default=list(OPERATIONS))
    parser.add_argument("--out", type=Path, default=Path("results/kernels"))
    args = parser.parse_args()
    for name, given, known in (
        ("ops", args.ops, set(OPERATIONS)),
        ("sizes", args.sizes, {"ci", "replica", "v3"}),
    ):
        if unknown := set(given) - known:
            parser.error(f"--{name} {unknown}: must be among {sorted(known)}")
    device = jax.devices()[0].device_kind
    rate = rates()
    print(
        f"{device}: {rate['bytes'] / 1e9:.0f} GB/s, {rate['flops'] / 1e12:.2f} TFLOP/s"
    )
    result: dict[str, Any] = {
        "device": device,
        "jax": jax.__version__,
        "command": f"python -m pallas_kernels.bench --sizes {' '.join(args.sizes)} "
        f"--ops {' '.join(args.ops)}",
        "rates": rate,
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"
    for size, name in itertools.product(args.sizes, args.ops):
        result["rows"] += rows(name, size, rate)
        # At once, so that what is measured is kept whatever comes next.
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
