"""The mesh: its order, and what is refused."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel import mesh as meshes


def test_experts_fill_a_node_before_they_go_on():
    mesh = meshes.make(MeshConfig(data=2, node=2, expert=2))
    assert mesh.axis_names == ("pipe", "data", "fsdp", "node", "expert")
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(1, 2, 1, 2, 2))


def test_a_mesh_of_one_takes_the_first_of_many():
    assert meshes.make(MeshConfig()).devices.tolist() == [[[[[jax.devices()[0]]]]]]


@pytest.mark.parametrize("shape", [{"data": 4}, {"data": 4, "expert": 4}])
def test_axes_must_multiply_to_the_devices(shape):
    size = MeshConfig(**shape).size
    with pytest.raises(ValueError, match=f"make {size} devices: there are 8"):
        meshes.make(MeshConfig(**shape))


def test_rows_are_in_the_order_of_devices():
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, expert=2))
    rows = jax.device_put(np.arange(16), meshes.by_rows(mesh))
    for shard in rows.addressable_shards:
        want = [2 * shard.device.id, 2 * shard.device.id + 1]
        np.testing.assert_array_equal(shard.data, want)
