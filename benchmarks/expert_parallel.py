"""What the transports of expert parallelism cost: time here, and bytes on real text.

Time: forward and backward of one small MoE layer on 2 nodes x half of the devices, 8 of
them simulated on a CPU, by each transport in turn; medians over the turns. On simulated
devices copies cost what memory does, and `ragged` is made from a gather of everything:
which transport wins there says nothing of a network.

Bytes (--run): of a trained run's routers on validation text, counted by
`parallel.traffic` (see `expert_traffic.py`). A device has one expert; nodes are the
groups that the selection is limited to. The text goes through the model once, under its
own routing, and experts are then selected again, by what its routers rank, for every
number of nodes, node limit and number of experts a token. Rows count as `--dim` numbers
wide, V3's 7168; the ring's are in bf16.

The picture (--plot) has the time of the two-hop dispatch on either kind of link, 160
and 50 GB/s a device (arXiv:2412.19437, section 3.2.2): up to 3.2 experts on each node
that a token goes to, the links inside the nodes are done first.

    python -m benchmarks.expert_parallel --run runs/tiny --json expert_parallel.json \\
        --plot expert_parallel.png
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # before JAX starts
# They share the cores: a collective may have to wait long for the slowest.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import expert_traffic as tables
from benchmarks.config_a import timed
from deepseek_jax import presets, runtime
from deepseek_jax.analysis import plots
from deepseek_jax.config import (
    PAYLOADS,
    TRANSPORTS,
    Config,
    DataConfig,
    MeshConfig,
    MoEConfig,
)
from deepseek_jax.files import write_text
from deepseek_jax.ops.routing import node_limited
from deepseek_jax.parallel import expert
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.typing import Array

LAYER = MoEConfig(num_experts=16, top_k=4, ffn_dim=128, num_groups=4, keep_groups=2)
WARMUP = 2


def ways(payload: str) -> list[tuple[str, str]]:
    """Transports with the payloads that make a difference to them."""
    both = dict.fromkeys(("exact", payload))
    return [(t, p) for t in TRANSPORTS for p in both if t != "ring" or p == "exact"]


def layer(transport: str, payload: str, tokens: int, dim: int) -> Callable[[], Any]:
    """A layer's value and gradients, of random tokens, on all devices."""
    count = jax.device_count()
    nodes = 2 if count % 2 == 0 else 1
    config = Config(
        model=dataclasses.replace(presets.tiny(), dim=dim, moe=LAYER),
        data=DataConfig(batch=count),
        mesh=MeshConfig(
            node=nodes, expert=count // nodes, transport=transport, payload=payload
        ),
    )
    mesh = meshes.make(config.mesh)
    rt = expert.on_mesh(runtime.build(config.runtime), config, mesh)
    rng, hidden = np.random.default_rng(0), LAYER.ffn_dim
    choice_TE = jnp.asarray(rng.random((tokens, LAYER.num_experts)), jnp.float32)
    experts_TK = jax.lax.top_k(node_limited(choice_TE, LAYER), LAYER.top_k)[1]
    rows, shapes = meshes.by_rows(mesh), ((dim, hidden), (dim, hidden), (hidden, dim))
    over = NamedSharding(mesh, PartitionSpec(meshes.EXPERTS))

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    floats = [jax.device_put(normal(tokens, dim), rows)]
    floats += [jax.device_put(normal(tokens, LAYER.top_k), rows)]
    floats += [jax.device_put(normal(LAYER.num_experts, *s), over) for s in shapes]
    experts_TK = jax.device_put(experts_TK, rows)

    @jax.jit
    def run(experts_TK: Array, *floats: Array) -> Any:
        def total(x: Array, weights: Array, *matrices: Array) -> Array:
            y, _ = rt.experts(
                x, weights, experts_TK, *matrices, grouped_dot=rt.grouped_dot
            )
            return (y**2).sum()

        return jax.value_and_grad(total, range(5))(*floats)

    return functools.partial(run, experts_TK, *floats)


def times(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all transports, turn by turn, and prints their table."""
    names = ways(args.payload)
    layers = [layer(*name, args.tokens, args.width) for name in names]
    seconds: list[list[float]] = [[] for _ in names]
    for turn in range(WARMUP + args.rounds):
        order = range(len(names)) if turn % 2 else reversed(range(len(names)))
        for i in order:
            seconds[i].append(timed(layers[i]))
    seconds = [each[WARMUP:] for each in seconds]
    ring = seconds[names.index(("ring", "exact"))]
    device = jax.devices()[0]
    print(
        f"{args.tokens} tokens of {args.width} numbers on {jax.device_count()} devices "
        f"({device.device_kind}), {LAYER.num_experts} experts, {LAYER.top_k} a token; "
        f"medians of {args.rounds} rounds\n\n"
        "transport   payload          ms   of the ring's"
    )
    found = []
    for (transport, payload), each in zip(names, seconds, strict=True):
        ratio = statistics.median(a / b for a, b in zip(each, ring, strict=True))
        ms = 1000 * statistics.median(each)
        print(f"{transport:11} {payload:10} {ms:8.1f} {ratio:15.2f}")
        found.append({"transport": transport, "payload": payload, "ms": ms})
        found[-1]["ratio_to_ring"] = ratio
    print()
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = (
        ("rounds", 9, "timed rounds, 0 for none; 9"),
        ("tokens", 2048, "of the timed layer; 2048"),
        ("width", 256, "of its rows; 256"),
        ("batches", 8, "of validation text; 8"),
        ("dim", 7168, "width of the rows that are counted; 7168"),
    )
    for name, default, about in numbers:
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=about
        )
    parser.add_argument("--run", type=Path, metavar="DIR", help="a trained run")
    parser.add_argument(
        "--payload", choices=PAYLOADS, default="fp8", help="of rows; fp8"
    )
    parser.add_argument("--capacity", type=float, default=1.5, help="of buffers; 1.5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png, of --run")
    args = parser.parse_args()
    for name, _, _ in numbers:
        least = 0 if name == "rounds" else 1
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.capacity <= 0:
        parser.error(f"--capacity {args.capacity}: must be positive")
    if args.plot and not args.run:
        parser.error("--plot: needs --run")
    return args


def main() -> None:
    args, report = arguments(), {}
    try:
        if args.rounds and jax.device_count() < 2:
            print("one device: nothing to time\n")
        elif args.rounds:
            report["times"] = times(args)
        if args.run:
            text = tables.read(args.run, args.batches)
            rows = [tables.measure(text, case, args) for case in tables.cases(text)]
            tables.show(rows, args)
            curves = tables.equal_cost(text, args)
            report |= {"bytes": rows, "equal_cost": curves}
            if args.plot:
                plots.save(tables.chart(curves), args.plot)
    except ValueError as error:
        sys.exit(f"expert_parallel: {error}")
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
