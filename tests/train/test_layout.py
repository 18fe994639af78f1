"""What a run says of its devices before it starts."""

import dataclasses

import jax
import pytest

from deepseek_jax import presets
from deepseek_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    PipelineConfig,
    RuntimeConfig,
)
from deepseek_jax.train import layout

CPU = jax.devices()[0]


def said(devices: int, **changes) -> str:
    config = Config(model=presets.tiny(), data=DataConfig(batch=16))
    config = dataclasses.replace(config, **changes)
    return "\n".join(layout.lines(config, [CPU] * devices))


def test_one_device_is_one_line_and_one_for_all_kernels():
    assert said(1).splitlines() == [
        "on 1 of 1 devices, cpu (cpu): products f32, attention chunked, "
        "experts blocks, remat policy",
        "kernels: xla for all (not a Hopper GPU)",
    ]
    chosen = RuntimeConfig(implementation="xla", strict=True)
    assert "kernels: xla for all (demanded)" in said(1, runtime=chosen)


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


REFUSED = {
    "strict": (
        RuntimeConfig(compute="bf16", strict=True),
        r"runtime.strict = True: .* xla for attention, grouped_dot, grouped_swiglu "
        r"\(mosaic_gpu runs on NVIDIA Hopper GPUs .* not on 'cpu'",
    ),
    "demanded": (
        RuntimeConfig(compute="bf16", implementation="mosaic_gpu"),
        "runtime.implementation = 'mosaic_gpu': attention: .* not on 'cpu'",
    ),
    "demanded in f32": (
        RuntimeConfig(implementation="interpret"),
        "runtime.implementation = 'interpret': attention: .* as float32",
    ),
    "demanded for blocks that are none of its": (
        RuntimeConfig(compute="fp8_v3", implementation="interpret", block=64),
        "runtime.implementation = 'interpret': grouped_dot: blocks have 64 rows",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_where_there_is_no_kernel_and_must_be_one(why):
    runtime, message = REFUSED[why]
    with pytest.raises(ValueError, match=message):
        said(1, runtime=runtime)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh": MeshConfig(data=2, expert=2)},
        {"mesh": MeshConfig(pipe=2, expert=2), "pipeline": PipelineConfig("1f1b", 2)},
    ],
)
def test_each_callable_says_what_it_takes_on_any_mesh(changes):
    """In strict mode too, where what was demanded is no fallback."""
    runtime = RuntimeConfig(compute="fp8_v3", implementation="interpret", strict=True)
    config = Config(model=presets.tiny(), data=DataConfig(batch=16), runtime=runtime)
    config = dataclasses.replace(config, **changes)
    devices = jax.devices()[: config.mesh.size]
    assert set(layout.kernels(config, devices).values()) == {("interpret", "")}
    text = "\n".join(layout.lines(config, devices))
    assert "kernels: interpret for attention, grouped_dot, linear\n" in text + "\n"


def test_fallbacks_are_told_with_their_reasons(monkeypatch):
    """As where a Hopper GPU is, of which only blocks of 128 rows have a kernel."""
    monkeypatch.setattr("pallas_kernels.choice.require_hopper", lambda: None)
    monkeypatch.setattr("deepseek_jax.kernels.require_hopper", lambda: None)
    runtime = RuntimeConfig(compute="bf16", block=64)
    assert (
        "kernels: mosaic_gpu for attention; xla for grouped_dot, grouped_swiglu "
        "(blocks have 64 rows: the kernel wants a multiple of 128)"
    ) in said(1, runtime=runtime)
    runtime = dataclasses.replace(runtime, block=128, strict=True)
    own = "kernels: mosaic_gpu for attention, grouped_dot, grouped_swiglu\n"
    assert own in said(1, runtime=runtime) + "\n"
    plain = dataclasses.replace(runtime, attention="plain")
    with pytest.raises(
        ValueError, match=r"xla for attention \(runtime\.attention = 'plain'"
    ):
        said(1, runtime=plain)
