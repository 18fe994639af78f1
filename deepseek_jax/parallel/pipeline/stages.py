"""What a rank computes of a micro-batch: one function, whichever stage it is.

The blocks that every stage has are run as they are. What only some stages have runs
under a conditional: the embedding before the first stage, dense blocks, blocks beyond
what the smallest stage has, and behind the last stage the norm, the MTP modules and the
losses. Its result has an activation's size; it keeps nothing for its backward pass,
which computes it again, and whose results have the size of its weights. Conditionals
contain exchanges between the devices of one rank, and none between ranks. The
mathematics is `model`'s, its modules applied one by one (arXiv:2412.19437, sections
2.1, 2.2), and the objective `train.objective`'s: `share` is what a micro-batch adds to
the global batch's loss.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import DenseBlock, MoEBlock, rematerialised
from deepseek_jax.model.linear import RMSNorm, embed
from deepseek_jax.model.mtp import MTPModule
from deepseek_jax.model.transformer import Totals
from deepseek_jax.ops.balancing import Balancer, Context
from deepseek_jax.ops.losses import cross_entropy
from deepseek_jax.ops.rope import Rotation, rotation
from deepseek_jax.parallel.pipeline.cut import Cut
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array


class Feed(NamedTuple):
    """What any stage may need of a micro-batch; entry k of J is MTP depth k's."""

    tokens_BS: Array  # S = L + the number of MTP modules
    position_BL: Array
    segment_BS: Array | None
    valid_JBL: Array  # bool, what each depth's router counts
    target_JBL: Array  # the tokens to predict
    weight_JBL: Array  # of each target in the global batch's mean


class Counted(NamedTuple):
    """Sums over micro-batches of what routers report; a leading axis over these."""

    load: Array
    stats: Any


class Report(NamedTuple):
    """What a stage adds to the step's figures; zero where it has no part in them."""

    ce: Array
    mtp_ce: Array  # [J]
    penalty: Array
    own: Counted | None  # of the stage's slots of MoE blocks
    mtp: Counted | None  # of the MTP modules


class Routers(NamedTuple):
    """Per router: the balancer's state, and counts of the global batch or None."""

    state: Any
    load: Array | None


class Where(NamedTuple):
    """Which stage a function call is."""

    first: Array  # int32, 1 if it is
    last: Array
    dense: Array  # int32 [slots], 1 for the full ones
    moe: Array
    routers: Routers  # [slots, ...]


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage of any model; arrays come as arguments."""

    config: ModelConfig
    cut: Cut
    rt: Runtime
    balancer: Balancer

    def __call__(
        self,
        own: Any,
        shared: Any,
        x_BLD: Array,
        feed: Feed,
        where: Where,
        mtp: Routers,
        totals: Totals,
        mtp_weight: Array,
    ) -> tuple[tuple[Array, Array], Report]:
        """A micro-batch through the stage.

        Args:
          own, shared: as `Cut.split` has them, `own` a list of this stage's blocks.
          x_BLD: the output of the stage before; nobody looks at the first one's.
          mtp: of the MTP modules' routers.
          totals: counts over the global batch; its `load` is not used.

        Returns:
          (what the next stage reads, share of the loss), and the report.
        """
        at = self.config.attention
        by = rotation(at.rope, at.rope_dim, feed.position_BL, x_BLD.dtype)
        length = feed.position_BL.shape[1]
        segment_BL = None if feed.segment_BS is None else feed.segment_BS[:, :length]
        given: Any
        with jax.named_scope("entry"):
            given = shared["embed"], feed.tokens_BS[:, :length], x_BLD
            x_BLD = where_only(where.first > 0, _embedded, given, _last)
        for i in range(self.cut.dense.width):
            dense = functools.partial(self._dense, by=by, segment_BL=segment_BL)
            given = own["dense"][i], x_BLD
            x_BLD = where_only(where.dense[i] > 0, dense, given, _last)
        reports = []
        for i in range(self.cut.moe.width):
            context = Context(feed.valid_JBL[0], totals.tokens[0], totals.rows[0])
            moe = functools.partial(self._moe, by=by, segment_BL=segment_BL)
            given = own["moe"][i], _at(where.routers, i), context, x_BLD
            if i < self.cut.moe.common:
                x_BLD, report = moe(*given)
            else:
                without = functools.partial(_unchanged, moe)
                x_BLD, report = where_only(where.moe[i] > 0, moe, given, without)
            reports.append(report)
        with jax.named_scope("exit"):
            leave = functools.partial(self._leave, by=by, segment_BL=segment_BL)
            given = shared, x_BLD, feed, mtp, totals
            without = functools.partial(_zeros, leave)
            ce_J, of_mtp, mtp_penalty = where_only(
                where.last > 0, leave, given, without
            )
        penalty = sum((each for _, each in reports), mtp_penalty)
        share = ce_J[0] + penalty
        if len(ce_J) > 1:
            share = share + mtp_weight * ce_J[1:].mean()
        of_own = stacked([counts for counts, _ in reports])
        return (x_BLD, share), Report(ce_J[0], ce_J[1:], penalty, of_own, of_mtp)

    def _dense(
        self, params: Any, x_BLD: Array, *, by: Rotation, segment_BL: Array | None
    ) -> Array:
        block = rematerialised(DenseBlock, self.rt)(self.config, self.rt)
        x_BLD, _ = _applied(block, params, x_BLD, by, segment_BL)
        return x_BLD

    def _moe(
        self,
        params: Any,
        router: Routers,
        context: Context,
        x_BLD: Array,
        *,
        by: Rotation,
        segment_BL: Array | None,
    ) -> tuple[Array, tuple[Counted, Array]]:
        block = rematerialised(MoEBlock, self.rt)(self.config, self.rt, self.balancer)
        context = context._replace(load_E=router.load)
        given = x_BLD, router.state, context, by, segment_BL
        x_BLD, aux = _applied(block, params, *given)
        return x_BLD, (Counted(aux.load, aux.stats), aux.penalty)

    def _leave(
        self,
        shared: Any,
        x_BLD: Array,
        feed: Feed,
        mtp: Routers,
        totals: Totals,
        *,
        by: Rotation,
        segment_BL: Array | None,
    ) -> tuple[Array, Counted | None, Array]:
        """(cross entropies [1+J], counts and penalty of the MTP modules)."""
        config, length = self.config, x_BLD.shape[1]
        normed = _applied(RMSNorm(config), shared["norm"], x_BLD)
        h_BLD = normed if config.mtp.input_norm else x_BLD
        hidden, counts, penalty = [normed], [], jnp.zeros((), x_BLD.dtype)
        for k in range(1, config.mtp.depth + 1):
            router = _at(mtp, k - 1)
            valid_BL, tokens, rows = feed.valid_JBL[k], totals.tokens[k], totals.rows[k]
            module = MTPModule(config, self.rt, self.balancer)
            raw, normed, aux = _applied(
                module,
                shared[f"mtp_{k - 1}"],
                h_BLD,
                embed(shared["embed"], feed.tokens_BS[:, k : k + length]),
                router.state,
                Context(valid_BL, tokens, rows, router.load),
                by,
                segment_BL,
            )
            h_BLD = normed if config.mtp.input_norm else raw
            hidden.append(normed)
            counts.append(Counted(aux.load, aux.stats))
            penalty = penalty + aux.penalty
        ce = [
            cross_entropy(
                h_BLD.reshape(-1, config.dim),
                shared["head"],
                feed.target_JBL[k].reshape(-1),
                feed.weight_JBL[k].reshape(-1),
                dot=self.rt.dot,
            )
            for k, h_BLD in enumerate(hidden)
        ]
        return jnp.stack(ce), stacked(counts) if counts else None, penalty


def where_only(
    pred: Array, do: Callable[..., Any], given: Any, instead: Callable[..., Any]
) -> Any:
    """`do(*given)` where `pred`, else `instead(*given)`.

    The backward pass computes it again: a conditional would hand out copies of what it
    reads, weights too.
    """

    def either(pred: Array, given: Any) -> Any:
        return jax.lax.cond(pred, do, instead, *given)

    return jax.checkpoint(either, prevent_cse=False)(pred, given)


def _applied(module: Any, params: Any, *given: Any) -> Any:
    return module.apply({"params": params}, *given)


def _embedded(table_VD: Array, tokens_BL: Array, _: Array) -> Array:
    return embed(table_VD, tokens_BL)


def _last(*given: Any) -> Any:
    return given[-1]


def _zeros(of: Callable[..., Any], *given: Any) -> Any:
    shapes = jax.eval_shape(of, *given)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _unchanged(of: Callable[..., Any], *given: Any) -> Any:
    """The last argument, and nothing of what `of` would report beside it."""
    return given[-1], _zeros(of, *given)[1]


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def stacked(trees: list[Any]) -> Any:
    """Trees of arrays as one, with a leading axis over them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
