"""RMSNorm, computed in at least float32 (arXiv:2412.19437, section 3.3.1)."""

import jax
import jax.numpy as jnp

from deepseek_jax.typing import Array, at_least_f32


def rms_norm(x: Array, scale_D: Array, eps: float) -> Array:
    """`x` [..., D] over its root mean square along D, times `scale_D`; at least f32."""
    x = at_least_f32(x)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return x * inverse * scale_D.astype(x.dtype)
