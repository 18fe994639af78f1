"""The bytes table of `expert_parallel.py`: what a trained run's routers choose on text.

`read` sends validation text through the model once, under its own routing, and keeps
what its routers rank; `selected` then selects experts for any node limit, and
`parallel.traffic` counts. A device has one expert, nodes are the groups of the limit.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import deepseek_jax
from deepseek_jax import runtime
from deepseek_jax.analysis.charts import GREY, RAMP, Chart, Line, Panel
from deepseek_jax.config import TRANSPORTS, MeshConfig, MoEConfig
from deepseek_jax.data import pipeline
from deepseek_jax.data.cache import default_cache
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ops import balancing
from deepseek_jax.ops.routing import Routing, node_limited
from deepseek_jax.parallel import traffic
from deepseek_jax.parallel.traffic import Layout, Links
from deepseek_jax.train.objective import forward, totals
from deepseek_jax.train.state import assemble
from deepseek_jax.typing import Array

NODES, LIMITS = (2, 4, 8), (1, 2, 4, 8)
MORE = (4, 8)  # experts a token, besides the run's own
SPEED = Links(160e9, 50e9)  # bytes/s of a device
FREE = SPEED.intra / SPEED.inter
BF16 = 2
SHOWN = ("dispatch", "combine", "metadata")
SHOWN += tuple(f"padded_{name}" for name in SHOWN)


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


def cases(text: Text) -> list[Case]:
    """All that differ and can be."""
    kinds = dict.fromkeys((text.moe.top_k, *MORE))
    found = [Case(n, m, k) for k in kinds for n in NODES for m in LIMITS]
    return [case for case in found if reachable(case, text.moe.num_experts)]


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


def chart(curves: list[dict[str, Any]]) -> Chart:
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
            label = f"M = {curve['limit']}"
            lines.append(Line(label, RAMP[2 * at], each, ratio, style="marked"))
        title, y = f"{nodes} nodes", "time inside / time between nodes"
        axis = "experts a token / nodes allowed"
        panels.append(Panel(title, axis, y, tuple(lines), from_zero=True))
    title = "Experts per node at equal cost (M: nodes a token may go to)"
    caption = "Below 1 the links between nodes are the slower ones."
    return Chart("expert_parallel", title, caption, tuple(panels))
