"""Layers dealt out to stages, and parameters taken apart and put together."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.config import MTPConfig
from deepseek_jax.parallel.pipeline import cut, schedules
from deepseek_jax.parallel.pipeline.cut import Slots
from tests.factory import SMALL


def model_of(layers, dense=1, depth=1):
    mtp = MTPConfig(depth=depth)
    return dataclasses.replace(SMALL, num_layers=layers, num_dense=dense, mtp=mtp)


@pytest.mark.parametrize("depth", range(3))
@pytest.mark.parametrize("dense", range(4))
def test_layers_are_dealt_out_in_order_and_evenly(dense, depth):
    """In all no stage has more than it must, and few have two MoE layers more."""
    for layers in range(dense + 1, 20):
        model = model_of(layers, dense, depth)
        for stages in range(1, layers + (depth > 0) + 1):
            bounds = cut.bounds(model, stages)
            assert len(bounds) == stages
            dealt = [layer for stage in bounds for layer in range(*stage)]
            assert dealt == list(range(layers))
            sizes = [stop - start for start, stop in bounds]
            sizes[-1] += depth  # the last stage has the MTP modules
            most = max(math.ceil((layers + depth) / stages), depth)
            assert max(sizes) <= most
            moe = [stop - max(min(dense, stop), start) for start, stop in bounds]
            assert sum(moe) == model.num_moe
            room = [n for n, size in zip(moe, sizes) if size < most]
            assert max(moe) - min(room, default=max(moe)) <= 1


def test_stages_of_some_models():
    v3 = cut.bounds(model_of(61, dense=3, depth=1), 16)
    sizes = [stop - start for start, stop in v3]
    assert sizes == [4] * 13 + [3] * 3  # and a module for the last stage
    assert cut.bounds(model_of(4), 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert cut.bounds(model_of(4), 5)[-1] == (4, 4)


@pytest.mark.parametrize(("layers", "depth"), [(3, 0), (3, 1), (8, 4)])
def test_more_stages_than_layers_are_refused(layers, depth):
    model, most = model_of(layers, depth=depth), layers + (depth > 0)
    assert len(cut.bounds(model, most)) == most
    text = rf"pipeline of {most + 1} stages: must be at most {most}.*model\.num_layers"
    with pytest.raises(ValueError, match=text):
        cut.bounds(model, most + 1)
    with pytest.raises(ValueError, match=text):
        cut.cut(model, schedules.build("1f1b", most + 1, 1))


def test_a_model_without_moe_layers_is_refused():
    """`ModelConfig` has none; whoever else may."""
    model = SimpleNamespace(num_moe=0, num_dense=2, num_layers=2, mtp=MTPConfig())
    with pytest.raises(ValueError, match=r"model.num_dense = 2: must be less than"):
        cut.bounds(model, 2)


# Name, ranks, chunks; layers, dense ones and MTP modules of a model.
CUTS = [
    (("1f1b", 1, None), (3, 1, 1)),
    (("1f1b", 4, None), (4, 1, 1)),
    (("gpipe", 3, None), (7, 2, 0)),
    (("zb1p", 4, None), (10, 0, 2)),
    (("interleaved", 2, 3), (9, 3, 1)),
    (("interleaved", 4, 2), (8, 1, 1)),
    (("dualpipe", 4, None), (6, 5, 1)),
    (("dualpipe", 8, None), (8, 1, 1)),
    (("dualpipev", 2, None), (5, 1, 1)),
    (("dualpipev", 4, None), (7, 1, 1)),
]


def cut_of(schedule, model):
    (name, ranks, chunks), sizes = schedule, model
    built = schedules.build(name, ranks, 4 * ranks, chunks)
    return cut.cut(model_of(*sizes), built), model_of(*sizes)


def random_params(model):
    rng = np.random.default_rng(0)
    stacks = {"dense": model.num_dense, "moe": model.num_moe}
    params = {
        name: {
            "norm": rng.normal(size=(layers, 3)),
            "mlp": {"up": rng.normal(size=(layers, 2, 3)).astype(np.float32)},
        }
        for name, layers in stacks.items()
        if layers
    }
    params |= {f"mtp_{k}": {"w": rng.normal(size=2)} for k in range(model.mtp.depth)}
    return params | {"embed": rng.normal(size=(5, 3)), "norm": rng.normal(size=3)}


@pytest.mark.parametrize(("schedule", "model"), CUTS)
def test_join_is_the_inverse_of_split(schedule, model):
    made, config = cut_of(schedule, model)
    params = random_params(config)
    with jax.enable_x64(True):
        own, shared = made.split(params)
        joined = made.join(own, shared)
    assert not shared.keys() & own.keys()
    assert {"dense", "moe"} >= own.keys()
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, joined, params)


@pytest.mark.parametrize(("schedule", "model"), CUTS)
def test_every_block_lies_where_its_stage_does(schedule, model):
    made, config = cut_of(schedule, model)
    stages = cut.bounds(config, made.schedule.stages)
    kinds = ["dense"] * config.num_dense + ["moe"] * config.num_moe
    first = {"dense": 0, "moe": config.num_dense}
    for name in ("dense", "moe"):
        slots = getattr(made, name)
        ranks, each = made.schedule.ranks, made.schedule.stages // made.schedule.ranks
        assert slots.layer_RdN.shape == (ranks, each, slots.width)
        for rank, digit in np.ndindex(ranks, each):
            start, stop = stages[made.schedule.stage_of(rank, digit)]
            held = [n + first[name] for n in slots.layer_RdN[rank, digit] if n >= 0]
            assert held == [n for n in range(start, stop) if kinds[n] == name]
            empty = slots.layer_RdN[rank, digit, len(held) :]
            assert (empty == -1).all()


def test_what_empty_slots_hold_does_not_come_back():
    made, config = cut_of(("1f1b", 4, None), (7, 1, 0))
    layers = np.arange(1.0, config.num_moe + 1)
    placed = np.asarray(made.moe.place(layers))
    empty = made.moe.layer_RdN < 0
    assert empty.any()
    np.testing.assert_array_equal(
        made.moe.stack(np.where(empty, np.nan, placed)), layers
    )


@pytest.mark.parametrize(
    ("layers", "width", "common"),
    [
        ([[[0, 1]], [[2, 3]]], 2, 2),
        ([[[0, -1]], [[1, 2]]], 2, 1),
        ([[[0], [3]], [[1], [-1]]], 1, 0),
        ([[[0, 1, 2]], [[3, 4, -1]], [[5, -1, -1]]], 3, 1),
        (np.zeros((2, 1, 0)), 0, 0),
    ],
)
def test_slots_that_every_stage_fills(layers, width, common):
    slots = Slots(np.array(layers, np.int32))
    assert (slots.width, slots.common) == (width, common)
