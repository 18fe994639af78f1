"""The device mesh and the shardings of a training step.

Parameters are replicated and rows split over `data`; XLA inserts the sums, so that
loss, loads and biases are those of the whole batch (arXiv:2412.19437, section 3.2 uses
the same data axis beside pipeline and expert ones).
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig


def make(config: MeshConfig) -> Mesh:
    """A mesh over the first `config.data` devices.

    Raises:
      ValueError: more devices are asked for than there are.
    """
    devices = jax.devices()
    if config.data > len(devices):
        raise ValueError(
            f"mesh.data = {config.data}: there are {len(devices)} devices "
            "(JAX_NUM_CPU_DEVICES=n in the environment simulates n on a CPU)"
        )
    return jax.make_mesh(
        (config.data,), ("data",), (AxisType.Auto,), devices=devices[: config.data]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the mesh's `data` axis."""
    return NamedSharding(mesh, PartitionSpec("data"))
