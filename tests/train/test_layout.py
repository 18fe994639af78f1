"""What a run says of its devices before it starts."""

import dataclasses

import jax

from deepseek_jax import presets
from deepseek_jax.config import Config, DataConfig, MeshConfig, PipelineConfig
from deepseek_jax.train import layout

CPU = jax.devices()[0]


def said(devices: int, **changes) -> str:
    config = Config(model=presets.tiny(), data=DataConfig(batch=16))
    config = dataclasses.replace(config, **changes)
    return "\n".join(layout.lines(config, [CPU] * devices))


def test_one_device_is_one_line():
    assert said(1) == (
        "on 1 of 1 devices, cpu (cpu): products f32, attention chunked, "
        "experts blocks, remat policy"
    )


def test_idle_devices_are_named_with_what_would_use_them():
    assert "3 devices are idle: --config.mesh.data=4 would use all" in said(4)
    assert "idle" not in said(4, mesh=MeshConfig(data=4))


def test_a_mesh_says_how_tokens_reach_experts():
    mesh = MeshConfig(data=2, expert=2, transport="ring")
    line = (
        "mesh data 2 x expert 2, rules fsdp; tokens to experts by ring, payload exact"
    )
    assert line in said(4, mesh=mesh)
    assert "tokens to experts" not in said(4, mesh=MeshConfig(data=4))


def test_a_pipeline_says_how_long_ranks_idle():
    # Of 1F1B a rank idles (R - 1)(F + B) of C (F + B) + that: 3 of 8 + 3.
    text = said(4, mesh=MeshConfig(pipe=4), pipeline=PipelineConfig("1f1b", 8))
    assert (
        "pipeline 1f1b over 4 ranks, 8 micro-batches: ranks idle 27% of a step" in text
    )
    alone = said(4, mesh=MeshConfig(pipe=4), pipeline=PipelineConfig("gpipe"))
    assert "1 micro-batches: ranks idle 75% of a step" in alone
