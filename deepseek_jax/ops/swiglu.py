"""SwiGLU's elementwise half: silu(gate) * up (arXiv:2412.19437, section 2.1.2)."""

from deepseek_jax.precision.later import Later as Later
from deepseek_jax.typing import Array
from pallas_kernels.grouped_matmul.reference import gated


def swiglu(gate: Array, up: Array, weight: Array | None = None) -> Array:
    """silu(gate) * up [..., F], at least f32, times each row's weight [...] if any."""
    hidden = gated(gate, up)
    return hidden if weight is None else hidden * weight[..., None]


def swiglu_later(gate: Array, up: Array, weight: Array | None = None) -> Later:
    """The same, left to the linear map that reads it."""
    return Later(swiglu, (gate, up), () if weight is None else (weight,))
