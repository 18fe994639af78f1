"""Losses relative to bfloat16's, and what 8 bits lose, from made-up runs."""

import dataclasses
import json

import numpy as np

from deepseek_jax.analysis import precision, runs
from deepseek_jax.config import RuntimeConfig
from tests.analysis import synthetic

SHIFTS = {"bf16": 0.0, "fp8_v3": 0.001, "fp8_block_grads": 0.02}
LOST = {"moe/attn/q_a": [0.001, 0.003], "moe/moe/experts": [0.01, 0.01]}


def study(path, policies=tuple(SHIFTS), seeds=2, steps=None, lr=None):
    """Runs whose losses are a given factor of the first policy's, by seed.

    Args:
      steps: done, by policy; the others are finished.
      lr: by policy, where it is not the usual one.
    """
    folders = []
    for policy in policies:
        for seed in range(seeds):
            config = synthetic.config(seed=seed)
            config = dataclasses.replace(
                config,
                runtime=RuntimeConfig(compute=policy),
                optim=dataclasses.replace(
                    config.optim, lr=(lr or {}).get(policy, config.optim.lr)
                ),
            )
            folder = path / f"{policy}-s{seed}"
            synthetic.write_run(folder, config, (steps or {}).get(policy))
            factor = 1 + SHIFTS[policy] * (1 + seed)
            lines = []
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                record = json.loads(line)
                for name in ("ce", "eval_ce"):
                    if name in record:
                        record[name] *= factor
                if "eval_ce" in record and policy != "bf16":
                    record["eval_underflowed_x_by_map"] = LOST
                lines.append(json.dumps(record))
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            folders.append(folder)
    return runs.gather(folders, "precision")


def test_smoothing_is_the_reports():
    made = precision.smoothed([1.0, 0.0, 0.0, 2.0])
    np.testing.assert_allclose(made, [1, 0.9, 0.81, 0.729 + 0.2])


def test_settings_are_ranked_by_their_distance(tmp_path):
    costs = precision.ranking(study(tmp_path))
    assert [cost.label.split("=")[-1] for cost in costs] == [
        "fp8_v3",
        "fp8_block_grads",
    ]
    near, far = costs
    np.testing.assert_allclose([*near.signed.by_seed.values()], [0.1, 0.2])
    np.testing.assert_allclose([*far.magnitude.by_seed.values()], [2, 4])
    np.testing.assert_allclose([*far.final.by_seed.values()], [2, 4])
    text = precision.markdown(study(tmp_path))
    assert "| 2 | 0.150 ± 0.071 % | +0.150 ± 0.071 % | +0.150 ± 0.071 % |" in text


def test_charts_show_what_there_is(tmp_path):
    made = study(tmp_path)
    chart = precision.relative_loss(made)
    assert len(chart.panels[0].lines) == 2
    inputs, *others = precision.underflow(made).panels
    assert not others
    assert inputs.lines[0].x == list(LOST)
    np.testing.assert_allclose(inputs.lines[0].y, [0.2, 1.0])


def test_without_bfloat16_there_is_nothing_to_say(tmp_path):
    made = study(tmp_path, ("fp8_v3", "fp8_block_grads"))
    assert precision.ranking(made) == []
    assert precision.markdown(made) == ""
    assert precision.relative_loss(made) is None


def test_a_run_that_stopped_is_not_ranked(tmp_path):
    made = study(tmp_path, steps={"fp8_v3": 3})
    assert [cost.label.split("=")[-1] for cost in precision.ranking(made)] == [
        "fp8_block_grads"
    ]
    text = precision.markdown(made)
    assert "fp8_v3-s0 (3 of 40 steps), fp8_v3-s1 (3 of 40 steps)" in text
    assert len(precision.relative_loss(made).panels[0].lines) == 2


def test_runs_that_differ_otherwise_are_no_pair(tmp_path):
    made = study(tmp_path, lr={"fp8_block_grads": 1e-5})
    (cost,) = precision.ranking(made)
    assert "fp8_v3" in cost.label
