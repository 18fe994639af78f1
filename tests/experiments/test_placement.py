"""The command `placement`: from a run's metrics to a table, JSON and a picture."""

import json

import numpy as np
import pytest

from deepseek_jax.parallel import eplb
from experiments import common, evaluate

EARLY = [[16, 2, 2, 2, 2, 2, 2, 4], [4] * 8]
LATE = [[12, 6, 2, 2, 2, 2, 2, 4], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture
def workdir(tmp_path):
    """What a run leaves behind, as far as the command reads it."""
    model = {"num_layers": 2, "num_dense": 1, "moe": {"num_groups": 2}}
    config = {"model": {**model, "mtp": {"depth": 1}}, "train": {"steps": 20}}
    run = tmp_path / "run"
    for step in (10, 20):
        (run / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": config}))
    by_domain = {"code": LATE[:1] + EARLY[1:]}
    write_metrics(
        run,
        {"step": 5, "loss": 3.0},
        {"step": 10, "eval_ce": 3.0, "eval_load": EARLY},
        {"step": 15, "eval_ce": 2.5, "eval_load": []},
        {
            "step": 20,
            "eval_ce": 2.0,
            "eval_load": LATE,
            "eval_load_by_domain": by_domain,
        },
    )
    return run


def write_metrics(run, *records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines)


def refused(capsys, words):
    with pytest.raises(SystemExit) as stop:
        common.guarded(evaluate.main, words)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert stop.value.code == common.BAD_INPUT
    return message


def measured(workdir, *words):
    out = workdir.parent / "new" / "placement.json"
    command = ["placement", "--checkpoint", str(workdir), "--json", str(out), *words]
    evaluate.main(command)
    return json.loads(out.read_text())


def test_the_last_evaluation_of_a_run(workdir, capsys):
    picture = workdir.parent / "placement.png"
    words = ["--devices=4", "--nodes=2", "--plot", str(picture)]
    made = measured(workdir, *words)
    sizes = {"devices": 4, "nodes": 2, "replicas": 12, "groups": 2, "experts": 8}
    assert made["step"] == 20 and made["sizes"] == sizes
    placed = eplb.place(LATE, 12, devices=4, nodes=2, groups=2)
    after = eplb.imbalance(eplb.device_loads(LATE, placed, 4))
    before = [4 * 18 / 32, 4 * 15 / 36]
    expert, names = [3, 16 / 9], ["layer 2", "MTP 1"]
    assert [found["layer"] for found in made["layers"]] == names
    for at, found in enumerate(made["layers"]):
        assert found["places"] == placed.phy2log[at].tolist()
        ratios = [found["expert"], found["before"], found["after"]]
        assert ratios == pytest.approx([expert[at], before[at], after[at]])
    assert made["mean"] == pytest.approx(
        {"before": np.mean(before), "after": after.mean()}
    )
    assert made["domains"].keys() == {"code"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["expert", "before", "after"]
    assert printed[1].split() == ["layer", "2", "3.000", "2.250", f"{after[0]:.3f}"]
    assert [line[:7] for line in printed[3:]] == ["mean   ", "on code"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_earlier_checkpoint(workdir):
    made = measured(workdir / "checkpoints" / "10", "--devices=2", "--groups=1")
    assert made["step"] == 10 and made["sizes"]["groups"] == 1
    assert made["layers"][0]["expert"] == 4 and made["domains"] == {}
    assert measured(workdir / "checkpoints", "--devices=2")["step"] == 20


def test_placed_by_an_earlier_evaluation(workdir, capsys):
    made = measured(workdir, "--devices=4", "--groups=1", "--placed-by=10")
    assert made["step"] == 20 and made["placed_by"] == 10
    stale = eplb.place(EARLY, 12, devices=4)
    after = eplb.imbalance(eplb.device_loads(LATE, stale, 4))
    assert [found["after"] for found in made["layers"]] == pytest.approx(after)
    best = measured(workdir, "--devices=4", "--groups=1")
    assert best["placed_by"] == 20 and best["mean"]["after"] < made["mean"]["after"]
    given = ["placement", "--checkpoint", str(workdir), "--placed-by=15"]
    assert "--placed-by 15: must be a step with" in refused(capsys, given)


def test_more_devices_than_experts(workdir):
    made = measured(workdir, "--devices=16")
    assert made["sizes"]["replicas"] == 16
    assert made["mean"]["before"] is None and made["mean"]["after"] >= 1


def test_a_layer_without_load(workdir, capsys):
    loads = [[0] * 8, LATE[1]]
    write_metrics(workdir, {"step": 20, "eval_ce": 2.0, "eval_load": loads})
    first = measured(workdir, "--devices=2")["layers"][0]
    assert first["expert"] is first["before"] is first["after"] is None
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices=0"], "--devices 0: must be at least 1"),
        (["--devices=4", "--replicas=10"], "replicas = 10: must be a multiple"),
        (["--devices=4", "--nodes=3"], "nodes = 3: must divide the 4 devices"),
        (["--devices=4", "--groups=3"], "groups = 3: must divide the 8 experts"),
        (["--devices=x"], "--devices"),
    ],
)
def test_sizes_that_do_not_fit(words, message, workdir, capsys):
    given = ["placement", "--checkpoint", str(workdir), *words]
    assert message in refused(capsys, given)


def test_runs_without_loads(workdir, tmp_path, capsys):
    given = ["placement", "--checkpoint"]
    assert "is not there" in refused(capsys, [*given, str(tmp_path / "none")])
    folder = ["--json", str(tmp_path)]
    assert "is a folder" in refused(capsys, [*given, str(workdir), *folder])
    write_metrics(workdir, {"step": 5, "loss": 3.0})
    assert "no measured loads" in refused(capsys, [*given, str(workdir)])
    (workdir / "metrics.jsonl").unlink()
    step = str(workdir / "checkpoints" / "10")
    assert "no measured loads up to step 10" in refused(capsys, [*given, step])
