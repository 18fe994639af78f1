"""Parameters of a model and bytes of its cache, without allocating anything.

Counted from the shapes that the model itself declares (`jax.eval_shape`), so a change
of the model cannot go unnoticed. Published figures: arXiv:2412.19437, section 4.2
(671B, 37B active); DeepSeek's counts include the router bias, which is the balancer's
state here.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import AttentionConfig, BalanceConfig, ModelConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ops import balancing
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Params


class Counts(NamedTuple):
    """Numbers of parameters; each includes the biases of its routers."""

    total: int  # the main model
    active: int  # of the main model, used for one token: embedding and head too
    mtp: int  # the MTP modules, without the embedding and head that they share
    embedding: int  # the embedding alone; the head is as large


def shapes(model: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    balancer = balancing.build(BalanceConfig(strategy="none"), model.moe)
    module = Transformer(model, Runtime(), balancer)
    tokens_BS = jnp.zeros((1, 1 + model.mtp.depth), jnp.int32)
    position_BL = jnp.zeros((1, 1), jnp.int32)

    def init(key: jax.Array) -> Params:
        params: Params = module.init(key, tokens_BS, position_BL, ())["params"]
        return params

    tree: Params = jax.eval_shape(init, jax.random.PRNGKey(0))
    return tree


def count_parameters(
    model: ModelConfig, balance: BalanceConfig | None = None
) -> Counts:
    """Counts of a model; `balance` (default: V3's) says whether routers have a bias."""
    balancer = balancing.build(balance or BalanceConfig(), model.moe)
    bias = model.moe.num_experts if balancer.bias else 0

    def count(config: ModelConfig) -> int:
        leaves = jax.tree.leaves(shapes(config))
        return sum(leaf.size for leaf in leaves) + config.num_routers * bias

    main = dataclasses.replace(model, mtp=dataclasses.replace(model.mtp, depth=0))
    total = count(main)
    expert = 3 * model.dim * model.moe.ffn_dim
    idle = model.num_moe * (model.moe.num_experts - model.moe.top_k) * expert
    return Counts(
        total, total - idle, count(model) - total, model.vocab_size * model.dim
    )


NUMBERS: dict[str, Callable[[AttentionConfig], int]] = {
    "mla": lambda at: at.kv_rank + at.rope_dim,
    "mha": lambda at: at.num_heads * (at.nope_dim + at.rope_dim + at.value_dim),
    "gqa": lambda at: at.kv_heads * (at.nope_dim + at.rope_dim + at.value_dim),
}


def cache_bytes(model: ModelConfig, itemsize: int = 2) -> int:
    """Bytes a token adds to the main model's cache: MLA keeps its latent and the
    rotary key, the others every key and value head.
    """
    return model.num_layers * NUMBERS[model.attention.kind](model.attention) * itemsize
