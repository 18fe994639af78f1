"""The bias update is the paper's on any mesh, accumulation and rematerialisation.

Twenty steps on the same global batches, in float64 so that rounding cannot flip a tie:
the biases must come out bitwise equal (arXiv:2412.19437, section 2.1.2; peers count one
shard or one micro-batch, or count twice under rematerialisation).
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig, RuntimeConfig, TrainConfig
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import make_step
from tests.factory import as_f64, random_batch, small

STEPS = 20


@functools.cache
def trained(
    accumulation: int = 1, remat: str = "none", shards: int = 1, strategy: str = "v3"
):
    """Balance state and losses after `STEPS` steps on fixed batches."""
    base = small(batch=8, segment_mask=True)
    config = dataclasses.replace(
        base,
        train=TrainConfig(steps=STEPS, accumulation=accumulation),
        runtime=RuntimeConfig(block=8, remat=remat),
        mesh=MeshConfig(data=shards),
        balance=dataclasses.replace(base.balance, strategy=strategy, alpha=0.1),
    )
    with jax.enable_x64(True):
        parts = assemble(config, jax.devices()[:shards])
        state = as_f64(init_state(parts, 0))
        step, losses, loads = make_step(parts), [], []
        for i in range(STEPS):
            state, metrics = step(state, random_batch(config, seed=i, documents=True))
            losses.append(float(metrics["loss"]))
            loads.append(np.asarray(metrics["load"]))
        return (
            jax.tree.map(np.asarray, state.balance),
            np.array(losses),
            np.array(loads),
        )


WAYS = {
    "accumulation 2": {"accumulation": 2},
    "accumulation 4": {"accumulation": 4},
    "remat": {"remat": "full"},
    "remat of all but products": {"remat": "products"},
    "2 shards": {"shards": 2},
    "4 shards": {"shards": 4},
    "8 shards": {"shards": 8},
    "2 shards, accumulation 2, remat": {
        "shards": 2,
        "accumulation": 2,
        "remat": "full",
    },
}


BETWEEN = {"accumulation 2", "remat", "4 shards"}  # the others take them in


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.slow] * (way in BETWEEN)) for way in WAYS],
)
def test_biases_are_bitwise_equal(way):
    want, want_losses, want_loads = trained()
    got, losses, loads = trained(**WAYS[way])
    np.testing.assert_array_equal(loads, want_loads)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-10)


@pytest.mark.parametrize(
    "strategy", ["quantile", "loss_free_proportional", "aux_global"]
)
def test_other_strategies_do_not_see_the_accumulation_either(strategy):
    want, want_losses, want_loads = trained(strategy=strategy)
    got, losses, loads = trained(strategy=strategy, accumulation=4)
    np.testing.assert_array_equal(loads, want_loads)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-10)


def test_the_per_micro_batch_loss_does_see_it():
    """Guards the tests above: penalties of a micro-batch's own counts must differ."""
    _, once, _ = trained(strategy="aux_batch")
    _, split, _ = trained(strategy="aux_batch", accumulation=4)
    assert np.abs(once - split).max() > 1e-6


def test_the_bias_moved():
    """Guards the first test: all biases have taken twenty steps of the right size."""
    balance, _, loads = trained()
    bias = jax.tree.leaves(balance)[0]
    first = np.sign(loads[0].mean(-1, keepdims=True) - loads[0])
    assert np.abs(first).max() == 1 and np.abs(bias).max() > 0.05
    total = 0.01 * sum(np.sign(x.mean(-1, keepdims=True) - x) for x in loads)
    np.testing.assert_allclose(bias, total, atol=1e-12)
