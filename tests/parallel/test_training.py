"""One training step on any mesh and by any transport is that of a single device.

Five steps of DeepSeek-V3's recipe with one MTP module, on the same global batches:
relative errors are max|a - b| / max|b| of each array (in float64, where a difference is
a bug and not rounding), loads and biases are equal. The gradient of a step, clipped, is
what AdamW's first moment gained in it.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig, MoEConfig
from deepseek_jax.parallel.partition import named
from deepseek_jax.train.state import assemble, init_state, shardings
from deepseek_jax.train.step import make_step
from tests.factory import SMALL, as_f64, random_batch, small

STEPS = 5
MOE = MoEConfig(num_experts=16, top_k=4, ffn_dim=16, num_groups=4, keep_groups=2)
ALONE = MeshConfig()


def config_of(mesh: MeshConfig):
    base = small(batch=8, segment_mask=True, mesh=mesh)
    attention = dataclasses.replace(SMALL.attention, q_rank=16)
    model = dataclasses.replace(base.model, moe=MOE, attention=attention)
    return dataclasses.replace(base, model=model)


@functools.cache
def trained(mesh: MeshConfig, x64: bool = True, steps: int = STEPS):
    """Per step: loss, gradients by name, loads; and the last biases."""
    config = config_of(mesh)
    with jax.enable_x64(x64):
        parts = assemble(config, jax.devices()[: mesh.size])
        state = init_state(parts, 0)
        if x64:
            state = jax.device_put(as_f64(state), shardings(parts, state))
        step, before, records = make_step(parts), 0.0, []
        for i in range(steps):
            batch = random_batch(config, seed=i, documents=True)
            state, metrics = step(state, batch)
            moment = {
                name: np.asarray(leaf)
                for name, leaf in named(state.opt_state).items()
                if "/mu/" in name
            }
            gained = {
                name: (mu - config.optim.b1 * (before[name] if before else 0))
                / (1 - config.optim.b1)
                for name, mu in moment.items()
            }
            before = moment
            records.append(
                (float(metrics["loss"]), gained, np.asarray(metrics["load"]))
            )
        return records, np.asarray(metrics["bias"])


def assert_same(mesh: MeshConfig, loss_bound: float, grad_bound: float, **how):
    (got, bias), (want, want_bias) = trained(mesh, **how), trained(ALONE, **how)
    for (loss, grads, load), (want_loss, want_grads, want_load) in zip(
        got, want, strict=True
    ):
        assert abs(loss - want_loss) <= loss_bound * abs(want_loss)
        np.testing.assert_array_equal(load, want_load)
        for name, grad in want_grads.items():
            error = np.abs(grads[name] - grad).max() / np.abs(grad).max()
            assert error <= grad_bound, name
    np.testing.assert_array_equal(bias, want_bias)


SHAPES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "data 2, expert 4": {"data": 2, "expert": 4},
    "node 2, local 4": {"node": 2, "expert": 4},
    "data 2, fsdp 2, expert 2": {"data": 2, "fsdp": 2, "expert": 2},
}
TRANSPORTS = ("all_to_all", "two_hop", "ragged", "ring")
# A device has a dozen tokens: with 1.5 times an even load most would take the ring.
WAYS = {
    f"{name}, {transport}": MeshConfig(
        **shape, transport=transport, capacity=1.5 if "fsdp" in shape else 8.0
    )
    for name, shape in SHAPES.items()
    for transport in TRANSPORTS
    # Without an expert axis they are one; in one node two hops are one.
    if "expert" in shape or transport == "all_to_all"
    if "node" in shape or transport != "two_hop"
}


# Every mesh and every transport once; the other pairs take as long again.
QUICK = (
    "data 8, all_to_all",
    "fsdp 8, all_to_all",
    "expert 8, ragged",
    "data 2, expert 4, ring",
    "node 2, local 4, two_hop",
    "data 2, fsdp 2, expert 2, all_to_all",
)


def pairs(*quick: str):
    return [
        pytest.param(way, marks=[] if way in quick else pytest.mark.slow)
        for way in WAYS
    ]


@pytest.mark.parametrize("way", pairs(*QUICK))
def test_five_steps_are_those_of_one_device(way):
    assert_same(WAYS[way], 1e-10, 1e-10)


@pytest.mark.parametrize("way", pairs("node 2, local 4, two_hop"))
def test_the_first_step_in_float32(way):
    assert_same(WAYS[way], 1e-6, 1e-5, x64=False, steps=1)


def test_the_quick_ones_are_of_every_kind():
    assert {way.rsplit(", ", 1)[0] for way in QUICK} == set(SHAPES)
    assert {way.rsplit(", ", 1)[1] for way in QUICK} == set(TRANSPORTS)


def test_nothing_is_quantised_where_nothing_is_sent():
    """Without an expert axis an FP8 payload changes no bit."""
    exact, fp8 = (MeshConfig(data=2, payload=payload) for payload in ("exact", "fp8"))
    (got, _), (want, _) = (trained(m, x64=False, steps=1) for m in (fp8, exact))
    assert got[0][0] == want[0][0]
