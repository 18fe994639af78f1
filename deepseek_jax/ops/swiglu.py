"""SwiGLU's elementwise half: silu(gate) * up (arXiv:2412.19437, section 2.1.2)."""

from deepseek_jax.precision.later import Later as Later
from deepseek_jax.typing import Array
from pallas_kernels.grouped_matmul.reference import gated

swiglu = gated


def swiglu_later(gate: Array, up: Array, weight: Array | None = None) -> Later:
    """The same, left to the linear map that reads it."""
    return Later(swiglu, (gate, up), () if weight is None else (weight,))
