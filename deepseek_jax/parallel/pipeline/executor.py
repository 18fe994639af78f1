"""Any schedule in one SPMD program: what a `Program` says, tick by tick.

All axes of the mesh are manual here. In a tick a rank does a forward, a backward, both
or neither, and what comes out goes to both neighbours at once. Rings of buffers and
sums of gradients lie in no conditional; the work itself does in runs of ticks where
busy ranks differ, and only there. In the others, such as the middle of a DualPipe, a
forward and the backward of the other direction stand side by side (`interleave`), as in
figure 4 of arXiv:2412.19437; what lies in a conditional of a stage is not cut.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.model.transformer import Totals
from deepseek_jax.parallel.mesh import ROWS
from deepseek_jax.parallel.pipeline.copies import (
    PIPE,
    summed,
    with_copies,
    without_copies,
)
from deepseek_jax.parallel.pipeline.interleave import side_by_side
from deepseek_jax.parallel.pipeline.program import (
    BACKWARDS,
    NOTHING,
    Program,
    Row,
    Run,
)
from deepseek_jax.parallel.pipeline.stages import (
    Feed,
    Report,
    Routers,
    Stage,
    Where,
)
from deepseek_jax.parallel.pipeline.work import PARTS, Gradients, backward, forward
from deepseek_jax.typing import Array


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
        do = functools.partial(self.forward, x_BLD=x_BLD)
        (_, report), kept = jax.eval_shape(do, 0, 0)
        slots, digits = self.program.slots, len(where.first)

        def zeros(of: Any, *lead: int) -> Any:
            return jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), s.dtype), of)

        return Carry(
            zeros(x_BLD, slots["x"] + 1),
            zeros(x_BLD, slots["g"] + 1),
            zeros(kept, slots["kept"] + 1),
            zeros(own),
            zeros(shared),
            zeros(report)._replace(own=zeros(report.own, digits)),
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
        ahead = functools.partial(self.forwards, carry, row, run)
        back = functools.partial(self.backwards, row=row, run=run)
        if run.uniform and run.forward and run.backward == ("B",):
            # Backward first: its exchange has a forward's attention beside it.
            found = side_by_side(back, ahead, (read, g_BLD), (x_BLD,))
            (own, shared, sent["g"]), ((sent["x"], report), kept) = found
        elif run.forward:
            (sent["x"], report), kept = ahead(x_BLD)
        if run.backward != (NOTHING,) and "g" not in sent:
            own, shared, sent["g"] = back(read, g_BLD)
        if run.forward:
            carry = carry._replace(
                report=_add_report(carry.report, report, row.f_digit),
                kept=_put(carry.kept, kept, row.f_kept),
            )
        if run.backward != (NOTHING,) and own is not None:
            carry = carry._replace(
                own=_add_at(carry.own, own, row.b_digit),
                shared=jax.tree.map(jnp.add, carry.shared, shared),
            )
        for name, pairs in self.program.sends_of(run).items():
            ring, way = name.split("_")
            value = sent[ring]
            if way != "here":
                with jax.named_scope(f"send_{ring}"):
                    value = lax.ppermute(value, PIPE, pairs)
            slot = getattr(row, name)
            carry = carry._replace(**{ring: _put(getattr(carry, ring), value, slot)})
        return carry

    def rest(self, digit: Any, microbatch: Any) -> tuple[Any, ...]:
        """What a stage reads besides weights and activations."""
        given = self.given
        feed, where = _at(given.feeds, microbatch), _at(given.where, digit)
        return feed, where, given.mtp, given.totals, given.mtp_weight

    def forwards(self, carry: Carry, row: Row, run: Run, x_BLD: Array) -> Any:
        """`forward` where the row says so; zeros elsewhere."""
        counts = carry.report._replace(own=_at(carry.report.own, 0))
        like = (x_BLD, counts), _at(carry.kept, 0)
        do = functools.partial(self.forward, row.f_digit, row.f_microbatch)
        return _only(row.forward > 0, run.uniform, do, like, x_BLD)

    def forward(self, digit: Any, microbatch: Any, x_BLD: Array) -> Any:
        """`forward` of a digit's stage on a micro-batch."""
        how = self.stage, self.program.keeps_inputs
        weights = _at(self.given.own, digit), self.given.shared
        return forward(*how, *weights, x_BLD, self.rest(digit, microbatch))

    def backward(self, kind: str, row: Row, read: Any, g_BLD: Array) -> Gradients:
        """`backward` of a row's stage and micro-batch."""
        how = self.stage, self.program.keeps_inputs, kind
        weights = _at(self.given.own, row.b_digit), self.given.shared
        rest = self.rest(row.b_digit, row.b_microbatch)
        return backward(*how, *weights, read, g_BLD, rest)

    def backwards(self, read: Any, g_BLD: Array, *, row: Row, run: Run) -> Gradients:
        """Of the row's kind; zeros for what another kind of the run computes."""
        kinds = [kind for kind in run.backward if kind != NOTHING]
        whole = _at(self.given.own, 0), self.given.shared, g_BLD
        parts = {kind: PARTS[kind] for kind in kinds}
        like = tuple(
            each if any(n in part for part in parts.values()) else None
            for n, each in enumerate(whole)
        )

        def of(kind: str) -> Callable[..., Gradients]:
            def do(read: Any, g_BLD: Array) -> Gradients:
                found = self.backward(kind, row, read, g_BLD)
                return tuple(
                    jax.tree.map(jnp.zeros_like, each) if part is None else part
                    for part, each in zip(found, like, strict=True)
                )

            return do

        if len(kinds) == 1:
            on = row.backward > 0
            return _only(on, run.uniform, of(kinds[0]), like, read, g_BLD)
        number = np.zeros(len(BACKWARDS), np.int32)
        for n, kind in enumerate(kinds, 1):
            number[BACKWARDS.index(kind)] = n
        branches = [lambda *_: jax.tree.map(jnp.zeros_like, like), *map(of, kinds)]
        return lax.switch(jnp.asarray(number)[row.backward], branches, read, g_BLD)


def _only(
    on: Array, uniform: bool, do: Callable[..., Any], like: Any, *given: Any
) -> Any:
    """`do(*given)`, or zeros `like` it where not `on`; done anyway if `uniform`."""
    if uniform:
        return jax.tree.map(lambda x: jnp.where(on, x, jnp.zeros_like(x)), do(*given))
    return lax.cond(on, do, lambda *_: jax.tree.map(jnp.zeros_like, like), *given)


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
