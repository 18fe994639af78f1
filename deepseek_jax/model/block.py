"""Pre-norm transformer blocks: attention, then a dense or a mixture-of-experts SwiGLU.

Bodies of `nn.scan`: the hidden state is the carry (arXiv:2412.19437, figure 2).
"""

from typing import Any

import flax.linen as nn

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import ATTENTION
from deepseek_jax.model.linear import RMSNorm, SwiGLU
from deepseek_jax.model.moe import Aux, MoE
from deepseek_jax.ops.balancing import Balancer, Context
from deepseek_jax.ops.rope import Rotation
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array


class DenseBlock(nn.Module):
    """Attention and a dense SwiGLU: the first layers."""

    config: ModelConfig
    rt: Runtime

    @nn.compact
    def __call__(
        self, x_BLD: Array, by: Rotation, segment_BL: Array | None
    ) -> tuple[Array, None]:
        attention = ATTENTION[self.config.attention.kind](self.config, self.rt, "attn")
        x_BLD = x_BLD + attention(
            RMSNorm(self.config, name="attn_norm")(x_BLD), by, segment_BL
        )
        ffn = SwiGLU(self.config.dense_dim, self.config, self.rt, name="ffn")
        x_BLD = x_BLD + ffn(RMSNorm(self.config, name="ffn_norm")(x_BLD))
        return self.rt.constrain(x_BLD, "hidden"), None


class MoEBlock(nn.Module):
    """Attention and a mixture of experts: all later layers, and every MTP module."""

    config: ModelConfig
    rt: Runtime
    balancer: Balancer

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        state: Any,
        context: Context,
        by: Rotation,
        segment_BL: Array | None,
    ) -> tuple[Array, Aux]:
        attention = ATTENTION[self.config.attention.kind](self.config, self.rt, "attn")
        x_BLD = x_BLD + attention(
            RMSNorm(self.config, name="attn_norm")(x_BLD), by, segment_BL
        )
        moe = MoE(self.config, self.rt, self.balancer, name="moe")
        y_BLD, aux = moe(RMSNorm(self.config, name="ffn_norm")(x_BLD), state, context)
        return self.rt.constrain(x_BLD + y_BLD, "hidden"), aux


def rematerialised(block: type[nn.Module], rt: Runtime) -> type[nn.Module]:
    """The block, recomputed in the backward pass as the runtime's policy says."""
    if rt.remat is None:
        return block
    return nn.remat(block, policy=rt.remat, prevent_cse=False)
