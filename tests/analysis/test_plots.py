"""Every chart, in both renderings, against the runs it is drawn from."""

import io
from dataclasses import replace

import matplotlib.image
import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.collections import QuadMesh

from deepseek_jax.analysis import (
    charts,
    comparisons,
    details,
    interactive,
    plots,
    runs,
)
from deepseek_jax.config import STRATEGIES
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    found = runs.read(synthetic.write_sweep(path, seeds=2))
    return replace(found, watched=("grad_norm",))


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """A sweep of one number."""
    path = tmp_path_factory.mktemp("rates")
    made = []
    for seed in (0, 1):
        for speed in (0.0, 1e-3, 1e-2):
            config = synthetic.config("loss_free", seed, steps=20)
            run = runs.read_run(synthetic.write_run(path / f"{speed}{seed}", config))
            overrides = {"balance.speed": speed, "seed": seed}
            made.append(replace(run, overrides=overrides))
    return runs.Study(path, "rates", runs.with_labels(made))


def every_chart(study, rates):
    found = [make(study) for make in (*comparisons.COMPARISONS, comparisons.overview)]
    found += [make(study.of("v3")[0]) for make in details.DETAILS.values()]
    return [chart for chart in found if chart] + [comparisons.response(rates)]


def test_no_chart_is_missing(study, rates):
    names = [chart.name for chart in every_chart(study, rates)]
    assert sorted(names) == sorted(
        {
            "loss_against_maxvio",
            "maxvio",
            "loss",
            "by_layer",
            "loss_by_domain",
            "flips",
            "watched",
            "overview",
            "load",
            "bias",
            "specialisation",
            "response",
        }
    )


def test_both_renderings_show_the_charts_numbers(study, rates):
    for chart in every_chart(study, rates):
        lines = [line for panel in chart.panels for line in panel.lines]
        heats = [panel.heat for panel in chart.panels if panel.heat]
        page = go.Figure(interactive.figure(chart))  # which checks every field
        picture = plots.static(chart)
        shown = [t for t in page.data if t.type == "scatter" and t.hoverinfo != "skip"]
        assert len(shown) == len(lines)
        for trace, line in zip(shown, lines, strict=True):
            np.testing.assert_allclose(trace.y, line.y, rtol=1e-6)
        for trace, heat in zip(
            [t for t in page.data if t.type == "heatmap"], heats, strict=True
        ):
            np.testing.assert_allclose(trace.z, heat.values, rtol=1e-6)
        drawn = [line.get_ydata() for axis in picture.axes for line in axis.lines]
        for line in lines:
            assert any(np.array_equal(line.y, y, equal_nan=True) for y in drawn), chart
        meshes = [
            mesh.get_array()
            for axis in picture.axes[: len(chart.panels)]
            for mesh in axis.collections
            if isinstance(mesh, QuadMesh)
        ]
        for mesh, heat in zip(meshes, heats, strict=True):
            np.testing.assert_array_equal(mesh.filled(np.nan), heat.values)
        titles = [axis.get_title() for axis in picture.axes]
        assert [panel.title for panel in chart.panels] == titles[: len(chart.panels)]


def test_pictures_are_not_blank(study, rates, tmp_path):
    for chart in every_chart(study, rates):
        plots.save(chart, tmp_path / f"{chart.name}.png")
        data = (tmp_path / f"{chart.name}.png").read_bytes()
        image = matplotlib.image.imread(io.BytesIO(data))
        assert image.shape[0] > 200 and image.shape[1] > 400
        assert image[..., :3].std() > 0.02
    assert all(path.suffix == ".png" for path in tmp_path.iterdir())


def test_every_caption_is_one_sentence(study, rates):
    for chart in every_chart(study, rates):
        if chart.name != "overview":
            assert chart.caption.endswith(".")
            assert ". " not in chart.caption


def test_the_load_heatmap_is_relative_to_uniform(study):
    run = study.of("none")[0]
    (panel,) = details.load_heatmap(run).panels
    _, load = run.series("load")
    values = panel.heat.values
    routers, experts = load.shape[1:]
    assert len(panel.heat.rows) == routers * experts + routers - 1
    assert np.isnan(values).all(1).sum() == routers - 1
    blocks = values[~np.isnan(values).all(1)].reshape(routers, experts, -1)
    np.testing.assert_allclose(blocks.mean(1), 1.0)
    expected = np.moveaxis(load / load.mean(-1, keepdims=True), 0, -1)
    np.testing.assert_allclose(blocks, expected)
    assert set(panel.heat.ticks.values()) == set(run.router_names())


def test_windows_of_the_load_heatmap_keep_every_token(study):
    run = study.of("v3")[0]
    (panel,) = details.load_heatmap(run, cells=1).panels
    assert panel.heat.values.shape == (16, details.LEAST_TIMES)
    _, load = run.series("load")
    steps = np.array_split(np.arange(len(load)), details.LEAST_TIMES)
    summed = np.stack([load[w].sum(0)[0] for w in steps], 1)
    np.testing.assert_allclose(panel.heat.values, summed / summed.mean(0))


def test_a_deep_model_is_thinned():
    for cells in (2000, 20_000):
        for count, each in ((61, 256 * 8), (4, 128), (1, 64)):
            chosen = details._routers(count, cells, each)
            assert len(chosen) == len(set(chosen)) <= min(count, details.MAX_ROUTERS)
            assert len(chosen) == 1 or len(chosen) * each <= cells
            assert {0, count - 1} <= set(chosen) or len(chosen) == 1


def test_specialisation_is_each_domains_own_load(study):
    run = study.of("v3")[1]
    (panel,) = details.specialisation(run).panels
    row = panel.heat.rows.index("layer 3 · speech")
    load = np.array(run.final["eval_load_by_domain"]["speech"][1], float)
    np.testing.assert_allclose(panel.heat.values[row], load / load.mean())


def test_a_run_without_a_bias_has_no_trajectories(study):
    assert details.bias_trajectories(study.of("none")[0]) is None
    chart = details.bias_trajectories(study.of("v3")[0])
    assert [len(panel.lines) for panel in chart.panels] == [16] * 4


def test_the_scatter_has_every_run_and_every_mean(study):
    (panel,) = comparisons.loss_against_maxvio(study).panels
    points = [line for line in panel.lines if line.style == "points"]
    means = [line for line in panel.lines if line.style == "mean"]
    assert sum(len(line.y) for line in points) == len(study.runs)
    for line in means:
        found = [run.final["eval_ce"] for run in study.of(line.label)]
        assert line.y == pytest.approx(np.mean(found))
        assert line.high - line.y == pytest.approx(np.std(found, ddof=1))


def test_differences_are_to_the_same_seed_of_the_baseline(study):
    assert comparisons.baseline(study) == "none"
    gaps = comparisons.loss_curves(study).panels[2]
    by_label = {line.label: line for line in gaps.lines}
    assert (by_label["none"].y == 0).all()
    pairs = zip(study.of("v3"), study.of("none"), strict=True)
    expected = [a.final["eval_ce"] - b.final["eval_ce"] for a, b in pairs]
    assert by_label["v3"].y[-1] == pytest.approx(np.mean(expected))


def test_a_swept_number_is_an_axis_in_its_order(rates):
    loss, violation = comparisons.response(rates).panels
    assert list(loss.lines[0].x) == ["0", "0.001", "0.01"]
    assert (loss.title, violation.title) == ("eval_ce", "maxvio_global")


def test_strategies_do_not_sweep_a_number(study):
    assert comparisons.response(study) is None


def test_every_strategy_has_a_colour_of_its_own():
    assert set(charts.COLOURS) == set(STRATEGIES)
    assert len(set(charts.COLOURS.values())) == len(STRATEGIES)


def test_settings_of_one_strategy_get_a_ramp(rates):
    found = charts.colours(rates)
    assert len(set(found.values())) == 3
    assert found["speed=0"] == charts.RAMP[0]
    assert found["speed=0.01"] == charts.RAMP[-1]


def test_names_of_the_means_do_not_cover_one_another():
    rng = np.random.default_rng(0)
    crowded = np.c_[np.exp(rng.normal(size=11) * 0.3), 5 + 0.05 * rng.normal(size=11)]
    places = comparisons._places(list(STRATEGIES), crowded, crowded)
    assert len(set(places)) > 1
    lone = comparisons._places(["none"], crowded[:1], crowded[:1])
    assert lone == ["right"]


def test_studies_with_nothing_to_draw(tmp_path):
    pending = [runs.read_run(tmp_path / "a", {"balance": {"strategy": "v3"}})]
    study = runs.Study(tmp_path, "t", runs.with_labels(pending), watched=("x",))
    makers = (*comparisons.COMPARISONS, comparisons.overview)
    assert [make(study) for make in makers] == [None] * len(makers)
    assert [make(study.runs[0]) for make in details.DETAILS.values()] == [None] * 3


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2, 300], "int16"),
        ([1.0, -2.0], "int16"),
        ([1, 40_000], "int32"),
        ([0.5, 1.0], "float32"),
        ([np.nan, 1.0], "float32"),
    ],
)
def test_numbers_take_few_bytes_and_keep_their_value(values, dtype):
    found = interactive._compact(values)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)
