"""What a pipeline's step needs of a device's memory, by schedule and micro-batches.

The gradients of a step of a small model, of equal layers, compiled for simulated
devices. Measured is what the compiler says a device needs for them beside arguments and
results; apart from it, what it feeds to the stages of all micro-batches (tokens, masks,
targets), which grows with their number under any schedule. The formula is the most that
ranks hold by `parallel.pipeline.check`: live activations, each of which is what `keep`
says, and gradients of outputs that wait for their weight gradient; of each kind as many
as any rank holds, since all run one program. Rings are what the program has for them:
with slots for what comes before it is needed, and one each to write nothing to. The
rest of what is measured is a tick's own work, and sums of gradients.

A stage has half as many layers where ranks have two (interleaved, dualpipev). Seconds
are of the CPU, to trace and to compile, since others may use it meanwhile.

    python -m benchmarks.pipeline_memory --json memory.json
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a card

import jax
import jax.numpy as jnp

from benchmarks.aot_h100 import shapes
from deepseek_jax import config as configs
from deepseek_jax import presets
from deepseek_jax.config import KEEPS, SCHEDULES, Config, MeshConfig, PipelineConfig
from deepseek_jax.data.batch import Batch
from deepseek_jax.files import write_text
from deepseek_jax.parallel.pipeline import check
from deepseek_jax.parallel.pipeline.executor import Carry, Rank
from deepseek_jax.train import pipelined
from deepseek_jax.train.objective import totals
from deepseek_jax.train.state import Parts, TrainState, assemble
from deepseek_jax.train.step import COMPILER_OPTIONS, micro_batches

MB = 1e6


class Size(NamedTuple):
    """Of a run, besides its schedule."""

    ranks: int = 4
    rows: int = 4  # of a micro-batch
    length: int = 256
    dim: int = 64


class Found(NamedTuple):
    """Of one program; bytes are a device's."""

    schedule: str
    keep: str
    microbatches: int
    stages: int
    live: int  # activations, by the checker
    deferred: int  # weight gradients
    formula: int
    rings: int
    measured: int
    feeds: int  # not in `measured`
    seconds: float


def config(schedule: str, keep: str, microbatches: int, size: Size) -> Config:
    """Two equal layers for each rank; an activation is large beside their weights."""
    model = presets.tiny()
    return Config(
        model=dataclasses.replace(
            model,
            vocab_size=64,
            dim=size.dim,
            num_layers=2 * size.ranks,
            num_dense=0,
            attention=configs.AttentionConfig(
                num_heads=2,
                q_rank=16,
                kv_rank=16,
                nope_dim=16,
                rope_dim=8,
                value_dim=16,
            ),
            moe=configs.MoEConfig(
                num_experts=4, top_k=2, ffn_dim=32, num_groups=1, keep_groups=1
            ),
            mtp=configs.MTPConfig(depth=0),
        ),
        data=configs.DataConfig(batch=size.rows * microbatches, length=size.length),
        optim=configs.OptimConfig(horizon=1000),
        mesh=MeshConfig(pipe=size.ranks),
        pipeline=PipelineConfig(schedule, microbatches, keep=keep),
    )


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gradients(
    parts: Parts, pipeline: pipelined.Pipeline, state: TrainState, batch: Batch
) -> Any:
    """What a step computes before the optimizer's part."""
    batches = micro_batches(batch, parts.config.micro_batches)
    counts, weight = totals(parts, batch), jnp.float32(0.1)
    return pipelined.accumulate(parts, pipeline, state, batches, counts, weight)


def feeds(parts: Parts, batch: Batch) -> Any:
    batches = micro_batches(batch, parts.config.micro_batches)
    return pipelined.feeds(parts, batches, totals(parts, batch))


def measure(schedule: str, keep: str, microbatches: int, size: Size) -> Found:
    """Compiles a program; nothing runs.

    Raises:
      ValueError: the schedule does not have these sizes.
    """
    made = config(schedule, keep, microbatches, size)
    parts = assemble(made, jax.devices()[: size.ranks])
    pipeline = pipelined.assemble(made, parts.mesh)
    state, batch = shapes(parts)
    carries: list[Carry] = []
    start = Rank.start

    def seen(rank: Rank) -> Carry:
        carries.append(start(rank))
        return carries[-1]

    since = time.process_time()
    program = jax.jit(
        functools.partial(gradients, parts, pipeline), compiler_options=COMPILER_OPTIONS
    )
    with mock.patch.object(Rank, "start", seen):
        lowered = program.lower(state, batch)
    compiled = lowered.compile()
    seconds = time.process_time() - since
    fed = nbytes(jax.eval_shape(functools.partial(feeds, parts), batch))
    held, carry = check.memory(pipeline.program.schedule), carries[0]
    one = nbytes(carry.x) // len(carry.x)
    saved = one
    if keep == "products":
        saved = nbytes(carry.kept) // (pipeline.program.slots["kept"] + 1)
    return Found(
        schedule,
        keep,
        microbatches,
        pipeline.program.schedule.stages,
        int(held.live.max()),
        int(held.deferred.max()),
        int(held.live.max() * saved + held.deferred.max() * one),
        nbytes((carry.x, carry.g, carry.kept)),
        compiled.memory_analysis().temp_size_in_bytes - fed,
        fed,
        seconds,
    )


HEAD = (
    f"{'schedule':12}{'micro-':>8}{'stages':>8}{'live':>6}{'deferred':>10}"
    f"{'formula':>9}{'rings':>8}{'measured':>10}{'feeds':>8}{'compiled':>10}\n"
    f"{'':12}{'batches':>8}{'':24}{'MB':>9}{'MB':>8}{'MB':>10}{'MB':>8}{'s':>10}"
)


def line(found: Found) -> str:
    sizes = (found.formula, found.rings, found.measured, found.feeds)
    mega = "".join(f"{n / MB:{w}.2f}" for n, w in zip(sizes, (9, 8, 10, 8)))
    return (
        f"{found.schedule:12}{found.microbatches:8}{found.stages:8}{found.live:6}"
        f"{found.deferred:10}{mega}{found.seconds:10.1f}"
    )


def table(args: argparse.Namespace, size: Size) -> Iterator[Found]:
    """Measures everything that is asked for, and prints it."""
    act = 4 * size.rows * size.length * size.dim
    print(
        f"{size.ranks} ranks, {2 * size.ranks} layers; a micro-batch of {size.rows} "
        f"rows of {size.length} tokens, whose activation has {act / MB:.2f} MB"
    )
    for keep in args.keep:
        print(f"\na stage keeps its {keep}\n{HEAD}")
        for schedule in args.schedules:
            for microbatches in args.microbatches:
                found = measure(schedule, keep, microbatches, size)
                print(line(found), flush=True)
                yield found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, SCHEDULES[1:]
    add("--schedules", nargs="+", choices=names, default=names, help="all")
    add("--keep", nargs="+", choices=KEEPS, default=KEEPS, help="inputs products")
    add("--microbatches", type=int, nargs="+", default=[16, 64, 128], help="16 64 128")
    for name, default in Size._field_defaults.items():
        add(f"--{name}", type=int, default=default, metavar="N", help=str(default))
    add("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    size = Size(args.ranks, args.rows, args.length, args.dim)
    jax.config.update("jax_num_cpu_devices", size.ranks)
    try:
        rows = [found._asdict() for found in table(args, size)]
    except ValueError as error:
        sys.exit(f"pipeline_memory: {error}")
    if args.json:
        report = {"size": size._asdict(), "programs": rows}
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
