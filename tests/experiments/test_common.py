"""Configs on the command line: round trips, overrides, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from deepseek_jax import presets
from deepseek_jax.config import Config, OptimConfig, to_dict
from experiments import common
from experiments.common import check_field, from_config_dict, to_config_dict
from experiments.configs import mini, tiny

CONFIG = dataclasses.replace(
    Config(seed=7), optim=OptimConfig(mtp_weight_changes=((100, 0.1), (200, 0.05)))
)


def test_a_config_dict_gives_the_config_back():
    values = to_config_dict(CONFIG)
    assert values.is_locked
    assert from_config_dict(values) == CONFIG
    assert from_config_dict(to_dict(CONFIG)) == CONFIG
    assert from_config_dict({"seed": 7}).seed == 7


def test_a_printed_command_is_of_the_python_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert common.command("a.b") == ".venv/bin/python -m a.b"
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert common.command("a.b") == "python -m a.b"


def test_an_override_changes_one_field():
    values = to_config_dict(CONFIG)
    values.model.moe.top_k = 4
    assert from_config_dict(values).model.moe.top_k == 4
    with pytest.raises(AttributeError):
        values.model.moe.topk = 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.moe.topk", r"'model\.moe\.topk'; did you mean 'model\.moe\.top_k'\?"),
        ("moe.top_k", r"did you mean 'model\.moe\.top_k'\?"),
        ("model.moe", r"'model\.moe' is a group: .* model\.moe\.num_experts"),
        ("optim.learning_rate", r"unknown config key 'optim\.learning_rate'"),
        ("zzz", r"unknown config key 'zzz'$"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        check_field(name)
    nested = {}
    inner = nested
    *groups, last = name.split(".")
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = 1
    with pytest.raises(ValueError, match=message):
        from_config_dict(ConfigDict(nested))


@pytest.mark.parametrize(
    "module, model", [(tiny, presets.tiny()), (mini, presets.mini())]
)
def test_config_files_build_and_shrink(module, model):
    full = from_config_dict(module.get_config())
    smoke = from_config_dict(module.get_config("smoke"))
    assert full.model == smoke.model == model
    assert smoke.train.steps < 10 < full.train.steps
    assert dataclasses.replace(smoke, train=full.train) == full
    with pytest.raises(ValueError, match="only :smoke"):
        module.get_config("smoek")


def test_sizes_are_those_of_the_issue():
    tiny_data = from_config_dict(tiny.get_config()).data
    mini_data = from_config_dict(mini.get_config()).data
    assert (tiny_data.batch, tiny_data.length) == (16, 256)
    assert (mini_data.batch, mini_data.length) == (8, 512)


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("a\n  b"), 2, "error: a b\n"),
        (FloatingPointError("loss is nan"), 1, "error: loss is nan\n"),
        (OSError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_foreseen_error_is_one_line_and_an_exit_code(error, code, text, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.guarded(fail)
    assert stop.value.code == code
    assert capsys.readouterr().err == text


@jax.jit
def refuses(x):
    with jax.named_scope("inner"):
        if x.shape[0] > 2:
            raise ValueError("give at most two")
        return x


def refused_inside_jax():
    try:
        refuses(jnp.ones(3))
    except ValueError as error:
        raise ValueError(f"bad input: {error}") from error


def test_a_value_that_we_refuse_is_one_line_wherever_that_happens(capsys):
    with pytest.raises(SystemExit) as stop:
        common.guarded(refused_inside_jax)
    assert stop.value.code == 2
    assert "bad input: give at most two" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bug",
    [
        lambda: 1 / 0,
        lambda: np.ones(6).reshape(5),
        lambda: np.stack([np.ones(2), np.ones(3)]),
        lambda: jnp.ones(6).reshape(5),
        lambda: jax.jit(lambda x: x.reshape(5))(jnp.ones(6)),
        lambda: jnp.einsum("ab,bc->ac", jnp.ones((2, 3)), jnp.ones((4, 5))),
        lambda: json.loads("{"),
        lambda: float("x"),
    ],
)
def test_a_bug_keeps_its_stack_trace(bug):
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        common.guarded(bug)


def test_a_bug_in_a_command_shows_where_it_is():
    code = (
        "import numpy as np; from experiments import common\n"
        "def broken(): np.ones(6).reshape(5)\n"
        "common.guarded(broken)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(common.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "in broken" in done.stderr and "Traceback" in done.stderr


def test_who_reads_the_output_may_have_enough():
    code = (
        "from experiments import common\n"
        "def much():\n"
        "    for _ in range(10**6): print('much to read')\n"
        "common.guarded(much)"
    )
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" | head -1'],
        cwd=Path(common.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("much to read\n", "")
