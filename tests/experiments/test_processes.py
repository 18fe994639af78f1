"""The launcher of several processes: what each is told, and how an end is reported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.checkpoint import folders
from experiments import common
from experiments.launch import processes
from tests.experiments.test_train import SMALL
from tests.train.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
MODULE = "experiments.launch.processes"


def launch(folder, code, count=2, **options):
    words = [sys.executable, "-c", f"import os, sys, time\n{code}"]
    return processes.run(words, count, folder, **options)


def logs(folder, count=2):
    return [(folder / f"log.{i}.txt").read_text() for i in range(count)]


def test_each_is_told_its_place_and_the_first_one_is_heard(tmp_path, capfd):
    names = "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID"
    names += f" JAX_LOCAL_DEVICE_IDS {common.PARENT}"
    code = f"print(*(os.environ[name] for name in {names.split()}))"
    assert launch(tmp_path, code, 3, gpus=2) == 0
    said = [text.splitlines()[-1].split() for text in logs(tmp_path, 3)]
    [address] = {words[0] for words in said}
    assert address.startswith("localhost:") and address[10:].isdigit()
    pid = str(os.getpid())
    devices = ("0,1", "2,3", "4,5")
    assert [w[1:] for w in said] == [["3", f"{i}", devices[i], pid] for i in range(3)]
    assert capfd.readouterr().err.strip() == " ".join(said[0])


def test_what_the_environment_says_of_devices_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "7")
    assert launch(tmp_path, "print(os.environ['JAX_LOCAL_DEVICE_IDS'])") == 0
    assert [text.splitlines()[-1] for text in logs(tmp_path)] == ["7", "7"]


MINE = f"GONE = {common.GONE!r}\nmine = os.environ['JAX_PROCESS_ID'] == '1'\n"


@pytest.mark.parametrize(
    "code, expected, said",
    [
        (
            "if mine: sys.exit('error: the disk is full')\ntime.sleep(60)",
            1,
            "process 1 of 2 ended (exit code 1): error: the disk is full. The others",
        ),
        # JAX aborts a process when another one is gone, maybe before that is noticed.
        (
            "if not mine: os.abort()\ntime.sleep(1)\nos.kill(os.getpid(), 9)",
            1,
            "process 1 of 2 ended (killed by SIGKILL). The others were stopped",
        ),
        (
            "print('error: ' + GONE if not mine else 'error: mine', flush=True)\n"
            "time.sleep(1 if mine else 0)\nsys.exit(1)",
            1,
            "process 1 of 2 ended (exit code 1): error: mine. The others were stopped",
        ),
        (
            "sys.exit(2 if mine else 1)",
            2,
            "process 1 of 2 ended (exit code 2)",
        ),
        (
            "print('stopped after step 5', flush=True)\nsys.exit(130)",
            130,
            "stopped after step 5; the same command goes on from here",
        ),
    ],
)
def test_the_one_that_failed_is_named(
    code, expected, said, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(processes, "GRACE_S", 3.0)
    began = time.monotonic()
    assert launch(tmp_path, MINE + code) == expected
    assert time.monotonic() - began < 30
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--processes"),
        (["--processes=0", "--", "--workdir=x"], "--processes=0: must be 1 or more"),
        (["--processes=2"], "--workdir is missing after --"),
        (["--processes=2", "--", "--config=x.py"], "--workdir is missing after --"),
    ],
)
def test_a_wrong_command_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.main(arguments)


def test_the_workdir_is_found_however_it_is_written():
    for flags in (["--workdir=a/b"], ["--x", "--workdir", "a/b", "--y=1"]):
        assert processes.workdir(flags) == Path("a/b")


@pytest.mark.slow
def test_ctrl_c_saves_and_bad_input_is_one_line(tmp_path):
    workdir, corpus = tmp_path / "run", write_corpus(tmp_path / "corpus")
    command = [
        *(sys.executable, "-m", MODULE, "--processes=2", "--", *SMALL),
        *(f"--config.data.source={corpus}", f"--workdir={workdir}"),
        *("--config.train.steps=5000", "--config.train.log_every=1"),
    ]
    streams = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | {"DEEPSEEK_JAX_CACHE": str(tmp_path / "cache")}
    wrong = subprocess.run(
        command, env=environment, timeout=300, check=False, **streams
    )
    assert wrong.returncode == 2
    assert "make 1 devices: there are 2" in wrong.stderr.splitlines()[-1]
    command.append("--config.mesh.data=2")
    with subprocess.Popen(command, env=environment, **streams) as process:
        said = ""
        while not said.startswith("step ") and process.poll() is None:
            said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=300)
    assert process.returncode == 130, rest
    [*_, step] = folders.steps(workdir / "checkpoints")
    assert f"stopped after step {step}, which is saved" in rest
