"""A step through any pipeline is the step without one.

DeepSeek-V3's recipe with one MTP module, on batches of documents, against gradients
accumulated over the same micro-batches on one device: relative errors are max|a - b| /
max|b| of each array (in float64, where a difference is a bug and not rounding), loads
and biases are equal. The gradient of a step, clipped, is what AdamW's first moment
gained in the first one.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax.config import (
    BalanceConfig,
    MeshConfig,
    MoEConfig,
    MTPConfig,
    PipelineConfig,
    TrainConfig,
)
from deepseek_jax.parallel.partition import named
from deepseek_jax.parallel.pipeline import executor
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES
from deepseek_jax.train.state import assemble, init_balance, init_state, shardings
from deepseek_jax.train.step import make_step
from tests.factory import SMALL, as_f64, random_batch, small

MOE = MoEConfig(num_experts=16, top_k=4, ffn_dim=16, num_groups=4, keep_groups=2)
TWO_STAGES = ("interleaved", "dualpipev")  # schedules that give a rank two
LONG = 10  # steps
BATCH = 24


@pytest.fixture(autouse=True)
def forget_each_program():
    """Those of all the tests here would be too many for a process."""
    yield
    jax.clear_caches()


def config_of(
    schedule, *, layers=5, dense=1, depth=1, keep="inputs", strategy="v3", **mesh
):
    """Three micro-batches for each of 4 or 8 ranks, or twelve.

    A device has a dozen tokens or two: with 1.5 times an even load most micro-batches
    would be gathered.
    """
    shape = MeshConfig(**{"capacity": 8.0} | mesh)
    microbatches = 3 * max(shape.pipe, 4)
    base = small(
        batch=max(BATCH, microbatches * shape.size // shape.pipe),
        segment_mask=True,
        mesh=shape,
        balance=BalanceConfig(strategy, speed=1e-2, alpha=1e-2),
        pipeline=PipelineConfig(schedule, microbatches, keep=keep),
    )
    model = dataclasses.replace(
        base.model,
        attention=dataclasses.replace(SMALL.attention, q_rank=16),
        moe=MOE,
        mtp=MTPConfig(depth),
        num_layers=layers,
        num_dense=dense,
    )
    return dataclasses.replace(base, model=model)


def without_pipeline(config):
    train = TrainConfig(accumulation=config.micro_batches)
    alone = {"mesh": MeshConfig(), "pipeline": PipelineConfig(), "train": train}
    return dataclasses.replace(config, **alone)


@functools.cache
def initial(model, x64):
    """Parameters and optimizer at step 0, which are the same on any mesh."""
    config = without_pipeline(dataclasses.replace(config_of("1f1b"), model=model))
    with jax.enable_x64(x64):
        state = init_state(assemble(config), 0)
        return jax.device_get(as_f64(state) if x64 else state)


def trained(config, x64, steps):
    """Per step its metrics; and the first one's gradients by name."""
    with jax.enable_x64(x64):
        parts = assemble(config, jax.devices()[: config.mesh.size])
        state = initial(config.model, x64)._replace(balance=init_balance(parts))
        state = jax.device_put(state, shardings(parts, state))
        step, records, grads = make_step(parts), [], {}
        for i in range(steps):
            batch = random_batch(config, seed=i, documents=True)
            state, metrics = step(state, batch)
            records.append(jax.device_get(metrics))
            grads = grads or {
                name: np.asarray(leaf)
                for name, leaf in named(state.opt_state).items()
                if "/mu/" in name
            }
        return records, grads


reference = functools.cache(trained)


def close(got, want, bound):
    return np.abs(got - want).max(initial=0) <= bound * np.abs(want).max(initial=0)


def assert_same(config, steps, x64=True):
    bound, grad_bound, later = (1e-10, 1e-10, 1e-9) if x64 else (1e-6, 2e-5, 1e-6)
    got, grads = trained(config, x64, steps)
    want, want_grads = reference(without_pipeline(config), x64, LONG if x64 else 1)
    for name in ("loss", "ce", "mtp_ce", "penalty", "grad_norm"):
        assert close(got[0][name], want[0][name], bound), name
    assert grads.keys() == want_grads.keys()
    wrong = [n for n, w in want_grads.items() if not close(grads[n], w, grad_bound)]
    assert not wrong
    for ours, theirs in zip(got, want):
        assert close(ours["loss"], theirs["loss"], later)
        np.testing.assert_array_equal(ours["load"], theirs["load"])
        for name in {"bias"} & theirs.keys():
            np.testing.assert_array_equal(ours[name], theirs[name])


MESHES = {"4": {"pipe": 4}, "8": {"pipe": 8}, "4 x 2": {"pipe": 4, "expert": 2}}


def way(name, shape, keep):
    """One layer more than stages."""
    stages = MESHES[shape]["pipe"] * (1 + (name in TWO_STAGES))
    return config_of(name, layers=stages + 1, keep=keep, **MESHES[shape])


KEEPS = ("inputs", "products")
WAYS = [(n, shape, k) for n in SCHEDULES for shape in MESHES for k in KEEPS]
# One alone: each takes as long as all the other tests of pipelines together.
QUICK = [("dualpipe", "4", "products")]
ROUNDED = [each for each in WAYS if each[-1] == "inputs"]


def marked(ways, quick):
    return [
        pytest.param(*way, marks=[] if way in quick else pytest.mark.slow)
        for way in ways
    ]


@pytest.mark.parametrize(("name", "shape", "keep"), marked(WAYS, QUICK))
def test_steps_are_those_without_a_pipeline(name, shape, keep):
    quick = (name, shape, keep) in QUICK
    assert_same(way(name, shape, keep), 3 if quick else LONG)


def test_an_uneven_cut_beside_an_expert_axis():
    """A stage of a dense and a MoE layer, one of two, and one with the MTP module."""
    assert_same(config_of("1f1b", pipe=3, expert=2), 3)


def test_the_first_step_in_float32():
    assert_same(config_of("interleaved", pipe=2), 1, x64=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "keep"), ROUNDED)
def test_the_first_step_of_the_others_in_float32(name, shape, keep):
    assert_same(way(name, shape, keep), 1, x64=False)


EXCHANGES = {
    "in two hops": {"pipe": 2, "node": 2, "expert": 2, "transport": "two_hop"},
    "over nodes": {"pipe": 4, "node": 2, "transport": "two_hop"},
    "ragged": {"pipe": 4, "expert": 2, "transport": "ragged"},
    "gathered": {"pipe": 4, "expert": 2, "transport": "ring"},
    "gathered by four": {"pipe": 2, "expert": 4, "transport": "ring"},
    "gathered for want of room": {"pipe": 4, "expert": 2, "capacity": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_any_exchange_between_experts(exchange):
    assert_same(config_of("dualpipe", **EXCHANGES[exchange]), 3)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
@pytest.mark.parametrize("name", ["gpipe", "dualpipe"])
def test_other_axes_beside_a_pipeline(name, axis):
    assert_same(config_of(name, pipe=2, **{axis: 2}), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 6},  # a stage has two MoE layers
        {"layers": 4},  # the first one has none
        {"layers": 6, "dense": 3},
        {"layers": 5, "dense": 0},
        {"layers": 3},  # the last one has nothing but the MTP module
        {"layers": 5, "depth": 0},
        {"layers": 7, "depth": 2},
    ],
    ids=str,
)
def test_any_cut(sizes):
    assert_same(config_of("dualpipe", pipe=4, **sizes), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("dualpipe", "aux_batch"),  # each its own micro-batch's
        ("gpipe", "aux_global"),
        ("dualpipe", "quantile"),
        ("zb1p", "z_loss"),
    ],
)
def test_other_balancing(name, strategy):
    assert_same(config_of(name, pipe=4, strategy=strategy), LONG)


@pytest.mark.slow
def test_counts_of_the_whole_batch_where_it_is_one_micro_batch():
    """Of all devices that share it, not of each."""
    config = config_of("gpipe", pipe=2, data=2, strategy="aux_global")
    one = dataclasses.replace(config.pipeline, microbatches=1)
    assert_same(dataclasses.replace(config, pipeline=one), 1)


def test_a_wrong_gradient_would_be_found():
    config = without_pipeline(config_of("1f1b"))
    want = reference(config, True, LONG)[1]
    for grad in want.values():
        wrong = grad.copy()
        wrong.flat[0] += 1e-9 * np.abs(grad).max()
        assert not close(wrong, grad, 1e-10)
        assert close(grad * (1 + 1e-12), grad, 1e-10)


@pytest.mark.slow
def test_gradients_of_a_direction_that_get_lost_are_found(monkeypatch):
    def without_copies(schedule, every):
        return jax.tree.map(lambda x: x[:1], every)

    monkeypatch.setattr(executor, "without_copies", without_copies)
    with pytest.raises(AssertionError):
        assert_same(config_of("dualpipe", pipe=2), 1)
