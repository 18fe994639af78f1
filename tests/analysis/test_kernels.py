"""Pictures of kernels against the numbers that they are of."""

import json

import numpy as np
import pytest

from deepseek_jax.analysis import kernels, plots, plots_tiles
from deepseek_jax.analysis.plots_tiles import COLOURS, IDLE

FOUND = {
    "device": "NVIDIA H200",
    "rates": {"flops": 8e14, "bytes": 4e12},
    "rows": [
        {"op": "a", "pass": "forward", "by": "ours", "tflops": 400.0, "gbytes": 500.0},
        {"op": "a", "pass": "forward", "by": "ours", "tflops": 2.0, "gbytes": 2000.0},
        {"op": "a", "pass": "forward", "by": "xla", "tflops": 3.0, "gbytes": 3.0},
        {"op": "b", "pass": "forward", "by": "ours", "tflops": 0.0, "gbytes": 3000.0},
        {"op": "c", "pass": "forward", "by": "ours", "skipped": "no"},
    ],
}


def test_a_roofline_has_the_roof_and_a_point_for_each_shape():
    chart = kernels.roofline(FOUND, "ours")
    roof, own = chart.panels[0].lines
    assert roof.y.max() == 800
    slope = np.searchsorted(roof.x, 10.0)
    assert roof.y[slope] == pytest.approx(4 * roof.x[slope])
    assert own.label == "a"
    np.testing.assert_allclose(own.x, [1, 800])
    np.testing.assert_allclose(own.y, [2, 400])
    assert plots.static(chart).axes[0].get_xscale() == "log"


def test_who_was_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"by = 'torch'.*\['ours', 'xla'\]"):
        kernels.roofline(FOUND, "torch")


def test_files_of_a_bench_are_found_among_others(tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200/NVIDIA_H200.json").write_text(json.dumps(FOUND))
    (tmp_path / "h200/summary.json").write_text("{}")
    assert kernels.benches(tmp_path) == kernels.benches(tmp_path, "ours") == [FOUND]
    assert kernels.benches(tmp_path, "torch") == []


def test_errors_are_lines():
    chart = kernels.errors({"a": {128: 1e-4, 256: 2e-4}, "b": {128: 1.0}}, "error")
    first, second = chart.panels[0].lines
    assert (first.label, list(first.x), list(first.y)) == (
        "a",
        [128, 256],
        [1e-4, 2e-4],
    )
    assert first.colour != second.colour


def area(matrix, *colours):
    tiles = [tile for tile in matrix.tiles if tile.colour in colours]
    return sum(tile.rows * tile.columns for tile in tiles)


def test_attention_computes_the_tiles_that_are_not_above_the_diagonal():
    matrix = plots_tiles.attention(512, 128, 64)
    assert area(matrix, *COLOURS) == 10 * 128**2
    assert area(matrix, *COLOURS, IDLE) == 512**2
    last = [tile for tile in matrix.tiles if tile.row >= 384 and tile.colour != IDLE]
    order = {tile.column: tile.text for tile in last}
    assert order == {0: "4", 128: "3", 256: "2", 384: "1"}
    cut = plots_tiles.attention(512, 128, 64, first=[0, 0, 2, 2])
    assert area(cut, *COLOURS) == 6 * 128**2


def test_a_grouped_product_reads_the_expert_of_its_block():
    x, w, y = plots_tiles.grouped(
        [0, 2, 2, 2], 3, (3, 256, 512), (128, 256, 64), at=(1, 1)
    )
    brought = [tile for tile in w.tiles if tile.colour == plots_tiles.BROUGHT]
    assert {tile.column for tile in brought} == {256}
    assert [tile.row for tile in brought] == [512, 576, 640, 704]
    assert area(x, plots_tiles.BROUGHT) == 128 * 256
    assert area(y, *COLOURS) == 128 * 256
    assert area(y, IDLE) == 128 * 512
    figure = plots_tiles.draw([x, w, y])
    assert [axes.get_title() for axes in figure.axes] == ["x", "w", "y"]
    assert len(figure.axes[1].patches) == len(w.tiles)
