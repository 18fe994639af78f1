"""The device mesh: axes `pipe`, `data`, `fsdp`, `node`, `expert`; each may be 1.

A batch's rows are split over all five, but inside a pipeline (`parallel.pipeline`),
whose ranks all see them, over the last four. Experts are split over `node` and
`expert`, the two halves of arXiv:2412.19437, section 3.2.2: between nodes links are
slow, inside one they are fast. `expert` comes last, and devices are taken in JAX's
order, process by process, so that an expert group fills a node before it goes over to
the next.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig

AXES = ("pipe", "data", "fsdp", "node", "expert")
ROWS = AXES[1:]  # the devices that share a micro-batch in a pipeline
EXPERTS = ("node", "expert")


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all that JAX has, of all processes.

    A mesh of one device takes the first and leaves the others alone.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if config.size == 1 and jax.process_count() == 1:
        devices = devices[:1]
    shape = [getattr(config, axis) for axis in AXES]
    if config.size != len(devices):
        product = " x ".join(
            f"mesh.{axis} = {size}" for axis, size in zip(AXES, shape, strict=True)
        )
        raise ValueError(
            f"{product} make {config.size} devices: there are {len(devices)} "
            "(JAX_NUM_CPU_DEVICES=n in the environment simulates n on a CPU)"
        )
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
