"""A model cut into the stages of a pipeline, and put together again.

Layers are dealt out in order and as evenly as they go, an MTP module counting as one of
them (arXiv:2412.19437, section 3.2 has about four layers on a rank). Embedding and head
go with the first stage and the last, as do the MTP modules, and may be needed by both:
they are `shared`, which every rank has. Blocks are `own`: those of a stage lie in slots
of an array with leading axes [ranks, stages of a rank, slots], where a stage with fewer
blocks leaves its last slots empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.pipeline.schedules import Schedule
from deepseek_jax.typing import Array, Params

STACKS = ("dense", "moe")  # of the model's parameters, a block after another


@dataclass(frozen=True)
class Slots:
    """Which block of a stack lies where, of `Schedule.paths[0]`."""

    layer_RdN: NDArray[np.int32]  # [ranks, stages of a rank, slots]; -1 where empty

    @property
    def width(self) -> int:
        """Slots of a stage."""
        return self.layer_RdN.shape[-1]

    @property
    def common(self) -> int:
        """Leading slots that are full on every stage."""
        return int((self.layer_RdN >= 0).sum(-1).min())

    def place(self, stacked: Any) -> Any:
        """Arrays with a leading layer axis to [ranks, stages of a rank, slots, ...].

        Empty slots hold some layer's.
        """
        at = jnp.asarray(np.maximum(self.layer_RdN, 0))
        return jax.tree.map(lambda x: jnp.take(x, at, axis=0), stacked)

    def stack(self, placed: Any) -> Any:
        """The inverse: back in the order of layers, without what empty slots hold."""
        flat = self.layer_RdN.reshape(-1)
        order = np.flatnonzero(flat >= 0)[np.argsort(flat[flat >= 0])]

        def one(x: Array) -> Array:
            return jnp.take(x.reshape(-1, *x.shape[3:]), order, axis=0)

        return jax.tree.map(one, placed)


@dataclass(frozen=True)
class Cut:
    """Where every block lies, and where stages do."""

    schedule: Schedule
    dense: Slots
    moe: Slots

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters as (own, shared)."""
        own = {name: getattr(self, name).place(params[name]) for name in self.stacks}
        shared = {name: params[name] for name in params if name not in STACKS}
        return own, shared

    def join(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Params:
        """The inverse of `split`, of gradients."""
        return {
            **{name: getattr(self, name).stack(own[name]) for name in self.stacks},
            **shared,
        }

    @property
    def stacks(self) -> tuple[str, ...]:
        """Those that the model has."""
        return tuple(n for n in STACKS if getattr(self, n).width)


def bounds(model: ModelConfig, stages: int) -> list[tuple[int, int]]:
    """First layer of every stage and the one after its last.

    No stage has more layers and MTP modules together than it must; as far as that
    leaves a choice, MoE layers are spread evenly.

    Raises:
      ValueError: more stages than layers (one more with MTP), or no MoE layers.
    """
    if not model.num_moe:
        raise ValueError(
            f"model.num_dense = {model.num_dense}: must be less than model.num_layers "
            "for a pipeline, whose stages are built around MoE layers"
        )
    # All MTP modules lie on the last stage, which needs nothing else.
    limit = model.num_layers + (model.mtp.depth > 0)
    if stages > limit:
        raise ValueError(
            f"pipeline of {stages} stages: must be at most {limit}, the model's "
            f"{model.num_layers} layers (model.num_layers) and one for MTP modules if "
            "it has any"
        )
    units = model.num_layers + model.mtp.depth
    most = max(-(-units // stages), model.mtp.depth)
    dense = [min(most, max(0, model.num_dense - most * s)) for s in range(stages)]
    room = [most - each for each in dense]
    room[-1] -= model.mtp.depth
    moe = [0] * stages
    for _ in range(model.num_moe):
        open_to = [s for s in range(stages) if moe[s] < room[s]]
        moe[min(open_to, key=lambda s: (moe[s], dense[s], s == stages - 1))] += 1
    ends = np.cumsum(np.add(dense, moe)).tolist()
    return list(zip([0, *ends], ends))


def cut(model: ModelConfig, schedule: Schedule) -> Cut:
    """Deals the model's layers out to the stages of a schedule.

    Raises:
      ValueError: as `bounds`.
    """
    stages = bounds(model, schedule.stages)
    ends = model.num_dense, model.num_layers
    found = []
    for start, end in zip((0, model.num_dense), ends, strict=True):
        blocks = [
            [layer - start for layer in range(*stage) if start <= layer < end]
            for stage in stages
        ]
        width = max(map(len, blocks))
        of_stage = [each + [-1] * (width - len(each)) for each in blocks]
        layers = [
            [of_stage[stage] for stage in range(schedule.stages)
             if schedule.paths[0][stage].rank == rank]
            for rank in range(schedule.ranks)
        ]  # fmt: skip
        found.append(Slots(np.array(layers, np.int32)))
    return Cut(schedule, *found)
