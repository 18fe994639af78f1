"""A figure as plain data, a `Chart`, drawn by `plots` for files, `interactive` else.

A chart has panels of lines or of one heatmap, and a caption that says what to look at.
`comparisons` and `details` make them; the parts that they share are here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_jax.analysis.runs import Study
from deepseek_jax.analysis.seeds import Curve, average, curve, mean_and_std

GREY = "#8a8f98"
COLOURS = {  # biases are cold, auxiliary losses warm
    "none": GREY,
    "loss_free": "#2f7ed8",
    "loss_free_proportional": "#16a3b5",
    "multiplicative": "#7a5fd9",
    "loss_free_frozen": "#86b6ea",
    "aux_batch": "#e6a532",
    "aux_seq": "#e2662c",
    "aux_global": "#a9790f",
    "quantile": "#2f9e5d",
    "z_loss": "#b98fbb",
    "v3": "#d6336c",
}
RAMP = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0c52c", "#e2b714")

# Colours of a load relative to uniform: even steps in its logarithm, neutral at 1.
LOAD_TOP = 8.0
LOAD_COLOURS = (
    (0.0, "#123a7d"),
    (0.25, "#4f83c4"),
    (0.5, "#a9c6e4"),
    (1.0, "#f3f1ec"),
    (2.0, "#f2b48f"),
    (4.0, "#d9593d"),
    (8.0, "#7d0f25"),
)
LOAD_SCALE = [(value / LOAD_TOP, colour) for value, colour in LOAD_COLOURS]
LOAD_TICKS = (0, 1, 2, 4, 8)
BAND_ALPHA = 0.15
PANEL_HEIGHT = 270  # pixels of the page
ROW_HEIGHT, NAMED_ROW_HEIGHT = 8, 17  # of a heatmap


@dataclass(frozen=True)
class Line:
    """Points of one label; `low` and `high` bound a band; NaN = nothing drawn there."""

    label: str
    colour: str
    x: Sequence[float | str] | np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    # line, marked (line with markers), points, bar, mean (big, named)
    style: str = "line"
    place: str = "right"  # of a mean's name: right, left, above, below


@dataclass(frozen=True)
class Heat:
    """Loads relative to uniform [rows, columns]; a row of NaN is a gap."""

    x: Sequence[float | str] | np.ndarray
    rows: list[str]
    values: np.ndarray
    ticks: dict[str, str]  # a row's name -> what its axis label says


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str = ""
    lines: tuple[Line, ...] = ()
    heat: Heat | None = None
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False  # the vertical axis shows no negative values


@dataclass(frozen=True)
class Chart:
    name: str  # also the stem of the picture's file
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 2
    legend: bool = True


def bar_labels(values: np.ndarray) -> list[str]:
    """What stands at a bar's end."""
    return [f"{value:,.4g}" for value in values]


def height_of(chart: Chart) -> int:
    """Pixels of a row of panels: a chart of heatmaps alone grows with its rows."""
    heats = [panel.heat for panel in chart.panels]
    if None in heats:
        return PANEL_HEIGHT
    rows = max(len(heat.rows) for heat in heats)
    named = max(len(heat.ticks) for heat in heats) > rows / 2
    return int(np.clip((NAMED_ROW_HEIGHT if named else ROW_HEIGHT) * rows, 220, 720))


def colours(study: Study) -> dict[str, str]:
    """A colour for each label: the strategy's own, or a ramp over its settings."""
    labels = study.labels
    if all(label in COLOURS for label in labels):
        return {label: COLOURS[label] for label in labels}
    at = np.linspace(0, len(RAMP) - 1, max(2, len(labels)))
    return {label: between(at[i]) for i, label in enumerate(labels)}


def between(position: float) -> str:
    """The colour at a place along `RAMP`, 0 to len(RAMP) - 1."""
    low = min(int(position), len(RAMP) - 2)
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in RAMP[low : low + 2]]
    mixed = np.array(ends[0]) + (position - low) * np.subtract(ends[1], ends[0])
    return "#" + "".join(f"{round(v):02x}" for v in mixed)


def band(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """`low` and `high` of a line: ± one std, None where there is a single seed."""
    return (None, None) if np.isnan(std).all() else (mean - std, mean + std)


def curve_panel(
    study: Study,
    curves: Mapping[str, Sequence[Curve]],
    title: str,
    y_label: str = "",
    *,
    log_y: bool = False,
    marked: bool = False,
) -> Panel | None:
    """Mean and band over the seeds of each label's curves."""
    lines, palette = [], colours(study)
    for label, found in curves.items():
        x, mean, std = average(found)
        if not len(x):
            continue
        low, high = band(mean, std)
        if low is not None and log_y:
            low = np.maximum(low, mean / 4)
        style = "marked" if marked else "line"
        lines.append(Line(label, palette[label], x, mean, low, high, style))
    return Panel(title, "step", y_label, tuple(lines), log_y=log_y) if lines else None


def curves(study: Study, key: str) -> dict[str, list[Curve]]:
    """A metric's curves, one a seed, by label."""
    return {label: [curve(r, key) for r in study.of(label)] for label in study.labels}


def chart(
    name: str, title: str, caption: str, panels: Sequence[Panel | None], **more: Any
) -> Chart | None:
    """A chart of the panels that hold something, None if none does."""
    drawn = tuple(panel for panel in panels if panel)
    return Chart(name, title, caption, drawn, **more) if drawn else None


def category_panel(
    study: Study,
    values: Mapping[str, Sequence[Mapping[str, float]]],
    title: str,
    *,
    x_label: str = "",
    y_label: str = "",
    from_zero: bool = False,
) -> Panel | None:
    """Mean and band over seeds of values by category, a line a label or strategy.

    Categories are those that every seed has; numbers among them are shown as text.
    """
    lines, palette = [], COLOURS | colours(study)
    for label, found in values.items():
        names = [k for k in found[0] if all(k in f for f in found)] if found else []
        if names:
            by_seed = np.array([[f[name] for name in names] for f in found], float)
            mean, std = mean_and_std(by_seed)
            ticks = [k if isinstance(k, str) else f"{k:.3g}" for k in names]
            colour = palette.get(label, GREY)
            lines.append(Line(label, colour, ticks, mean, *band(mean, std), "marked"))
    if not lines:
        return None
    return Panel(title, x_label, y_label, tuple(lines), from_zero=from_zero)
