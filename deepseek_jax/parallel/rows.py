"""A function on each device's own rows of a batch, where no row depends on another.

XLA could split such a function itself, but would gather a scan over chunks of rows, and
cannot split a kernel. Ours.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


def on_rows(
    function: Callable[..., Any],
    mesh: Mesh,
    whole: tuple[int, ...] = (),
    total: bool = False,
) -> Callable[..., Any]:
    """`function` of arrays whose leading axis is split over all devices.

    Args:
      whole: the arguments, by number, that every device gets all of.
      total: results are summed over the devices; else they are rows again.
    """
    if mesh.size == 1:
        return function
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
