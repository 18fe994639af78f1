"""What 8 bits lose of a model's numbers, by map and layer, and where one is none.

Section 3.3 of arXiv:2412.19437 rounds three operands of every linear map: its input x,
its weight w and the gradient g of its output. They are looked at from outside, while
the objective of one batch is computed: the model knows nothing of it. Of a policy
without FP8 it is what `fp8_v3` would lose. The routed experts of a layer are one map:
x is what they are given, w all their matrices, g the gradient of what comes back. Where
scales are of earlier steps (`precision.delayed`), so are these.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.batch import Batch
from deepseek_jax.model.linear import Linear
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.transformer import OBSERVED, Totals
from deepseek_jax.precision import delayed, policy, quantize
from deepseek_jax.precision.fp8_dots import Recipe
from deepseek_jax.precision.later import now
from deepseek_jax.precision.recipe import recipe
from deepseek_jax.schedule import piecewise
from deepseek_jax.train.objective import objective, totals
from deepseek_jax.train.state import Parts, TrainState, pieces
from deepseek_jax.train.step import micro_batches
from deepseek_jax.typing import Array

# What observing adds to the variables.
OPERANDS, OUTPUTS = OBSERVED
LEAST, POWERS = -64, 96  # scales are sorted by powers of two, from 2^LEAST on
# What is computed first, to the end: stacks of layers, then the maps of a layer.
ORDER = ("dense", "moe", "mtp")
MAPS = ("combine", *policy.ATTENTION_MAPS, "gate", "up", "down", "experts")


class Found(NamedTuple):
    """Of one operand of one map; arrays have a leading axis over the map's layers."""

    saturated: Array  # numbers too large for their scale
    underflowed: Array  # not zero, but rounded to it
    not_finite: Array
    total: Array  # numbers there are
    scales: Array  # [layers, POWERS], how many have which power of two


Looked = dict[str, dict[str, Found]]  # by operand, then by map: "moe/attn/q_a"


def of(x: Array, scheme: quantize.Scheme, known: Array | None = None) -> Found:
    """What quantisation does to x [..., M, N].

    Args:
      known: the largest magnitude [...] of earlier steps, which gives the scale unless
        it is 0; None: scales are of the moment.
    """
    if known is None:
        scale = quantize.scales(x, scheme)
    else:
        own = delayed.largest(x, (-2, -1))
        scale = delayed.scale(known.reshape(own.shape), own, scheme)[..., None, None]
    counts = quantize.counts(x, scheme, scale=scale)
    scale = scale.reshape(-1)
    power = jnp.clip(jnp.frexp(scale)[1] - 1 - LEAST, 0, POWERS - 1)
    # Those that are not finite are one too far, and fall away.
    power = jnp.where(jnp.isfinite(scale), power, POWERS)
    numbers = jnp.bincount(power, length=POWERS)
    # A float: the experts of one layer of DeepSeek-V3 are too many for 32 bits.
    return Found(*counts, jnp.float32(x.size), numbers)


def recipes(parts: Parts) -> Callable[[str], Recipe]:
    """What the run's policy rounds a map's operands to, or else what `fp8_v3` would."""
    own = pieces(parts.config) or policy.V3

    def recipe_of(name: str) -> Recipe:
        return recipe(own, name) or recipe(policy.V3, name) or Recipe()

    return recipe_of


def _name(module: nn.Module) -> str:
    return "experts" if isinstance(module, MoE) else str(module.name)


def _known(w: Array | delayed.Remembered) -> tuple[Array | None, Array | None]:
    """Of a map's x and w, the largest magnitudes of earlier steps."""
    if not isinstance(w, delayed.Remembered):
        return None, None
    return w.amax[delayed.X], w.amax[delayed.W]


def _watch(
    recipe_of: Callable[[str], Recipe],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
) -> Any:
    """Counts what a map reads, and marks what it returns, for its gradient."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, Linear | MoE):
        return call(*args, **kwargs)
    out = call(*args, **kwargs)
    schemes, x = recipe_of(_name(module)), now(args[0])
    own = module.variables["params"]
    matrices = [own[name] for name in ("kernel", *delayed.EXPERTS) if name in own]
    x_known, _ = _known(matrices[0])
    found = {"x": of(x.reshape(-1, x.shape[-1]), schemes.x, x_known)}
    found["w"] = jax.tree.map(
        lambda *each: sum(each),
        *(of(delayed.weight_of(w), schemes.w, _known(w)[1]) for w in matrices),
    )
    for operand, value in found.items():
        module.sow(
            OPERANDS,
            operand,
            value,
            reduce_fn=lambda _, new: new,
            init_fn=lambda: None,
        )
    if isinstance(module, MoE):
        return module.perturb("g", out[0], OUTPUTS), *out[1:]
    return module.perturb("g", out, OUTPUTS)


@dataclass(frozen=True)
class Watched:
    """A model whose maps are looked at; `seen` gets what was found.

    `pushes` is added to the outputs of maps; None: `seen` gets their shapes, too.
    """

    model: Any
    recipe_of: Callable[[str], Recipe]
    pushes: Any
    seen: list[Any]

    @property
    def rt(self) -> Any:
        return self.model.rt

    def apply(self, variables: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        if self.pushes is not None:
            variables = {**variables, OUTPUTS: self.pushes}
        mutable = [OPERANDS] if self.pushes is not None else [OPERANDS, OUTPUTS]
        with nn.intercept_methods(functools.partial(_watch, self.recipe_of)):
            out, seen = self.model.apply(variables, *args, mutable=mutable, **kwargs)
        self.seen.append(seen)
        return out


def look(
    parts: Parts, state: TrainState, batch: Batch, counts: Totals | None = None
) -> Looked:
    """The three operands of every map on some rows; may be jitted.

    It holds the gradients of all maps' outputs on these rows at once.

    Args:
      counts: of the batch that the rows are of, whose mean the loss is; None: of them.
    """
    recipe_of = recipes(parts)
    counts = totals(parts, batch) if counts is None else counts
    params = delayed.remembered(state.params, state.scales)
    optim = parts.config.optim
    weight = piecewise(optim.mtp_weight, optim.mtp_weight_changes)(state.step)

    def watched(pushes: Any) -> tuple[Array, Any]:
        seen: list[Any] = []
        model: Any = Watched(parts.model, recipe_of, pushes, seen)
        own = replace(parts, model=model)
        loss, _ = objective(own, params, state.balance, batch, counts, weight)
        return loss, seen[0]

    shapes = jax.eval_shape(lambda: watched(None)[1])[OUTPUTS]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    gradients, seen = jax.grad(watched, has_aux=True)(zeros)
    looked: Looked = {"x": {}, "w": {}, "g": {}}
    for where, found in _leaves(seen[OPERANDS]):
        where, _, operand = where.rpartition("/")
        found = found if _stacked(where) else jax.tree.map(lambda x: x[None], found)
        looked[operand][_called(where)] = found
    for where, g in _leaves(gradients):
        where = where.removesuffix("/g")
        rows = g.reshape(len(g) if _stacked(where) else 1, -1, g.shape[-1])
        scheme = recipe_of(_called(where).rpartition("/")[2]).g
        known = _known_gradient(state, where)
        looked["g"][_called(where)] = jax.lax.map(
            lambda each, by=scheme: of(each[0], by, *each[1:]), (rows, *known)
        )
    return looked


def _known_gradient(state: TrainState, where: str) -> tuple[Array, ...]:
    """The largest magnitudes [layers] of a map's g in earlier steps, if any are kept;
    experts' is that of what `down` puts out.
    """
    last = "down" if where.endswith("/moe") else "kernel"
    history = state.scales.get(".".join([*where.split("/"), last]))
    return () if history is None else (history[..., delayed.G, :].max(-1).reshape(-1),)


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(tree, lambda x: isinstance(x, Found))
    for path, value in flat[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), value


def _stacked(where: str) -> bool:
    """Whether a map is in a scanned stack of layers."""
    return where.split("/")[0] in ("dense", "moe")


def _called(where: str) -> str:
    """A map's place; the layer of experts is called what it is in policies."""
    return where + "/experts" if where.endswith("/moe") else where


def record(looked: Looked) -> dict[str, Any]:
    """Shares of numbers lost, by operand: over all maps, and by map and layer.

    And [power of two, how many] of all scales.
    """
    values: dict[str, Any] = {}
    for operand, maps in looked.items():
        counts = sum(np.asarray(found.scales).sum(0) for found in maps.values())
        values[f"eval_scales_{operand}"] = [
            [LEAST + int(power), int(counts[power])] for power in np.flatnonzero(counts)
        ]
    for loss in ("underflowed", "saturated"):
        for operand, maps in looked.items():
            lost = {where: np.asarray(getattr(f, loss)) for where, f in maps.items()}
            total = {where: np.asarray(f.total) for where, f in maps.items()}
            share = sum(map(np.sum, lost.values())) / sum(map(np.sum, total.values()))
            values[f"eval_{loss}_{operand}"] = float(share)
            values[f"eval_{loss}_{operand}_by_map"] = {
                where: (lost[where] / total[where]).tolist() for where in maps
            }
    return values


def some(batch: Batch, rows: int, index: int = 0) -> Batch:
    """`rows` rows of a batch, or all that it has; strided, as micro-batches are."""
    parts = max(len(batch.tokens) // rows, 1)
    return jax.tree.map(lambda x: x[index], micro_batches(batch, parts))


def recorder(parts: Parts) -> Callable[[TrainState, Batch], dict[str, Any]] | None:
    """`record` of a row for each device of a batch; None: nothing is in 8 bits.

    Under a pipeline, too, the model is computed as in evaluations, without one.
    """
    if not pieces(parts.config):
        return None

    @jax.jit
    def looked(state: TrainState, batch: Batch) -> Looked:
        return look(
            parts, state, some(batch, parts.model.rt.devices), totals(parts, batch)
        )

    return lambda state, batch: record(jax.device_get(looked(state, batch)))


def explained(parts: Parts, state: TrainState, batch: Batch) -> str:
    """Where numbers are first not finite, of a batch whose step was `step.refused`.

    A parameter, or else a map's operand: some rows after others, as many at a time as
    a micro-batch has.
    """
    state = state._replace(step=-1 - state.step)
    if bad := spoilt(state):
        return bad
    micro = parts.config.micro_batches
    looked = jax.jit(functools.partial(look, parts))
    counts = totals(parts, batch)
    for index in range(micro):
        rows = some(batch, len(batch.tokens) // micro, index)
        said = first_not_finite(jax.device_get(looked(state, rows, counts)))
        if said:
            return said
    return "all parameters and all operands of linear maps are finite"


def spoilt(state: TrainState) -> str:
    """Names the parameter, or balancer's number, that is not finite; "" if all are."""
    for tree in (state.params, state.balance):
        for where, x in _leaves(tree):
            bad = int((~jnp.isfinite(x)).sum())
            if bad:
                return f"{where} has {bad} numbers of {x.size} that are not finite"
    return ""


def first_not_finite(looked: Looked) -> str:
    """Names the map and layer where numbers first are not finite; "" if all are.

    Inputs in the order in which they are computed; if all of them are finite, what
    follows the last map is not, or gradients in the reverse order.
    """

    def place(where: str, layer: int) -> tuple[Any, ...]:
        stack, *_, name = where.split("/")
        order = ORDER.index(stack.partition("_")[0])
        return order, stack, layer, MAPS.index(name), "shared" not in where

    bad = [
        (place(where, layer), operand, where, layer, int(n), int(found.total[layer]))
        for operand, maps in looked.items()
        for where, found in maps.items()
        for layer, n in enumerate(np.asarray(found.not_finite))
        if n
    ]
    if not bad:
        return ""
    forward = [entry for entry in bad if entry[1] != "g"]
    _, operand, where, layer, n, total = min(forward) if forward else max(bad)
    named = f"of {where}, layer {layer}: {n} of {total}"
    if operand == "g":
        return (
            "the inputs of all linear maps are finite, so it is the head, the loss or "
            f"a gradient, first the output's {named}"
        )
    return f"first not finite: the {'input' if operand == 'x' else 'weight'} {named}"
