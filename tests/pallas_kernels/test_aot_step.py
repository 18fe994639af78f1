"""Steps of a replica are machine code for Hopper with kernels in it: a whole one of
training, and one of decoding.

`mini`, whose heads and experts the kernels have; its layers are scanned, so fewer of
them would compile no faster. Needs the extra `aot`; skipped without, unless REQUIRE_AOT
is set.
"""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot_h100 import shapes
from deepseek_jax import presets
from deepseek_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    MTPConfig,
    OptimConfig,
    RuntimeConfig,
)
from deepseek_jax.decode import cache as caches
from deepseek_jax.decode import engine, forward
from deepseek_jax.eval import logits
from deepseek_jax.train import layout
from deepseek_jax.train.state import assemble
from deepseek_jax.train.step import make_step
from pallas_kernels import testing
from pallas_kernels.choice import MOSAIC_GPU

FLASH = "flash_mla_forward", "flash_mla_queries", "flash_mla_keys"
MAPS = "q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down"
ALWAYS = {"attention", "grouped_dot"}
TOTALS = {
    "bf16": ALWAYS | {"grouped_swiglu"},
    "fp8_v3": ALWAYS | {f"linear {name}" for name in MAPS},
}


def config(compute: str, **changes) -> Config:
    """`mini` in strict mode; the MTP module is one more block of the same kind."""
    runtime = RuntimeConfig(compute=compute, strict=True)
    model = dataclasses.replace(presets.mini(), mtp=MTPConfig(depth=0))
    data, optim = DataConfig(batch=8, length=512), OptimConfig(horizon=100)
    return dataclasses.replace(
        Config(model=model, data=data, optim=optim, runtime=runtime), **changes
    )


def compiled(config: Config, devices) -> tuple[Counter, list[testing.Report]]:
    """Places of the kernels in the program and how many are there; their reports."""
    with jax.default_device(devices[0]):
        chosen = layout.kernels(config, devices)
        assert set(chosen) == TOTALS[config.runtime.compute]
        assert set(chosen.values()) == {(MOSAIC_GPU, "")}
        parts = assemble(config, devices)
        lower = functools.partial(make_step(parts).lower, *shapes(parts))
        program, reports = testing.compile_lowered(devices[0], lower)
    calls = [
        line
        for line in program.as_text().splitlines()
        if "custom-call(" in line and "mosaic_gpu" in line
    ]
    return Counter(re.search(r'op_name="([^"]*)"', line)[1] for line in calls), reports


def number(calls: Counter, *parts: str) -> int:
    """Kernels at places whose names have all these parts."""
    return sum(n for place, n in calls.items() if all(part in place for part in parts))


def check(calls: Counter, reports: list[testing.Report]) -> None:
    """Attention of both stacks, forward and backward, and experts' six products.

    XLA may have a kernel twice in a program.
    """
    for name in FLASH:
        for stack in ("/dense/", "/moe/"):
            assert number(calls, stack, "/core/", name) >= 1
    assert number(calls, "/experts/") >= 6
    for report in reports:
        testing.assert_hopper(report, ("tma", "mbarrier"))
    assert sum("wgmma" in report.ptx for report in reports) >= len(FLASH) + 3


def test_in_bf16(h100s):
    calls, reports = compiled(config("bf16"), h100s[:1])
    check(calls, reports)
    assert number(calls) == number(calls, "/core/") + number(calls, "/experts/")


@pytest.mark.parametrize("cards", [1, 2])
def test_in_fp8(h100s, cards):
    mesh = MeshConfig(data=cards)
    calls, reports = compiled(config("fp8_v3", mesh=mesh), h100s[:cards])
    check(calls, reports)
    assert not cards > 1 or number(calls, "shard_map") == number(calls)
    # Fprop, Dgrad and Wgrad of each map: two operands are quantised, then multiplied.
    for name in MAPS:
        for stack in ("/dense/", "/moe/"):
            assert number(calls, stack, f"/{name}/") >= 9


def test_of_decoding(h100s):
    """Two tokens a row, as drafts are judged, on a paged cache."""
    with jax.default_device(h100s[0]):
        parts = assemble(config("bf16"), h100s[:1])
        state, _ = shapes(parts)
        model = logits.build(parts.config, RuntimeConfig(compute="bf16"))
        assert engine.attention(model, jnp.bfloat16, page=64) == (MOSAIC_GPU, "")
    split = functools.partial(forward.split, model)
    cache = caches.create(model.config, [512] * 8, dtype=jnp.bfloat16, page=64)
    window = jax.ShapeDtypeStruct((8, 2), jnp.int32)
    reports = testing.compile_for(
        h100s[0],
        functools.partial(forward.forward, model),
        jax.eval_shape(split, state.params, state.balance),
        window,
        window,
        cache,
    )
    for report in reports:
        testing.assert_hopper(report, ())
    assert any("wgmma" in report.ptx for report in reports)


def test_on_two_cards_that_share_experts(h100s):
    """There kernels are inside of `shard_map`."""
    mesh = MeshConfig(expert=2, rules="zero1")
    calls, reports = compiled(config("bf16", mesh=mesh), h100s[:2])
    check(calls, reports)
    assert number(calls, "shard_map") == number(calls)
