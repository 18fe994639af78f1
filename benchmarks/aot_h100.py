"""The training step compiled for H100s that are not here: memory and overlap.

    python -m benchmarks.aot_h100 --devices 8 64 --json aot_h100.json

A model of DeepSeek-V3's layers (arXiv:2412.19437, section 4.2), but few of them, in
bf16, each device with one row. For every number of devices: what the step needs of a
device's memory, its collectives, and which of those that carry tokens to experts and
back have a matrix product launched between their start and their done. Nothing runs:
the order shows what may overlap, not how long it takes.

Needs JAX's plugin for NVIDIA GPUs (the extra `aot`) and, where there is no CUDA
toolkit, the packages nvidia-cuda-nvcc and nvidia-nvvm.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a card

import jax
import jax.numpy as jnp

from deepseek_jax import config as configs
from deepseek_jax import presets
from deepseek_jax.analysis import hlo
from deepseek_jax.config import Config, DataConfig, MeshConfig, RuntimeConfig
from deepseek_jax.data.batch import Batch
from deepseek_jax.files import write_text
from deepseek_jax.parallel import aot
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import state as states
from deepseek_jax.train.state import Parts, TrainState
from deepseek_jax.train.step import make_step

DEVICE_GIB = 79.1  # of an H100 with 80 GB
SMALL = 1e6  # bytes; smaller collectives are counted, not listed
MEMORY = ("argument", "output", "temp", "alias")
ROUTES = ("dispatch", "combine")


def config(devices: int, layers: int, length: int, mesh: MeshConfig) -> Config:
    """V3's layers, one of them dense, with 8 experts a device up to V3's 256."""
    model = presets.v3_671b()
    experts = min(model.moe.num_experts, 8 * devices)
    return Config(
        model=dataclasses.replace(
            model,
            num_layers=layers,
            num_dense=1,
            moe=dataclasses.replace(model.moe, num_experts=experts),
            mtp=configs.MTPConfig(depth=0),
        ),
        data=DataConfig(batch=devices, length=length),
        optim=configs.OptimConfig(horizon=10_000),
        # Whose product runs under what is told of XLA's own products.
        runtime=RuntimeConfig(compute="bf16", implementation="xla"),
        mesh=mesh,
    )


def mesh_of(devices: int, transport: str, payload: str) -> MeshConfig:
    """Experts over all devices, hosts as nodes; what AdamW keeps is sharded."""
    hosts = max(devices // aot.PER_HOST, 1)
    return MeshConfig(
        node=hosts,
        expert=devices // hosts,
        rules="zero1",
        transport=transport,
        payload=payload,
    )


def shapes(parts: Parts) -> tuple[TrainState, Batch]:
    """What the step takes, as shapes that lie on the mesh; nothing is allocated."""
    on = lambda shape, sharding: jax.ShapeDtypeStruct(  # noqa: E731
        shape.shape, shape.dtype, sharding=sharding
    )
    state = jax.eval_shape(functools.partial(states.init_state, parts), 0)
    state = jax.tree.map(on, state, states.shardings(parts, state))
    data, depth = parts.config.data, parts.config.model.mtp.depth
    numbers = jax.ShapeDtypeStruct((data.batch, data.length + 1 + depth), jnp.int32)
    marks = jax.ShapeDtypeStruct(numbers.shape, jnp.bool_)
    batch = Batch(numbers, numbers, numbers, marks, numbers)
    rows = meshes.by_rows(parts.mesh)
    return state, jax.tree.map(lambda shape: on(shape, rows), batch)


def compile_for(config: Config) -> tuple[str, dict[str, float], float]:
    """The step's program, the memory of a device in GiB, seconds."""
    parts = states.assemble(config, aot.h100s(config.mesh.size))
    start = time.perf_counter()
    compiled = aot.compiled(make_step(parts).lower(*shapes(parts)), aot.OVERLAP)
    seconds = time.perf_counter() - start
    found = compiled.memory_analysis()
    memory = {name: getattr(found, f"{name}_size_in_bytes") / 2**30 for name in MEMORY}
    memory["total"] = memory["argument"] + memory["output"] + memory["temp"]
    memory["total"] -= memory["alias"]
    return compiled.as_text(), memory, seconds


def direction(collective: hlo.Collective) -> str:
    """In which pass the step needs it."""
    if "rematted_computation" in collective.op_name:
        return "again"
    return "backward" if "transpose(" in collective.op_name else "forward"


def exchanges(found: list[hlo.Collective]) -> list[hlo.Collective]:
    """Those that carry tokens, not their numbers or weights, whatever the routing."""
    routed = [c for c in found if any(c.within(route) for route in ROUTES)]
    most = max((c.bytes for c in routed), default=0)
    return [c for c in routed if c.bytes > most / 10 and c.times is not None]


def show(devices: int, memory: dict[str, float], found: list[hlo.Collective]) -> None:
    """Prints one number of devices' part of the report."""
    fits = "fits" if memory["total"] < DEVICE_GIB else "DOES NOT FIT"
    print(
        f"{devices} H100s: {memory['total']:.1f} GiB of {DEVICE_GIB} a device {fits} "
        f"(arguments {memory['argument']:.1f}, results {memory['output']:.1f}, of "
        f"which shared {memory['alias']:.1f}, temporary {memory['temp']:.1f})\n"
    )
    sure = [c for c in found if c.times is not None]
    large = [c for c in sure if c.bytes >= SMALL]
    print(hlo.table(large))
    print(
        f"and {len(sure) - len(large)} of less than {SMALL / 1e6:.0f} MB, "
        f"{len(found) - len(sure)} that a condition or a count decides\n"
    )
    for c in exchanges(found):
        route = next(route for route in ROUTES if c.within(route))
        shared, others = len(c.under_scope("shared")), len(c.under)
        print(
            f"{route:8} {direction(c):8} {c.kind} of {c.bytes / 1e6:.0f} MB: under "
            f"{others} matmuls, {shared} of the shared expert"
        )
    print(flush=True)


def entry(config: Config, memory: dict[str, float], seconds: float) -> dict[str, Any]:
    """What the JSON file says of one number of devices, but its collectives."""
    return {
        "config": configs.to_dict(config),
        "seconds": seconds,
        "gib": memory,
        "fits": memory["total"] < DEVICE_GIB,
    }


def row(c: hlo.Collective) -> dict[str, Any]:
    """A collective in the JSON file."""
    return {
        "kind": c.kind,
        "op_name": c.op_name,
        "direction": direction(c),
        "bytes": c.bytes,
        "groups": [len(c.groups), len(c.groups[0]) if c.groups else 0],
        "times": c.times,
        "asynchronous": c.asynchronous,
        "matmuls": len(c.under),
        "matmul_flops": sum(m.flops for m in c.under),
        "matmuls_of_shared": len(c.under_scope("shared")),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[8], help="8")
    parser.add_argument("--layers", type=int, default=3, help="one is dense; 3")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row; 2048")
    parser.add_argument(
        "--transport", default="all_to_all", help="how tokens travel; all_to_all"
    )
    parser.add_argument("--payload", default="bf16", help="as what they do; bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="keep the programs")
    return parser.parse_args()


def main() -> None:
    args, report = arguments(), {}
    try:
        for devices in args.devices:
            mesh = mesh_of(devices, args.transport, args.payload)
            made = config(devices, args.layers, args.length, mesh)
            text, memory, seconds = compile_for(made)
            if args.text:
                args.text.mkdir(parents=True, exist_ok=True)
                write_text(args.text / f"h100-{devices}.hlo", text)
            found = hlo.collectives(text)
            show(devices, memory, found)
            rows = [row(c) for c in found]
            report[devices] = entry(made, memory, seconds) | {"collectives": rows}
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"aot_h100: {error}")
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
