"""Charts of kernels: their rooflines, and the error of a sum that keeps few digits.

The roofline is that of Williams, Waterman and Patterson (doi:10.1145/1498765.1498785):
speed over operations per byte, below a roof of the machine's own copy and product.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.analysis.charts import GREY, RAMP, Chart, Line, Panel, between
from deepseek_jax.analysis.runs import read_json

EDGES = 1.0, 1e4  # operations per byte, between which the roof is drawn


def benches(folder: Path, by: str | None = None) -> list[dict[str, Any]]:
    """What `pallas_kernels.bench` wrote in a folder or below it, by file.

    Args:
      by: leave out files in which this candidate was never measured.
    """
    files = [read_json(path, {}) for path in sorted(folder.rglob("*.json"))]
    return [
        found
        for found in files
        if "rates" in found
        and (by is None or any(_measured(row, by) for row in found["rows"]))
    ]


def _measured(row: Mapping[str, Any], by: str) -> bool:
    return row["by"] == by and "tflops" in row


def roofline(found: Mapping[str, Any], by: str) -> Chart:
    """What `pallas_kernels.bench` wrote: a point for each shape that `by` computed.

    Raises:
      ValueError: it computed none with operations to count.
    """
    rows = [
        row
        for row in found["rows"]
        if _measured(row, by) and row["tflops"] > 0 and row["pass"] == "forward"
    ]
    if not rows:
        known = sorted({row["by"] for row in found["rows"] if "tflops" in row})
        raise ValueError(f"by = {by!r}: must be one of those measured, {known}")
    product, copy = found["rates"]["flops"] / 1e12, found["rates"]["bytes"] / 1e12
    x = np.geomspace(*EDGES, 200)
    lines = [Line("roof", GREY, x, np.minimum(product, copy * x))]
    names = list(dict.fromkeys(row["op"] for row in rows))
    for name, at in zip(names, _places(len(names))):
        own = [row for row in rows if row["op"] == name]
        own.sort(key=lambda row: row["tflops"] / row["gbytes"])
        per_byte = [1e3 * row["tflops"] / row["gbytes"] for row in own]
        speed = np.array([row["tflops"] for row in own])
        lines.append(Line(name, between(at), per_byte, speed, style="marked"))
    panel = Panel(
        "", "operations per byte", "TFLOP/s", tuple(lines), log_x=True, log_y=True
    )
    title = f"{found['device']}, {by}"
    return Chart("roofline", title, "Higher is better.", (panel,), columns=1)


def errors(values: Mapping[str, Mapping[int, float]], y_label: str) -> Chart:
    """A line of each model's error over the length of its sums, both logarithmic."""
    lines = tuple(
        Line(name, between(at), [*found], np.array([*found.values()]), style="marked")
        for (name, found), at in zip(values.items(), _places(len(values)))
    )
    panel = Panel("", "numbers in a sum, K", y_label, lines, log_x=True, log_y=True)
    return Chart("errors", "Error of a product", "Lower is better.", (panel,), 1)


def _places(count: int) -> Sequence[float]:
    return list(np.linspace(0, len(RAMP) - 1, max(2, count)))
