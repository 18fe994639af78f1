"""Draws a `charts.Chart` in matplotlib, for files; `interactive` is for the page.

Both read the same chart, so that a picture and a page cannot disagree.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from deepseek_jax.analysis.charts import (
    BAND_ALPHA,
    LOAD_SCALE,
    LOAD_TICKS,
    LOAD_TOP,
    Chart,
    Heat,
    Line,
    bar_labels,
    height_of,
)
from deepseek_jax.files import replacing

MAX_INCHES = 5.5  # of a picture's row of panels
OFFSETS = {"right": (9, 0), "left": (-9, 0), "above": (0, 9), "below": (0, -9)}


def static(chart: Chart) -> Figure:
    """The chart as a matplotlib figure, which needs no display."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    height = rows * min(MAX_INCHES, height_of(chart) / 80)
    width = max(8.0, 4.4 * columns)
    figure = Figure(figsize=(width, height + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, chart.panels, strict=False):
        if panel.heat:
            _static_heat(figure, axis, panel.heat)
        else:
            axis.grid(alpha=0.25)
        for line in panel.lines:
            _draw(axis, line)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
        if panel.log_x:
            axis.set_xscale("log")
            _log_ticks(axis.xaxis)
        if panel.log_y:
            axis.set_yscale("log")
            _log_ticks(axis.yaxis)
        if panel.from_zero:
            axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(chart.panels) :]:
        axis.set_visible(False)
    if chart.legend:
        _static_legend(figure)
    figure.suptitle(chart.title, fontsize=12)
    return figure


def _log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _static_legend(figure: Figure) -> None:
    named = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend(
            named.values(),
            named.keys(),
            loc="outside lower center",
            ncols=min(6, len(named)),
            frameon=False,
        )


def _draw(axis: Axes, line: Line) -> None:
    style = {"color": line.colour}
    if line.style == "mean":
        bar = None
        if line.high is not None:
            bar = line.high - line.y
        axis.errorbar(line.x, line.y, bar, fmt="o", ms=10, capsize=3, **style)
        across, up = OFFSETS[line.place]
        axis.annotate(
            line.label,
            (line.x[0], line.y[0]),
            xytext=(across, up),
            textcoords="offset points",
            ha="center" if up else "left" if across > 0 else "right",
            va="center" if across else "bottom" if up > 0 else "top",
        )
    elif line.style == "bar":
        bars = axis.bar(line.x, line.y, label=line.label, zorder=2, **style)
        axis.bar_label(bars, bar_labels(line.y))
    elif line.style == "points":
        axis.plot(line.x, line.y, "o", ms=4, alpha=0.5, **style)
    else:
        marker = "o" if line.style == "marked" else None
        axis.plot(
            line.x, line.y, marker=marker, ms=3.5, lw=1.6, label=line.label, **style
        )
        if line.high is not None:
            axis.fill_between(
                line.x, line.low, line.high, alpha=BAND_ALPHA, lw=0, **style
            )


def _static_heat(figure: Figure, axis: Axes, heat: Heat) -> None:
    colours = LinearSegmentedColormap.from_list("load", LOAD_SCALE)
    image = axis.pcolormesh(
        np.asarray(heat.x, float),
        np.arange(len(heat.rows)),
        np.ma.masked_invalid(heat.values),
        cmap=colours,
        vmin=0,
        vmax=LOAD_TOP,
        shading="nearest",
    )
    axis.invert_yaxis()
    at = [heat.rows.index(row) for row in heat.ticks]
    axis.set_yticks(at, list(heat.ticks.values()), fontsize=8)
    figure.colorbar(image, ax=axis, ticks=LOAD_TICKS, label="× uniform", pad=0.01)


def save(chart: Chart, path: Path) -> None:
    """Writes the chart as a PNG."""
    with replacing(path) as temporary:
        static(chart).savefig(temporary, format="png", dpi=130)
