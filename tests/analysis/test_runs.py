"""Reading runs and sweeps, whole, half written and not there at all."""

import json
from dataclasses import replace

import numpy as np
import pytest

from deepseek_jax.analysis import runs
from tests.analysis import synthetic


def test_every_prefix_of_a_file_gives_a_prefix_of_its_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": i, "loss": i / 3, "name": "é"} for i in range(4)]
    content = "".join(
        json.dumps(r, ensure_ascii=False) + "\n" for r in records
    ).encode()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        found = runs.read_records(path)
        assert found == records[: len(found)]
        assert len(found) >= content[:size].count(b"\n")


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        runs.read_records(path)


def test_a_run_is_read_back(tmp_path):
    config = synthetic.config("v3", seed=3, steps=40)
    run = runs.read_run(synthetic.write_run(tmp_path / "a", config))
    assert (run.name, run.strategy, run.seed, run.steps) == ("a", "v3", 3, 40)
    assert run.status == runs.DONE
    assert run.final["step"] == 40
    assert run.domains == synthetic.DOMAINS
    assert run.num_moe == 3
    assert run.router_names() == ["layer 2", "layer 3", "layer 4", "MTP 1"]
    steps, load = run.series("load")
    assert steps.tolist() == [10, 20, 30, 40]
    assert load.shape == (4, 4, 16)
    assert (load.sum(-1) == 2 * synthetic.TOKENS).all()


def test_a_run_on_its_way_has_no_final_evaluation(tmp_path):
    config = synthetic.config(steps=40)
    run = runs.read_run(synthetic.write_run(tmp_path / "a", config, steps=25))
    assert (run.status, run.steps, run.final) == (runs.RUNNING, 25, None)
    assert len(run.evals) == 2


def test_a_run_that_is_not_there_is_pending(tmp_path):
    run = runs.read_run(tmp_path / "a", {"seed": 5})
    assert (run.status, run.steps, run.seed) == (runs.PENDING, None, 5)
    assert run.strategy is None


def test_a_step_written_twice_keeps_its_later_line(tmp_path):
    lines = [(1, 9.0), (2, 8.0), (2, 7.5), (3, 7.0)]
    text = "".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    steps, loss = runs.read_run(tmp_path).series("loss")
    assert steps.tolist() == [1, 2, 3]
    assert loss.tolist() == [9.0, 7.5, 7.0]


def test_a_value_that_is_no_number_is_left_out(tmp_path):
    lines = [{"step": 1, "loss": 1.0, "cv": [0.5, None]}, {"step": 2, "loss": None}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    run = runs.read_run(tmp_path)
    assert run.series("loss")[0].tolist() == [1]
    np.testing.assert_array_equal(run.series("cv")[1], [[0.5, np.nan]])


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        (
            [
                {"balance.strategy": "none", "seed": 0},
                {"balance.strategy": "v3", "seed": 0, "balance.alpha": 1e-4},
                {"balance.strategy": "v3", "seed": 1, "balance.alpha": 1e-4},
            ],
            ["none", "v3", "v3"],
        ),
        (
            [
                {"balance.strategy": "loss_free", "balance.speed": u, "seed": s}
                for u in (0.0, 1e-3)
                for s in (0, 1)
            ],
            ["speed=0", "speed=0", "speed=0.001", "speed=0.001"],
        ),
        (
            [
                {"balance.strategy": "none"},
                {"balance.strategy": "v3", "balance.speed": 1e-2},
                {"balance.strategy": "v3", "balance.speed": 1e-3},
            ],
            ["none", "v3 speed=0.01", "v3 speed=0.001"],
        ),
    ],
)
def test_labels_say_what_a_study_compares(overrides, labels, tmp_path):
    found = [
        runs.Run(f"r{i}", tmp_path, overrides=each) for i, each in enumerate(overrides)
    ]
    assert [run.label for run in runs.with_labels(found)] == labels


def test_a_sweep_is_read_in_every_state(tmp_path):
    synthetic.write_sweep(tmp_path, ("none", "v3"), seeds=2)
    rows = json.loads((tmp_path / "summary.json").read_text())
    for row, status in zip(rows, ("done", "failed", "running"), strict=False):
        row["status"] = status
    (tmp_path / "summary.json").write_text(json.dumps(rows[:3]))
    (tmp_path / "none-s1" / "log.txt").write_text(
        "$ first\nerror: of the first start\n$ second\nValueError: too odd\nbye\n"
    )
    (tmp_path / "v3-s1" / "metrics.jsonl").unlink()
    study = runs.read(tmp_path)
    assert [run.status for run in study.runs] == [
        "done",
        "failed",
        "running",
        "pending",
    ]
    assert study.runs[1].error == "ValueError: too odd"
    assert study.labels == ["none", "v3"]
    assert [run.name for run in study.of("v3")] == ["v3-s0", "v3-s1"]
    settled = [run.status for run in study.settled().runs]
    assert settled == ["done", "failed", "stopped", "pending"]


def test_a_summary_that_is_being_written_is_no_error(tmp_path):
    synthetic.write_sweep(tmp_path, ("v3",), seeds=1)
    (tmp_path / "summary.json").write_text("[{")
    assert [run.status for run in runs.read(tmp_path).runs] == ["pending"]


def test_a_single_run_is_a_study(tmp_path):
    path = synthetic.write_run(tmp_path / "mine", synthetic.config("aux_seq"))
    study = runs.read(path)
    assert (study.title, study.labels) == ("mine", ["aux_seq"])


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a sweep nor a run"):
        runs.read(tmp_path)


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        ("$ run\n", ""),
        ("step 1\rstep 2\nerror: no space\n", "error: no space"),
        ("Traceback\n  line\nKeyError: 'x'\nwarning\n", "KeyError: 'x'"),
        ("$ run\nsays nothing more", "says nothing more"),
    ],
)
def test_last_error(log, error, tmp_path):
    (tmp_path / "log.txt").write_text(log)
    assert runs.last_error(tmp_path / "log.txt") == error


def test_no_log_is_no_error(tmp_path):
    assert runs.last_error(tmp_path / "log.txt") == ""


def test_a_run_is_not_changed_by_a_label(tmp_path):
    run = runs.read_run(synthetic.write_run(tmp_path / "a", synthetic.config()))
    assert run.final  # cached
    assert replace(run, label="x").final == run.final


def test_runs_from_anywhere_make_a_study_of_their_differences(tmp_path):
    configs = {
        "a": synthetic.config("none"),
        "b": synthetic.config("v3"),
        "c": synthetic.config("v3", seed=1),
        "d": synthetic.config("v3", steps=20),
    }
    paths = [synthetic.write_run(tmp_path / n / n, c) for n, c in configs.items()]
    study = runs.gather(paths[:3], "three")
    assert [run.label for run in study.runs] == ["none", "v3", "v3"]
    assert study.runs[2].overrides == {"balance.strategy": "v3", "seed": 1}
    labels = [run.label for run in runs.gather(paths[1:], "lengths").runs]
    assert labels[0] != labels[2] and "steps=20" in labels[2]


def test_gathered_runs_need_names_of_their_own(tmp_path):
    for paths in ([], [tmp_path / "x" / "a", tmp_path / "y" / "a"]):
        with pytest.raises(ValueError, match="different names"):
            runs.gather(paths, "t")
