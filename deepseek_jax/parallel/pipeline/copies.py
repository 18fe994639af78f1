"""What ranks hold twice, and what devices add up, of parameters and of their gradients.

In a schedule of two directions each stage lies on two ranks, which mirror each other
(arXiv:2412.19437, section 3.2.1): parameters come over by one exchange between them,
and gradients go back by one. All axes are manual here.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import EXPERTS
from deepseek_jax.parallel.partition import named
from deepseek_jax.parallel.pipeline.schedules import Schedule
from deepseek_jax.parallel.rules import EXPERT
from deepseek_jax.typing import Array

PIPE = "pipe"


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
