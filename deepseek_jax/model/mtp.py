"""Multi-token prediction modules (arXiv:2412.19437, section 2.2, equations 21-23).

Module k reads h^{k-1}_i and the embedding of token i+k and predicts token i+k+1;
embedding and head belong to the main model. We project [hidden; embedding] as the paper
prints it (released checkpoints store the other order). With packed documents an
embedding from another document is replaced by zeros, so nothing crosses.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import MoEBlock, rematerialised
from deepseek_jax.model.linear import Linear, RMSNorm
from deepseek_jax.model.moe import Aux
from deepseek_jax.ops.balancing import Balancer, Context
from deepseek_jax.ops.rope import Rotation
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array


class MTPModule(nn.Module):
    """One prediction depth: combine, one MoE block, its own norm before the shared
    head.
    """

    config: ModelConfig
    rt: Runtime
    balancer: Balancer

    @nn.compact
    def __call__(
        self,
        hidden_BLD: Array,
        embedding_BLD: Array,
        state: Any,
        context: Context,
        by: Rotation,
        segment_BL: Array | None,
    ) -> tuple[Array, Array, Aux]:
        """Returns the block's output, the same normed for the head, and the router's
        report.
        """
        config, rt = self.config, self.rt
        embedding_BLD = jnp.where(context.valid_BL[..., None], embedding_BLD, 0)
        both = jnp.concatenate(
            [
                RMSNorm(config, name="hidden_norm")(hidden_BLD),
                RMSNorm(config, name="embed_norm")(embedding_BLD),
            ],
            -1,
        )
        x_BLD = Linear(config.dim, config, rt, name="combine")(both)
        block = rematerialised(MoEBlock, rt)(config, rt, self.balancer, name="block")
        x_BLD, aux = block(x_BLD, state, context, by, segment_BL)
        return x_BLD, RMSNorm(config, name="norm")(x_BLD), aux
