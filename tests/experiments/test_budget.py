"""The budget of a sweep: FLOPs against a count of its own, and what a time goes by."""

import dataclasses
import json

import pytest

from benchmarks import config_a
from deepseek_jax.config import MTPConfig
from experiments.launch import budget, script
from experiments.launch.plan import Item


@pytest.mark.parametrize("depth", [0, 2])
def test_flops_are_those_of_the_products(depth):
    """`config_a` adds up matrix after matrix; scales and biases don't multiply."""
    config = config_a.config("f32")
    model = dataclasses.replace(config.model, mtp=MTPConfig(depth=depth))
    config = dataclasses.replace(config, model=model)
    tokens = config.data.batch * config.data.length
    mine = tokens * budget.flops_per_token(model, config.data.length)
    assert mine == pytest.approx(sum(config_a.flops(config)), rel=2e-3)


def items(steps=(10, 10)):
    """Runs of the same sizes."""
    config = config_a.config("f32")
    return [
        Item(
            f"run{i}",
            {},
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, steps=n), seed=i
            ),
        )
        for i, n in enumerate(steps)
    ]


def finish(folder, item, tokens_per_s, until=None):
    """A run's records, with its last evaluation if it has all steps."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": item.record()["config"]}))
    steps = until or item.config.train.steps
    lines = [
        {"step": k + 1, "loss": 1.0, "tokens_per_s": tokens_per_s if k else 1.0}
        for k in range(steps)
    ]
    if until is None:
        lines.append({"step": steps, "eval_ce": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_a_new_sweep_is_timed_by_a_product(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "product_rate", lambda: 100e9)
    planned = items()
    flops = sum(budget.cost(item.config).flops for item in planned)
    said = budget.text(planned, tmp_path)
    assert "budget: 2 runs" in said and "time here" in said
    assert "tokens: 41K a run, 81.9K in all" in said
    assert f"training: {budget.short(flops)}FLOP in all (6 x active" in said
    expected = budget.clock(flops / (budget.CPU_SHARE * 100e9))
    assert f"rough guess: {expected} for what is left, by 30% of the 100GFLOP/s" in said
    assert "compiling, half a minute a program and more, is not in it" in said


def test_finished_runs_say_how_fast_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "product_rate", lambda: pytest.fail("not needed"))
    planned = items((10, 20, 20))
    finish(tmp_path / "run0", planned[0], tokens_per_s=1000.0)
    finish(tmp_path / "run1", planned[1], tokens_per_s=9.0, until=5)
    tokens = (15 + 20) * 8 * 512  # of the steps to come
    said = budget.text(planned, tmp_path, workers=2)
    assert f"{budget.clock(tokens / 1000 / 2)} for what is left, by 1 finished" in said


def test_on_unknown_gpus_there_is_no_time(tmp_path):
    assert "GPU-hours: under 0.01" in budget.text(
        items(), tmp_path, script.Resources(gpus=1)
    )
    planned = items((10_000_000, 10_000_000))
    flops = sum(budget.cost(item.config).flops for item in planned)
    said = budget.text(planned, tmp_path, script.Resources(gpus=1))
    hours = budget.short(flops / (0.3 * 989e12) / 3600)
    assert f"GPU-hours: {hours}, were they H100s at 30%" in said
    assert "time" not in said
    said = budget.text(planned, tmp_path, script.Resources(gpus=0, processes=2))
    assert "no guess" in said


def test_runs_of_different_sizes_have_a_range():
    assert budget.spread([1e6, 2.5e6]) == "1M to 2.5M"
    assert budget.spread([0.5, 0.5]) == "0.5"
    assert budget.short(1.23e15) == "1.23P"
