"""The command as a user types it: what it writes, what it refuses, how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import report
from tests.train.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TINY = "--config=experiments/configs/tiny.py"
SMALL = (
    f"{TINY}:smoke",
    "--config.data.tokenizer=bytes",
    "--config.data.batch=4",
    "--config.data.length=32",
    "--config.model.vocab_size=264",
    "--config.model.dim=16",
    "--config.model.num_layers=2",
    "--config.model.dense_dim=16",
    "--config.model.moe.ffn_dim=8",
    "--config.runtime.block=8",
)


def command(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--config is missing"),
        ((TINY,), "--workdir is missing"),
        ((TINY, "--config.model.moe.topk=4"), "did you mean 'model.moe.top_k'?"),
        ((TINY, "--config.train.steps=few"), "--config.train.steps=few"),
        ((TINY, "--config.optim.mtp_weight_changes=(5,)"), "(step, value) pairs"),
        ((f"{TINY}:smok",), "only :smoke is known here"),
        (("--config=nowhere.py",), "--config=nowhere.py: there is no such file"),
        ((TINY, "--workdri=x"), "Unknown command line flag 'workdri'"),
        ((TINY, "--steps=10"), "flag 'steps'; the field is --config.train.steps"),
        ((TINY, "--config.train.steps=1e3"), "steps=1e3: must be whole, not '1e3'"),
        (
            (TINY, "--config.model.moe.top_k=9"),
            "model.moe.top_k = 9: must be at most 8",
        ),
        (
            (*SMALL, "--config.data.source=nowhere/*.txt"),
            "data.source = 'nowhere/*.txt': no such file",
        ),
        (
            (*SMALL, "--config.mesh.data=4"),
            "mesh.data = 4 x mesh.fsdp = 1 x mesh.node = 1 x mesh.expert = 1 make 4",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    if "--workdir" not in message and arguments:
        arguments = (*arguments, f"--workdir={tmp_path / 'run'}")
    code, _, errors = command(*arguments, DEEPSEEK_JAX_CACHE=str(tmp_path / "cache"))
    assert code == 2
    assert message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()


def test_help_suffices():
    code, text, _ = command("--help")
    assert code == 0
    for word in ("--config", "--workdir", "mtp_weight_changes", "python -m", ":smoke"):
        assert word in text


def test_a_run_from_start_to_finish(tmp_path):
    workdir = tmp_path / "run"
    corpus = write_corpus(tmp_path / "corpus")
    environment = {
        "DEEPSEEK_JAX_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    arguments = (
        *SMALL,
        f"--config.data.source={corpus}",
        f"--workdir={workdir}",
        "--config.mesh.data=2",
        "--config.optim.mtp_weight_changes=((3,0.1),)",
    )
    code, _, errors = command(*arguments, **environment)
    assert code == 0, errors
    assert "step 6: eval_ce" in errors
    for name in ("config.json", "tokenizer", "checkpoints/6", "tensorboard"):
        assert (workdir / name).exists()
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["optim"]["mtp_weight_changes"] == [[3, 0.1]]
    assert saved["config"]["optim"]["horizon"] == 6
    assert saved["runtime"]["devices"] == 2
    lines = [
        json.loads(t) for t in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    training, evaluation = lines[-2:]
    for key in ("loss", "ce", "penalty", "lr", "grad_norm", "speed", "maxvio_batch"):
        assert isinstance(training[key], float), key
    assert len(training["mtp_ce"]) == 1 and len(training["maxvio_layers"]) == 2
    assert len(training["load"]) == len(training["bias"]) == 2
    assert sum(training["load"][0]) == 4 * 32 * 2
    assert {"eval_ce", "eval_maxvio_global", "eval_routing_flips"} <= evaluation.keys()

    report.main([f"--workdir={workdir}"])
    assert (workdir / "summary.json").exists() and (workdir / "report.html").exists()
    code, _, errors = command(*arguments, **environment)
    assert code == 0 and "nothing to do" in errors

    code, _, errors = command(*arguments, "--config.optim.lr=1", **environment)
    assert code == 2 and "optim.lr = 0.003 there, 1.0 here" in errors
    assert errors.count("\n") == 1
