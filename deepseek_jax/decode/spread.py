"""Decoding on several devices: experts, some of them copied, are spread over these.

A device has rows of the batch with their cache, and places of experts; the rest of the
model it has whole. Tokens reach experts on other devices as they do in training
(`parallel.transport`), and a copied expert's tokens take turns between its copies. The
redundant experts of arXiv:2412.19437, section 3.4; where we differ: attention is not
split over devices, the shared expert is on all of them instead of being routed to, and
experts are placed once, not every ten minutes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.config import MeshConfig
from deepseek_jax.decode.forward import Weights
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import eplb, expert, partition
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.rules import PRESETS
from deepseek_jax.typing import Params

RULES = PRESETS["decode"]
MATRICES = ("gate", "up", "down")


def spread(
    model: Transformer,
    weights: Weights,
    config: MeshConfig,
    *,
    placement: eplb.Placement | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Transformer, Weights]:
    """The model and its weights on a mesh, for `engine.generate`.

    Make them once: programs are compiled for the model as an object.

    Args:
      weights: `forward.split` of a checkpoint's parameters.
      config: axes and how tokens travel; the rules are those of decoding. With a
        `capacity` of node x expert there is always room, for few tokens the best.
      placement: `eplb.place`'s, a layer for each router, those of MTP modules last;
        None leaves the experts in their order, uncopied.
      devices: of the mesh; by default all that JAX has.

    Raises:
      ValueError: sizes that do not divide, or a placement of another model.
    """
    check(model, config, placement)
    mesh = meshes.make(config, devices)
    places = (PartitionSpec(meshes.EXPERTS, None, None),) * len(MATRICES)
    rt = expert.spread(model.rt, model.config.moe, config, mesh, places)
    copied = _routers(weights, placement)
    parts = Weights(
        *(_put(part, mesh) for part in weights[:3]),
        tuple(_put(next(copied), mesh) for _ in weights.blocks),
        tuple(_put(next(copied), mesh) for _ in weights.mtp),
    )
    return model.clone(rt=rt), parts


def check(
    model: Transformer, config: MeshConfig, placement: eplb.Placement | None
) -> None:
    """Refuses what does not fit.

    Raises:
      ValueError: as said in `spread`.
    """
    experts, routers = model.config.moe.num_experts, model.config.num_routers
    shares = config.node * config.expert
    if placement is None:
        if experts % shares:
            raise ValueError(
                f"model.moe.num_experts = {experts}: must be a multiple of mesh.node x "
                f"mesh.expert = {shares}, or some need copies (replicas)"
            )
        return
    if placement.counts.shape != (routers, experts):
        raise ValueError(
            f"placement of {list(placement.counts.shape)} routers and experts: must be "
            f"one of the model's {[routers, experts]}"
        )
    if (places := placement.phy2log.shape[1]) % shares:
        raise ValueError(
            f"placement of {places} places: must be a multiple of mesh.node x "
            f"mesh.expert = {shares}"
        )


def _routers(
    weights: Weights, placement: eplb.Placement | None
) -> Iterator[tuple[Params, Any]]:
    """Layers and then MTP modules, one by one, with their experts at places."""
    router = 0
    for params, state in (*weights.blocks, *weights.mtp):
        inner = params.get("block", params)
        if placement is not None and "moe" in inner:
            inner = {**inner, "moe": at_places(inner["moe"], placement, router)}
            router += 1
        yield ({**params, "block": inner} if "block" in params else inner), state


def at_places(moe: Params, placement: eplb.Placement, router: int) -> Params:
    """A layer's parameters with matrices for each place, and the way to these."""
    phy2log, *copies = (table[router] for table in placement)
    at_place = {name: eplb.expand(moe[name], phy2log) for name in MATRICES}
    return {**moe, **at_place, "copies": eplb.Copies(*copies)}


def _put(tree: Any, mesh: Mesh) -> Any:
    return jax.device_put(tree, partition.by_table(RULES, mesh, tree))
