"""`generate --mesh`: the same text from several devices, and what is refused."""

import json
import re

import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.decode import engine
from deepseek_jax.parallel import eplb
from experiments import common, generate, spread
from tests.experiments.test_generate import checkpoint, expected, words

ROUTERS, EXPERTS, GROUPS = 4, 8, 4
LOADS = np.random.default_rng(0).integers(1, 100, (ROUTERS, EXPERTS)).tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was evaluated."""
    workdir = checkpoint(tmp_path_factory.mktemp("runs") / "run", depth=2)
    record = {"step": 3, "eval_ce": 2.0, "eval_load": LOADS}
    (workdir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return workdir


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("runs") / "run", depth=2)


def imbalance(placement):
    return eplb.imbalance(eplb.device_loads(LOADS, placement, 8)).mean()


def test_copies_by_measured_loads(run, capsys):
    """Of the text nothing changes; JSON says how many places there are, and why."""
    given = ("--json", "--mesh=node=2,expert=4", "--replicas=16", "--n=8")
    generate.main(words(run, *given))
    out, errors = capsys.readouterr()
    found, row = json.loads(out), expected(run)
    assert errors == ""
    assert [each["tokens"] for each in found["samples"]] == [row.tokens] * 8
    for sample in found["samples"]:
        np.testing.assert_allclose(sample["log_probs"], row.log_probs, atol=1e-5)
    about = found["mesh"]
    placed = eplb.place(LOADS, 16, devices=8, nodes=2, groups=GROUPS)
    before, after = about.pop("load_before"), about.pop("load_after")
    assert before == pytest.approx(imbalance(eplb.contiguous(ROUTERS, EXPERTS)))
    assert after == pytest.approx(imbalance(placed)) and after < before
    assert about == {
        "axes": {"data": 1, "node": 2, "expert": 4},
        "devices": 8,
        "experts": EXPERTS,
        "places": 16,
        "step": 3,
    }


class Enough(Exception):
    """Ends a command where generation would begin."""


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        (
            "run",
            ["--mesh=expert=8", "--replicas=16"],
            r"8 devices, 16 places of 8 experts; busiest device's load 1\.\d\d -> "
            r"1\.\d\d of the mean, by step 3's evaluation",
        ),
        ("run", ["--mesh=data=2,expert=4"], r".* 8 places .* load (\d\.\d\d) -> \1 .*"),
        ("unmeasured", ["--mesh=expert=8"], r".* load unknown, none was measured"),
    ],
)
def test_a_line_for_people(name, given, line, request, capsys, monkeypatch):
    def stop(*args, **how):
        raise Enough

    monkeypatch.setattr(engine, "generate", stop)
    with pytest.raises(Enough):
        generate.main(words(request.getfixturevalue(name), "--n=8", *given))
    first, second = capsys.readouterr().err.splitlines()
    assert second == "compiling"
    assert re.fullmatch(line, first), first


def test_buffers_have_room_for_any_routing():
    want = MeshConfig(node=2, expert=4, data=3, capacity=8.0)
    assert spread.parse("node=2, expert=4,data=3") == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mesh=tensor=8"], "there is no axis 'tensor'"),
        (["--mesh=expert"], "'expert' must be a number of devices"),
        (["--mesh=expert=0"], "'expert=0' must be a number of devices"),
        (["--mesh=expert=4,expert=2"], "once for each axis"),
        (["--mesh=expert=4"], "make 4 devices: there are 8"),
        (["--mesh=expert=8", "--n=6"], "--n 6: must be a multiple of the 8 devices"),
        (["--mesh=expert=8", "--page=4"], "page = 4: must be 0 on a mesh"),
        (["--mesh=expert=8", "--replicas=12"], "replicas = 12: must be a multiple"),
        (["--mesh=expert=8", "--replicas=0"], "replicas = 0: must be a multiple"),
        (["--replicas=8"], "--replicas 8: needs --mesh"),
    ],
)
def test_bad_input_is_one_line(run, given, message, capsys, monkeypatch):
    monkeypatch.setattr(generate.deepseek_jax, "load", pytest.fail)
    with pytest.raises(SystemExit) as stop:
        common.guarded(generate.main, words(run, n=8) + given)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in errors and errors.count("\n") == 1, errors


def test_copies_need_measured_loads(unmeasured, capsys, monkeypatch):
    monkeypatch.setattr(generate.deepseek_jax, "load", pytest.fail)
    given = ["--mesh=expert=8", "--replicas=16", "--n=8"]
    with pytest.raises(SystemExit):
        common.guarded(generate.main, words(unmeasured, *given))
    assert "has no measured loads" in capsys.readouterr().err
