"""Dense products, with operands laid out as XLA's CPU library is fast with.

A product that contracts the rows of both operands (every weight gradient) runs at half
speed in float32, and at a third in bfloat16 because XLA then converts to float32 first
(measured with jax 0.11.2; `benchmarks/parts_cpu.py` shows it). So the narrower operand
is copied transposed, and layouts are pinned to keep XLA from undoing that.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array

PRODUCT = "product"  # what `jax.checkpoint` policies call these kernels' results


def row_major(x: Array) -> Array:
    """x, stored with its last axis contiguous."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def transposed(x: Array) -> Array:
    """x with its last two axes exchanged, as a copy in row-major order."""
    return row_major(x.swapaxes(-1, -2))


def wide(x: Array) -> Any:
    """The dtype that sums of x's products are kept in: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def product(a: Array, b: Array, contract: int = -2) -> Array:
    """Sums over a's last axis and b's axis `contract` (-2 or -1), batched over the
    rest.

    Returns at least float32 whatever the operands are.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((a.ndim - 1,), (b.ndim + contract,)), (batch, batch)
    # A transposed result would be computed from transposed operands, hence `row_major`.
    highest = lax.Precision.HIGHEST
    return row_major(
        lax.dot_general(a, b, dims, highest, preferred_element_type=wide(a))
    )


def row_product(a_TD: Array, b_TF: Array) -> Array:
    """a^T b, the sum over rows: [D, F]."""
    if a_TD.shape[-1] <= b_TF.shape[-1]:
        return product(transposed(a_TD), b_TF)
    return transposed(product(transposed(b_TF), a_TD))


def rounded(x: Array, compute_dtype: Any) -> Array:
    """x in `compute_dtype`, or as it is when that is None."""
    return x if compute_dtype is None else x.astype(compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x_TD: Array, w_DF: Array, compute_dtype: Any = None) -> Array:
    """x @ w, at least float32: [T, F].

    Args:
      compute_dtype: what the operands of all three products (the two gradients too) are
        rounded to; None keeps them as they are.
    """
    return product(rounded(x_TD, compute_dtype), rounded(w_DF, compute_dtype))


def _forward(
    x_TD: Array, w_DF: Array, compute_dtype: Any
) -> tuple[Array, tuple[Array, ...]]:
    operands = rounded(x_TD, compute_dtype), rounded(w_DF, compute_dtype)
    # Empty arrays carry the types that the gradients must have.
    types = jnp.zeros((0,), x_TD.dtype), jnp.zeros((0,), w_DF.dtype)
    return checkpoint_name(product(*operands), PRODUCT), (*operands, *types)


def _backward(
    compute_dtype: Any, saved: tuple[Array, ...], g_TF: Array
) -> tuple[Array, Array]:
    x_TD, w_DF, x_type, w_type = saved
    g_TF = g_TF.astype(x_TD.dtype)
    dx_TD, dw_DF = product(g_TF, w_DF, -1), row_product(x_TD, g_TF)
    return dx_TD.astype(x_type.dtype), dw_DF.astype(w_type.dtype)


dot.defvjp(_forward, _backward)
