"""Runs that differ only in scalars and seed, as one program.

A small replica keeps a device busy badly, and every value of a bias speed would be a
program to compile. Here the scalars are arguments of the step and the states of all
runs lie stacked: a device takes its share of them, all at once, or on a CPU, whose
caches a single run's products fill, one after the other. `population_loop` trains them.
The report (arXiv:2412.19437, section 4.5) has such ablations, and no word on how they
are run; seeds under `vmap` are usual in JAX's reinforcement learning.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import Config, flatten, to_dict
from deepseek_jax.data.batch import Batch
from deepseek_jax.train.state import Parts, TrainState, assemble, shardings
from deepseek_jax.train.step import COMPILER_OPTIONS, plain_step

SCALARS = (
    "optim.lr",
    "optim.weight_decay",
    "optim.mtp_weight",
    "optim.mtp_weight_changes",
    "balance.speed",
    "balance.speed_changes",
    "balance.freeze_step",
    "balance.alpha",
    "balance.z_weight",
)
CHANGES = "_changes"  # of these each run needs as many, at whatever steps
AXIS = "member"

Each = Callable[[Callable[..., Any]], Callable[..., Any]]
Scalars = Mapping[str, Any]


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `jax.vmap` computes, a member after the other."""
    return lambda *stacked: jax.lax.map(lambda member: function(*member), stacked)


# How a device goes over its members. Together, four of `tiny` take 1.5 times as long on
# a CPU as one by one: benchmarks/vectorize.py.
EACH: dict[str, Each] = {"cpu": one_by_one}


def scalars(config: Config) -> dict[str, Any]:
    """The numbers of a run that its program takes as arguments."""
    flat = flatten(to_dict(config))
    # XLA (jax 0.11.2) crashes on an array of nothing where it is split: no changes.
    return {name: np.asarray(flat[name]) for name in SCALARS if flat[name] != []}


def with_scalars(config: Config, values: Scalars) -> Config:
    """`config` with other numbers, which may be traced and so are not checked again."""
    made = copy.copy(config)
    for name, value in values.items():
        group, field = name.split(".")
        part = copy.copy(getattr(made, group))
        object.__setattr__(part, field, value)
        object.__setattr__(made, group, part)
    return made


def check(config: Config) -> None:
    """Refuses a run that can't be one of several in a program.

    Raises:
      ValueError: it needs more than a device, or its parameters' mean is asked for.
    """
    if config.optim.ema:
        raise ValueError(
            f"optim.ema = {config.optim.ema}: must be 0 for a run that is one of "
            "several in a program; leave out --vectorize, or it"
        )
    if config.mesh.size > 1:
        raise ValueError(
            f"mesh has {config.mesh.size} devices: must have one for a run that is one "
            "of several in a program; leave out --vectorize, or the mesh"
        )
    if config.pipeline.schedule != "none":
        raise ValueError(
            f"pipeline.schedule = {config.pipeline.schedule!r}: must be 'none' for a "
            "run that is one of several in a program; leave out --vectorize, or it"
        )


def kind(config: Config) -> tuple[tuple[str, str], ...]:
    """What runs must have in common to be one program, by name."""
    flat = flatten(to_dict(config))
    return tuple(
        (name, str(len(value)) if name.endswith(CHANGES) else repr(value))
        for name, value in flat.items()
        if name.endswith(CHANGES) or name not in (*SCALARS, "seed")
    )


def teams(configs: Sequence[Config], size: int) -> list[list[int]]:
    """Indices of runs that are one program, at most `size` a team, in their order.

    Raises:
      ValueError: as `check`.
    """
    kinds: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, config in enumerate(configs):
        check(config)
        kinds.setdefault(kind(config), []).append(index)
    cut = [
        alike[at : at + size]
        for alike in kinds.values()
        for at in range(0, len(alike), size)
    ]
    return sorted(cut)


def check_team(configs: Sequence[Config]) -> None:
    """Refuses runs that differ in more than scalars and seed.

    Raises:
      ValueError: names what differs.
    """
    if len(teams(configs, len(configs) or 1)) < 2:
        return
    first, *others = (dict(kind(config)) for config in configs)
    names = sorted({k for other in others for k in first if first[k] != other[k]})
    raise ValueError(
        "runs of one program may differ in scalars and seed alone, and these do in "
        + ", ".join(names)
    )


def make_mesh(members: int) -> Mesh:
    """As many devices as share the members evenly."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if members % n == 0)
    return Mesh(np.asarray(devices[:count]), (AXIS,))


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis, that of the members, over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def each_on(mesh: Mesh) -> Each:
    """How its devices go over their members."""
    return EACH.get(mesh.devices.flat[0].platform, jax.vmap)


def make_step(
    config: Config, mesh: Mesh, each: Each | None = None
) -> Callable[[Scalars, TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The jitted step of all members; it donates the states.

    All arguments and results are stacked along the members, and lie as `split` says.

    Args:
      config: of any of them.
      each: how a device goes over its members, if not as `EACH` says.
    """

    def member(
        values: Scalars, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        own = assemble(with_scalars(config, values), mesh.devices.flat[:1])
        return plain_step(own)(state, batch)

    axis = PartitionSpec(AXIS)
    step = jax.shard_map(
        (each or each_on(mesh))(member),
        mesh=mesh,
        in_specs=axis,
        out_specs=axis,
        check_vma=False,
    )
    place = split(mesh)
    return jax.jit(
        step,
        in_shardings=place,
        out_shardings=place,
        donate_argnums=1,
        compiler_options=COMPILER_OPTIONS,
    )


def stack(trees: Sequence[Any]) -> Any:
    """Arrays of each member as arrays of all, on the host."""
    return jax.tree.map(lambda *leaves: np.stack([*map(np.asarray, leaves)]), *trees)


def taker(parts: Parts, mesh: Mesh) -> Callable[[TrainState, int], TrainState]:
    """A function (states, i) -> member i's state, where a run of its own has it."""
    whole = NamedSharding(mesh, PartitionSpec())
    at = jax.jit(
        lambda tree, i: jax.tree.map(lambda x: x[i], tree), out_shardings=whole
    )

    def take(states: TrainState, index: int) -> TrainState:
        state = jax.tree.map(lambda x: x.addressable_data(0), at(states, index))
        placed: TrainState = jax.device_put(state, shardings(parts, state))
        return placed

    return take
