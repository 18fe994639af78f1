"""DeepSeekMoE: shared experts plus routed ones chosen by the balancer's rule.

arXiv:2412.19437, section 2.1.2, equations 12-16. The router works in at least float32
whatever the runtime's matmul (section 3.3.1). Loads and statistics are return values.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.linear import SwiGLU, initializer
from deepseek_jax.ops.balancing import Balancer, Context, load
from deepseek_jax.ops.routing import Routing, route
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array, at_least_f32


class Aux(NamedTuple):
    """What one router reports of one micro-batch; stacked over routers by the model."""

    load: Array  # int32 [E], valid slots an expert received
    stats: Any  # Balancer.observe, summed over the global batch before its update
    penalty: Array  # this micro-batch's share of the balance penalty
    experts: Array  # int32 [T, K], the selection


class MoE(nn.Module):
    """Routed and shared experts of one layer."""

    config: ModelConfig
    rt: Runtime
    balancer: Balancer

    @nn.compact
    def __call__(self, x_BLD: Array, state: Any, context: Context) -> tuple[Array, Aux]:
        moe, init = self.config.moe, initializer(self.config)
        dim, hidden, experts = self.config.dim, moe.ffn_dim, moe.num_experts
        x_TD = x_BLD.reshape(-1, dim)
        with jax.named_scope("route"):
            router_DE = self.param("router", init, (dim, experts))
            logits_TE = jnp.dot(
                at_least_f32(x_TD),
                at_least_f32(router_DE),
                precision=jax.lax.Precision.HIGHEST,
            )
            by_row = functools.partial(route, select=self.balancer.select, moe=moe)
            routing = self.rt.rows(by_row, whole=(1,))(logits_TE, state)
        shared, inner_TF = None, None
        if moe.num_shared:
            size = moe.num_shared * hidden
            shared = SwiGLU(size, self.config, self.rt, name="shared")
            inner_TF = shared.inner(x_TD)
        with jax.named_scope("experts"):
            y_TD, inner_TF = self.rt.experts(
                x_TD,
                routing.weights_TK,
                routing.experts_TK,
                self.matrices("gate", (dim, hidden)),
                self.matrices("up", (dim, hidden)),
                self.matrices("down", (hidden, dim)),
                grouped_dot=self.rt.grouped_dot,
                beside=inner_TF,
            )
        if shared is not None:
            y_TD = y_TD + shared.outer(inner_TF)
        valid_T = context.valid_BL.reshape(-1)

        def counts(routing: Routing, valid_T: Array) -> tuple[Array, Any]:
            return load(routing, valid_T, experts), self.balancer.observe(
                routing, valid_T
            )

        aux = Aux(
            *self.rt.rows(counts, total=True)(routing, valid_T),
            jnp.asarray(self.balancer.penalty(routing, context), logits_TE.dtype),
            routing.experts_TK,
        )
        return y_TD.reshape(x_BLD.shape), aux

    def matrices(self, name: str, shape: tuple[int, int]) -> Array:
        """One for each expert, or as many as were given: `rt.experts` may have fewer
        on a device, or copies.
        """
        given = self.get_variable("params", name)
        size = self.config.moe.num_experts if given is None else len(given)
        made: Array = self.param(name, initializer(self.config), (size, *shape))
        return made
