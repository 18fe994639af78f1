"""The table, what it says of differences, and the summary files."""

import csv
import json
from dataclasses import replace

import pytest

from deepseek_jax.analysis import runs, seeds, tables
from tests.analysis import synthetic


def study_of(losses: dict[str, list[float]], tmp_path) -> runs.Study:
    """A finished study whose final losses are given, by setting and seed."""
    made = []
    for strategy, values in losses.items():
        for seed, loss in enumerate(values):
            config = synthetic.config(strategy, seed, steps=4)
            path = synthetic.write_run(tmp_path / f"{strategy}{seed}", config)
            run = runs.read_run(path, overrides={"balance.strategy": strategy})
            run.evals[-1]["eval_ce"] = loss
            made.append(replace(run, label=strategy))
    return runs.Study(tmp_path, "t", made)


def test_one_seed_is_no_finding(tmp_path):
    text = tables.verdict(study_of({"none": [5.0], "v3": [4.0]}, tmp_path))
    assert "v3, 4.000 nats" in text
    assert "no difference in loss is a finding" in text


def test_differences_beyond_and_below_the_spread(tmp_path):
    losses = {
        "none": [5.0, 5.1, 5.2],
        "v3": [4.9, 5.02, 5.1],  # lower by 0.09 for each seed, nearly alike
        "aux_seq": [4.95, 4.97, 5.16],
    }
    text = tables.verdict(study_of(losses, tmp_path))
    assert "Lowest validation loss: v3, 5.007 ± 0.101 nats (3 seeds)" in text
    assert "Worse beyond the spread of seeds: none (+0.093)." in text
    assert "Not told apart from it: aux_seq." in text
    assert "Differences below the seed spread are not findings" in text


def test_nothing_to_compare(tmp_path):
    assert "fewer than two" in tables.verdict(study_of({"v3": [4.0]}, tmp_path))
    assert "fewer than two" in tables.verdict(runs.Study(tmp_path, "t", []))


def test_the_table_is_mean_and_std_by_setting(tmp_path):
    study = study_of({"none": [5.0, 6.0], "v3": [4.0]}, tmp_path)
    text = tables.text_table(study).splitlines()
    assert "5.500 ± 0.707" in text[1]
    assert "4.000" in text[2] and "±" not in text[2]
    assert len({len(line) for line in text}) == 1


@pytest.mark.parametrize("status", ["pending", "done"])
def test_summaries_say_the_same_in_both_files(status, tmp_path):
    config = synthetic.config("v3", seed=2)
    path = tmp_path / "a"
    if status == "done":
        synthetic.write_run(path, config)
    run = runs.read_run(path, status=status, overrides={"seed": 2, "train.steps": 40})
    tables.write_summaries(tmp_path, [seeds.summarize(run)])
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    (line,) = csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())
    assert list(row) == list(line)
    assert json.loads(line["overrides"]) == row["overrides"]
    assert line["eval_ce"] == ("" if row["eval_ce"] is None else str(row["eval_ce"]))
    assert row["status"] == line["status"] == status
    assert {p.name for p in tmp_path.iterdir()} - {"a"} == {
        "summary.json",
        "summary.csv",
    }
