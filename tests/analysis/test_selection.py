"""Several sweeps as one study, some runs of one, and what settings differ in."""

import pytest

from deepseek_jax.analysis import report, runs, selection
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sweeps that have the runs v3-s0 and v3-s1 in common."""
    path = tmp_path_factory.mktemp("sweeps")
    made = (("a", ("none", "v3")), ("b", ("v3", "aux_seq")))
    for name, strategies in made:
        synthetic.write_sweep(path / name, strategies, seeds=2, steps=8)
    return [runs.read(path / name) for name, _ in made]


def test_sweeps_together_are_told_apart(two, tmp_path):
    both = selection.together(two, tmp_path)
    assert both.path == tmp_path and len(both.runs) == 8
    assert both.labels == ["a none", "a v3", "b v3", "b aux_seq"]
    assert len({run.name for run in both.runs}) == 8
    page = report.write(both).read_text()
    assert "b aux_seq" in page and "../" in page.split("config.json")[0][-200:]
    assert "| a none | 2 |" in (tmp_path / "summary.md").read_text()


def test_names_stay_where_nothing_is_alike(two, tmp_path):
    apart = [two[0], selection.only(two[1], {"balance.strategy": ["aux_seq"]})]
    both = selection.together(apart, tmp_path)
    assert both.labels == ["none", "v3", "aux_seq"]


def test_folders_of_one_name_are_refused(two, tmp_path):
    with pytest.raises(ValueError, match="must have different names"):
        selection.together([two[0], two[0]], tmp_path)


def test_only_what_is_asked_for(two):
    found = selection.only(two[0], {"balance.strategy": ["v3"], "seed": ["1"]})
    assert [run.name for run in found.runs] == ["v3-s1"]
    found = selection.only(two[0], {"balance.strategy": ["v3", "none"], "seed": ["1"]})
    assert sorted(run.name for run in found.runs) == ["none-s1", "v3-s1"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"balance.strateg": ["v3"]}, "strateg; did you mean 'balance.strategy'?"),
        ({"strategy": ["v3"]}, "strategy; did you mean 'balance.strategy'?"),
        ({"qqq": ["v3"]}, "no run has a setting qqq; what differs is .*, seed$"),
        ({"balance.strategy": ["v2"]}, "there is none, v3"),
        ({"balance.strategy": ["v3", "v2"]}, "strategy=v2: there is none, v3"),
    ],
)
def test_what_is_not_there_is_said(two, wanted, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        selection.only(two[0], wanted)


def test_configs_differ_in_what_the_sweep_set(two):
    found = selection.differing(two[0])
    assert found["balance.strategy"] == {"none": "none", "v3": "v3"}
    assert "seed" not in found and "model.dim" not in found
