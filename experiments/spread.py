"""The options --mesh and --replicas of `experiments.generate`."""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint import folders, manager
from deepseek_jax.config import Config, MeshConfig, from_dict
from deepseek_jax.decode import spread
from deepseek_jax.decode.forward import Weights
from deepseek_jax.decode.request import check_rows
from deepseek_jax.eval import logits
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import eplb
from deepseek_jax.parallel import mesh as meshes
from experiments import placement

AXES = ("data", "node", "expert")
EXAMPLE = "write AXIS=N, as in expert=4 or node=2,expert=4"


class Plan(NamedTuple):
    """Where a model's experts go, and what --json prints of that."""

    mesh: MeshConfig
    placement: eplb.Placement | None  # None: experts in order
    about: dict[str, Any]


def add(parser: argparse.ArgumentParser) -> None:
    """Adds both options."""
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="spread experts and samples over all devices, as in node=2,expert=4; "
        "each makes as many samples (--n), without --page",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="P",
        help="places for experts on these devices; the busiest experts get copies",
    )


def plan(options: argparse.Namespace) -> Plan | None:
    """What the options ask for; None without --mesh.

    Raises:
      ValueError: an axis that is not there, sizes that do not divide, pages, or a
        checkpoint without the loads that copies are made by.
    """
    replicas = options.replicas
    if options.mesh is None:
        if replicas is not None:
            raise ValueError(f"--replicas {replicas}: needs --mesh")
        return None
    mesh = parse(options.mesh)
    meshes.make(mesh)
    if options.n % mesh.size:
        raise ValueError(
            f"--n {options.n}: must be a multiple of the {mesh.size} devices of "
            f"--mesh {options.mesh}, each of which makes samples of its own"
        )
    check_rows(options.n, mesh.size, options.page)
    saved = manager.read_config(*folders.resolve(options.checkpoint))
    config = from_dict(Config, saved["config"])
    experts, shares = config.model.moe.num_experts, mesh.node * mesh.expert
    step, loads_RE = measured(options.checkpoint, needed=replicas is not None)
    placed = None
    if replicas is not None:
        groups = config.model.moe.num_groups
        placed = eplb.place(
            loads_RE, replicas, devices=shares, nodes=mesh.node, groups=groups
        )
    spread.check(logits.build(config), mesh, placed)
    in_order = eplb.contiguous(config.model.num_routers, experts)
    about = {
        "axes": {axis: getattr(mesh, axis) for axis in AXES},
        "devices": mesh.size,
        "experts": experts,
        "places": experts if replicas is None else replicas,
        "step": step,
        "load_before": busiest(loads_RE, in_order, shares),
        "load_after": busiest(loads_RE, placed or in_order, shares),
    }
    return Plan(mesh, placed, about)


def carry_out(
    plan: Plan, model: Transformer, weights: Weights
) -> tuple[Transformer, Weights]:
    """The model and its weights on the devices."""
    return spread.spread(model, weights, plan.mesh, placement=plan.placement)


def parse(text: str) -> MeshConfig:
    """The mesh that "node=2,expert=4" stands for.

    Its buffers have room for any routing, that is for all tokens of a pass at once: few
    in decoding, and in prefill no more than one device alone would have.

    Raises:
      ValueError: it does not read like that, or an axis that is not there.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(
                f"--mesh {text}: there is no axis {name!r} of a mesh for decoding, "
                f"only {', '.join(AXES)}; {EXAMPLE}"
            )
        if name in axes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text}: {part!r} must be a number of devices, at least 1, "
                f"once for each axis; {EXAMPLE}"
            )
        axes[name] = int(size)
    shares = axes.get("node", 1) * axes.get("expert", 1)
    return MeshConfig(**axes, capacity=float(shares))


def measured(checkpoint: Path, *, needed: bool) -> tuple[int | None, np.ndarray | None]:
    """The last evaluation's step and loads; None where there are none to be had.

    Raises:
      ValueError: they are needed and not there.
    """
    try:
        _, record = placement.evaluation(checkpoint)
    except ValueError:
        if needed:
            raise
        return None, None
    return record["step"], np.array(record["eval_load"])


def busiest(
    loads_RE: np.ndarray | None, placed: eplb.Placement, devices: int
) -> float | None:
    """Load of the busiest device over the mean, on average over routers.

    None where it is not known, or places do not divide over the devices.
    """
    if loads_RE is None or placed.phy2log.shape[1] % devices:
        return None
    ratio_R = eplb.imbalance(eplb.device_loads(loads_RE, placed, devices))
    mean = float(ratio_R.mean())
    return None if math.isnan(mean) else mean


def line(about: dict[str, Any]) -> str:
    """One line for people."""
    said = f"{about['devices']} devices, {about['places']} places of "
    said += f"{about['experts']} experts; busiest device's load "
    before, after = (
        "unknown" if about[key] is None else f"{about[key]:.2f}"
        for key in ("load_before", "load_after")
    )
    if about["step"] is None:
        return said + "unknown, none was measured"
    return (
        said + f"{before} -> {after} of the mean, by step {about['step']}'s evaluation"
    )
