"""The charts of decoding show the numbers that they are given, in both renderings."""

import numpy as np
import plotly.graph_objects as go

from deepseek_jax.analysis import decoding, interactive, plots


def shown(chart):
    """Numbers by label in plotly, and the heights that matplotlib drew."""
    page = go.Figure(interactive.figure(chart))
    picture = plots.static(chart)
    traces = [t for t in page.data if t.hoverinfo != "skip"]
    lines = [line.get_ydata() for axis in picture.axes for line in axis.lines]
    bars = [p.get_height() for axis in picture.axes for p in axis.patches]
    return [(t.name, np.asarray(t.y, float)) for t in traces], lines, bars, picture


def test_bars_of_cache_sizes():
    sizes = {"MLA": 70_272, "GQA": 312_320.0, "MHA": 4_997_120}
    traces, _, bars, picture = shown(decoding.cache_sizes(sizes))
    assert [name for name, _ in traces] == ["MLA", "GQA", "MHA"]
    np.testing.assert_allclose(np.concatenate([y for _, y in traces]), bars, 1e-6)
    np.testing.assert_allclose(bars, [70.272, 312.32, 4997.12])
    (axis,) = picture.axes
    assert [text.get_text() for text in axis.texts] == ["70.27", "312.3", "4,997"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["MLA", "GQA", "MHA"]
    assert axis.get_legend() is None


def test_lines_by_context():
    values = {"cached": {128: 900.0, 2048: 700.0}, "not": {128: 300.0, 2048: 9.0}}
    chart = decoding.by_context(values, "Speed", "tokens/s", "Higher is faster.")
    traces, lines, _, picture = shown(chart)
    for (name, y), drawn in zip(traces, lines, strict=True):
        np.testing.assert_allclose(y, [*values[name].values()])
        np.testing.assert_allclose(drawn, y)
    assert picture.axes[0].get_xscale() == picture.axes[0].get_yscale() == "log"


def test_acceptance_by_domain():
    one = {"code": [(0.6, 0.02)], "speech": [(0.5, float("nan"))]}
    two = {"code": [(0.6, 0.02), (0.4, 0.1)], "speech": [(0.5, 0.1), (0.3, 0.2)]}
    chart = decoding.acceptance({"one module": one, "two modules": two})
    traces, lines, _, picture = shown(chart)
    wanted = [[0.6, 0.5], [0.6, 0.5], [0.4, 0.3]]
    assert [name for name, _ in traces] == ["draft 1", "draft 1", "draft 2"]
    for (_, y), drawn, values in zip(traces, lines, wanted, strict=True):
        np.testing.assert_allclose(y, values, 1e-6)
        np.testing.assert_allclose(drawn, values)
    assert [axis.get_title() for axis in picture.axes] == ["one module", "two modules"]
    assert chart.panels[1].lines[1].low.tolist() == [0.4 - 0.1, 0.3 - 0.2]
