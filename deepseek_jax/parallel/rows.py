"""A function on each device's own rows of a batch, where no row depends on another.

XLA splits most of them by itself, but gathers all rows where a loop goes over chunks of
them (attention, the losses) and for `top_k` (the router), and cannot split a kernel.
Ours.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.runtime import Attention
from deepseek_jax.typing import Array


def on_devices(
    function: Callable[..., Any],
    *,
    mesh: Mesh,
    whole: tuple[int, ...] = (),
    total: bool = False,
) -> Callable[..., Any]:
    """`Runtime.rows` over all devices of a mesh."""
    rows = PartitionSpec(mesh.axis_names)

    def of_device(*arrays: Any) -> Any:
        own = function(*arrays)
        return jax.lax.psum(own, mesh.axis_names) if total else own

    def of_all(*arrays: Any) -> Any:
        split = [PartitionSpec() if n in whole else rows for n in range(len(arrays))]
        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=tuple(split),
            out_specs=PartitionSpec() if total else rows,
            check_vma=False,
        )(*arrays)

    return of_all


def attention_on_devices(
    *arrays: Array | None, scale: float, attention: Attention, mesh: Mesh
) -> Array:
    """`Runtime.attention` over all devices of a mesh."""

    def of_device(*arrays: Any) -> Array:
        return attention(*arrays, scale=scale)

    out: Array = on_devices(of_device, mesh=mesh)(*arrays)
    return out
