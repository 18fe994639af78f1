"""What a run says first: on which devices, and how, its steps are computed. Ours."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import (
    AUTO,
    Config,
    MTPConfig,
    OptimConfig,
    PipelineConfig,
    TrainConfig,
)
from deepseek_jax.data.batch import Batch
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.pipeline import cost
from deepseek_jax.runtime import XLA, Choice, dry_run, on_hopper
from deepseek_jax.train import pipelined
from deepseek_jax.train.objective import objective, totals
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.typing import Params

Choices = dict[str, Choice]


def lines(config: Config, devices: list[jax.Device] | None = None) -> Iterator[str]:
    """A line each for devices and runtime, kernels, mesh, pipeline, idle devices.

    Raises:
      ValueError: a schedule that these sizes do not have; or as `kernels`.
    """
    devices = jax.devices() if devices is None else devices
    mesh, runtime = config.mesh, config.runtime
    kind = f"{devices[0].platform} ({devices[0].device_kind})"
    yield (
        f"on {mesh.size} of {len(devices)} devices, {kind}: "
        f"products {runtime.compute}, attention {runtime.attention}, "
        f"experts {runtime.experts}, remat {runtime.remat}"
    )
    yield _kernels(kernels(config, devices))
    if mesh.size > 1:
        sizes = {axis: getattr(mesh, axis) for axis in AXES}
        used = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1)
        line = f"mesh {used}, rules {mesh.rules}"
        if mesh.node * mesh.expert > 1:
            line += f"; tokens to experts by {mesh.transport}, payload {mesh.payload}"
        yield line
    if config.pipeline.schedule != "none":
        yield _pipeline(config)
    if mesh.size == 1 and len(devices) > 1:
        yield (
            f"{len(devices) - 1} devices are idle: --config.mesh.data={len(devices)} "
            "would use all"
        )


def _pipeline(config: Config) -> str:
    schedule, _ = pipelined.plan(config)
    timing = cost.simulate(schedule, cost.costs())
    return (
        f"pipeline {schedule.name} over {schedule.ranks} ranks, "
        f"{schedule.microbatches} micro-batches: ranks idle {timing.share:.0%} of a "
        "step, if a forward and the parts of a backward take the same time"
    )


def kernels(config: Config, devices: list[jax.Device] | None = None) -> Choices:
    """Which implementation each callable of the runtime takes in this run's steps.

    "all" stands for them where nothing has to be traced to know it. Linear maps count
    in FP8 only, each with its name.

    Raises:
      ValueError: the one demanded cannot do it; or under `runtime.strict`, one falls
        back.
    """
    asked, hopper = config.runtime, on_hopper()
    if asked.implementation == XLA:
        return {"all": Choice(XLA, "demanded")}
    if asked.implementation == AUTO and not (hopper or asked.strict):
        return {"all": Choice(XLA, "not a Hopper GPU")}
    own = tuple(jax.devices() if devices is None else devices)
    found = _traced(_as_small(config), own, str(jax.config.jax_default_device))
    if asked.attention == "plain":
        found = {"attention": Choice(XLA, "runtime.attention = 'plain'")} | found
    slow = {name: choice for name, choice in found.items() if choice.reason}
    if asked.strict and slow:
        raise ValueError(
            "runtime.strict = True: everything must have a kernel, and does not; leave "
            f"it out to train without: {_grouped(slow)}"
        )
    return found


def _as_small(config: Config) -> Config:
    """A run whose layers are called with what this one's are, each kind but once."""
    model, dense = config.model, min(config.model.num_dense, 1)
    return Config(
        model=replace(
            model, num_layers=dense + 1, num_dense=dense, mtp=MTPConfig(depth=0)
        ),
        data=replace(
            config.data, batch=config.data.batch // config.micro_batches, lanes=0
        ),
        optim=OptimConfig(horizon=1),
        balance=config.balance,
        train=TrainConfig(),
        runtime=config.runtime,
        mesh=replace(config.mesh, pipe=1),
        pipeline=PipelineConfig(),
    )


@functools.lru_cache(maxsize=1)
def _traced(config: Config, devices: tuple[jax.Device, ...], target: str) -> Choices:
    """Traces a loss for what its callables decide, with this as the default device."""
    parts = assemble(config, devices[: config.mesh.size])
    state = jax.eval_shape(functools.partial(init_state, parts), 0)
    shape = config.data.batch, config.data.length + 1
    numbers = jax.ShapeDtypeStruct(shape, jnp.int32)
    marks = jax.ShapeDtypeStruct(shape, jnp.bool_)
    batch = Batch(numbers, numbers, numbers, marks, numbers)

    def loss(params: Params, balance: Any, batch: Batch) -> Any:
        counts = totals(parts, batch)
        return objective(parts, params, balance, batch, counts, jnp.float32(0))

    with dry_run() as choices:
        jax.eval_shape(loss, state.params, state.balance, batch)
    return dict(sorted(choices.items()))


def _kernels(choices: Choices) -> str:
    """Callables by what they take: "mosaic_gpu for attention; xla for ... (why)"."""
    maps = [name for name in choices if name.startswith("linear ")]
    if len({choices[name] for name in maps}) == 1:  # all alike
        rest = {name: choices[name] for name in choices if name not in maps}
        choices = rest | {"linear": choices[maps[0]]}
    return f"kernels: {_grouped(choices)}"


def _grouped(choices: Choices) -> str:
    groups: dict[Choice, list[str]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice, []).append(name)
    return "; ".join(
        f"{implementation} for {', '.join(names)}" + f" ({reason})" * bool(reason)
        for (implementation, reason), names in groups.items()
    )
