"""What the transports of expert parallelism cost: time here, and bytes on real text.

Time: forward and backward of one small MoE layer on 2 nodes x half of the devices, 8 of
them simulated on a CPU, by each transport in turn; medians over the turns. On simulated
devices copies cost what memory does, and `ragged` is made from a gather of everything:
which transport wins there says nothing of a network.

Bytes (--run): of a trained run's routers on validation text, counted by
`parallel.traffic`. A device has one expert; nodes are the groups that the selection is
limited to. The text goes through the model once, under its own routing, and experts are
then selected again, by what its routers rank, for every number of nodes, node limit and
number of experts a token. Rows count as `--dim` numbers wide, V3's 7168; the ring's
are in bf16.

The picture (--plot) has the time of the two-hop dispatch on either kind of link, 160
and 50 GB/s a device (arXiv:2412.19437, section 3.2.2): up to 3.2 experts on each node
that a token goes to, the links inside the nodes are done first.

    python -m benchmarks.expert_parallel --run runs/tiny --json expert_parallel.json \\
        --plot expert_parallel.png
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # before JAX starts
# They share the cores: a collective may have to wait long for the slowest.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import deepseek_jax
from benchmarks.config_a import timed
from deepseek_jax import presets, runtime
from deepseek_jax.analysis import plots
from deepseek_jax.analysis.charts import GREY, RAMP, Chart, Line, Panel
from deepseek_jax.config import (
    PAYLOADS,
    TRANSPORTS,
    Config,
    DataConfig,
    MeshConfig,
    MoEConfig,
)
from deepseek_jax.data import pipeline
from deepseek_jax.data.cache import default_cache
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.files import write_text
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ops import balancing
from deepseek_jax.ops.routing import Routing, node_limited
from deepseek_jax.parallel import expert, traffic
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.traffic import Layout, Links
from deepseek_jax.train.objective import forward, totals
from deepseek_jax.train.state import assemble
from deepseek_jax.typing import Array

NODES, LIMITS = (2, 4, 8), (1, 2, 4, 8)
SPEED = Links(160e9, 50e9)  # bytes/s of a device
FREE = SPEED.intra / SPEED.inter
BF16 = 2
SHOWN = ("dispatch", "combine", "metadata")
SHOWN += tuple(f"padded_{name}" for name in SHOWN)
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
            y = rt.experts(
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


def seen(routing: Routing, valid_T: Array) -> Array:
    """In place of a balancer's statistics: what was ranked."""
    return routing.choice_TE


class Text(NamedTuple):
    """What a run's routers make of validation batches."""

    moe: MoEConfig
    choices: list[Array]  # [R, T, E] of each batch: what was ranked


def read(run: Path, batches: int) -> Text:
    """Sends validation text through a trained model.

    Raises:
      ValueError: the run has no tokenizer, or its experts do not suit the nodes.
    """
    config, params, balance, tokenizer = deepseek_jax.load(run)
    moe = config.model.moe
    if tokenizer is None or moe.num_experts < 2 * max(NODES):
        raise ValueError(
            f"--run {run}: must have a tokenizer and at least {2 * max(NODES)} "
            f"experts, two for each of {max(NODES)} nodes; has {moe.num_experts}"
        )
    config = dataclasses.replace(config, mesh=MeshConfig())
    balancer = balancing.build(config.balance, moe)
    looking = dataclasses.replace(balancer, observe=seen)
    model = Transformer(config.model, runtime.build(config.runtime), looking)
    parts = dataclasses.replace(assemble(config), model=model)
    run_model = jax.jit(
        lambda batch: forward(parts, params, balance, batch, totals(parts, batch)).aux
    )
    corpus = open_corpus(config.data, default_cache())
    depth = config.model.mtp.depth
    found = pipeline.validation(config.data, corpus, tokenizer, depth=depth)
    choices = []
    for batch in itertools.islice(found, batches):
        aux = run_model(batch)
        same = select(aux.stats, moe) == aux.experts
        assert bool(same.all()), "selecting again is not what the model did"
        choices.append(aux.stats)
    return Text(moe, choices)


@functools.partial(jax.jit, static_argnums=1)
def select(choice_RTE: Array, moe: MoEConfig) -> Array:
    """The experts [R, T, K] that routers select of what they rank."""
    limited = jax.vmap(functools.partial(node_limited, moe=moe))
    return jax.lax.top_k(limited(choice_RTE), moe.top_k)[1]


class Case(NamedTuple):
    nodes: int
    limit: int  # nodes that a token goes to, at most
    top_k: int


def selected(text: Text, case: Case) -> list[np.ndarray]:
    """The experts [T, K] of every batch and router."""
    moe = dataclasses.replace(
        text.moe, num_groups=case.nodes, keep_groups=case.limit, top_k=case.top_k
    )
    return [
        experts_TK
        for choice_RTE in text.choices
        for experts_TK in np.asarray(select(choice_RTE, moe))
    ]


def reachable(case: Case, experts: int) -> bool:
    """Whether the nodes have enough experts, and the limit could matter."""
    most = min(case.nodes, case.top_k)
    return case.limit <= most and case.top_k <= experts // case.nodes * case.limit


def measure(text: Text, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes a token and layer of every transport."""
    experts, chosen = text.moe.num_experts, selected(text, case)
    layout = Layout(case.nodes, experts // case.nodes, experts)
    tokens = sum(map(len, chosen))
    node_ATK = [experts_TK // (experts // case.nodes) for experts_TK in chosen]
    reached = sum((np.diff(np.sort(n), axis=1) > 0).sum() + len(n) for n in node_ATK)
    row: dict[str, Any] = {**case._asdict(), "local": layout.local}
    row |= {"nodes_reached": float(reached / tokens), "transports": {}}
    for transport in TRANSPORTS:
        counted = [
            traffic.count(
                transport,
                experts_TK,
                layout,
                dim=args.dim,
                payload=args.payload,
                itemsize=BF16,
                capacity=args.capacity,
                reach=case.limit,
            )
            for experts_TK in chosen
        ]
        each = {
            name: Links(*np.sum([getattr(c, name) for c in counted], 0) / tokens)
            for name in SHOWN
        }
        row["transports"][transport] = {k: v._asdict() for k, v in each.items()}
        overflow = statistics.mean(not c.fits for c in counted)
        row["transports"][transport]["overflow"] = overflow
    most = (
        min(case.limit, case.nodes - 1) * traffic.row_bytes(args.payload, args.dim)[0]
    )
    row["formula_inter"] = most
    assert row["transports"]["two_hop"]["dispatch"]["inter"] <= most
    return row


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints dispatched bytes; combine and metadata go the same ways."""
    there, back = traffic.row_bytes(args.payload, args.dim)
    print(
        f"dispatch, kB a token and layer inside | between nodes; a copy has {there} "
        f"bytes as {args.payload}, {back} on its way back;\nmost: two_hop between "
        f"nodes by the formula; padded: what buffers for {args.capacity} times an even "
        "load carry,\nand in how many of 100 batches and layers they do not do"
    )
    head = "".join(f"{t:>15}" for t in TRANSPORTS)
    head += f"{'all_to_all':>22}{'two_hop':>22}"
    print(f"{'':30}{head}\n{'':5}{'nodes':>5}{'M':>3}{'reached':>9}{'most':>8}", end="")
    print(f"{'':{15 * len(TRANSPORTS)}}{'padded':>22}{'padded':>22}")
    top_k = 0
    for row in rows:
        if row["top_k"] != top_k:
            top_k = row["top_k"]
            print(f"{top_k} experts a token")
        line = f"{row['nodes']:>10}{row['limit']:>3}{row['nodes_reached']:>9.2f}"
        line += f"{row['formula_inter'] / 1e3:>8.2f}"
        for found in row["transports"].values():
            line += pair(found["dispatch"], 15)
        for name in ("all_to_all", "two_hop"):
            found = row["transports"][name]
            line += pair(found["padded_dispatch"], 16)
            line += f"{100 * found['overflow']:>5.0f}%"
        print(line)


def pair(links: dict[str, float], width: int) -> str:
    return f"{links['intra'] / 1e3:.2f} |{links['inter'] / 1e3:6.2f}".rjust(width)


def equal_cost(text: Text, args: argparse.Namespace) -> list[dict[str, Any]]:
    """By node limit: experts on a node that a token goes to, and time on the links."""
    found = []
    for nodes, limit in itertools.product(NODES, LIMITS):
        local = text.moe.num_experts // nodes
        if limit > nodes or local <= FREE:
            continue
        layout, points = Layout(nodes, local, text.moe.num_experts), []
        for top_k in range(limit, local * limit + 1):
            chosen = selected(text, Case(nodes, limit, top_k))
            size = {"dim": args.dim, "payload": args.payload}
            sent = [traffic.count("two_hop", c, layout, **size) for c in chosen]
            total = np.sum([each.dispatch for each in sent], 0)
            time = traffic.seconds(Links(*total / sum(map(len, chosen))), SPEED)
            points.append(
                {"experts_per_node": top_k / limit, "seconds": time._asdict()}
            )
        ratios = [p["seconds"]["intra"] / p["seconds"]["inter"] for p in points]
        each = [p["experts_per_node"] for p in points]
        equal = float(np.interp(1, ratios, each, left=np.nan, right=np.nan))
        found.append({"nodes": nodes, "limit": limit, "points": points})
        found[-1]["equal_at"] = None if np.isnan(equal) else equal
    return found


def chart(curves: list[dict[str, Any]], args: argparse.Namespace) -> Chart:
    """Time inside over time between nodes, by experts on a node."""
    x = np.arange(1.0, 9.0)
    even = Line("equal cost", GREY, x[[0, -1]], np.ones(2))
    formula = Line("all remote: experts / 3.2", "#222222", x, x / FREE)
    panels = []
    for nodes in dict.fromkeys(curve["nodes"] for curve in curves):
        lines = [even, formula]
        for curve in (c for c in curves if c["nodes"] == nodes):
            at = LIMITS.index(curve["limit"])
            times = [p["seconds"] for p in curve["points"]]
            ratio = np.array([t["intra"] / t["inter"] for t in times])
            each = [p["experts_per_node"] for p in curve["points"]]
            label = f"at most {curve['limit']} nodes"
            lines.append(Line(label, RAMP[2 * at], each, ratio, style="marked"))
        title, y = f"{nodes} nodes", "time inside / time between nodes"
        axis = "experts a token / nodes allowed"
        panels.append(Panel(title, axis, y, tuple(lines), from_zero=True))
    title = "Experts per node at equal cost"
    caption = "Below 1 the links between nodes are the slower ones."
    return Chart("expert_parallel", title, caption, tuple(panels))


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
        if getattr(args, name) < (name != "rounds"):
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
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
            text = read(args.run, args.batches)
            experts = text.moe.num_experts
            kinds = dict.fromkeys((text.moe.top_k, 4, 8))
            cases = [Case(n, m, k) for k in kinds for n in NODES for m in LIMITS]
            cases = [case for case in cases if reachable(case, experts)]
            report["bytes"] = [measure(text, case, args) for case in cases]
            show(report["bytes"], args)
            report["equal_cost"] = equal_cost(text, args)
            if args.plot:
                plots.save(chart(report["equal_cost"], args), args.plot)
    except ValueError as error:
        sys.exit(f"expert_parallel: {error}")
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
