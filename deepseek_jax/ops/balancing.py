"""Load balancing as values: a `Balancer` says how a router ranks, pays and learns.

Sources: arXiv:2412.19437 (section 2.1.2: bias update and sequence-wise loss; section
4.5.3: batch-wise loss), arXiv:2408.15664 (loss-free balancing and its variants),
arXiv:2202.08906 (router z-loss); `ops.penalties` and `ops.quantile` hold the sums.

What holds for every strategy, and why:
* A forward pass changes nothing. It returns integers, the trainer sums them over the
  whole global batch (shards and micro-batches), and `update` turns the sum into one
  step. A sign taken earlier, per shard or per micro-batch, is another algorithm.
* Biases are at least float32 and no parameters: 0.5 + 0.001 is 0.5 in bfloat16.
* Loads are compared with their mean in integers (`mean_load`): exact at any batch size.
* Only P of a balance loss carries a gradient, its counts don't. Padding never counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import BalanceConfig, MoEConfig
from deepseek_jax.ops import quantile as quantiles
from deepseek_jax.ops.penalties import imbalance, picked, tally
from deepseek_jax.ops.routing import Routing, Select, count_experts
from deepseek_jax.schedule import Schedule, piecewise
from deepseek_jax.typing import Array


class Context(NamedTuple):
    """What a penalty may know, all of it fixed before the first micro-batch."""

    valid_BL: Array  # bool, real positions of this micro-batch; T = B * L, row major
    tokens: Array | int  # valid tokens of this router in the whole global batch
    rows: Array | int  # rows with a valid token in the whole global batch
    load_E: Array | None = None  # Balancer.count of the global batch; None: count here


def load(routing: Routing, valid_T: Array, num_experts: int) -> Array:
    """Valid tokens sent to each expert: int32 [E], summing to valid tokens x K."""
    return count_experts(routing.experts_TK, valid_T, num_experts)


def _observe_load(routing: Routing, valid_T: Array) -> Array:
    return load(routing, valid_T, routing.scores_TE.shape[-1])


STILL = piecewise(0.0)
Total = Callable[[Any], Any]


def itself(x: Any) -> Any:
    """A `Total` of what is all there is."""
    return x


@dataclass(frozen=True)
class Balancer:
    """A strategy for one router; the defaults are the one that does nothing.

    `state` is a pytree of one layer; the trainer maps everything here over layers.
    """

    init: Callable[[int], Any] = lambda num_experts: ()
    # Scores and state to what is ranked; the combine weights never see it.
    select: Select = lambda scores_TE, state, /: scores_TE
    # This micro-batch's share; the shares add up to the global batch's penalty.
    penalty: Callable[[Routing, Context], Any] = lambda routing, context: 0.0
    # (routing, valid_T) to integer arrays, to be summed over the global batch.
    observe: Callable[[Routing, Array], Any] = _observe_load
    # (state, summed integers, optimizer steps finished before) to state, once a step.
    update: Callable[[Any, Any, Array | int], Any] = lambda state, stats, step: state
    # The bias [E] in a state, for records; None when the strategy keeps none.
    bias: Callable[[Any], Array] | None = None
    speed: Schedule = STILL  # u by step, for records
    # context.load_E in summed integers; None when the penalty does not need it.
    count: Callable[[Any], Array] | None = None

    @property
    def needs_counts(self) -> bool:
        """Whether accumulation takes a first pass over all micro-batches for load_E."""
        return self.count is not None


def chain(*balancers: Balancer) -> Balancer:
    """All of them at once: rankings compose in order, penalties add.

    States and statistics are tuples. Records show the first that keeps a bias.

    Raises:
      ValueError: two of them need counts of the whole batch; there is one load_E.
    """
    if sum(b.needs_counts for b in balancers) > 1:
        raise ValueError("chain: at most one balancer may count the whole batch")

    def select(scores_TE: Array, state: Any, /) -> Array:
        for balancer, own in zip(balancers, state, strict=True):
            scores_TE = balancer.select(scores_TE, own)
        return scores_TE

    def update(state: Any, stats: Any, step: Array | int) -> Any:
        parts = zip(balancers, state, stats, strict=True)
        return tuple(b.update(own, seen, step) for b, own, seen in parts)

    return Balancer(
        init=lambda num_experts: tuple(b.init(num_experts) for b in balancers),
        select=select,
        penalty=lambda r, context: sum(b.penalty(r, context) for b in balancers),
        observe=lambda r, valid_T: tuple(b.observe(r, valid_T) for b in balancers),
        update=update,
        bias=_first([b.bias for b in balancers]),
        speed=next((b.speed for b in balancers if b.bias), STILL),
        count=_first([b.count for b in balancers]),
    )


Reader = Callable[[Any], Array]


def _first(readers: list[Reader | None]) -> Reader | None:
    """The first reader there is, made to read its own entry of a tuple."""
    for i, reader in enumerate(readers):
        if reader is not None:
            return partial(_entry, reader, i)
    return None


def _entry(reader: Reader, i: int, parts: Any) -> Array:
    return reader(parts[i])


def mean_load(load_E: Array) -> tuple[Array, Array]:
    """The mean of int32 loads as whole + rest / E, both integers and 0 <= rest < E.

    Neither the total nor E * load is formed. At the report's size (63M tokens, 8 of 256
    experts) the latter overflows int32 for an expert with over four times its share.
    """
    experts = load_E.shape[-1]
    rest = (load_E % experts).sum(dtype=load_E.dtype)
    whole = (load_E // experts).sum(dtype=load_E.dtype)
    return whole + rest // experts, rest % experts


def _error_sign(load_E: Array) -> Array:
    """sign(mean - load): +1 for an underloaded expert, exactly 0 at the mean."""
    whole, rest = mean_load(load_E)
    return jnp.sign(jnp.where(load_E == whole, rest, whole - load_E))


def _error_ratio(load_E: Array) -> Array:
    """(mean - load) / mean; 0 when there is no load at all."""
    whole, rest = mean_load(load_E)
    part = rest.astype(float) / load_E.shape[-1]
    return ((whole - load_E) + part) / jnp.maximum(whole + part, 1 / load_E.shape[-1])


def _bias(
    start: float, select: Select, error: Callable[[Array], Array], speed: Schedule
) -> Balancer:
    """b += u * error(load) once a step."""

    def update(bias_E: Array, load_E: Array, step: Array | int) -> Array:
        push_E = speed(step) * error(load_E)
        return bias_E + push_E.astype(bias_E.dtype)

    return Balancer(
        init=lambda num_experts: jnp.full(num_experts, start, float),
        select=select,
        update=update,
        bias=lambda bias_E: bias_E,
        speed=speed,
    )


def none() -> Balancer:
    """No balancing: what the others are measured against."""
    return Balancer()


def loss_free(speed: Schedule) -> Balancer:
    """b += u * sign(mean - load), select on s + b (arXiv:2412.19437, section 2.1.2)."""
    return _bias(0.0, lambda s, b, /: s + b, _error_sign, speed)


def loss_free_proportional(speed: Schedule) -> Balancer:
    """b += u * (mean - load) / mean, the rule of arXiv:2408.15664 for softmax gates."""
    return _bias(0.0, lambda s, b, /: s + b, _error_ratio, speed)


def multiplicative(speed: Schedule) -> Balancer:
    """Select on s * b, b from 1 with the sign update, unbounded (arXiv:2408.15664)."""
    return _bias(1.0, lambda s, b, /: s * b, _error_sign, speed)


def loss_free_frozen(speed: Schedule, freeze_step: int) -> Balancer:
    """`loss_free` with u = 0 from `freeze_step` on, so after that many updates.

    The report does so for its last 0.5T tokens (arXiv:2412.19437, section 4.2).
    """
    return loss_free(lambda step: jnp.where(step < freeze_step, speed(step), 0.0))


def sequence_loss(alpha: float, biased: bool = False) -> Balancer:
    """alpha * sum_i f_i P_i of each row, averaged over rows (equations 17-20).

    A row counts by its valid tokens and, whatever their number, as one row.
    """

    def penalty(routing: Routing, context: Context) -> Array:
        top_k = routing.experts_TK.shape[-1]
        count_BE, p_BE = tally(routing, context.valid_BL, biased)
        tokens_B = context.valid_BL.sum(-1)
        rows_B = imbalance(count_BE, p_BE, tokens_B, top_k)
        return alpha * rows_B.sum() / jnp.maximum(context.rows, 1)

    return Balancer(penalty=penalty)


def batch_loss(alpha: float, biased: bool = False, total: Total = itself) -> Balancer:
    """alpha * sum_i f_i P_i of each micro-batch, weighted by its share of valid tokens.

    The balance asked for is that of a micro-batch over all devices (section 4.5.3);
    `total` sums integers over those that a program sees one of.
    """

    def penalty(routing: Routing, context: Context) -> Array:
        top_k = routing.experts_TK.shape[-1]
        count_BE, p_BE = tally(routing, context.valid_BL, biased)
        count_E, tokens = total((count_BE.sum(0), context.valid_BL.sum()))
        whole = imbalance(count_E, p_BE.sum(0), tokens, top_k)
        return alpha * whole * tokens / jnp.maximum(context.tokens, 1)

    return Balancer(penalty=penalty)


def global_loss(alpha: float, biased: bool = False) -> Balancer:
    """alpha * sum_i f_i P_i of the global batch, whatever its micro-batches.

    f comes from a first pass over all of them (`Context.load_E`).
    """

    def penalty(routing: Routing, context: Context) -> Array:
        top_k = routing.experts_TK.shape[-1]
        count_BE, p_BE = tally(routing, context.valid_BL, biased)
        count_E = count_BE.sum(0) if context.load_E is None else context.load_E
        return alpha * imbalance(count_E, p_BE.sum(0), context.tokens, top_k)

    def observe(routing: Routing, valid_T: Array) -> Array:
        return count_experts(
            picked(routing, biased), valid_T, routing.scores_TE.shape[-1]
        )

    return Balancer(penalty=penalty, observe=observe, count=lambda count_E: count_E)


def z_loss(weight: float) -> Balancer:
    """weight * mean of logsumexp(logits)^2 over valid tokens (arXiv:2202.08906)."""

    def penalty(routing: Routing, context: Context) -> Array:
        z_T = jax.nn.logsumexp(routing.logits_TE, -1)
        z_T = jnp.where(context.valid_BL.reshape(-1), z_T, 0)
        return weight * (z_T**2).sum() / jnp.maximum(context.tokens, 1)

    return Balancer(penalty=penalty)


def quantile(top_k: int, num_experts: int) -> Balancer:
    """Each step b_i becomes the K/E quantile of what tokens require (`ops.quantile`).

    a_t ignores node limits. With them the rule is exact only for the ranking before the
    group mask, and some imbalance stays (MaxVio 0.03 to 1.5 on skewed random scores).
    Counting after the mask would be exact, but there it never settled: whole groups
    swung from no token to all of them and back.

    Raises:
      ValueError: K = E, where there is no (K+1)-th choice.
    """

    if top_k >= num_experts:
        raise ValueError(
            f"model.moe.top_k = {top_k}: must be below num_experts = {num_experts} "
            "for balance.strategy 'quantile'"
        )

    def observe(routing: Routing, valid_T: Array) -> Array:
        x_TE = quantiles.required_bias(routing.scores_TE, routing.choice_TE, top_k)
        return quantiles.histogram(x_TE, valid_T)

    return Balancer(
        init=lambda num_experts: jnp.zeros(num_experts, float),
        select=lambda s, b, /: s + b,
        observe=observe,
        update=lambda bias_E, seen, step: quantiles.solve(seen, bias_E, top_k),
        bias=lambda bias_E: bias_E,
    )


def _speed(config: BalanceConfig) -> Schedule:
    return piecewise(config.speed, config.speed_changes)


Builder = Callable[[BalanceConfig, MoEConfig, Total], Balancer]
STRATEGIES: dict[str, Builder] = {
    "none": lambda c, moe, total: none(),
    "loss_free": lambda c, moe, total: loss_free(_speed(c)),
    "loss_free_proportional": lambda c, moe, total: loss_free_proportional(_speed(c)),
    "multiplicative": lambda c, moe, total: multiplicative(_speed(c)),
    "loss_free_frozen": lambda c, moe, total: loss_free_frozen(
        _speed(c), c.freeze_step
    ),
    "aux_batch": lambda c, moe, total: batch_loss(c.alpha, c.biased_topk, total),
    "aux_seq": lambda c, moe, total: sequence_loss(c.alpha, c.biased_topk),
    "aux_global": lambda c, moe, total: global_loss(c.alpha, c.biased_topk),
    "quantile": lambda c, moe, total: quantile(moe.top_k, moe.num_experts),
    "z_loss": lambda c, moe, total: z_loss(c.z_weight),
    "v3": lambda c, moe, total: chain(
        loss_free(_speed(c)), sequence_loss(c.alpha, c.biased_topk)
    ),
}


def build(config: BalanceConfig, moe: MoEConfig, total: Total = itself) -> Balancer:
    """The strategy that `config` names, for routers of `moe`'s shape.

    Args:
      total: sums integers over the devices that share a micro-batch, where a program
        sees the rows of one device (`parallel.pipeline`).
    """
    return STRATEGIES[config.strategy](config, moe, total)
