"""Gradients of a step through a pipeline, in place of `step.accumulate`.

The model is taken apart into stages, the schedule's program is run on them, and what
comes back is put together as the model has it: parameters, losses and counts look as
they do without a pipeline, and so do checkpoints (arXiv:2412.19437, section 3.2.1).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax import runtime
from deepseek_jax.config import Config
from deepseek_jax.data.batch import Batch
from deepseek_jax.model.transformer import Totals
from deepseek_jax.ops import balancing
from deepseek_jax.parallel import expert
from deepseek_jax.parallel.mesh import EXPERTS, ROWS
from deepseek_jax.parallel.partition import named
from deepseek_jax.parallel.pipeline import cut, executor, program, schedules
from deepseek_jax.parallel.pipeline.copies import PIPE, is_expert
from deepseek_jax.parallel.pipeline.executor import Given
from deepseek_jax.parallel.pipeline.stages import (
    Counted,
    Feed,
    Report,
    Routers,
    Stage,
    Where,
)
from deepseek_jax.train.objective import Losses, bounds, input_masks, targets
from deepseek_jax.train.state import Parts, TrainState
from deepseek_jax.typing import Array, Params

RANKS = PartitionSpec(PIPE)
WHOLE = PartitionSpec()


class Pipeline(NamedTuple):
    """What a run's `pipeline` settings stand for."""

    program: program.Program
    stage: Stage


def assemble(config: Config, mesh: Mesh) -> Pipeline:
    """Plans the schedule and cuts the model.

    Raises:
      ValueError: a schedule that these sizes do not have, or too many stages.
    """
    schedule, pieces = plan(config)
    total = functools.partial(lax.psum, axis_name=ROWS)
    stage = Stage(
        config.model,
        pieces,
        expert.in_pipeline(runtime.build(config.runtime), config, mesh),
        balancing.build(config.balance, config.model.moe, total),
    )
    keeps_inputs = config.pipeline.keep == "inputs"
    return Pipeline(program.assemble(schedule, keeps_inputs), stage)


def plan(config: Config) -> tuple[schedules.Schedule, cut.Cut]:
    """The schedule that a config asks for, and the model cut into its stages.

    Raises:
      ValueError: names the settings and what is wrong with them together.
    """
    asked, ranks = config.pipeline, config.mesh.pipe
    try:
        schedule = schedules.build(
            asked.schedule, ranks, asked.microbatches, asked.chunks or None
        )
        return schedule, cut.cut(config.model, schedule)
    except ValueError as error:
        raise ValueError(
            f"pipeline.schedule = {asked.schedule!r}, mesh.pipe = {ranks}, "
            f"pipeline.microbatches = {asked.microbatches}, pipeline.chunks = "
            f"{asked.chunks}: {error}"
        ) from None


def feeds(parts: Parts, batches: Batch, counts: Totals) -> Feed:
    """What stages need of all micro-batches; `batches` [C, rows, ..]."""
    length, depth = parts.config.data.length, parts.config.model.mtp.depth

    def one(batch: Batch) -> Feed:
        segment_BS, _ = bounds(parts, batch)
        target_BL, weight_BL = zip(*targets(parts, batch, counts), strict=True)
        return Feed(
            batch.tokens[:, : length + depth],
            batch.position[:, :length],
            None if segment_BS is None else segment_BS[:, : length + depth],
            jnp.stack(input_masks(parts, batch)),
            jnp.stack(target_BL),
            jnp.stack(weight_BL),
        )

    return jax.vmap(one)(batches)


def by_name(tree: Any, rest: PartitionSpec) -> Any:
    """Specs of parameters: experts are split over their devices, too."""

    def one(name: str, leaf: Array) -> PartitionSpec:
        if not is_expert(name):
            return rest
        lead = [None] * (leaf.ndim - 3 - len(rest))
        return PartitionSpec(*rest, *lead, EXPERTS, None, None)

    specs = [one(name, leaf) for name, leaf in named(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), specs)


def place(
    parts: Parts, pipeline: Pipeline, state: TrainState, counts: Totals
) -> tuple[Where, Routers]:
    """What each place is, [ranks, stages of a rank, ..], and the routers of MTP."""
    pieces, routers = pipeline.stage.cut, parts.config.model.num_moe
    schedule = pipeline.program.schedule
    size = schedule.digits // schedule.copies
    first, last = program.flags(schedule)
    every = Routers(state.balance, counts.load)
    where = Where(
        jnp.asarray(first[:, :size], jnp.int32),
        jnp.asarray(last[:, :size], jnp.int32),
        jnp.asarray(pieces.dense.layer_RdN >= 0, jnp.int32),
        jnp.asarray(pieces.moe.layer_RdN >= 0, jnp.int32),
        pieces.moe.place(jax.tree.map(lambda x: x[:routers], every)),
    )
    return where, jax.tree.map(lambda x: x[routers:], every)


def accumulate(
    parts: Parts,
    pipeline: Pipeline,
    state: TrainState,
    batches: Batch,
    counts: Totals,
    mtp_weight: Array,
) -> tuple[Params, Losses, tuple[Array, Any]]:
    """Gradients, losses, loads and statistics, summed over micro-batches."""
    pieces = pipeline.stage.cut
    own, shared = pieces.split(state.params)
    where, mtp = place(parts, pipeline, state, counts)
    given = Given(
        own, shared, where, mtp, feeds(parts, batches, counts), counts, mtp_weight
    )
    by_row, by_depth = PartitionSpec(None, ROWS), PartitionSpec(None, None, ROWS)
    segment = None if given.feeds.segment_BS is None else by_row
    feed = Feed(by_row, by_row, segment, by_depth, by_depth, by_depth)
    specs = by_name(own, RANKS), by_name(shared, WHOLE)
    run = functools.partial(executor.execute, pipeline.program, pipeline.stage)
    own, shared, report = jax.shard_map(
        run,
        mesh=parts.mesh,
        in_specs=(
            Given(*specs, RANKS, WHOLE, feed, WHOLE, WHOLE),
            PartitionSpec(None, PIPE),
        ),
        out_specs=(*specs, Report(WHOLE, WHOLE, WHOLE, RANKS, WHOLE)),
        check_vma=False,
    )(given, jax.tree.map(jnp.asarray, pipeline.program.rows))
    return pieces.join(own, shared), *figures(pieces, report, mtp_weight)


def figures(
    pieces: cut.Cut, report: Report, mtp_weight: Array
) -> tuple[Losses, tuple[Array, Any]]:
    """Losses, and loads and statistics in the order of the routers."""
    loss = report.ce + report.penalty
    if report.mtp_ce.size:
        loss = loss + mtp_weight * report.mtp_ce.mean()
    losses = Losses(loss, report.ce, report.mtp_ce, report.penalty)
    counts: Counted = pieces.moe.stack(report.own)
    if report.mtp is not None:
        counts = jax.tree.map(lambda *both: jnp.concatenate(both), counts, report.mtp)
    return losses, tuple(counts)
