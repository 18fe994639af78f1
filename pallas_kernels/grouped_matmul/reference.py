"""Block-grouped matmul: block i of `b` rows times the weights of expert `expert_n[i]`.

The layout is that of dropless MoE kernels (MegaBlocks, arXiv:2211.15841, section 5):
rows sorted by expert, each expert's rows padded to whole blocks. Only `used` blocks are
computed; the rest of the result is zero. `lax.ragged_dot` would be the library's way,
but XLA expands it on a CPU to a dense product with every expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.matmul.reference import (
    PRODUCT,
    product,
    rounded,
    transposed,
    wide,
)

Array = jax.Array


def grouped_dot_oracle(
    x_nbD: Array, w_EDF: Array, expert_n: Array, used: Array
) -> Array:
    """Gathers each block's weights and multiplies: what `grouped_dot` must equal."""
    dtype = jnp.promote_types(x_nbD.dtype, jnp.float32)
    live_n = jnp.arange(len(x_nbD)) < used
    x_nbD = jnp.where(live_n[:, None, None], x_nbD, 0)
    return jnp.einsum(
        "nbD,nDF->nbF",
        x_nbD,
        w_EDF[expert_n],
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def grouped_dot(
    x_nbD: Array, w_EDF: Array, expert_n: Array, used: Array, compute_dtype: Any = None
) -> Array:
    """Multiplies block i by w_EDF[expert_n[i]] for i < used, and returns zeros
    elsewhere.

    Args:
      x_nbD: n blocks of b rows; those from `used` on are never read.
      w_EDF: a matrix for each expert.
      expert_n: [n] int, the expert of each block.
      used: scalar int, how many leading blocks hold rows; it bounds the loop.
      compute_dtype: what operands are rounded to in all three products; None keeps
        them.

    Returns:
      [n, b, F], at least float32 whatever the operands are.
    """
    return differentiable(x_nbD, w_EDF, expert_n, used, compute_dtype, PRODUCTS)


class Products(NamedTuple):
    """The products of `grouped_dot` and `grouped_swiglu`, however they are computed.

    Attributes:
      blocks: (x_nbD, w_EDF, expert_n, used, contract, dtype) -> each used block times
        its expert's matrix, summed over that one's axis `contract`, in `dtype`.
      weight_gradient: (x_nbD, g_nbF, expert_n, used, experts, dtype) -> the sum of
        x^T g over each expert's used blocks.
      swiglu: (x_nbD, gate_EDF, up_EDF, weight_nb, expert_n, used, keep, dtype) ->
        silu(x gate) * (x up) of sums in float32, times each row's weight if any, in
        `dtype`; with `keep` both products, too, as they were summed.
    """

    blocks: Callable[..., Array]
    weight_gradient: Callable[..., Array]
    swiglu: Callable[..., Sequence[Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def differentiable(
    x_nbD: Array,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    compute_dtype: Any,
    products: Products,
) -> Array:
    """`grouped_dot` by any products; reverse mode only."""
    return _forward(x_nbD, w_EDF, expert_n, used, compute_dtype, products)[0]


def unrolled(used: Array, blocks: int, body: Any, start: Any) -> Any:
    """Folds `body(trip, carry)` over the used blocks, several in each trip.

    Products of one trip do not depend on each other, so XLA runs them on several cores.
    A trip is a list of (block, first visit or not): the last trip is filled up with the
    last used block, since unused ones may hold anything, NaN too.
    """
    unroll = next(n for n in (4, 3, 2, 1) if blocks % n == 0)

    def trip(j: Array, carry: Any) -> Any:
        wanted = [unroll * j + k for k in range(unroll)]
        return body([(jnp.minimum(i, used - 1), i < used) for i in wanted], carry)

    return lax.fori_loop(0, -(-used // unroll), trip, start)


def blocks(
    x_nbD: Array,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    contract: int,
    dtype: Any,
) -> Array:
    """See `Products`."""

    def body(trip: list[tuple[Array, Array]], out_nbF: Array) -> Array:
        products = [product(x_nbD[i], w_EDF[expert_n[i]], contract) for i, _ in trip]
        for (i, _), y_bF in zip(trip, products, strict=True):
            out_nbF = out_nbF.at[i].set(y_bF)
        return out_nbF

    width = w_EDF.shape[-2 if contract == -1 else -1]
    out_nbF = jnp.zeros((*x_nbD.shape[:2], width), wide(x_nbD))
    return unrolled(used, len(x_nbD), body, out_nbF).astype(dtype)


def weight_gradient(
    x_nbD: Array,
    g_nbF: Array,
    expert_n: Array,
    used: Array,
    experts: int,
    dtype: Any,
) -> Array:
    """See `Products`."""

    def body(trip: list[tuple[Array, Array]], dw_EDF: Array) -> Array:
        live = [transposed(jnp.where(first, x_nbD[i], 0)) for i, first in trip]
        products = [product(x_Db, g_nbF[i]) for x_Db, (i, _) in zip(live, trip)]
        for (i, _), dw_DF in zip(trip, products, strict=True):
            dw_EDF = dw_EDF.at[expert_n[i]].add(dw_DF)
        return dw_EDF

    start_EDF = jnp.zeros((experts, x_nbD.shape[-1], g_nbF.shape[-1]), wide(x_nbD))
    return unrolled(used, len(x_nbD), body, start_EDF).astype(dtype)


def gated(gate: Array, up: Array, weight: Array | None = None) -> Array:
    """silu(gate) * up [..., F], at least f32, times each row's weight [...] if any."""
    hidden = jax.nn.silu(gate.astype(wide(gate))) * up.astype(wide(up))
    return hidden if weight is None else hidden * weight[..., None]


def swiglu(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    keep: bool,
    dtype: Any,
) -> Sequence[Array]:
    """See `Products`."""
    gate_nbF, up_nbF = (
        blocks(x_nbD, w_EDF, expert_n, used, -2, wide(x_nbD))
        for w_EDF in (gate_EDF, up_EDF)
    )
    kept = [gate_nbF, up_nbF] if keep else []
    return [gated(gate_nbF, up_nbF, weight_nb).astype(dtype), *kept]


PRODUCTS = Products(blocks, weight_gradient, swiglu)


def _forward(
    x_nbD: Array,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    compute_dtype: Any,
    products: Products,
) -> tuple[Array, tuple[Array, ...]]:
    saved = rounded(x_nbD, compute_dtype), rounded(w_EDF, compute_dtype), expert_n, used
    y_nbF = checkpoint_name(products.blocks(*saved, -2, wide(saved[0])), PRODUCT)
    # Empty arrays carry the types that the gradients must have.
    types = jnp.zeros((0,), x_nbD.dtype), jnp.zeros((0,), w_EDF.dtype)
    return y_nbF, (*saved, *types)


def _backward(
    compute_dtype: Any, products: Products, saved: tuple[Array, ...], g_nbF: Array
) -> tuple[Array | None, ...]:
    x_nbD, w_EDF, expert_n, used, x_type, w_type = saved
    g_nbF = g_nbF.astype(x_nbD.dtype)
    dx_nbD = products.blocks(g_nbF, w_EDF, expert_n, used, -1, x_type.dtype)
    dw_EDF = products.weight_gradient(
        x_nbD, g_nbF, expert_n, used, len(w_EDF), w_type.dtype
    )
    return dx_nbD, dw_EDF, None, None


differentiable.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def differentiable_swiglu(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    compute_dtype: Any,
    products: Products,
) -> Array:
    """`grouped_swiglu` by any products; reverse mode only.

    Kept for the backward pass are both products, as they were summed.
    """
    operands = [rounded(x, compute_dtype) for x in (x_nbD, gate_EDF, up_EDF)]
    routing = _live(weight_nb, used, operands[0]), expert_n, used
    return products.swiglu(*operands, *routing, False, operands[0].dtype)[0]


def _live(weight_nb: Array | None, used: Array, x: Array) -> Array | None:
    """Rows' weights as x's sums are, but zero in unused blocks, which hold anything."""
    if weight_nb is None:
        return None
    live_n1 = jnp.arange(len(weight_nb))[:, None] < used
    return jnp.where(live_n1, weight_nb, 0).astype(wide(x))


def _swiglu_forward(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    compute_dtype: Any,
    products: Products,
) -> tuple[Array, tuple[Any, ...]]:
    given = x_nbD, gate_EDF, up_EDF
    operands = [rounded(x, compute_dtype) for x in given]
    routing = _live(weight_nb, used, operands[0]), expert_n, used
    made = products.swiglu(*operands, *routing, True, operands[0].dtype)
    hidden_nbF, *kept = (checkpoint_name(each, PRODUCT) for each in made)
    types = jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), (*given, weight_nb))
    return hidden_nbF, (operands, routing, kept, types)


def _swiglu_backward(
    compute_dtype: Any, products: Products, saved: tuple[Any, ...], g_nbF: Array
) -> tuple[Array | None, ...]:
    (x_nbD, *weights), (weight_nb, expert_n, used), kept, types = saved
    g_nbF = jnp.where(jnp.arange(len(g_nbF))[:, None, None] < used, g_nbF, 0)
    *both, dweight_nb = jax.vjp(gated, *kept, weight_nb)[1](g_nbF.astype(wide(g_nbF)))
    # One product reads each row once, and writes no half of a sum.
    g_nbF2 = jnp.concatenate([g.astype(x_nbD.dtype) for g in both], -1)
    w_EDF2 = jnp.concatenate(weights, -1)
    dx_nbD = products.blocks(g_nbF2, w_EDF2, expert_n, used, -1, types[0].dtype)
    dw_EDF2 = products.weight_gradient(
        x_nbD, g_nbF2, expert_n, used, len(w_EDF2), types[1].dtype
    )
    dw = jnp.split(dw_EDF2, 2, -1)
    if weight_nb is not None:
        dweight_nb = dweight_nb.astype(types[3].dtype)
    return dx_nbD, dw[0], dw[1].astype(types[2].dtype), dweight_nb, None, None


differentiable_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
