"""SwiGLU's elementwise half: silu(gate) * up (arXiv:2412.19437, section 2.1.2)."""

import jax

from deepseek_jax.precision.later import Later as Later
from deepseek_jax.typing import Array, at_least_f32


def swiglu(gate: Array, up: Array, weight: Array | None = None) -> Array:
    """silu(gate) * up [..., F], at least f32, times each row's weight [...] if any."""
    hidden = jax.nn.silu(at_least_f32(gate)) * up
    return hidden if weight is None else hidden * weight[..., None]


def swiglu_later(gate: Array, up: Array, weight: Array | None = None) -> Later:
    """The same, left to the linear map that reads it."""
    return Later(swiglu, (gate, up), () if weight is None else (weight,))
