"""A `charts.Chart` as plotly.js draws it on the page, a plain dict of its own terms.

plotly's Python objects would check every field of every figure, which for a page of
hundreds takes half a minute; the tests let them check one of each kind
(plotly.com/javascript/reference). `plots` draws the same charts for files.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from deepseek_jax.analysis.charts import (
    BAND_ALPHA,
    LOAD_SCALE,
    LOAD_TICKS,
    LOAD_TOP,
    Chart,
    Heat,
    Line,
    Panel,
    bar_labels,
    height_of,
)

PANEL_GAP = 90  # pixels between rows of panels
LOG_TICKS = [digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5)]
LOG = {
    "type": "log",
    "tickvals": LOG_TICKS,
    "ticktext": [f"{value:g}" for value in LOG_TICKS],
}
PLACES = {"right": "middle right", "left": "middle left"}  # plotly's words
PLACES |= {"above": "top center", "below": "bottom center"}
COLOUR_AXIS = {
    "cmin": 0,
    "cmax": LOAD_TOP,
    "colorscale": LOAD_SCALE,
    "colorbar": {
        "title": {"text": "× uniform"},
        "tickvals": LOAD_TICKS,
        "thickness": 12,
    },
}
LEGEND = {"orientation": "h", "yref": "container", "y": 1, "x": 0, "yanchor": "top"}

Trace = dict[str, Any]


def figure(chart: Chart) -> dict[str, Any]:
    """The chart's traces and layout; bands follow their line in the legend."""
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    height = rows * height_of(chart)
    data: list[Trace] = []
    layout: dict[str, Any] = {"annotations": []}
    named: set[str] = set()
    for i, panel in enumerate(chart.panels):
        number = "" if i == 0 else str(i + 1)
        across = _part(i % columns, columns, 0.2 / columns)
        down = _part(rows - 1 - i // columns, rows, PANEL_GAP / height)
        layout["annotations"].append(_title(panel.title, across, down))
        layout[f"xaxis{number}"] = _x_axis(panel, across, number)
        layout[f"yaxis{number}"] = _y_axis(panel, down, number)
        at = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        if panel.heat:
            data.append(_heat(panel.heat) | at)
            layout["coloraxis"] = COLOUR_AXIS
        for line in panel.lines:
            first = chart.legend and line.label not in named
            data += [trace | at for trace in _traces(line, first)]
            named.add(line.label)
    top = 40 + (22 * -(-len(named) // 7) if chart.legend and named else 0)
    bottom = 50 if any(panel.x_label for panel in chart.panels) else 30
    layout |= {
        "height": height + top + bottom,
        "showlegend": chart.legend,
        "hovermode": "closest",
        "legend": LEGEND,
        "margin": {"l": 60, "r": 20, "t": top, "b": bottom},
    }
    return {"data": data, "layout": layout}


def _part(n: int, count: int, gap: float) -> list[float]:
    """From where to where the n-th of so many panels goes, as a share of all."""
    size = (1 - gap * (count - 1)) / count
    return [n * (size + gap), n * (size + gap) + size]


def _title(text: str, across: list[float], down: list[float]) -> dict[str, Any]:
    return {
        "text": text,
        "x": sum(across) / 2,
        "y": down[1],
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 14},
    }


def _x_axis(panel: Panel, across: list[float], number: str) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "domain": across,
        "anchor": f"y{number}",
        "title": {"text": panel.x_label},
    }
    if panel.log_x:
        axis |= LOG
    if panel.heat:
        axis |= {"showgrid": False}
    return axis


def _y_axis(panel: Panel, down: list[float], number: str) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "domain": down,
        "anchor": f"x{number}",
        "title": {"text": panel.y_label},
    }
    if panel.log_y:
        axis |= LOG
    if panel.from_zero:
        axis |= {"rangemode": "tozero", "minallowed": 0}
    if panel.heat:
        axis |= {
            "autorange": "reversed",
            "type": "category",
            "tickvals": list(panel.heat.ticks),
            "ticktext": list(panel.heat.ticks.values()),
            "showgrid": False,
        }
    return axis


def _traces(line: Line, first: bool) -> Iterator[Trace]:
    """A line's traces: its band, if it has one, below itself."""
    common = {"x": _compact(line.x), "legendgroup": line.label, "name": line.label}
    if line.high is not None and line.style != "mean":
        edge = {
            "type": "scatter",
            "mode": "lines",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
            **common,
        }
        yield edge | {"y": _compact(line.low)}
        filled = {"fill": "tonexty", "fillcolor": _faded(line.colour)}
        yield edge | {"y": _compact(line.high)} | filled
    yield {"y": _compact(line.y), "showlegend": first, **_style(line), **common}


def _style(line: Line) -> Trace:
    """How a line looks."""
    colour = {"color": line.colour}
    match line.style:
        case "bar":
            return {"type": "bar", "text": bar_labels(line.y), "marker": colour}
        case "marked":
            return {"type": "scatter", "mode": "lines+markers", "line": colour}
        case "points":
            marker = colour | {"size": 7}
            return {
                "type": "scatter",
                "mode": "markers",
                "marker": marker,
                "opacity": 0.5,
            }
        case "mean":
            style: Trace = {
                "type": "scatter",
                "mode": "markers+text",
                "marker": colour | {"size": 14},
                "text": line.label,
                "textposition": PLACES[line.place],
                "cliponaxis": False,
            }
            if line.high is not None:
                size = line.high - line.y
                style["error_y"] = {"type": "data", "array": size, "width": 4}
            return style
    return {"type": "scatter", "mode": "lines", "line": colour}


def _heat(heat: Heat) -> Trace:
    return {
        "type": "heatmap",
        "x": _compact(heat.x),
        "y": heat.rows,
        "z": heat.values.astype(np.float32),
        "coloraxis": "coloraxis",
        "hovertemplate": "%{y}<br>%{x}: %{z:.2f} × uniform<extra></extra>",
    }


def _compact(values: Sequence[float | str] | np.ndarray) -> list[str] | np.ndarray:
    """Numbers in the fewest bytes that show them; text as it is."""
    array = np.asarray(values)
    if array.dtype.kind == "U":
        return list(map(str, array))
    if not np.array_equal(array, np.round(array)):
        return array.astype(np.float32)
    return array.astype(np.int16 if np.abs(array).max() < 2**15 else np.int32)


def packed(array: np.ndarray) -> dict[str, str]:
    """An array as plotly.js reads it from JSON: its bytes, and what they mean."""
    code = f"{array.dtype.kind}{array.dtype.itemsize}"
    made = {"dtype": code, "bdata": base64.b64encode(array.tobytes()).decode()}
    if array.ndim > 1:
        made["shape"] = ", ".join(map(str, array.shape))
    return made


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND_ALPHA})"


def plotly_js() -> str:
    """The script that draws plotly figures, about 5 MB."""
    return get_plotlyjs()
