"""The two things a rank does of a micro-batch: a stage forward, and its backward pass.

A backward pass is `jax.vjp` of a stage. B uses all of it, I the gradient of the input
and W those of the weights; what a kind does not use is never computed. I keeps what it
read until W reads it again, so W computes the gradients inside the stage a second time:
with the stage's input kept, its forward pass too (arXiv:2401.10241 splits the two at
the cost of keeping every product's operands).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.pipeline.stages import Stage, stacked
from deepseek_jax.typing import Array

Gradients = tuple[Any, ...]  # of own (of one digit), of shared, of the input
PARTS = {"B": (0, 1, 2), "I": (2,), "W": (0, 1)}  # of these, by kind of backward


# Traced once each, for all the runs of a program.
@functools.partial(jax.jit, static_argnums=(0, 1))
@jax.named_scope("forward")
def forward(
    stage: Stage, keeps_inputs: bool, own: Any, shared: Any, x_BLD: Array, rest: Any
) -> Any:
    """((output, report), what the backward pass needs besides weights)."""

    own = slots(own)

    def run(own: Any, shared: Any, x_BLD: Array) -> Any:
        return stage(own, shared, x_BLD, *rest)

    if keeps_inputs:
        (y_BLD, _), report = run(own, shared, x_BLD)
        return (y_BLD, report), ()
    (y_BLD, _), pull, report = jax.vjp(run, own, shared, x_BLD, has_aux=True)
    return (y_BLD, report), _residuals(pull, own, shared)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@jax.named_scope("backward")
def backward(
    stage: Stage,
    keeps_inputs: bool,
    kind: str,
    own: Any,
    shared: Any,
    read: Any,
    g_BLD: Array,
    rest: Any,
) -> Gradients:
    """The PARTS of a kind; None for the others.

    Args:
      read: the stage's input, or what `forward` kept.
      g_BLD: of the stage's output; nobody looks at the last one's.
    """

    own = slots(own)

    def run(own: Any, shared: Any, x_BLD: Array) -> Any:
        return stage(own, shared, x_BLD, *rest)

    # Where the forward pass has kept all, this one is for its structure alone.
    x_BLD = read if keeps_inputs else jnp.zeros_like(g_BLD)
    (_, share), pull, _ = jax.vjp(run, own, shared, x_BLD, has_aux=True)
    if not keeps_inputs:
        pull = _residuals(pull, own, shared)[1](read)
    is_last = rest[1].last > 0
    own, *found = pull((jnp.where(is_last, 0, g_BLD), jnp.ones_like(share)))
    found = [{name: stacked(blocks) for name, blocks in own.items()}, *found]
    return tuple(each if n in PARTS[kind] else None for n, each in enumerate(found))


def slots(own: Any) -> dict[str, list[Any]]:
    """The blocks of each stack one by one, so that a vjp knows its weights again."""
    sizes = {name: len(jax.tree.leaves(stack)[0]) for name, stack in own.items()}
    return {
        name: [jax.tree.map(lambda x, i=i: x[i], own[name]) for i in range(size)]
        for name, size in sizes.items()
    }


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
