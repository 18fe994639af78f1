"""The command that makes a report again: of a sweep, finished or not, and of a run."""

import json
import sys

import pytest

from deepseek_jax.train import hooks
from experiments import common, report
from tests.analysis import synthetic


def statuses(path):
    return [row["status"] for row in json.loads((path / "summary.json").read_text())]


def test_everything_is_made_again(tmp_path, capsys):
    synthetic.write_sweep(tmp_path, ("none", "v3"), seeds=2, steps=8)
    report.main([f"--workdir={tmp_path}"])
    made = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert {"report.html", "summary.json", "summary.csv"} <= made
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["name"] for row in rows] == ["none-s0", "none-s1", "v3-s0", "v3-s1"]
    assert all(row["eval_ce"] for row in rows)
    said = capsys.readouterr().out
    assert "2 seeds" in said and str(tmp_path / "report.html") in said


@pytest.mark.parametrize("lives", [True, False])
def test_a_running_sweep_keeps_its_own_summary(lives, tmp_path, capsys):
    synthetic.write_sweep(tmp_path, ("v3",), seeds=2, steps=8)
    rows = json.loads((tmp_path / "summary.json").read_text())
    rows[1]["status"] = "running"
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    if lives:
        with hooks.exclusive(tmp_path):
            report.main([f"--workdir={tmp_path}"])
    else:
        report.main([f"--workdir={tmp_path}"])
    assert statuses(tmp_path) == ["done", "running" if lives else "stopped"]
    assert ("still running" in capsys.readouterr().err) == lives
    assert (tmp_path / "report.html").exists()


def test_a_single_run(tmp_path):
    path = synthetic.write_run(tmp_path / "run", synthetic.config(steps=8))
    report.main([f"--workdir={path}"])
    assert statuses(path) == ["done"]
    assert (path / "report.html").exists()


def test_an_error_is_not_taken_for_a_running_sweep(tmp_path, monkeypatch, capsys):
    def fail(run):
        raise ValueError("no such measure")

    path = synthetic.write_run(tmp_path / "run", synthetic.config(steps=8))
    monkeypatch.setattr(report.seeds, "summarize", fail)
    with pytest.raises(ValueError, match="no such measure"):
        report.main([f"--workdir={path}"])
    assert "still running" not in capsys.readouterr().err


def test_traceback_says_where_an_error_came_from(tmp_path, monkeypatch, capsys):
    arguments = [f"--workdir={tmp_path}", "--traceback"]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(SystemExit) as stop:
        common.guarded(report.main, arguments)
    assert stop.value.code == common.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "in read" in error
    assert error.splitlines()[-1].startswith("error: workdir")


def test_a_folder_with_neither(tmp_path):
    with pytest.raises(ValueError, match="neither a sweep nor a run"):
        report.main([f"--workdir={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_several_folders_and_some_of_their_runs(tmp_path):
    for name in ("a", "b"):
        synthetic.write_sweep(tmp_path / name, ("none", "v3"), seeds=1, steps=8)
    before = (tmp_path / "a" / "summary.json").read_bytes()
    folders = [str(tmp_path / name) for name in ("a", "b")]
    out = tmp_path / "out"
    only = ("--only", "balance.strategy=v3")
    report.main(["--workdir", *folders, f"--out={out}", *only])
    rows = json.loads((out / "summary.json").read_text())
    assert [row["name"] for row in rows] == ["a/v3-s0", "b/v3-s0"]
    assert (tmp_path / "a" / "summary.json").read_bytes() == before
    assert not (tmp_path / "a" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "--out is missing: a report of several folders"),
        (["a", "--only", "seed=0"], "--out is missing: a report of several folders"),
        (["a", "--out", "b"], "--out .*b: holds a sweep"),
        (["a", "--out", "c", "--only", "seed"], "--only seed: must be KEY=VALUE"),
    ],
)
def test_what_would_go_over_a_report_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        synthetic.write_sweep(tmp_path / name, ("v3",), seeds=1, steps=8)
    with pytest.raises(ValueError, match=message):
        report.main(["--workdir", *words])
    assert not (tmp_path / "c").exists()
