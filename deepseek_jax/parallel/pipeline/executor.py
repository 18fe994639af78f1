"""Any schedule in one SPMD program: what a `Program` says, tick by tick.

All axes of the mesh are manual here. In a tick a rank does a forward, a backward, both
or neither, and what comes out goes to both neighbours at once. Rings of buffers and
sums of gradients lie in no conditional; the work itself does in runs of ticks where
busy ranks differ, and only there. So in a DualPipe's long middle a forward and the
backward of the other direction stand side by side with nothing between them, as in
figure 4 of arXiv:2412.19437, and the exchange of the one may run under the products of
the other.

A backward pass is `jax.vjp` of a stage, of which B uses all, I the gradient of the
input, and W those of the weights; what a kind does not use is never computed. I keeps
what it read until W reads it again: with `keep` = "inputs" the stage's input and its
output's gradient, from which either computes the rest.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.model.transformer import Totals
from deepseek_jax.parallel.mesh import EXPERTS, ROWS
from deepseek_jax.parallel.partition import named
from deepseek_jax.parallel.pipeline.program import (
    BACKWARDS,
    NOTHING,
    Program,
    Row,
    Run,
)
from deepseek_jax.parallel.pipeline.schedules import Schedule
from deepseek_jax.parallel.pipeline.stages import (
    Feed,
    Report,
    Routers,
    Stage,
    Where,
)
from deepseek_jax.parallel.rules import EXPERT
from deepseek_jax.typing import Array

PIPE = "pipe"


class Given(NamedTuple):
    """What a rank works with; [d] is the digits of a rank."""

    own: Any  # [d, slots, ...]
    shared: Any
    where: Where  # [d, ...]
    mtp: Routers
    feeds: Feed  # [C, ...]
    totals: Totals
    mtp_weight: Array


class Carry(NamedTuple):
    """What goes from tick to tick: rings, then sums."""

    x: Array  # [slots, B, L, D]
    g: Array
    kept: Any  # [slots, ...]
    own: Any  # gradients, as in `Given`
    shared: Any
    report: Report  # `own` of it [d, ...]


Gradients = tuple[Any, Any, Any]  # of own (of one digit), of shared, of the input


@dataclass(frozen=True)
class Rank:
    """A rank's part of a program, and what it works with."""

    program: Program
    stage: Stage
    given: Given

    def run(self, rows: Row) -> Carry:
        """All ticks; `rows` [T] is this rank's."""
        carry = self.start()
        for run in self.program.runs:
            part = jax.tree.map(lambda x, run=run: x[run.start : run.stop], rows)

            def tick(carry: Carry, row: Row, run: Run = run) -> tuple[Carry, None]:
                return self.tick(carry, row, run), None

            if run.stop - run.start == 1:
                carry, _ = tick(carry, jax.tree.map(lambda x: x[0], part))
            else:
                carry, _ = lax.scan(tick, carry, part)
        return carry

    def start(self) -> Carry:
        """Empty rings and sums."""
        own, shared, where, *_ = self.given
        x_BLD = self.example()
        (_, report), kept = jax.eval_shape(lambda: self.forward(0, 0, x_BLD))
        slots = self.program.slots

        def ring(name: str, of: Any) -> Any:
            size = slots[name] + 1
            return jax.tree.map(lambda s: jnp.zeros((size, *s.shape), s.dtype), of)

        def zeros(of: Any, *lead: int) -> Any:
            return jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), s.dtype), of)

        counts = report._replace(own=zeros(report.own, len(where.first)))
        sums = zeros(report)._replace(own=counts.own)
        return Carry(
            ring("x", x_BLD),
            ring("g", x_BLD),
            ring("kept", kept),
            zeros(own),
            zeros(shared),
            sums,
        )

    def example(self) -> Array:
        """Of an activation; zeros [B, L, D]."""
        rows, length = self.given.feeds.position_BL.shape[1:]
        table_VD = self.given.shared["embed"]
        dtype = jnp.promote_types(table_VD.dtype, jnp.float32)
        return jnp.zeros((rows, length, table_VD.shape[1]), dtype)

    def tick(self, carry: Carry, row: Row, run: Run) -> Carry:
        """One tick; reads all rings before it writes any."""
        x_BLD, g_BLD = _at(carry.x, row.f_x), _at(carry.g, row.b_g)
        read = _at(carry.x if self.program.keeps_inputs else carry.kept, row.b_kept)
        sent: dict[str, Any] = {}
        if run.forward:
            (sent["x"], report), kept = self.do_forward(row, x_BLD, run.uniform)
            carry = carry._replace(
                report=_add_report(carry.report, report, row.f_digit),
                kept=_put(carry.kept, kept, row.f_kept),
            )
        if run.backward != (NOTHING,):
            own, shared, sent["g"] = self.do_backward(row, read, g_BLD, run)
            if own is not None:
                carry = carry._replace(
                    own=_add_at(carry.own, own, row.b_digit),
                    shared=jax.tree.map(jnp.add, carry.shared, shared),
                )
        for name, pairs in self.program.sends_of(run).items():
            ring, way = name.split("_")
            value = sent[ring]
            if way != "here":
                value = lax.ppermute(value, PIPE, pairs)
            slot = getattr(row, name)
            carry = carry._replace(**{ring: _put(getattr(carry, ring), value, slot)})
        return carry

    def call(self, digit: Any, microbatch: Any) -> Callable[..., Any]:
        """The stage of a digit on a micro-batch: (own, shared, x) to its results."""
        given = self.given
        feed, where = _at(given.feeds, microbatch), _at(given.where, digit)

        def stage(own: Any, shared: Any, x_BLD: Array) -> Any:
            rest = feed, where, given.mtp, given.totals, given.mtp_weight
            return self.stage(own, shared, x_BLD, *rest)

        return stage

    def forward(self, digit: Any, microbatch: Any, x_BLD: Array) -> Any:
        """((output, report), what the backward pass needs besides weights)."""
        own, shared = _at(self.given.own, digit), self.given.shared
        stage = self.call(digit, microbatch)
        if self.program.keeps_inputs:
            (y_BLD, _), report = stage(own, shared, x_BLD)
            return (y_BLD, report), ()
        (y_BLD, _), pull, report = jax.vjp(stage, own, shared, x_BLD, has_aux=True)
        return (y_BLD, report), _residuals(pull, own, shared)[0]

    def do_forward(self, row: Row, x_BLD: Array, uniform: bool) -> Any:
        """`forward`, where the row says so; zeros elsewhere."""

        def do(x_BLD: Array) -> Any:
            with jax.named_scope("forward"):
                return self.forward(row.f_digit, row.f_microbatch, x_BLD)

        return _only(row.forward > 0, do, x_BLD, uniform)

    def backward(self, kind: str, row: Row, read: Any, g_BLD: Array) -> Gradients:
        """Of what `kind` computes; None for the rest."""
        own, shared = _at(self.given.own, row.b_digit), self.given.shared
        where = _at(self.given.where, row.b_digit)
        stage = self.call(row.b_digit, row.b_microbatch)
        x_BLD = read if self.program.keeps_inputs else self.example()
        (_, share), pull, _ = jax.vjp(stage, own, shared, x_BLD, has_aux=True)
        if (
            not self.program.keeps_inputs
        ):  # the forward pass above is for its structure alone
            pull = _residuals(pull, own, shared)[1](read)
        g_BLD = jnp.where(where.last > 0, 0, g_BLD)
        own, shared, x_BLD = pull((g_BLD, jnp.ones_like(share)))
        if kind == "I":
            return None, None, x_BLD
        return own, shared, None if kind == "W" else x_BLD

    def do_backward(self, row: Row, read: Any, g_BLD: Array, run: Run) -> Gradients:
        """`backward` of the row's kind; zeros where another kind has a result."""

        def branch(kind: str) -> Callable[..., Gradients]:
            def do(given: tuple[Any, Array]) -> Gradients:
                with jax.named_scope(f"backward_{kind}"):
                    return self.backward(kind, row, *given)

            return do

        kinds, given = [k for k in run.backward if k != NOTHING], (read, g_BLD)
        if run.uniform:
            return _only(row.backward > 0, branch(kinds[0]), given, True)
        shapes = [jax.eval_shape(branch(kind), given) for kind in kinds]
        # What any kind computes, all must.
        whole = tuple(
            next((part for part in parts if part is not None), None)
            for parts in zip(*shapes, strict=True)
        )

        def filled(kind: str) -> Callable[..., Gradients]:
            def do(given: tuple[Any, Array]) -> Gradients:
                found = branch(kind)(given) if kind else (None,) * 3
                return tuple(
                    _zeros(like) if part is None else part
                    for part, like in zip(found, whole, strict=True)
                )

            return do

        every = [NOTHING, *kinds]
        number = np.zeros(len(BACKWARDS), np.int32)
        for n, kind in enumerate(every):
            number[BACKWARDS.index(kind)] = n
        which = jnp.asarray(number)[row.backward]
        return lax.switch(which, [filled(kind) for kind in every], given)


def _residuals(pull: Any, own: Any, shared: Any) -> tuple[list[Array], Any]:
    """The arrays in a vjp that are no weights, and what puts others in their place."""
    weights = {id(leaf) for leaf in jax.tree.leaves((own, shared))}
    leaves, structure = jax.tree.flatten(pull)
    kept = [n for n, leaf in enumerate(leaves) if id(leaf) not in weights]

    def with_these(read: list[Array]) -> Any:
        for n, leaf in zip(kept, read, strict=True):
            leaves[n] = leaf
        return jax.tree.unflatten(structure, leaves)

    return [leaves[n] for n in kept], with_these


def _only(on: Array, do: Callable[[Any], Any], given: Any, uniform: bool) -> Any:
    """`do(given)`, or zeros where not `on`; without a conditional if `uniform`."""
    if uniform:
        return jax.tree.map(lambda x: jnp.where(on, x, jnp.zeros_like(x)), do(given))
    shapes = jax.eval_shape(do, given)
    return lax.cond(on, do, lambda _: _zeros(shapes), given)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _at(tree: Any, i: Any) -> Any:
    """Entry i of every array's leading axis."""
    return jax.tree.map(
        lambda x: x[0] if len(x) == 1 else lax.dynamic_index_in_dim(x, i, 0, False),
        tree,
    )


def _put(ring: Any, value: Any, slot: Array) -> Any:
    return jax.tree.map(
        lambda x, v: lax.dynamic_update_index_in_dim(x, v, slot, 0), ring, value
    )


def _add_at(sums: Any, value: Any, i: Array) -> Any:
    return _put(sums, jax.tree.map(jnp.add, _at(sums, i), value), i)


def _add_report(sums: Report, new: Report, digit: Array) -> Report:
    own = _add_at(sums.own, new.own, digit)
    rest = jax.tree.map(jnp.add, sums._replace(own=None), new._replace(own=None))
    return rest._replace(own=own)


def with_copies(schedule: Schedule, first: Any) -> Any:
    """From what ranks hold for path 0 to that for all digits, [d, ...]."""
    parts = [first]
    for path in schedule.paths[1:]:
        pairs = [(a.rank, b.rank) for a, b in zip(schedule.paths[0], path, strict=True)]
        parts.append(jax.tree.map(lambda x, p=pairs: lax.ppermute(x, PIPE, p), first))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def without_copies(schedule: Schedule, every: Any) -> Any:
    """The inverse of `with_copies`: copies go back and are added up."""
    size = schedule.digits // schedule.copies
    total = jax.tree.map(lambda x: x[:size], every)
    for n, path in enumerate(schedule.paths[1:], 1):
        pairs = [(b.rank, a.rank) for a, b in zip(schedule.paths[0], path, strict=True)]

        def add(x: Array, own: Array, n: int = n, pairs: Any = pairs) -> Array:
            copy = own[n * size : (n + 1) * size]
            return x + lax.ppermute(copy, PIPE, pairs)

        total = jax.tree.map(add, total, every)
    return total


def is_expert(name: str) -> bool:
    """Whether a parameter is split over the devices that share experts."""
    return re.search(EXPERT, f"/{name}") is not None


def summed(grads: Any, over: tuple[str, ...]) -> Any:
    """Gradients over all devices that have seen other rows, by parameters' names."""
    alone = tuple(axis for axis in over if axis not in EXPERTS)
    leaves = [
        lax.psum(leaf, alone if is_expert(name) else over)
        for name, leaf in named(grads).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(grads), leaves)


def execute(
    program: Program, stage: Stage, given: Given, rows: Row
) -> tuple[Any, Any, Report]:
    """The whole step of a device: gradients of (own, shared), and the report.

    Args:
      given: `own` and `where` for path 0 alone, with a leading axis of size 1.
      rows: [T, 1].

    Returns:
      Sums over all devices; what is own of a rank, as in `given`.
    """
    schedule = program.schedule
    own, where = jax.tree.map(lambda x: x[0], (given.own, given.where))
    own, where = with_copies(schedule, (own, where))
    rank = Rank(program, stage, given._replace(own=own, where=where))
    carry = rank.run(jax.tree.map(lambda x: x[:, 0], rows))
    own, counts = without_copies(schedule, (carry.own, carry.report.own))
    everywhere = (PIPE, *ROWS)
    report = jax.tree.map(
        lambda x: lax.psum(x, everywhere), carry.report._replace(own=None)
    )
    counts = jax.tree.map(lambda x: lax.psum(x, ROWS)[None], counts)
    own = jax.tree.map(lambda x: x[None], summed(own, ROWS))
    return own, summed(carry.shared, everywhere), report._replace(own=counts)
