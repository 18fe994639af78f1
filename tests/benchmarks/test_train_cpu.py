"""What the benchmark of a training step makes of its measurements, and refuses."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import config_a, train_cpu
from deepseek_jax.model.count import shapes

ROOT = Path(__file__).resolve().parents[2]


def test_config_a_is_the_published_one():
    """10.7M parameters and 0.14 TFLOP a step."""
    config = config_a.config("f32")
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes(config.model))]
    assert 10.6e6 < sum(sizes) < 10.8e6
    assert 0.139e12 < sum(config_a.flops(config)) < 0.143e12


def test_flops_are_six_per_active_weight_and_token_and_attention():
    config = config_a.config("f32")
    model, tokens = config.model, config.data.batch * config.data.length
    flops = config_a.flops(config)
    params = shapes(model)
    every = [("dense", model.num_dense), ("moe", model.num_moe)]
    attention = sum(
        leaf.size
        for name, _ in every
        for path, leaf in jax.tree_util.tree_leaves_with_path(params[name]["attn"])
        if path[-1].key == "kernel"
    )
    assert flops.projections == 6 * tokens * attention
    assert flops.head == 6 * tokens * params["head"].size
    ffn = jax.tree.leaves(params["dense"]["ffn"])
    assert flops.dense == 6 * tokens * sum(leaf.size for leaf in ffn)


def test_the_ratio_is_the_median_of_pairs():
    ours = [
        {"seconds": s, "peak_rss_mb": m, "gemm_fraction": f}
        for s, m, f in [(1.0, 10, 0.5), (2.0, 30, 0.25), (4.0, 20, 0.1)]
    ]
    peer = [{"seconds": s} for s in (2.0, 6.0, 4.0)]
    found = train_cpu.summary(100, ours, peer)
    assert found == {
        "tokens_per_s": 50.0,
        "step_ms": 2000.0,
        "peak_rss_mb": 30,
        "gemm_fraction": 0.25,
        "ratio_to_peer": 2.0,
    }
    assert train_cpu.summary(100, ours, None)["ratio_to_peer"] is None


def test_all_take_turns_and_the_warm_up_does_not_count():
    turns = []

    class Worker:
        def __init__(self, name):
            self.name = name

        def turn(self):
            turns.append(self.name)
            return {"turn": len(turns)}

    answers = train_cpu.alternate([Worker("a"), Worker("b")], rounds=2)
    assert "".join(turns) == "baabbaab"
    assert [[answer["turn"] for answer in each] for each in answers] == [[6, 7], [5, 8]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=0"], "--rounds=0: must be at least 1"),
        (["--cores=999"], "--cores=999: must be from 1 to "),
        (["--json=nowhere/x.json"], "there is no folder nowhere"),
        (["--json=."], "is a folder, must be a file"),
        (["--round"], "--round"),
    ],
)
def test_bad_flags_are_refused_at_once(arguments, message):
    done = subprocess.run(
        [sys.executable, "benchmarks/train_cpu.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr
