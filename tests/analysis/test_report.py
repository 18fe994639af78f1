"""The page as text: nothing from outside, nothing too large, nothing hidden."""

import json
import re
from dataclasses import replace

import pytest

from deepseek_jax.analysis import interactive, report, runs
from deepseek_jax.config import STRATEGIES
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    return runs.read(synthetic.write_sweep(path, ("none", "v3"), seeds=2))


def without_plotly(page: str) -> str:
    assert page.count(interactive.plotly_js()) == 1
    return page.replace(interactive.plotly_js(), "")


def data_of(page: str) -> dict:
    (text,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_asks_for_nothing_from_outside(study):
    page = without_plotly(report.page(study))
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", page) == []
    asked = re.findall(r'(?:src|href)="(?!data:)([^"]*)"', page)
    assert asked == [f"{run.name}/config.json" for run in study.runs]  # for a click
    assert "@import" not in page and "{{" not in page


def test_every_figure_has_its_place_and_every_place_its_figure(study):
    page = report.page(study)
    data = data_of(page)
    places = re.findall(r'class="plot" id="([^"]+)"', page)
    sides = range(len(data["shown"]))
    figures = [f"figure-{name}" for name in data["comparisons"]]
    figures += [f"{kind}-{side}" for kind in data["details"] for side in sides]
    assert sorted(places) == sorted(figures)
    assert set(data["runs"]) == {run.name for run in study.runs}
    options = re.findall(r"<option[^>]*>([^<]+)</option>", page)
    assert options == [run.name for run in study.runs] * 2
    assert data["shown"][0].startswith("none") and data["shown"][1].startswith("v3")


def test_a_large_sweep_stays_below_8_mb(tmp_path):
    path = synthetic.write_sweep(tmp_path, STRATEGIES, seeds=3, steps=300)
    study = runs.read(path)
    biased = next(run for run in study.runs if run.strategy == "v3")
    bias = {r["step"]: r["bias"] for r in biased.train if "bias" in r}
    for run in study.runs:  # as if every strategy had one
        for record in run.train:
            record |= {"bias": bias[record["step"]]} if record["step"] in bias else {}
    page = report.page(study)
    assert len(page.encode()) < 8e6
    assert len(data_of(page)["runs"]) == 33


def test_no_more_runs_are_detailed_than_fit(study):
    many = [
        replace(run, name=f"{run.name}-{i}") for i in range(40) for run in study.runs
    ]
    detailed = report._first_seeds(replace(study, runs=many), report.MAX_DETAILED)
    assert len(detailed) == report.MAX_DETAILED
    labels = [run.label for run in detailed]
    assert labels.count("none") == labels.count("v3")


def test_names_are_text_and_never_markup(study):
    nasty = '</script><b onclick="x">&'
    title = replace(study, title=nasty, about=nasty, command=nasty)
    run = replace(study.runs[0], name=nasty, error=nasty, status=runs.FAILED)
    page = without_plotly(report.page(replace(title, runs=[run, *study.runs[1:]])))
    assert "<b onclick" not in page and page.count("</script>") == 3
    assert nasty in data_of(page)["runs"]


def test_a_failed_run_shows_why(study):
    failed = replace(study.runs[1], status=runs.FAILED, error="error: no room left")
    page = report.page(replace(study, runs=[study.runs[0], failed]))
    assert "1 done, 1 failed" in page
    assert "error: no room left" in page
    assert '<details class="runs" open>' in page


@pytest.mark.parametrize("steps", [0, 3, 25])
def test_a_run_on_its_way_has_a_page(steps, tmp_path):
    config = synthetic.config(steps=40)
    path = synthetic.write_run(tmp_path / "a", config, steps)
    page = report.write(runs.read(path))
    assert page == path / "report.html"
    data = data_of(page.read_text())
    assert ("loss" in data["comparisons"]) == (steps > 0)
    assert "loss_against_maxvio" not in data["comparisons"]


def test_pictures_lie_beside_the_page(study):
    page = report.write(study)
    pictures = {path.name for path in (page.parent / "figures").iterdir()}
    assert {
        "overview.png",
        "loss.png",
        "load-none-s0.png",
        "bias-v3-s0.png",
    } <= pictures
    assert all(name.endswith(".png") for name in pictures)
