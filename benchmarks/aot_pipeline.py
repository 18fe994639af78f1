"""A pipeline's step compiled for H100s that are not here: what runs under what.

    python -m benchmarks.aot_pipeline --schedules dualpipe 1f1b --json aot_pipeline.json

A small model of DeepSeek-V3's kind (arXiv:2412.19437, section 2), a dense layer, one
MoE layer a rank and an MTP module, in bf16, on four ranks of 16 cards, two hosts, that
share experts, so that tokens go over the network as in section 3.2.2. Of the program's
steady body, the loop of most ticks: every exchange of tokens and every send to another
rank, with the matrix products that are launched between its start and its done, of its
own direction and of the other; and copies of what the loop carries, larger than what a
rank sends. A loop over experts' blocks, whose turns the routing decides, counts as one
turn. Nothing runs: the order shows what may overlap, not how long it takes. XLA starts
an exchange only as early as its model of the link says: inside one host, half of them
just before their results are needed. Needs what `benchmarks.aot_h100` needs; minutes
each.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import aot_h100
from deepseek_jax import config as configs
from deepseek_jax import presets
from deepseek_jax.analysis import hlo
from deepseek_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    PipelineConfig,
    RuntimeConfig,
)
from deepseek_jax.files import write_text

RANKS, CARDS = 4, 16  # of a pipeline; that share a rank's experts
WAYS = ("forward", "backward")
SENDS = ("send_x", "send_g")


class Exchange(NamedTuple):
    """An exchange of the steady body, and how many products are under it."""

    what: str  # "forward dispatch", "send_x", ..
    kind: str
    megabytes: float
    own: int  # products of its own direction
    other: int


def config(schedule: str, microbatches: int, length: int) -> Config:
    """A model of V3's kind that compiles in minutes."""
    v3 = presets.v3_671b()
    attention = dataclasses.replace(v3.attention, num_heads=16, q_rank=768)
    moe = dataclasses.replace(
        v3.moe, num_experts=16, top_k=4, ffn_dim=1024, num_groups=4, keep_groups=2
    )
    return Config(
        model=dataclasses.replace(
            v3,
            vocab_size=8192,
            dim=2048,
            num_layers=1 + RANKS,
            num_dense=1,
            dense_dim=4096,
            attention=attention,
            moe=moe,
        ),
        data=DataConfig(batch=microbatches * CARDS, length=length),
        optim=configs.OptimConfig(horizon=10_000),
        # Whose product runs under what is told of XLA's own products.
        runtime=RuntimeConfig(
            compute="bf16", implementation="xla", attention="plain", remat="none"
        ),
        mesh=MeshConfig(pipe=RANKS, expert=CARDS, rules="zero1", payload="bf16"),
        pipeline=PipelineConfig(
            schedule=schedule, microbatches=microbatches, keep="products"
        ),
    )


def steady(found: list[hlo.Collective]) -> list[hlo.Collective]:
    """The collectives of the loop with the most ticks, where it holds any sends."""
    sends = [c for c in found if any(c.within(each) for each in SENDS)]
    most = max((c.times or 0 for c in sends), default=0)
    bodies = {c.computation for c in sends if c.times == most}
    return [c for c in found if c.computation in bodies]


def exchanges(found: list[hlo.Collective]) -> list[Exchange]:
    """Sends between ranks, and exchanges of tokens, but for those of small arrays."""
    rows, most = [], max((c.bytes for c in found if c.within("experts")), default=0)
    for c in found:
        way = next((way for way in WAYS if c.within(way)), "")
        sent = next((each for each in SENDS if c.within(each)), "")
        if sent:
            way = "forward" if sent == "send_x" else "backward"
        elif not way or c.bytes * 4 < most or not c.within("experts"):
            continue
        other = next(each for each in WAYS if each != way)
        route = "dispatch" if c.within("dispatch") else "combine"
        rows.append(
            Exchange(
                sent or f"{way} {route}",
                c.kind,
                c.bytes / 1e6,
                len(c.under_scope(way)),
                len(c.under_scope(other)),
            )
        )
    return rows


class Found(NamedTuple):
    """What one schedule's program shows."""

    seconds: float  # to compile
    gib: dict[str, float]  # of a card's memory
    steady: list[Exchange]
    copies: list[hlo.Copy]  # of rings and sums


def measure(made: Config) -> Found:
    """Compiles a config's step and reads its steady body.

    Raises:
      NotImplementedError: nothing here compiles for an H100.
      ValueError: the settings do not fit.
    """
    text, memory, seconds = aot_h100.compile_for(made)
    body = steady(hlo.collectives(text, loops=True))
    rows = exchanges(body)
    sent = max((row.megabytes for row in rows if row.what in SENDS), default=0) * 1e6
    inside = {each.computation for each in body}
    copies = [
        copy
        for copy in hlo.carried_copies(text)
        if copy.computation in inside and copy.bytes > sent
    ]
    return Found(seconds, memory, rows, copies)


def show(schedule: str, found: Found) -> None:
    """Prints one schedule's part of the report."""
    total, rows = found.gib["total"], found.steady
    print(
        f"{schedule}: {total:.1f} GiB a card, {total / aot_h100.DEVICE_GIB:.0%} of it"
    )
    print(f"compiled in {found.seconds:.0f} s\n")
    print(f"{'':18} {'':20} {'MB':>6} {'own':>5} {'other':>6}  products under it")
    for row in rows:
        mb = f"{row.megabytes:.1f}"
        print(f"{row.what:18} {row.kind:20} {mb:>6} {row.own:5} {row.other:6}")
    hidden = sum(row.other > 0 for row in rows)
    print(f"\n{hidden} of {len(rows)} under the other direction")
    print(f"{len(found.copies)} copies of rings or sums\n", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = configs.SCHEDULES[1:]
    parser.add_argument(
        "--schedules", nargs="+", default=["dualpipe"], choices=names, help="dualpipe"
    )
    parser.add_argument("--microbatches", type=int, default=16, help="16")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row; 1024")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_args()


def main() -> None:
    args, report = arguments(), dict[str, Any]()
    try:
        for schedule in args.schedules:
            made = config(schedule, args.microbatches, args.length)
            found = measure(made)
            show(schedule, found)
            report[schedule] = {
                "config": configs.to_dict(made),
                **found._asdict(),
                "steady": [row._asdict() for row in found.steady],
                "copies": [copy._asdict() for copy in found.copies],
            }
    except (NotImplementedError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
