"""Sweeps on Slurm without Slurm: the script, run by bash; refusals; what status says.

Slurm's commands are small scripts on the PATH here; `tests/slurm` has the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import report, sweep
from experiments.launch import control, ended, local, plan, script, slurm, watch
from experiments.launch.script import Resources, in_words, ranges, seconds
from tests.analysis import synthetic
from tests.experiments.test_sweep import ROOT, points

TINY = "experiments/configs/tiny.py"
ONE = {"name": "a", "train.steps": 8}
TWO = {"name": "b-b", "data.source": "my text.txt", "train.steps": 8}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(plan, "open_corpora", lambda _: None)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts commands on the PATH, which else has what every system has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    real = slurm.shutil.which

    def which(name):  # a machine with Slurm counts as one without
        found = real(name)
        return found if found and Path(found).parent == folder else None

    monkeypatch.setattr(slurm.shutil, "which", which)

    def put(**scripts: str) -> None:
        for name, text in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)

    return put


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "sweep_file.py"
    path.write_text(points(ONE, TWO, config=f"{TINY}:smoke"))
    return str(path)


def command_line(spec: str, workdir: Path, *more: str) -> int:
    cpus = ("--gpus-per-run=0",)
    arguments = (f"--sweep={spec}", f"--workdir={workdir}", "--launcher=slurm")
    return sweep.main([*arguments, *(more or cpus)])


def dry(spec: str, workdir: Path, *more: str) -> str:
    assert (
        command_line(spec, workdir, "--dry-run", *(more or ("--gpus-per-run=0",))) == 0
    )
    return (workdir / "sweep.sbatch").read_text()


def directives(text: str) -> dict[str, str]:
    start = "#SBATCH --"
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return dict(line.removeprefix(start).partition("=")[::2] for line in lines)


def test_a_dry_run_writes_the_script_and_needs_no_slurm(
    spec, tmp_path, commands, capsys
):
    workdir = tmp_path / "out"
    found = directives(dry(spec, workdir))
    said = capsys.readouterr().out
    assert f"sbatch {workdir}/sweep.sbatch" in said
    assert "each run for 4 h, told to save 2 min before" in said
    assert found == {
        "job-name": "out",
        "comment": str(workdir),
        "array": "0-1",
        "nodes": "1",
        "ntasks-per-node": "1",
        "time": "4:00:00",
        "signal": "TERM@120",
        "requeue": "",
        "open-mode": "append",
        "output": f"{workdir}/slurm.out",
    }
    assert {path.name for path in workdir.iterdir()} == {
        *("sweep.sbatch", "sweep.json", ".lock")
    }
    before = (workdir / "sweep.json").read_bytes()
    dry(spec, workdir)
    assert (workdir / "sweep.json").read_bytes() == before


@pytest.mark.parametrize("there", [True, False])
def test_a_note_if_jax_has_no_cuda_here(there, spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "CUDA", ("jax" if there else "jax_cuda0_plugin",))
    dry(spec, tmp_path / "cpus")
    assert capsys.readouterr().err == ""
    dry(spec, tmp_path / "gpus", "--gpus-per-run=1")
    assert ("JAX has no CUDA in this environment" in capsys.readouterr().err) != there


def test_what_runs_get(tmp_path, commands):
    path = tmp_path / "sweep_file.py"
    path.write_text(points(ONE | {"mesh.expert": 8}))
    more = (
        *("--gpus-per-run=8", "--nodes-per-run=2", "--time=1-0", "--partition=h100"),
        *("--array-parallelism=16", "--cpus-per-process=4", "--save-seconds=300"),
        *("--sbatch=account=lab", "--sbatch=exclusive"),
    )
    text = dry(str(path), tmp_path / "out", *more)
    found = directives(text)
    assert (
        found
        | {
            "array": "0%16",
            "nodes": "2",
            "ntasks-per-node": "4",
            "gpus-per-node": "4",
            "cpus-per-task": "4",
            "partition": "h100",
            "time": "1-0",
            "signal": "TERM@300",
            "account": "lab",
            "exclusive": "",
        }
        == found
    )
    assert "export JAX_PLATFORMS=cuda,cpu\n" in text
    assert script.parallelism(text) == 16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus-per-run=-1"], "--gpus-per-run=-1: must be 0 or more"),
        (["--nodes-per-run=0"], "--nodes-per-run=0: must be 1 or more"),
        (["--gpus-per-run=2", "--processes-per-run=2"], "is for --gpus-per-run=0"),
        (
            ["--gpus-per-run=3", "--nodes-per-run=2"],
            "--gpus-per-run=3: must be a multiple of --nodes-per-run=2",
        ),
        (["--time=soon"], "--time=soon: must be minutes, minutes:seconds"),
        (["--time=2:00"], "--time=2:00: is 120 s, and must be more than --save-seco"),
        (["--sbatch=--account=x"], "must be an option of sbatch without its dashes"),
        (["--workers=2"], "--workers is for --launcher=local"),
        (["--launcher=local"], "--time: needs --launcher=slurm"),
        (["--launcher=kubernetes"], "invalid choice: 'kubernetes'"),
        (
            ["--gpus-per-run=8"],
            "run a: its mesh has 1 devices, and it would get 8; change mesh in the "
            "sweep, or --gpus-per-run",
        ),
        (["--gpus-per-run=0", "--processes-per-run=2"], "or --processes-per-run"),
        (["--gpus-per-run=0"], "there is no sbatch on the PATH: run this where Slurm"),
    ],
)
def test_what_is_refused(more, message, spec, tmp_path, commands):
    with pytest.raises(ValueError) as error:
        command_line(spec, tmp_path / "out", "--time=2:00:00", *more)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--time=1:00:00", "--sbatch=account=lab"])
def test_an_option_of_slurm_alone_is_named(flag, spec, tmp_path):
    wanted = f"{flag.partition('=')[0]}: needs --launcher=slurm"
    with pytest.raises(ValueError, match=wanted):
        sweep.main([f"--sweep={spec}", f"--workdir={tmp_path / 'out'}", flag])
    assert not (tmp_path / "out").exists()


SINFO = "echo debug; echo gpu"
SBATCH = """
echo "$@" >>"$(dirname "$0")/calls"
if [[ $* == *--test-only* ]]; then
    cat >"$(dirname "$0")/tested"
    [ -z "$REFUSE" ] || { echo "sbatch: error: $REFUSE" >&2; exit 1; }
else
    echo 12
fi
"""


def calls(tmp_path):
    path = tmp_path / "bin" / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("more", "refuse", "message"),
    [
        (
            ["--partition=nope"],
            "",
            "--partition=nope: Slurm has no nope, but debug, gpu",
        ),
        (["--partition=gpu"], "Invalid account", "sbatch refuses: error: Invalid acco"),
    ],
)
def test_what_slurm_refuses(
    more, refuse, message, spec, tmp_path, commands, monkeypatch
):
    commands(sinfo=SINFO, sbatch=SBATCH, squeue="")
    monkeypatch.setenv("REFUSE", refuse)
    with pytest.raises(ValueError, match=message):
        command_line(spec, tmp_path / "out", "--gpus-per-run=0", *more)
    assert not (tmp_path / "out").exists()
    assert not [call for call in calls(tmp_path) if "--array" in call]


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"kind": "tr')


def another_run(folder: Path) -> None:
    (item,) = (each for each in plan.load(SPEC[0]).items if each.name == folder.name)
    config = item.record()["config"] | {"seed": 7}
    saved = {"kind": "train", "config": config}
    (folder / "config.json").write_text(json.dumps(saved))


def damage_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')


def a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("")


SPEC: list[str] = []


@pytest.mark.parametrize("launcher", ["local", "slurm"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "run a: .*config.json is damaged"),
        (another_run, "run a: .* holds another run: seed = 7 there, 0 here"),
        (damage_metrics, "run a: .*metrics.jsonl, line 2: no JSON object"),
        (a_file, "run a: workdir .* is a file, not a folder"),
    ],
)
def test_damaged_runs_are_refused(damage, message, launcher, spec, tmp_path, commands):
    SPEC[:] = [spec]
    folder = tmp_path / "out" / "a"
    folder.mkdir(parents=True)
    damage(folder)
    files = sorted(path for path in folder.rglob("*"))
    commands(sinfo=SINFO, sbatch=SBATCH, squeue="")
    arguments = [f"--sweep={spec}", f"--workdir={tmp_path / 'out'}"]
    if launcher == "slurm":
        arguments += ["--launcher=slurm", "--gpus-per-run=0"]
    with pytest.raises(ValueError, match=message):
        sweep.main(arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert sorted(path for path in folder.rglob("*")) == files
    assert calls(tmp_path) == []


def test_another_sweep_and_a_damaged_one_are_refused(spec, tmp_path, commands):
    workdir = tmp_path / "out"
    dry(spec, workdir)
    commands(sinfo=SINFO, sbatch=SBATCH, squeue="")
    Path(spec).write_text(points(ONE | {"seed": 5}, TWO, config=f"{TINY}:smoke"))
    before = (workdir / "sweep.sbatch").read_text()
    with pytest.raises(ValueError, match=r"another sweep: run 'a' has seed = 0 there"):
        command_line(spec, workdir)
    assert (workdir / "sweep.sbatch").read_text() == before
    (workdir / "sweep.json").write_text("{")
    for arguments in (["status", str(workdir)], ["retry", str(workdir)]):
        with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
            sweep.main(arguments)
    assert not [call for call in calls(tmp_path) if "--array" in call]


def queued(workdir: Path, *tasks: str) -> str:
    return "\n".join(f"echo '{task}|{workdir}'" for task in tasks)


def finish(workdir: Path, name: str) -> None:
    """Makes a run's folder that of a finished one."""
    [item] = [each for each in plan.read(workdir).items if each.name == name]
    folder = workdir / name
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(record) + "\n" for record in synthetic.records(item.config))
    (folder / "metrics.jsonl").write_text("".join(lines))


def events(workdir: Path, name: str, *each: tuple[str, int]) -> Path:
    folder = workdir / name
    folder.mkdir(exist_ok=True)
    known = {"job": "12_0", "node": "n1", "time": int(time.time())}
    with (folder / "slurm.jsonl").open("a") as file:
        for event, code in each:
            file.write(json.dumps({"event": event, "code": code} | known) + "\n")
    return folder


def test_what_is_done_or_in_the_queue_is_not_submitted(
    spec, tmp_path, commands, capsys
):
    workdir = tmp_path / "out"
    commands(sinfo=SINFO, sbatch=SBATCH, squeue="")
    options = ("--gpus-per-run=0", "--array-parallelism=3")
    script_ = f"{workdir}/sweep.sbatch"
    assert command_line(spec, workdir, *options) == 0
    assert calls(tmp_path) == [
        "--test-only",
        f"--parsable --array=0-1%3 {script_}",
    ]
    tested = (tmp_path / "bin" / "tested").read_text()
    assert tested == (workdir / "sweep.sbatch").read_text()
    assert "job 12: a, b-b" in capsys.readouterr().out
    finish(workdir, "a")
    command_line(spec, workdir, *options)
    assert calls(tmp_path)[-1] == f"--parsable --array=1%3 {script_}"
    commands(squeue=queued(workdir, "1|12|PENDING||Priority"))
    before = calls(tmp_path)
    command_line(spec, workdir, *options)
    assert calls(tmp_path) == [*before, "--test-only"]
    assert "0 of 2 runs submitted" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of its runs are in Slurm's queue"):
        sweep.main([f"--sweep={spec}", f"--workdir={workdir}"])
    added = points(ONE, {"name": "c"}, TWO, config=f"{TINY}:smoke")
    Path(spec).write_text(added)
    with pytest.raises(ValueError, match="other runs than those in Slurm's queue"):
        command_line(spec, workdir, *options)
    assert len(plan.read(workdir).items) == 2


def test_a_local_sweep_goes_on_where_slurm_has_no_cluster(
    spec, tmp_path, commands, capsys, monkeypatch
):
    workdir, told = tmp_path / "out", []
    dry(spec, workdir)
    commands(squeue="echo 'squeue: error: no controller' >&2; exit 1")

    def run(planned, folder, *_, **__):
        """Told to end while it runs."""
        found = iter([watch.runner(folder), None])
        with monkeypatch.context() as patch:
            patch.setattr(watch, "runner", lambda _: next(found))
            patch.setattr(os, "kill", lambda *to: told.append(to))
            assert sweep.main(["cancel", str(folder)]) == 0
        return 130

    monkeypatch.setattr(local, "run", run)
    assert sweep.main([f"--sweep={spec}", f"--workdir={workdir}"]) == 130
    assert told == [(os.getpid(), signal.SIGTERM)]
    said = capsys.readouterr().err
    assert "note: not known if the sweep is in Slurm's queue: squeue refuses" in said
    events(workdir, "a", ("start", 0))
    with pytest.raises(ValueError, match="runs of it have been in Slurm, which can't"):
        sweep.main([f"--sweep={spec}", f"--workdir={workdir}"])


def statuses(workdir: Path) -> dict[str, tuple[str, str]]:
    return {
        each.run.name: (each.run.status, each.note) for each in watch.look(workdir)[0]
    }


def test_status_says_where_each_run_stands(spec, tmp_path, commands, capsys):
    workdir = tmp_path / "out"
    dry(spec, workdir)
    commands(squeue="")
    none = ("pending", "not started")
    assert statuses(workdir) == {"a": none, "b-b": none}
    other = f"echo '0|9|RUNNING|n1|None|{workdir}2'"
    mine = queued(workdir, "0|12|RUNNING|n[1-2]|None", "1|12|PENDING||Priority")
    commands(squeue=f"{other}\n{mine}")
    events(workdir, "a", ("start", 0))
    assert statuses(workdir) == {
        "a": ("running", "job 12_0 on n[1-2]"),
        "b-b": ("pending", "job 12_1 in the queue (Priority)"),
    }
    assert sweep.main(["status", str(workdir)]) == 0
    said = capsys.readouterr().out
    assert "2 runs: 1 running, 1 pending" in said
    rows = json.loads((workdir / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["running", "pending"]
    commands(squeue="")
    assert statuses(workdir)["a"][0] == "failed"
    assert "gone without a word" in statuses(workdir)["a"][1]
    folder = events(workdir, "a", ("end", 1))
    (folder / "log.txt").write_text("$ x\nerror: the disk is full\nsrun: error: b\n")
    assert statuses(workdir)["a"] == ("failed", "error: the disk is full")
    events(workdir, "a", ("start", 0), ("end", 130))
    assert statuses(workdir)["a"] == ("pending", "stopped by a signal")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert statuses(workdir)["a"] == ("stopped", "stopped by a signal")
    events(workdir, "a", ("start", 0), ("requeue", 130))
    assert statuses(workdir)["a"] == ("stopped", "cancelled while it waited to go on")
    finish(workdir, "a")
    status, note = statuses(workdir)["a"]
    assert status == "done" and note.startswith("validation loss ")


def test_without_slurm_status_goes_by_the_folders(spec, tmp_path, commands, capsys):
    workdir = tmp_path / "out"
    dry(spec, workdir)
    events(workdir, "a", ("start", 0))
    assert statuses(workdir)["a"] == ("running", "job 12_0 on n1, by its last word")
    sweep.main(["status", str(workdir)])
    assert "there is no squeue on the PATH" in capsys.readouterr().err
    assert not (workdir / "summary.json").exists()
    for verb in ("retry", "cancel"):
        with pytest.raises(
            ValueError, match=r"there is no (squeue|sbatch) on the PATH"
        ):
            sweep.main([verb, str(workdir)])


def test_eta_and_silence(spec, tmp_path, commands):
    workdir = tmp_path / "out"
    dry(spec, workdir)
    commands(squeue=queued(workdir, "0|12|RUNNING|n1|None", "1|12|PENDING||Priority"))
    finish(workdir, "a")
    metrics = workdir / "a" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    config = plan.read(workdir).items[0].config
    tokens = config.data.batch * config.data.length
    told = {"tokens_per_s": tokens / 3}
    early = [
        r | told | {"elapsed_s": 40 + 3 * r["step"]} for r in records if r["step"] <= 5
    ]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in early))
    os.utime(metrics, (time.time() - 100,) * 2)
    standings, _ = watch.look(workdir)
    first, second = standings
    assert (first.left, first.step_s) == (3, pytest.approx(3.0))
    assert 99 < first.silent_s < 160 and second.silent_s is None
    # The one that waits has a program to compile, too.
    assert watch.eta_s(standings) == pytest.approx(3 * 3 + 8 * 3 + 43)
    line = watch.text(standings).splitlines()[1].split()
    assert line[:4] == ["a", "running", "5/8", "0:09"]


def test_cancel_and_retry(spec, tmp_path, commands, capsys):
    workdir = tmp_path / "out"
    dry(spec, workdir, "--gpus-per-run=0", "--array-parallelism=2")
    note = 'echo "$@" >>"$(dirname "$0")/calls"'
    tasks = queued(workdir, "0|12|RUNNING|n1|None", "1|12|PENDING||Priority")
    commands(squeue=tasks, scancel=note, scontrol=note, sbatch=SBATCH)
    sweep.main(["retry", str(workdir)])
    assert calls(tmp_path) == []
    sweep.main(["cancel", str(workdir)])
    ended_ = ["12_1", "update JobId=12_0 Requeue=0", "--signal=TERM 12_0"]
    assert calls(tmp_path) == ended_
    commands(squeue="")
    sweep.main(["cancel", str(workdir)])
    assert "nothing of" in capsys.readouterr().out
    events(workdir, "a", ("start", 0), ("end", 1))
    sweep.main(["retry", str(workdir), "--failed"])
    sweep.main(["retry", str(workdir)])
    path = workdir / "sweep.sbatch"
    assert calls(tmp_path)[3:] == [
        f"--parsable --array=0%2 {path}",
        f"--parsable --array=0-1%2 {path}",
    ]


# Runs the train command of a script as the environment CODE and SAVES say.
SRUN = """
while [[ $1 == --* ]]; do echo "$1" >>"$0.said"; shift; done
printf '%s\\n' "$@" >"$0.words"
run=$(printf '%s\\n' "$@" | sed -n 's/^--workdir=//p')
[ -z "$SAVES" ] || mkdir -p "$run/checkpoints/$SAVES"
[ -z "$SAYS" ] || echo "$SAYS"
exit $CODE
"""


SCONTROL = """
case $* in
    *show*) echo "X=1 JobState=${STATE:-RUNNING} Reason=None Requeue=${GOES:-1} Y=" ;;
    *) echo "$@" >>"$0.said" ;;
esac
"""


@pytest.fixture
def execute(spec, tmp_path, commands):
    """Runs the script as Slurm would; what it asked scontrol for, and its exit code."""
    workdir = tmp_path / "out"
    text = dry(spec, workdir)
    # Python's start is not what these tests are about: `ended` is called in them.
    quick = text.replace(f"python={sys.executable}", "python=$(command -v python)")
    (workdir / "sweep.sbatch").write_text(quick)
    commands(
        srun=SRUN,
        scontrol=SCONTROL,
        python='echo "$@" >>"$0.said"',
    )

    def execute(task: int, **environment: object) -> int:
        known = {
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": task,
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NTASKS": 1,
        }
        given = {k: str(v) for k, v in (known | environment).items()}
        done = subprocess.run(
            ["bash", workdir / "sweep.sbatch"],
            env=os.environ | given,
            capture_output=True,
            text=True,
        )
        assert done.stderr == "", done.stderr
        return done.returncode

    def asked(name: str) -> str:
        path = tmp_path / "bin" / name
        return path.read_text() if path.exists() else ""

    return execute, asked, workdir


def test_the_script_trains_what_was_checked(execute):
    run, asked, workdir = execute
    assert run(1, CODE=0) == 0
    words = asked("srun.words").splitlines()
    assert words[1:5] == [
        *("-m", "experiments.train", f"--config={TINY}:smoke"),
        f"--workdir={workdir}/b-b",
    ]
    assert words[5:] == ["--config.data.source=my text.txt", "--config.train.steps=8"]
    log = (workdir / "b-b" / "log.txt").read_text()
    assert log.startswith("$ ") and "experiments.train" in log
    found = [
        json.loads(line)
        for line in (workdir / "b-b" / "slurm.jsonl").read_text().splitlines()
    ]
    assert [(e["event"], e["code"], e["job"]) for e in found] == [
        ("start", 0, "12_1"),
        ("end", 0, "12_1"),
    ]
    assert abs(found[0]["time"] - time.time()) < 100
    assert asked("python.said") == f"-m experiments.launch.ended {workdir}/b-b 0\n"
    assert asked("scontrol.said") == ""


def test_several_processes_have_a_log_each(execute):
    run, asked, workdir = execute
    run(0, CODE=0, SLURM_NTASKS=2, SLURM_CPUS_PER_TASK=3)
    assert asked("srun.said").splitlines() == [
        *("--kill-on-bad-exit=0", "--wait=60"),
        *(f"--output={workdir}/a/log.%t.txt", "--open-mode=append"),
        "--cpus-per-task=3",
    ]
    for i in range(2):
        assert (workdir / "a" / f"log.{i}.txt").read_text().startswith("$ ")


@pytest.mark.parametrize(
    ("environment", "again"),
    [
        ({"CODE": 0}, False),
        ({"CODE": 1}, False),
        ({"CODE": 2}, False),
        ({"CODE": 130}, True),  # saved
        ({"CODE": 130, "SLURM_RESTART_COUNT": 50}, True),
        ({"CODE": 130, "STATE": "COMPLETING"}, False),  # scancel
        ({"CODE": 130, "GOES": 0}, False),  # experiments.sweep cancel
        ({"CODE": 137, "SLURM_RESTART_COUNT": 1}, True),
        ({"CODE": 137, "SLURM_RESTART_COUNT": 2}, False),
        ({"CODE": 137, "SLURM_RESTART_COUNT": 2, "SAVES": 20}, True),  # got further
        ({"CODE": 143, "SLURM_RESTART_COUNT": 2, "SAVES": 7}, False),
        ({"CODE": 137, "STATE": "COMPLETING", "SAVES": 20}, False),
    ],
)
def test_which_ends_go_back_in_the_queue(environment, again, execute):
    run, asked, workdir = execute
    for step in ("9", "10"):
        (workdir / "a" / "checkpoints" / step).mkdir(parents=True)
    assert run(0, **environment) == environment["CODE"]
    assert asked("scontrol.said") == ("requeue 12_0\n" if again else "")
    *_, last = (workdir / "a" / "slurm.jsonl").read_text().splitlines()
    assert json.loads(last)["event"] == ("requeue" if again else "end")
    assert bool(asked("python.said")) != again


def test_a_number_that_no_run_has(execute):
    run, asked, _ = execute
    assert run(2, CODE=0) == 2
    assert asked("srun.said") == ""


@pytest.mark.parametrize(
    ("code", "logs", "status", "error"),
    [
        (0, {}, "failed", "error: ended without a final evaluation"),
        (130, {}, "pending", ""),
        (130, {"metrics.jsonl": '{"step": 1, "loss": 3.0}\n'}, "stopped", ""),
        (2, {"log.txt": "$ x\nerror: a is b"}, "failed", "error: a is b"),
        (
            1,
            {
                "log.0.txt": f"$ x\nerror: {ended.common.GONE}",
                "log.1.txt": "error: full",
            },
            "failed",
            "error: full",
        ),
        (
            137,
            {
                "log.txt": "$ x\nsrun: error: n1: task 0: old\n"
                "$ x\nsrun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Exited",
                "log.0.txt": f"$ x\nerror: {ended.common.GONE}",
                "log.1.txt": "$ x\nstep 3/8",
            },
            "failed",
            "error: n1: task 1: Killed",
        ),
        (3, {"log.txt": "$ x\n"}, "failed", "error: exit code 3"),
    ],
)
def test_the_report_knows_how_a_run_ended(
    code, logs, status, error, spec, tmp_path, commands
):
    workdir = tmp_path / "out"
    dry(spec, workdir)
    folder = events(workdir, "a", ("start", 0), ("end", code))
    (folder / "log.txt").touch()
    for name, text in logs.items():
        (folder / name).write_text(text)
    for _ in range(2):  # noted once
        ended.main([str(folder), str(code)])
    [row] = json.loads((workdir / "summary.json").read_text())
    assert (row["name"], row["status"]) == ("a", status)
    if error:
        lines = (folder / "log.txt").read_text().splitlines()
        assert lines.count(error) == 1
    study = report.runs.read(workdir)
    assert (study.runs[0].status, study.runs[0].error) == (status, error)
    commands(squeue="")
    assert statuses(workdir)["a"][0] == status
    assert statuses(workdir)["a"][1] == (error or "stopped by a signal")


def test_ended_wants_a_run_of_a_sweep(tmp_path):
    with pytest.raises(ValueError, match="is no run of a sweep"):
        ended.main([str(tmp_path / "x"), "0"])


@pytest.mark.parametrize(
    ("time_", "expected"),
    [
        ("30", 1800),
        ("4:00", 240),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-0:0:10", 86410),
    ],
)
def test_times_are_read_as_sbatch_reads_them(time_, expected):
    assert seconds(time_) == expected


def test_times_in_words():
    assert [in_words(s) for s in (240, 14400, 131410)] == [
        *("4 min", "4 h", "36 h 30 min 10 s"),
    ]


@pytest.mark.parametrize(
    ("numbers", "parallel", "text"),
    [
        ([0], 0, "0"),
        ([0, 1, 2, 5, 7, 8], 4, "0-2,5,7-8%4"),
        ([8, 3, 2], 0, "2-3,8"),
    ],
)
def test_ranges(numbers, parallel, text):
    assert ranges(numbers, parallel) == text


def test_retry_here_runs_what_has_failed(spec, tmp_path, commands, monkeypatch):
    workdir = tmp_path / "out"
    plan.save(plan.load(spec), workdir)
    seen = []

    def run(planned, folder, workers, only, vectorize):
        names = [item.name for item in planned.items]
        seen.append((list(only), workers, vectorize, names))
        return 130

    monkeypatch.setattr(control.local, "run", run)
    finish(workdir, "b-b")
    for name, status in (("a", "failed"), ("b-b", "done")):
        rows = control.runs.read_json(workdir / "summary.json", [])
        row = {"name": name, "status": status, "overrides": {}}
        (workdir / "summary.json").write_text(json.dumps([*rows, row]))
    flags = ["--failed", "--workers=2", "--vectorize=3"]
    assert sweep.main(["retry", str(workdir), *flags]) == 130
    assert seen == [(["a"], 2, 3, ["a", "b-b"])]
    assert plan.read(workdir) == plan.load(spec)


def test_cancel_here_ends_the_sweep(spec, tmp_path, commands, capsys):
    workdir = tmp_path / "out"
    plan.save(plan.load(spec), workdir)
    assert sweep.main(["cancel", str(workdir)]) == 0
    assert "nothing of" in capsys.readouterr().out
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "from experiments.launch import watch\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "with watch.running(Path(sys.argv[1])):\n"
        "    print(1, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(workdir)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="is in use"):
            sweep.main([f"--sweep={spec}", f"--workdir={workdir}"])
        assert sweep.main(["cancel", str(workdir)]) == 0
        assert process.wait(30) == 0
    assert "has ended" in capsys.readouterr().out


def test_resources_fit_the_devices_of_a_cpu_process(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    assert Resources(gpus=0, processes=2).devices == 8
    assert Resources(gpus=8).devices == 8
