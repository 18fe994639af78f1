"""The command for GPU machines: parts, budgets, refusals, and what it compares."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, gpu_training, gpu_wheels
from deepseek_jax.config import Config, flatten, to_dict
from pallas_kernels.bench_cases import OPERATIONS

EVERY = [(name, part) for name in gpu.PARTS for part in gpu.PARTS[name]]


@pytest.mark.parametrize(("device", "part"), EVERY)
def test_a_part_is_a_command_of_ours(device, part):
    folders = dict.fromkeys(("out", "runs", "data"), "x")
    words = shlex.split(part.command.format(**folders))
    assert words[0] == "-m" and importlib.util.find_spec(words[1])
    known = flatten(to_dict(Config()))
    named = re.findall(r"--config\.([\w.]+)=", part.command)
    assert set(named) <= set(known)
    if words[1].startswith("experiments"):
        assert named
    if "--ops" in words:
        assert words[words.index("--ops") + 1] in OPERATIONS


def test_all_parts_fit_into_eight_minutes():
    """With half a minute for what comes before."""
    assert sum(part.seconds for part in gpu.PARTS["hopper"]) <= gpu.TOTAL - 30
    names = [[part.name for part in parts] for parts in gpu.PARTS.values()]
    assert names[0] == names[1]


def run(tmp_path, code, seconds):
    part = gpu.Part("it", seconds, f"-c {shlex.quote(code)}")
    return gpu.run(part, part.seconds, {"runs": tmp_path}, {"HELLO": "there"})


def test_a_part_s_output_and_end_are_kept(tmp_path):
    row, output = run(tmp_path, "import os; print(os.environ['HELLO'])", 30)
    assert (row["state"], row["says"], output) == ("ok", ["there"], "there\n")
    row, _ = run(tmp_path, "import sys; sys.exit('/some/where/x.py: no')", 30)
    assert (row["state"], row["says"]) == ("failed", ["x.py: no"])


SLEEPS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_part_beyond_its_budget_is_cut_with_all_that_it_started(tmp_path):
    begun = time.monotonic()
    row, output = run(tmp_path, SLEEPS, 2)
    assert row["state"] == "cut" and row["says"]
    assert time.monotonic() - begun < 2 + 2 * gpu.GRACE
    listed = subprocess.run(
        ["ps", "-o", "stat=", "-p", output.strip()], capture_output=True, text=True
    )
    assert listed.stdout.strip()[:1] in ("", "Z")


def test_without_a_gpu_it_refuses_in_one_line(capsys):
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match(r"error: .*Hopper.*'cpu'.*--device=cpu", err)


def test_without_the_text_it_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    found = {"device": "NVIDIA H200", "jax": "0.11.2"}
    monkeypatch.setattr(gpu, "probe", lambda device: found)
    assert gpu.main(["--wheels", str(tmp_path)]) == 2
    assert "make gpu-wheels" in capsys.readouterr().err


def test_wheels_of_what_is_there_are_left_alone(tmp_path):
    names = (
        f"pytest-{pytest.__version__}-py3-none-any.whl",
        "pytest-1.0-py3-none-any.whl",
        "pytest-999.0-py3-none-any.whl",
        "no_such_package-1.0-py3-none-any.whl",
    )
    wheels = [tmp_path / name for name in names]
    assert gpu.lacking(wheels) == wheels[2:]


def test_every_wheel_is_pinned():
    pinned = gpu_wheels.pinned()
    assert len(pinned) == len(gpu_wheels.PACKAGES)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", each) for each in pinned)


def a_run(folder, losses, corpus="a" * 64):
    config = to_dict(Config())
    about = {"config": config, "corpus": {"hash": corpus}, "runtime": {"device": "cpu"}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    records = [
        {"step": i + 1, "loss": loss, "tokens_per_s": 1.0 if i < 10 else 100.0}
        for i, loss in enumerate(losses)
    ]
    records.append({"step": len(losses), "eval_ce": 1.0})
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_last_steps_decide_how_far_apart_losses_are(tmp_path):
    reference = tmp_path / "reference.json"
    gpu_training.keep(a_run(tmp_path / "cpu", [9.0] * 20 + [4.0] * 230), reference)
    kept = json.loads(reference.read_text())
    assert len(kept["loss"]) == gpu_training.STEPS
    near = a_run(tmp_path / "near", [1.0] * 180 + [4.02] * 20)
    assert gpu_training.apart(near, kept)["apart"] == pytest.approx(0.005)
    other = a_run(tmp_path / "other", [4.0] * 200, corpus="b" * 64)
    with pytest.raises(ValueError, match="bbbbbbbbbbbb: must be aaaaaaaaaaaa"):
        gpu_training.apart(other, kept)
    short = a_run(tmp_path / "short", [4.0] * 5)
    with pytest.raises(ValueError, match="5 steps"):
        gpu_training.apart(short, kept)


@pytest.mark.parametrize(("loss", "code"), [(4.03, 0), (4.05, 1)])
def test_the_command_fails_beyond_one_percent(tmp_path, monkeypatch, loss, code):
    gpu_training.keep(a_run(tmp_path / "cpu", [4.0] * 200), tmp_path / "reference.json")
    folder = a_run(tmp_path / "run", [loss] * 200)
    words = [str(folder), "--reference", str(tmp_path / "reference.json")]
    monkeypatch.setattr(sys, "argv", ["gpu_training", *words])
    assert gpu_training.main() == code


def test_utilisation_is_of_the_measured_rate(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"rates": {"flops": 1e12}}))
    (tmp_path / "summary.json").write_text("{}")
    rate = gpu_training.rate_of(tmp_path)
    found = gpu_training.measured(a_run(tmp_path / "run", [4.0] * 30), rate)
    assert (rate, found["tokens_per_s"]) == (1e12, 100.0)
    # Six operations for every active weight, more for attention.
    assert found["utilisation"] == pytest.approx(found["tflops"])
    assert 0.95 < found["tflops"] * 1e12 / (6 * 37e9 * 100) < 1.2


@pytest.mark.slow
def test_all_parts_run_at_tiny_sizes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", "--out"]
    done = subprocess.run([*command, tmp_path], cwd=gpu.ROOT, timeout=500)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert done.returncode == 0, summary
    assert [part["state"] for part in summary["parts"]] == ["ok"] * 6
    runs = json.loads((tmp_path / "mini.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["kernels", "xla"]


def test_late_parts_get_what_is_left():
    part, now = gpu.PARTS["hopper"][0], time.monotonic()
    assert gpu.seconds_left(part, now) == part.seconds
    late = now - (gpu.TOTAL - 2 * gpu.GRACE - 3)
    assert 2 < gpu.seconds_left(part, late) <= 3
    assert gpu.seconds_left(part, now - gpu.TOTAL) == 0
