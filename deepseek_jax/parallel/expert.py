"""Expert parallelism: a runtime whose experts lie on many devices.

`on_mesh` makes one for a program that sees a whole mesh, `in_pipeline` for a rank of a
pipeline, whose program sees one device. How tokens travel is `transport`'s
(arXiv:2412.19437, section 3.2.2).
"""

import functools
from dataclasses import replace

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.config import Config, MeshConfig, MoEConfig
from deepseek_jax.parallel import partition
from deepseek_jax.parallel.mesh import AXES, EXPERTS, ROWS, by_rows
from deepseek_jax.parallel.rows import attention_on_devices, on_devices
from deepseek_jax.parallel.transport import (
    TRANSPORTS,
    Group,
    Slots,
    Transport,
    Weights,
    gather,
    ring,
)
from deepseek_jax.runtime import GroupedDot, Runtime
from deepseek_jax.typing import Array

GPUS = ("gpu", "cuda", "rocm")


def experts_on_mesh(
    x_TD: Array,
    weights_TK: Array,
    experts_TK: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    grouped_dot: GroupedDot,
    most: int | None = None,
    beside: Array | None = None,
    mesh: Mesh,
    transport: Transport,
    group: Group,
    places: tuple[PartitionSpec, ...],
) -> tuple[Array, Array | None]:
    """`Runtime.experts` with rows split over all of a mesh.

    Args:
      places: where gate, up and down lie; but for their experts they are gathered.
    """

    def gathered(w: Array, place: PartitionSpec) -> Array:
        for dim, axes in enumerate(place[1:], 1):
            w = w if axes is None else lax.all_gather(w, axes, axis=dim, tiled=True)
        return w

    def on_device(
        slots: Slots, weights: tuple[Array, ...], beside: Array | None
    ) -> tuple[Array, Array | None]:
        whole = Weights(*map(gathered, weights, places))
        return transport(group, slots, whole, grouped_dot, beside)

    rows = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(rows, places, rows),
        out_specs=rows,
        check_vma=False,
    )(Slots(x_TD, weights_TK, experts_TK), (gate_EDF, up_EDF, down_EFD), beside)


def group_of(rt: Runtime, moe: MoEConfig, config: MeshConfig, mesh: Mesh) -> Group:
    """The devices of `mesh` that share experts, each computing as `rt` does."""
    aligned = moe.num_groups % config.node == 0
    return Group(
        rt.experts,
        config.node,
        config.expert,
        moe.keep_groups if aligned else config.node,
        config.capacity,
        config.payload,
        mesh.devices.flat[0].platform in GPUS,
        ring,
        AXES,
    )


def experts_in_pipeline(
    x_tD: Array,
    weights_tK: Array,
    experts_tK: Array,
    gate_eDF: Array,
    up_eDF: Array,
    down_eFD: Array,
    *,
    grouped_dot: GroupedDot,
    most: int | None = None,
    beside: Array | None = None,
    transport: Transport,
    group: Group,
) -> tuple[Array, Array | None]:
    """`Runtime.experts` of a device's own rows and experts, all axes being manual."""
    slots = Slots(x_tD, weights_tK, experts_tK)
    weights = Weights(gate_eDF, up_eDF, down_eFD)
    return transport(group, slots, weights, grouped_dot, beside)


def in_pipeline(rt: Runtime, config: Config, mesh: Mesh) -> Runtime:
    """The runtime of one device, for a rank of a pipeline whose devices share experts.

    Where the ring would send, everything is gathered.
    """
    group = group_of(rt, config.model.moe, config.mesh, mesh)
    if group.size(EXPERTS) == 1:
        return rt
    group = replace(group, spare=gather, same=ROWS)
    name = config.mesh.transport
    experts = functools.partial(
        experts_in_pipeline,
        transport=gather if name == "ring" else TRANSPORTS[name],
        group=group,
    )
    return replace(rt, experts=experts)


def on_mesh(rt: Runtime, config: Config, mesh: Mesh) -> Runtime:
    """The runtime `rt` of one device, for a mesh of several."""
    if mesh.size == 1:
        return rt
    places = partition.expert_places(config, mesh)
    return spread(rt, config.model.moe, config.mesh, mesh, places)


def spread(
    rt: Runtime,
    moe: MoEConfig,
    config: MeshConfig,
    mesh: Mesh,
    places: tuple[PartitionSpec, ...],
) -> Runtime:
    """The same for experts that lie at `places`: gate, up and down of a layer."""
    group = group_of(rt, moe, config, mesh)
    shared = group.size(EXPERTS) > 1  # else the ring is the device's own computation
    experts = functools.partial(
        experts_on_mesh,
        mesh=mesh,
        transport=TRANSPORTS[config.transport if shared else "ring"],
        group=group,
        places=places,
    )
    by_device = functools.partial(attention_on_devices, mesh=mesh)
    return replace(
        rt,
        attention=functools.partial(by_device, attention=rt.attention),
        latent_attention=functools.partial(by_device, attention=rt.latent_attention),
        experts=experts,
        constrain=functools.partial(partition.pin, mesh=mesh),
        rows=functools.partial(on_devices, mesh=mesh),
        placed=by_rows(mesh),
    )
