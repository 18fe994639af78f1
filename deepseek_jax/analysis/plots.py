"""Draws a `charts.Chart`: `interactive` in plotly, `static` in matplotlib for files.

Both read the same chart, so that a picture and a page cannot disagree.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from deepseek_jax.analysis.charts import (
    LOAD_COLOURS,
    LOAD_TOP,
    Chart,
    Heat,
    Line,
)
from deepseek_jax.files import replacing

PANEL_HEIGHT = 270  # pixels of the page
ROW_HEIGHT, NAMED_ROW_HEIGHT = 8, 17
LOAD_SCALE = [(value / LOAD_TOP, colour) for value, colour in LOAD_COLOURS]
LOAD_TICKS = (0, 1, 2, 4, 8)
MAX_INCHES = 5.5  # of a picture's row of panels
BAND_ALPHA = 0.15
LOG_TICKS = [digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5)]
PLACES = {"right": "middle right", "left": "middle left"}  # plotly's words
PLACES |= {"above": "top center", "below": "bottom center"}
OFFSETS = {"right": (9, 0), "left": (-9, 0), "above": (0, 9), "below": (0, -9)}


def interactive(chart: Chart) -> go.Figure:
    """The chart as a plotly figure; bands follow their line in the legend."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    height = rows * _height(chart)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[panel.title for panel in chart.panels],
        horizontal_spacing=0.2 / columns,
        vertical_spacing=90 / height if rows > 1 else 0,
    )
    named: set[str] = set()
    for i, panel in enumerate(chart.panels):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        if panel.heat:
            _interactive_heat(figure, panel.heat, at)
        for line in panel.lines:
            for trace in _traces(line, first=chart.legend and line.label not in named):
                figure.add_trace(trace, **at)
            named.add(line.label)
        log = {"type": "log", "tickvals": LOG_TICKS, "ticktext": _ticks(LOG_TICKS)}
        figure.update_xaxes(
            title_text=panel.x_label, **log if panel.log_x else {}, **at
        )
        figure.update_yaxes(
            title_text=panel.y_label, **log if panel.log_y else {}, **at
        )
        if panel.from_zero:
            figure.update_yaxes(rangemode="tozero", minallowed=0, **at)
    top = 40 + (22 * -(-len(named) // 7) if chart.legend and named else 0)
    bottom = 50 if any(panel.x_label for panel in chart.panels) else 30
    figure.update_annotations(font_size=14)
    figure.update_layout(
        height=height + top + bottom,
        showlegend=chart.legend,
        hovermode="closest",
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 1,
            "x": 0,
            "yanchor": "top",
        },
        margin={"l": 60, "r": 20, "t": top, "b": bottom},
    )
    return figure


def _ticks(values: list[float]) -> list[str]:
    return [f"{value:g}" for value in values]


def _height(chart: Chart) -> int:
    """Pixels of a row of panels: a chart of heatmaps alone grows with its rows."""
    heats = [panel.heat for panel in chart.panels]
    if None in heats:
        return PANEL_HEIGHT
    rows = max(len(heat.rows) for heat in heats)
    named = max(len(heat.ticks) for heat in heats) > rows / 2
    return int(np.clip((NAMED_ROW_HEIGHT if named else ROW_HEIGHT) * rows, 220, 720))


def _labels(values: np.ndarray) -> list[str]:
    """What stands at a bar's end."""
    return [f"{value:,.4g}" for value in values]


def _traces(line: Line, *, first: bool) -> list[go.Scatter | go.Bar]:
    """A line's traces: its band, if it has one, below itself."""
    common = {"x": _compact(line.x), "legendgroup": line.label, "name": line.label}
    traces = []
    if line.high is not None and line.style != "mean":
        common_band = {"mode": "lines", "line_width": 0, "hoverinfo": "skip"}
        for edge, fill in ((line.low, None), (line.high, "tonexty")):
            traces.append(
                go.Scatter(
                    y=_compact(edge),
                    fill=fill,
                    fillcolor=_faded(line.colour) if fill else None,
                    showlegend=False,
                    **common_band,
                    **common,
                )
            )
    if line.style == "bar":
        shown = {"text": _labels(line.y), "marker_color": line.colour}
        return [go.Bar(y=_compact(line.y), showlegend=first, **shown, **common)]
    style: dict[str, Any] = {"mode": "lines", "line": {"color": line.colour}}
    if line.style == "marked":
        style |= {"mode": "lines+markers"}
    elif line.style == "points":
        style = {"mode": "markers", "marker": {"color": line.colour, "size": 7}}
        style |= {"opacity": 0.5}
    elif line.style == "mean":
        style = {"mode": "markers+text", "marker": {"color": line.colour, "size": 14}}
        style |= {"text": line.label, "textposition": PLACES[line.place]}
        style |= {"cliponaxis": False}
        if line.high is not None:
            style["error_y"] = {"type": "data", "array": line.high - line.y, "width": 4}
    traces.append(go.Scatter(y=_compact(line.y), showlegend=first, **style, **common))
    return traces


def _compact(values: Sequence[float | str] | np.ndarray) -> list[str] | np.ndarray:
    """Numbers in the fewest bytes that show them; text as it is."""
    array = np.asarray(values)
    if array.dtype.kind == "U":
        return list(map(str, array))
    if not np.array_equal(array, np.round(array)):
        return array.astype(np.float32)
    return array.astype(np.int16 if np.abs(array).max() < 2**15 else np.int32)


def _interactive_heat(figure: go.Figure, heat: Heat, at: dict[str, int]) -> None:
    figure.add_trace(
        go.Heatmap(
            x=_compact(heat.x),
            y=heat.rows,
            z=heat.values.astype(np.float32),
            coloraxis="coloraxis",
            hovertemplate="%{y}<br>%{x}: %{z:.2f} × uniform<extra></extra>",
        ),
        **at,
    )
    figure.update_layout(
        coloraxis={
            "cmin": 0,
            "cmax": LOAD_TOP,
            "colorscale": LOAD_SCALE,
            "colorbar": {
                "title": {"text": "× uniform"},
                "tickvals": LOAD_TICKS,
                "thickness": 12,
            },
        }
    )
    figure.update_yaxes(
        autorange="reversed",
        type="category",
        tickvals=list(heat.ticks),
        ticktext=list(heat.ticks.values()),
        showgrid=False,
        **at,
    )
    figure.update_xaxes(showgrid=False, **at)


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND_ALPHA})"


def static(chart: Chart) -> Figure:
    """The chart as a matplotlib figure, which needs no display."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    height = rows * min(MAX_INCHES, _height(chart) / 80)
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
        axis.bar_label(bars, _labels(line.y))
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


def plotly_js() -> str:
    """The script that draws plotly figures, about 5 MB."""
    return get_plotlyjs()
