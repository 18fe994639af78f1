"""Block-grouped products of E4M3 numbers with scales, in plain JAX.

Rows are sorted by expert in blocks as `grouped_matmul` has them; each block's product
is one of `fp8_matmul`. In the weight gradient no tile has rows of two blocks, so that
with blocks of up to 128 rows each has one scale for a column.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import matmul, matmul_oracle
from pallas_kernels.grouped_matmul.reference import unrolled

Array = jax.Array


def blocks_oracle(
    a_nbK: Array,
    a_scale_nbJ: Array,
    b_ENK: Array,
    b_scale_EIJ: Array,
    expert_n: Array,
    used: Array,
) -> Array:
    """Every block by gathered weights, those not used made zero: [n, b, N]."""
    b = b_ENK[expert_n], b_scale_EIJ[expert_n]
    y_nbN = jax.vmap(matmul_oracle)(a_nbK, a_scale_nbJ, *b)
    live_n = jnp.arange(len(expert_n)) < used
    return jnp.where(live_n[:, None, None], y_nbN, 0)


def blocks(
    a_nbK: Array,
    a_scale_nbJ: Array,
    b_ENK: Array,
    b_scale_EIJ: Array,
    expert_n: Array,
    used: Array,
    dtype: Any,
) -> Array:
    """Each used block times its expert's matrix transposed; zeros for the others."""

    def body(trip: list[tuple[Array, Array]], out_nbN: Array) -> Array:
        for i, _ in trip:
            e = expert_n[i]
            y_bN = matmul(a_nbK[i], a_scale_nbJ[i], b_ENK[e], b_scale_EIJ[e], dtype)
            out_nbN = out_nbN.at[i].set(y_bN)
        return out_nbN

    out_nbN = jnp.zeros((*a_nbK.shape[:2], b_ENK.shape[1]), dtype)
    return unrolled(used, len(expert_n), body, out_nbN)


def weight_gradient_oracle(
    a_nMb: Array,
    a_scale_nM: Array,
    b_nNb: Array,
    b_scale_nN: Array,
    expert_n: Array,
    used: Array,
    experts: int,
) -> Array:
    """Products of all blocks, those not used made zero, added up: [E, M, N]."""
    scales = a_scale_nM[..., None], b_scale_nN[..., None]
    dw_nMN = jax.vmap(matmul_oracle)(a_nMb, scales[0], b_nNb, scales[1])
    live_n = jnp.arange(len(expert_n)) < used
    dw_nMN = jnp.where(live_n[:, None, None], dw_nMN, 0)
    return jnp.zeros((experts, *dw_nMN.shape[1:])).at[expert_n].add(dw_nMN)


def weight_gradient(
    a_nMb: Array,
    a_scale_nM: Array,
    b_nNb: Array,
    b_scale_nN: Array,
    expert_n: Array,
    used: Array,
    experts: int,
    dtype: Any,
) -> Array:
    """The sum of a b^T over the used blocks of each expert: [E, M, N]."""

    def body(trip: list[tuple[Array, Array]], dw_EMN: Array) -> Array:
        for i, first in trip:
            scales = a_scale_nM[i][:, None], b_scale_nN[i][:, None]
            dw_MN = matmul(a_nMb[i], scales[0], b_nNb[i], scales[1])
            dw_EMN = dw_EMN.at[expert_n[i]].add(jnp.where(first, dw_MN, 0))
        return dw_EMN

    shape = (experts, a_nMb.shape[1], b_nNb.shape[1])
    start_EMN = jnp.zeros(shape, jnp.float32)
    return unrolled(used, len(expert_n), body, start_EMN).astype(dtype)
