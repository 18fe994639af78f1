"""What a pipeline cannot be is refused by name, before anything is compiled.

Some of it by the configuration itself; what depends on the schedule's table or the cut
of the model, when that is planned, which a run does before it opens its data.
"""

import dataclasses

import jax
import pytest

from deepseek_jax.config import (
    BalanceConfig,
    MeshConfig,
    PipelineConfig,
    TrainConfig,
)
from deepseek_jax.train import pipelined, start
from deepseek_jax.train.state import assemble
from deepseek_jax.train.step import make_step
from tests.factory import SMALL, small

ROWS = 48  # a multiple of whatever is asked of it here


def config_of(schedule, ranks, microbatches, chunks=0, batch=ROWS, layers=8, **groups):
    mesh = groups.pop("mesh", MeshConfig(pipe=ranks))
    pipeline = PipelineConfig(schedule, microbatches, chunks)
    base = small(batch=batch, mesh=mesh, pipeline=pipeline, **groups)
    model = dataclasses.replace(SMALL, num_layers=layers)
    return dataclasses.replace(base, model=model)


def aux_global(schedule):
    return config_of(schedule, 2, 4, balance=BalanceConfig("aux_global"))


def accumulated():
    return config_of("1f1b", 2, 4, train=TrainConfig(accumulation=2))


def with_devices(batch):
    return config_of("1f1b", 2, 4, batch=batch, mesh=MeshConfig(pipe=2, expert=2))


# How it is made, and what the message says: field and value, and what would be right.
BY_CONFIG = {
    "no such schedule": (
        lambda: config_of("dualpip", 2, 4),
        ("pipeline.schedule = 'dualpip'", "did you mean 'dualpipe'?"),
    ),
    "no such thing to keep": (
        lambda: PipelineConfig("1f1b", keep="input"),
        ("pipeline.keep = 'input'", "did you mean 'inputs'?"),
    ),
    "ranks without a schedule": (
        lambda: config_of("none", 2, 1),
        ("mesh.pipe = 2", "needs a pipeline.schedule", "1f1b", "dualpipe"),
    ),
    "micro-batches without a schedule": (
        lambda: config_of("none", 1, 4),
        ("pipeline.microbatches = 4", "needs a pipeline.schedule"),
    ),
    "chunks without a schedule": (
        lambda: config_of("none", 1, 1, chunks=2),
        ("pipeline.chunks = 2", "needs a pipeline.schedule"),
    ),
    "no micro-batches": (
        lambda: config_of("1f1b", 2, 0),
        ("pipeline.microbatches = 0", "must be positive"),
    ),
    "accumulation": (
        accumulated,
        ("train.accumulation = 2", "must be 1", "pipeline.microbatches"),
    ),
    "a batch that its micro-batches do not divide": (
        lambda: config_of("1f1b", 2, 4, batch=6),
        ("data.batch = 6", "pipeline.microbatches", "= 4"),
    ),
    "a batch that the devices of a rank do not divide": (
        lambda: with_devices(batch=12),
        ("data.batch = 12", "pipeline.microbatches x the mesh's devices", "= 8"),
    ),
    **{
        f"a penalty of the whole batch under {schedule}": (
            lambda schedule=schedule: aux_global(schedule),
            (
                "balance.strategy = 'aux_global'",
                f"pipeline.schedule = '{schedule}'",
                "'aux_seq' (per sequence)",
                "'aux_batch' (per micro-batch)",
                "'gpipe'",
            ),
        )
        for schedule in ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
    },
}
BY_STEP = {
    "odd ranks": (
        lambda: config_of("dualpipe", 3, 8),
        ("= 3: must be even for dualpipe",),
    ),
    "odd micro-batches": (
        lambda: config_of("dualpipe", 2, 3),
        ("microbatches = 3: must be even for dualpipe",),
    ),
    "too few micro-batches": (
        lambda: config_of("dualpipe", 4, 6),
        ("microbatches = 6: must be at least 8 for dualpipe on 4 ranks",),
    ),
    "too few micro-batches there and back": (
        lambda: config_of("dualpipev", 4, 6),
        ("microbatches = 6: must be at least 8 for dualpipev on 4 ranks",),
    ),
    "micro-batches that make no rounds": (
        lambda: config_of("interleaved", 4, 6),
        ("microbatches = 6: must be a multiple of", "= 4 for interleaved"),
    ),
    "one chunk": (
        lambda: config_of("interleaved", 2, 4, chunks=1),
        ("chunks = 1: must be at least 2",),
    ),
    "chunks of another schedule": (
        lambda: config_of("1f1b", 2, 4, chunks=2),
        ("chunks = 2: 1f1b has none; interleaved has",),
    ),
    "more stages than layers": (
        lambda: config_of("1f1b", 4, 4, layers=2),
        ("pipeline of 4 stages: must be at most 3", "2 layers (model.num_layers)"),
    ),
    "more stages than layers, two a rank": (
        lambda: config_of("dualpipev", 4, 8, layers=6),
        ("pipeline of 8 stages: must be at most 7", "6 layers (model.num_layers)"),
    ),
    "more chunks than layers": (
        lambda: config_of("interleaved", 2, 4, chunks=5),
        ("pipeline of 10 stages: must be at most 9", "8 layers (model.num_layers)"),
    ),
}


def too_late(*_, **__):
    raise AssertionError("more is done than to refuse")


def refusal(make):
    with pytest.raises(ValueError) as refused:
        make()
    return str(refused.value)


@pytest.mark.parametrize("case", BY_CONFIG)
def test_refused_by_the_configuration(case):
    make, texts = BY_CONFIG[case]
    message = refusal(make)
    assert message.startswith(texts[0])
    assert [text for text in texts if text not in message] == []


@pytest.mark.parametrize("case", BY_STEP)
def test_refused_when_the_step_is_made(case, monkeypatch):
    """With no program traced, let alone compiled."""
    make, texts = BY_STEP[case]
    config = make()

    def assembled():
        parts = assemble(config, jax.devices()[: config.mesh.size])
        monkeypatch.setattr(jax, "jit", too_late)
        make_step(parts)

    message = refusal(assembled)
    assert [text for text in texts if text not in message] == []
    settings = f"pipeline.schedule = {config.pipeline.schedule!r}, mesh.pipe = "
    assert message.startswith(f"{settings}{config.mesh.pipe}, pipeline.microbatches")
    assert refusal(lambda: pipelined.plan(config)) == message


@pytest.mark.parametrize("case", BY_STEP)
def test_a_run_is_refused_before_it_opens_its_data(case, monkeypatch, tmp_path):
    monkeypatch.setattr(start, "open_data", too_late)
    message = refusal(lambda: start.open_run(BY_STEP[case][0](), tmp_path))
    assert BY_STEP[case][1][0] in message


def test_devices_that_are_not_there_are_refused():
    config = config_of("1f1b", 8, 8, mesh=MeshConfig(pipe=8, data=2))
    message = refusal(lambda: assemble(config))
    assert "mesh.pipe = 8 x mesh.data = 2" in message
    assert "make 16 devices" in message


def test_a_penalty_of_the_whole_batch_may_go_with_gpipe():
    assert aux_global("gpipe").balance.strategy == "aux_global"


@pytest.mark.parametrize(
    "sizes",
    [("dualpipe", 2, 4), ("dualpipe", 4, 8), ("interleaved", 4, 8, 2), ("1f1b", 3, 1)],
    ids=str,
)
def test_what_is_right_is_made(sizes):
    """The smallest of each that the messages name."""
    config = config_of(*sizes)
    make_step(assemble(config, jax.devices()[: config.mesh.size]))
