"""The matmuls a Runtime may use for weights; each takes two 2-D operands.

`dot_plain` is the oracle. `dot_f32` is the same product with a backward pass that suits
a CPU. `dot_bf16` rounds the operands of all three products (forward, data gradient,
weight gradient) to bfloat16 and sums in float32: the mixed precision that section 3.3
of arXiv:2412.19437 compares FP8 with; master weights and elementwise work stay float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from deepseek_jax.precision.later import Later, now
from deepseek_jax.typing import Array
from pallas_kernels.matmul.reference import dot


def dot_plain(x_TD: Array, w_DF: Array) -> Array:
    """x @ w in the operands' own precision, the result at least float32: [T, F]."""
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    return jnp.dot(
        x_TD, w_DF, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )


def dot_f32(x_TD: Array, w_DF: Array) -> Array:
    """What `dot_plain` computes; reverse-mode differentiation only."""
    return dot(x_TD, w_DF, None)


def dot_bf16(x_TD: Array, w_DF: Array) -> Array:
    """x @ w with operands rounded to bfloat16, summed in float32: [T, F]."""
    return dot(x_TD, w_DF, jnp.bfloat16)


def linear(
    x: Array | Later,
    w_DF: Array,
    name: str | None = None,
    *,
    dot: Callable[[Array, Array], Array] = dot_plain,
) -> Array:
    """A linear map of the model by `dot`, whatever its name."""
    return dot(now(x), w_DF)
