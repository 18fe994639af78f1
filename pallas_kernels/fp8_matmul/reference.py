"""Products of E4M3 numbers with a scale for every tile or block, in plain JAX.

Section 3.3 of arXiv:2412.19437: one operand has a scale for each of its rows and 128 of
K, the other too (weight gradients) or one for 128 x 128 (weights). Both lie with K
last. Every 128 of K is summed by itself and promoted: added, times the scales, in
float32. J = ceil(K / 128).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_quantize.reference import BLOCK, TILE, Block, dequantize, spread
from pallas_kernels.matmul.reference import row_major

Array = jax.Array

DEPTH = TILE[1]


def block_of(b_NK: Array, b_scale: Array) -> Block:
    """Whether the second operand's scales are of tiles or of blocks."""
    return TILE if len(b_scale) == len(b_NK) else BLOCK


def matmul_oracle(a_MK: Array, a_scale_MJ: Array, b_NK: Array, b_scale: Array) -> Array:
    """Numbers, not codes, multiplied in float32, K at once: [M, N]."""
    a_MK = dequantize(a_MK, a_scale_MJ, TILE)
    b_NK = dequantize(b_NK, b_scale, block_of(b_NK, b_scale))
    return jnp.einsum("MK,NK->MN", a_MK, b_NK, precision=lax.Precision.HIGHEST)


def matmul(
    a_MK: Array,
    a_scale_MJ: Array,
    b_NK: Array,
    b_scale: Array,
    out_dtype: jnp.dtype = jnp.float32,
) -> Array:
    """What `matmul_oracle` computes, promoted every 128 of K: [M, N] in `out_dtype`.

    Args:
      a_scale_MJ: of tiles 1 x 128.
      b_scale: of tiles 1 x 128, [N, J], or of blocks 128 x 128, [ceil(N/128), J].
    """
    tall = block_of(b_NK, b_scale)[0]
    b_scale_NJ = spread(b_scale, (tall, 1), (len(b_NK), b_scale.shape[1]))
    a_JMk, b_JkN = _steps(a_MK), row_major(_steps(b_NK).swapaxes(1, 2))

    def promote(total_MN: Array, step: tuple[Array, ...]) -> tuple[Array, None]:
        a_Mk, b_kN, a_scale_M, b_scale_N = step
        # E4M3 is exact in bfloat16, which a CPU multiplies twice as fast as float32.
        part_MN = jnp.dot(a_Mk, b_kN, preferred_element_type=jnp.float32)
        return total_MN + part_MN * (a_scale_M[:, None] * b_scale_N), None

    start_MN = jnp.zeros((len(a_MK), len(b_NK)), jnp.float32)
    steps = a_JMk, b_JkN, a_scale_MJ.T, b_scale_NJ.T
    return lax.scan(promote, start_MN, steps)[0].astype(out_dtype)


def _steps(x_NK: Array) -> Array:
    """[J, N, 128] in bfloat16, zeros where K ends early."""
    rows, depth = x_NK.shape
    x_NK = jnp.pad(x_NK.astype(jnp.bfloat16), ((0, 0), (0, -depth % DEPTH)))
    return x_NK.reshape(rows, -1, DEPTH).swapaxes(0, 1)
