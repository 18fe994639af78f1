"""What a run says first: on which devices, and how, its steps are computed. Ours."""

from collections.abc import Iterator

import jax

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.pipeline import cost
from deepseek_jax.train import pipelined


def lines(config: Config, devices: list[jax.Device] | None = None) -> Iterator[str]:
    """A line each for devices and runtime, the mesh, the pipeline, idle devices.

    Raises:
      ValueError: a schedule that these sizes do not have.
    """
    devices = jax.devices() if devices is None else devices
    mesh, runtime = config.mesh, config.runtime
    kind = f"{devices[0].platform} ({devices[0].device_kind})"
    yield (
        f"on {mesh.size} of {len(devices)} devices, {kind}: "
        f"products {runtime.compute}, attention {runtime.attention}, "
        f"experts {runtime.experts}, remat {runtime.remat}"
    )
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
