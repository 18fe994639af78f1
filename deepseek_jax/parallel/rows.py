"""A function on each device's own rows of a batch, where no row depends on another.

XLA splits most of them by itself, but gathers all rows where a loop goes over chunks of
them (attention, the losses) and for `top_k` (the router), and cannot split a kernel.
Ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.runtime import Attention, LatentAttention
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

    def of_device(made: Callable[..., Any], *arrays: Any) -> Any:
        own = function(*made(arrays))
        return jax.lax.psum(own, mesh.axis_names) if total else own

    def of_all(*arrays: Any) -> Any:
        arrays, made = without_empty(arrays, whole, mesh.size)
        split = [PartitionSpec() if n in whole else rows for n in range(len(arrays))]
        return jax.shard_map(
            functools.partial(of_device, made),
            mesh=mesh,
            in_specs=tuple(split),
            out_specs=PartitionSpec() if total else rows,
            check_vma=False,
        )(*arrays)

    return of_all


def without_empty(
    arrays: tuple[Any, ...], whole: tuple[int, ...], devices: int
) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Arguments with None for arrays without numbers, and what makes these anew.

    XLA (jax 0.11.2) crashes on such an array where it is split and used.
    """

    def to_split(function: Callable[..., Any], *trees: Any) -> tuple[Any, ...]:
        return tuple(
            tree[0] if n in whole else jax.tree.map(function, *tree[1:])
            for n, tree in enumerate(zip(*trees, strict=True))
        )

    def one(x: Array, mine: Array | None) -> Array:
        shape = x.shape[0] // devices, *x.shape[1:]
        return jnp.zeros(shape, x.dtype) if mine is None else mine

    def made(own: tuple[Any, ...]) -> tuple[Any, ...]:
        return to_split(one, own, arrays, own)

    return to_split(lambda x: x if x.size else None, arrays, arrays), made


def attention_on_devices(
    *arrays: Array | None,
    scale: float,
    attention: Attention | LatentAttention,
    mesh: Mesh,
) -> Array:
    """`Runtime.attention`, or that over cached latents, over all devices of a mesh."""

    def of_device(*arrays: Any) -> Array:
        return attention(*arrays, scale=scale)

    out: Array = on_devices(of_device, mesh=mesh)(*arrays)
    return out
