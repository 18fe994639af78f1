"""One optimizer step: gradients, AdamW, then one update of the balancer.

Loads and statistics are summed over every micro-batch and device and only then turned
into one update (arXiv:2412.19437, section 2.1.2), which makes it independent of both.
"""

import ctypes
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.data.batch import Batch
from deepseek_jax.model.moe import Aux
from deepseek_jax.model.transformer import Totals
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision.delayed import (
    finite,
    forgotten,
    is_remembered,
    pushed,
    remembered,
)
from deepseek_jax.schedule import piecewise
from deepseek_jax.train import pipelined
from deepseek_jax.train.objective import Losses, forward, objective, totals
from deepseek_jax.train.state import Parts, TrainState, init_state, shardings
from deepseek_jax.typing import Array, Params

Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# Of two orders of a program, the one whose largest memory is smaller.
COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def micro_batches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...]; strided: a device keeps its own rows,
    where a mesh without a pipeline has split them.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )


def _summed(aux: Aux) -> tuple[Array, Any]:
    """The additive part of a report: loads and statistics."""
    return aux.load, aux.stats


def first_pass(
    parts: Parts, state: TrainState, batches: Batch, counts: Totals
) -> Array:
    """Counts [R, E] over all micro-batches, for a penalty that needs them."""

    def one(_: None, batch: Batch) -> tuple[None, Array]:
        aux = forward(parts, state.params, state.balance, batch, counts).aux
        return None, jax.vmap(parts.balancer.count)(aux.stats)

    return jax.lax.scan(one, None, batches)[1].sum(0)


def accumulate(
    parts: Parts, state: TrainState, batches: Batch, counts: Totals, mtp_weight: Array
) -> tuple[Params, Losses, tuple[Array, Any]]:
    """Gradients, losses, loads and statistics, summed over micro-batches.

    What remembered weights saw is in their gradients: `precision.delayed`.
    """
    grad = jax.value_and_grad(objective, argnums=1, has_aux=True)

    def one(batch: Batch) -> tuple[Params, Losses, tuple[Array, Any]]:
        (_, (losses, aux)), grads = grad(
            parts, state.params, state.balance, batch, counts, mtp_weight
        )
        return grads, losses, _summed(aux)

    if parts.config.micro_batches == 1:
        return one(jax.tree.map(lambda x: x[0], batches))
    first = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first)
    )

    def add(total: Any, batch: Batch) -> tuple[Any, None]:
        new = one(batch)
        return jax.tree.map(operator.add, total, new, is_leaf=is_remembered), None

    return jax.lax.scan(add, zeros, batches)[0]


def refused(state: TrainState) -> TrainState:
    """The state after a step that is not finite: the same, and no step changes it.

    A step is dispatched before the one before is known to be finite. What the first
    refused one saw is kept to be looked at; step is -1 minus the number of steps done.
    """
    return state._replace(step=jnp.where(state.step < 0, state.step, -1 - state.step))


def plain_step(parts: Parts) -> Step:
    """The step as a pure function, to be compiled or mapped over runs."""
    config = parts.config
    gradients = accumulate
    if config.pipeline.schedule != "none":
        made = pipelined.assemble(config, parts.mesh)
        gradients = functools.partial(pipelined.accumulate, pipeline=made)
    mtp_weight = piecewise(config.optim.mtp_weight, config.optim.mtp_weight_changes)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = totals(parts, batch)
        batches = micro_batches(batch, config.micro_batches)
        known = state._replace(params=remembered(state.params, state.scales))
        piped = gradients is not accumulate
        if parts.balancer.needs_counts and (piped or config.micro_batches > 1):
            # The whole batch at once, if its micro-batches have rows for few devices.
            all_rows = micro_batches(batch, 1) if piped else batches
            counts = counts._replace(load=first_pass(parts, known, all_rows, counts))
        grads, losses, (load_RE, stats) = gradients(
            parts,
            state=known,
            batches=batches,
            counts=counts,
            mtp_weight=mtp_weight(state.step),
        )
        grads, seen = forgotten(grads)
        updates, opt_state = parts.optimizer.update(
            grads, state.opt_state, state.params
        )
        balance = jax.vmap(parts.balancer.update, (0, 0, None))(
            state.balance, stats, state.step
        )
        norm = optax.tree.norm(grads)
        metrics = {
            **losses._asdict(),
            "grad_norm": norm,
            "lr": parts.learning_rate(state.step),
            "speed": parts.balancer.speed(state.step),
            "load": load_RE,
        }
        if parts.balancer.bias is not None:
            metrics["bias"] = jax.vmap(parts.balancer.bias)(balance)
        new = TrainState(
            state.step + 1,
            optax.apply_updates(state.params, updates),
            opt_state,
            balance,
            state.key,
            pushed(state.scales, seen),
        )
        sound = jnp.isfinite(losses.loss) & jnp.isfinite(norm) & finite(seen)
        sound &= state.step >= 0
        kept = refused(state)
        return jax.tree.map(functools.partial(jnp.where, sound), new, kept), metrics

    return step


def make_step(parts: Parts) -> Step:
    """The jitted step; it donates the state. Metrics stay on the device.

    Raises:
      ValueError: a schedule that these sizes do not have, before anything is traced.
    """
    step = plain_step(parts)
    state = jax.eval_shape(functools.partial(init_state, parts), 0)
    placed = shardings(parts, state)
    return jax.jit(
        step,
        in_shardings=(placed, meshes.by_rows(parts.mesh)),
        out_shardings=(placed, meshes.replicated(parts.mesh)),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS,
    )


def compile_step(parts: Parts, state: TrainState, batch: Batch) -> Any:
    """`make_step`, compiled for these shapes."""
    return compiled(make_step(parts), state, batch)


def compiled(step: Any, *arguments: Any) -> Any:
    """A jitted function for these shapes; what the compiler used is given back.

    Without that the C library would keep it: on a CPU, half a gigabyte.
    """
    program = step.lower(*arguments).compile()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    return program
