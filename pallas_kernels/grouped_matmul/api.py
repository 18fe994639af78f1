"""One product per expert over sorted rows, by the fastest implementation there is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import INTERPRETED, MOSAIC_GPU, XLA, Choice, choose
from pallas_kernels.grouped_matmul import mosaic_gpu, reference

Array = jax.Array

# Made once, so that a program is compiled once.
PRODUCTS = {XLA: reference.PRODUCTS} | {
    name: reference.Products(
        functools.partial(mosaic_gpu.blocks, interpret=interpret),
        functools.partial(mosaic_gpu.weight_gradient, interpret=interpret),
        functools.partial(mosaic_gpu.swiglu, interpret=interpret),
    )
    for name, interpret in {MOSAIC_GPU: None, **INTERPRETED}.items()
}


def choice(
    x_nbD: Array,
    w_EDF: Array | jax.ShapeDtypeStruct,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Choice:
    """Which implementation `grouped_dot` takes for such operands, and why no faster."""
    dtypes = [compute_dtype or x.dtype for x in (x_nbD, w_EDF)]
    # Operands have tiles of 64 numbers, results in float32 of 32.
    tiled = tuple(
        (name, size, 64 if size > 64 else 32)
        for name, size in zip("DF", w_EDF.shape[1:], strict=True)
    )
    return choose(
        implementation,
        lambda: mosaic_gpu.check(x_nbD.shape, w_EDF.shape, *dtypes),
        tiled,
    )


def swiglu_choice(
    x_nbD: Array,
    gate_EDF: Array,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Choice:
    """`choice` for `grouped_swiglu`, whose gradients have both matrices as one."""
    *outer, width = gate_EDF.shape
    both = jax.ShapeDtypeStruct((*outer, 2 * width), gate_EDF.dtype)
    demanded = compute_dtype, implementation
    chosen = choice(x_nbD, gate_EDF, *demanded)
    return chosen if chosen.reason else choice(x_nbD, both, *demanded)


def grouped_dot(
    x_nbD: Array,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    compute_dtype: Any = None,
    *,
    implementation: str | None = None,
) -> Array:
    """Multiplies block i by w_EDF[expert_n[i]] for i < used; zeros elsewhere.

    Args:
      x_nbD: n blocks of b rows; those from `used` on are never read.
      w_EDF: a matrix for each expert.
      expert_n: [n] int, the expert of each block.
      used: scalar int, how many leading blocks hold rows.
      compute_dtype: what operands are rounded to in all three products; None keeps
        them. Kernels multiply bfloat16.
      implementation: see `choice.choose`; holds for both gradients too.

    Returns:
      [n, b, F], at least float32 whatever the operands are.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check(x_nbD, w_EDF, expert_n, used)
    chosen = choice(x_nbD, w_EDF, compute_dtype, implementation).implementation
    return reference.differentiable(
        x_nbD, w_EDF, expert_n, used, compute_dtype, PRODUCTS[chosen]
    )


def grouped_swiglu(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    expert_n: Array,
    used: Array,
    weight_nb: Array | None = None,
    compute_dtype: Any = None,
    *,
    implementation: str | None = None,
) -> Array:
    """silu(x gate) * (x up) of each block by its expert, for i < used; zeros elsewhere.

    The two products that an expert begins with, of which only their gated product is
    written: what the down-projection multiplies. A backward pass has both kept as well,
    in float32, as two `grouped_dot`s would.

    Args:
      x_nbD, expert_n, used, compute_dtype, implementation: as in `grouped_dot`.
      gate_EDF, up_EDF: matrices for each expert.
      weight_nb: what each row is multiplied by, as its token's routing says.

    Returns:
      [n, b, F] in the type that the operands are multiplied in; sums and the gate are
      computed in float32.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check(x_nbD, gate_EDF, expert_n, used)
    if gate_EDF.shape != up_EDF.shape:
        raise ValueError(
            f"gate and up have shapes {gate_EDF.shape} and {up_EDF.shape}: must be "
            "alike"
        )
    if weight_nb is not None and weight_nb.shape != x_nbD.shape[:2]:
        raise ValueError(
            f"weight_nb has shape {weight_nb.shape}: must be {x_nbD.shape[:2]}"
        )
    chosen = swiglu_choice(x_nbD, gate_EDF, compute_dtype, implementation)
    routing = weight_nb, expert_n, used
    return reference.differentiable_swiglu(
        x_nbD,
        gate_EDF,
        up_EDF,
        *routing,
        compute_dtype,
        PRODUCTS[chosen.implementation],
    )


def _check(x_nbD: Array, w_EDF: Array, expert_n: Array, used: Array) -> None:
    if x_nbD.ndim != 3 or w_EDF.ndim != 3 or x_nbD.shape[2] != w_EDF.shape[1]:
        raise ValueError(
            f"operands have shapes {x_nbD.shape} and {w_EDF.shape}: must be "
            "[n, b, D] and [E, D, F]"
        )
    if expert_n.shape != x_nbD.shape[:1] or jnp.ndim(used):
        raise ValueError(
            f"expert_n and used have shapes {expert_n.shape} and {jnp.shape(used)}: "
            f"must be {x_nbD.shape[:1]} and ()"
        )
