"""Parameters of the smallest parts: matrices, norms, and the SwiGLU feed-forward.

No linear map has a bias (arXiv:2412.19437; facts of the released configurations).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.ops.norm import rms_norm
from deepseek_jax.ops.swiglu import Later
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array, at_least_f32


def initializer(config: ModelConfig) -> nn.initializers.Initializer:
    """Normal with one standard deviation for every matrix (section 4.2: 0.006)."""
    return nn.initializers.normal(config.init_std or config.dim**-0.5)


class Linear(nn.Module):
    """x [..., D] -> [..., features] through `Runtime.linear`, on two dimensions."""

    features: int
    config: ModelConfig
    rt: Runtime

    @nn.compact
    def __call__(self, x: Array | Later) -> Array:
        shape = (x.shape[-1], self.features)
        kernel_DF = self.param("kernel", initializer(self.config), shape)
        flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), x)
        y_TF = self.rt.linear(flat, kernel_DF, self.name)
        return y_TF.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale, in at least float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale_D, self.config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), the dense layers' and the shared experts' feed-
    forward.
    """

    hidden: int
    config: ModelConfig
    rt: Runtime

    def setup(self) -> None:
        self.gate = Linear(self.hidden, self.config, self.rt)
        self.up = Linear(self.hidden, self.config, self.rt)
        self.down = Linear(self.config.dim, self.config, self.rt)

    def inner(self, x_BLD: Array) -> Array | Later:
        """The first half: what `down` multiplies."""
        return self.rt.swiglu(self.gate(x_BLD), self.up(x_BLD))

    def outer(self, hidden: Array | Later) -> Array:
        """The second half."""
        return self.down(hidden)

    def __call__(self, x_BLD: Array) -> Array:
        return self.outer(self.inner(x_BLD))


def embed(table_VD: Array, tokens_BL: Array) -> Array:
    """Rows of the embedding table, [B, L, D] in at least float32."""
    return at_least_f32(jnp.take(table_VD, tokens_BL, axis=0))
