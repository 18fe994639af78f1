"""DeepSeekMoE: shared experts plus routed ones chosen by the balancer's rule.

arXiv:2412.19437, section 2.1.2, equations 12-16. The router works in at least float32
whatever the runtime's matmul (section 3.3.1). Loads and statistics are return values.
"""

import functools
from collections.abc import Mapping
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


def mixture(
    x_TD: Array,
    params: Mapping[str, Array],
    state: Any,
    shared: SwiGLU | None,
    *,
    config: ModelConfig,
    rt: Runtime,
    balancer: Balancer,
) -> tuple[Array, Routing]:
    """What `MoE` computes, of given parameters: [T, D], and the routing.

    Args:
      params: `router`, and `gate`, `up`, `down` as `rt.experts` takes them.
      state: the balancer's, of this router.
      shared: the shared experts, with their parameters; None if there are none.
    """
    with jax.named_scope("route"):
        logits_TE = jnp.dot(
            at_least_f32(x_TD),
            at_least_f32(params["router"]),
            precision=jax.lax.Precision.HIGHEST,
        )
        by_row = functools.partial(route, select=balancer.select, moe=config.moe)
        routing = rt.rows(by_row, whole=(1,))(logits_TE, state)
    inner_TF = None if shared is None else shared.inner(x_TD)
    with jax.named_scope("experts"):
        y_TD, inner_TF = rt.experts(
            x_TD,
            routing.weights_TK,
            routing.experts_TK,
            *(params[name] for name in ("gate", "up", "down")),
            grouped_dot=rt.grouped_dot,
            beside=inner_TF,
        )
    if shared is not None:
        y_TD = y_TD + shared.outer(inner_TF)
    return y_TD, routing


def shared_experts(config: ModelConfig, rt: Runtime, **kwargs: Any) -> SwiGLU | None:
    """The module of the shared experts, one SwiGLU; None if there are none."""
    moe = config.moe
    hidden = moe.num_shared * moe.ffn_dim
    return SwiGLU(hidden, config, rt, **kwargs) if hidden else None


class MoE(nn.Module):
    """Routed and shared experts of one layer."""

    config: ModelConfig
    rt: Runtime
    balancer: Balancer

    @nn.compact
    def __call__(self, x_BLD: Array, state: Any, context: Context) -> tuple[Array, Aux]:
        moe, init = self.config.moe, initializer(self.config)
        dim, hidden, experts = self.config.dim, moe.ffn_dim, moe.num_experts
        shapes = {"gate": (dim, hidden), "up": (dim, hidden), "down": (hidden, dim)}
        params = {"router": self.param("router", init, (dim, experts))}
        for name, shape in shapes.items():
            # A device may have been given a part of the experts, as `rt` wants them.
            given = self.get_variable("params", name)
            made = functools.partial(self.param, name, init, (experts, *shape))
            params[name] = made() if given is None else given
        y_TD, routing = mixture(
            x_BLD.reshape(-1, dim),
            params,
            state,
            shared_experts(self.config, self.rt, name="shared"),
            config=self.config,
            rt=self.rt,
            balancer=self.balancer,
        )
        valid_T = context.valid_BL.reshape(-1)

        def counts(routing: Routing, valid_T: Array) -> tuple[Array, Any]:
            return load(routing, valid_T, experts), self.balancer.observe(
                routing, valid_T
            )

        aux = Aux(
            *self.rt.rows(counts, total=True)(routing, valid_T),
            jnp.asarray(
                self.balancer.penalty(routing, context), routing.logits_TE.dtype
            ),
            routing.experts_TK,
        )
        return y_TD.reshape(x_BLD.shape), aux
