"""What a linear map multiplies, when it is not computed yet.

DeepSeek-V3 keeps the inputs of SwiGLU and computes its output anew in the backward pass
(arXiv:2412.19437, section 3.3.3). So the map after it, whose operand that output is,
gets the function and its inputs, and decides itself what it keeps.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from deepseek_jax.typing import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rounded", "exact"),
    meta_fields=("function",),
)
@dataclass(frozen=True)
class Later:
    """`function(*rounded, *exact)`; only the first may be kept in fewer bits."""

    function: Callable[..., Array]
    rounded: tuple[Array, ...]
    exact: tuple[Array, ...] = ()

    def now(self) -> Array:
        return self.function(*self.rounded, *self.exact)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rounded[0].shape

    @property
    def dtype(self) -> Any:
        return self.rounded[0].dtype


def now(x: Array | Later) -> Array:
    """x, computed if it is not yet."""
    return x.now() if isinstance(x, Later) else x
