"""The model on tokens whose past lies in a cache.

arXiv:2412.19437, sections 2.1.1 and 3.4. The mathematics is that of `model`: its
modules are applied one by one, on weights of single layers, because a scan over stacked
layers would copy each layer's weights in every step. A first chunk of a prompt attends
with expanded keys and values; what follows reads the cache, absorbed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.decode.cache import Cache, Layer, append
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.linear import Linear, RMSNorm, SwiGLU, embed
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.transformer import Transformer, count
from deepseek_jax.ops.balancing import Context
from deepseek_jax.ops.rope import Rotation, rotation
from deepseek_jax.parallel import eplb
from deepseek_jax.typing import Array, Params


class Weights(NamedTuple):
    """Parameters and balancer states, each layer's by itself."""

    embed: Array
    head: Array
    norm: Params
    blocks: tuple[tuple[Params, Any], ...]  # of the main model, dense ones first
    mtp: tuple[tuple[Params, Any], ...]


def split(model: Transformer, params: Params, balance: Any) -> Weights:
    """Takes the stacks of a checkpoint apart; layers are copies of what they were."""
    config = model.config

    def at(tree: Any, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], tree)

    dense = [(at(params["dense"], i), None) for i in range(config.num_dense)]
    moe = [(at(params["moe"], i), at(balance, i)) for i in range(config.num_moe)]
    mtp = [
        (params[f"mtp_{k}"], at(balance, config.num_moe + k))
        for k in range(config.mtp.depth)
    ]
    weights = Weights(
        params["embed"], params["head"], params["norm"], tuple(dense + moe), tuple(mtp)
    )
    return jax.tree.map(jnp.asarray, weights)


class Window(NamedTuple):
    """What a forward pass works on; a position < 0 marks a token that is not there."""

    position_BL: Array
    by: Rotation
    table_BP: Array | None


Attend = Callable[[MLA, Array, Layer, Window], tuple[Array, Layer]]


def attend_expanded(
    mla: MLA, x_BLD: Array, layer: Layer, window: Window
) -> tuple[Array, Layer]:
    """Attention of the first tokens of each row, which are all that there is."""
    c_kv, k_rope = mla.latent(x_BLD, window.by)
    new = Layer(c_kv, k_rope[:, :, 0])
    layer = mla.rt.rows(append)(layer, new, window.position_BL, window.table_BP)
    query = mla.query(x_BLD, window.by)
    return mla.expanded(query, (c_kv, k_rope), None), layer


def attend_absorbed(
    mla: MLA, x_BLD: Array, layer: Layer, window: Window
) -> tuple[Array, Layer]:
    """Attention over everything in the cache up to each token.

    The products with W_UK and W_UV are one for each head, which `Runtime.dot`, [T, D]
    by [D, F], is not: they run in their operands' own precision, whatever the runtime.
    So with a bf16 runtime, where `attend_expanded` rounds those operands, the two ways
    agree within bf16 rounding only.
    """
    c_kv, k_rope = mla.latent(x_BLD, window.by)
    new = Layer(c_kv, k_rope[:, :, 0])
    layer = mla.rt.rows(append)(layer, new, window.position_BL, window.table_BP)

    def attend(q_lat: Array, q_rope: Array, *, scale: float) -> Array:
        where = window.position_BL, window.table_BP
        return mla.rt.latent_attention(q_lat, q_rope, *layer, *where, scale=scale)

    return mla.absorbed(mla.query(x_BLD, window.by), attend), layer


def _dense(
    model: Transformer, params: Params, state: None, x_BLD: Array, window: Window
) -> Array:
    module = SwiGLU(model.config.dense_dim, model.config, model.rt)
    return module.apply({"params": params}, x_BLD)


def _moe(
    model: Transformer, params: Params, state: Any, x_BLD: Array, window: Window
) -> Array:
    rt, valid_BL = model.rt, window.position_BL >= 0
    if copies := params.get("copies"):  # see `spread.at_places`
        on_copies = functools.partial(eplb.on_copies, experts=rt.experts, copies=copies)
        rt = dataclasses.replace(rt, experts=on_copies)
    totals = count([valid_BL])
    context = Context(valid_BL, totals.tokens[0], totals.rows[0])
    module = MoE(model.config, rt, model.balancer)
    y_BLD, _ = module.apply({"params": params}, x_BLD, state, context)
    return y_BLD


FEED_FORWARD = {"ffn": _dense, "moe": _moe}


def _norm(model: Transformer, params: Params, x_BLD: Array) -> Array:
    return RMSNorm(model.config).apply({"params": params}, x_BLD)


def _block(
    model: Transformer,
    weights: tuple[Params, Any],
    x_BLD: Array,
    layer: Layer,
    window: Window,
    attend: Attend,
) -> tuple[Array, Layer]:
    """`model.block`, with a cache."""
    params, state = weights
    out, layer = MLA(model.config, model.rt).apply(
        {"params": params["attn"]},
        _norm(model, params["attn_norm"], x_BLD),
        layer,
        window,
        method=attend,
    )
    x_BLD = x_BLD + out
    h_BLD = _norm(model, params["ffn_norm"], x_BLD)
    for name, feed_forward in FEED_FORWARD.items():
        if name in params:
            x_BLD = x_BLD + feed_forward(model, params[name], state, h_BLD, window)
    return model.rt.constrain(x_BLD, "hidden"), layer


def _window(model: Transformer, position_BL: Array, table: Any, dtype: Any) -> Window:
    at = model.config.attention
    by = rotation(at.rope, at.rope_dim, position_BL, dtype)
    return Window(position_BL, by, table)


def forward(
    model: Transformer,
    weights: Weights,
    tokens_BL: Array,
    position_BL: Array,
    cache: Cache,
    attend: Attend = attend_absorbed,
) -> tuple[Array, Cache]:
    """The main model on L tokens a row, which the cache then holds too.

    Args:
      position_BL: consecutive in a row; < 0 where there is no token. What a row's
        tokens see is everything at their position and before.
      attend: `attend_expanded` only where positions start at 0.

    Returns:
      Hidden states before the final norm, [B, L, D], and the cache.
    """
    x_BLD = embed(weights.embed, tokens_BL)
    window = _window(model, position_BL, cache.table_BP, x_BLD.dtype)
    layers = list(cache.layers)
    for i, block in enumerate(weights.blocks):
        x_BLD, layers[i] = _block(model, block, x_BLD, layers[i], window, attend)
    return x_BLD, cache._replace(layers=tuple(layers))


def forward_mtp(
    model: Transformer,
    weights: Weights,
    k: int,
    h_BLD: Array,
    tokens_BL: Array,
    position_BL: Array,
    cache: Cache,
    attend: Attend = attend_absorbed,
) -> tuple[Array, Array, Cache]:
    """MTP module k = 1..J: from h^{k-1} at positions i and tokens i+k to h^k.

    Returns:
      What module k+1 reads, what the head reads, [B, L, D] both, and the cache.
    """
    params, state = weights.mtp[k - 1]
    at = model.config.num_layers + k - 1
    both = jnp.concatenate(
        [
            _norm(model, params["hidden_norm"], h_BLD),
            _norm(model, params["embed_norm"], embed(weights.embed, tokens_BL)),
        ],
        -1,
    )
    combine = Linear(model.config.dim, model.config, model.rt)
    x_BLD = combine.apply({"params": params["combine"]}, both)
    window = _window(model, position_BL, cache.table_BP, x_BLD.dtype)
    layers = list(cache.layers)
    x_BLD, layers[at] = _block(
        model, (params["block"], state), x_BLD, layers[at], window, attend
    )
    normed = _norm(model, params["norm"], x_BLD)
    raw = normed if model.config.mtp.input_norm else x_BLD
    return raw, normed, cache._replace(layers=tuple(layers))


def final_norm(model: Transformer, weights: Weights, x_BLD: Array) -> Array:
    """The main model's hidden states, ready for the head."""
    return _norm(model, weights.norm, x_BLD)


def logits(model: Transformer, weights: Weights, normed_BLD: Array) -> Array:
    """The shared head on normed hidden states, [B, L, V]."""
    flat_TD = normed_BLD.reshape(-1, normed_BLD.shape[-1])
    return model.rt.dot(flat_TD, weights.head).reshape(*normed_BLD.shape[:2], -1)
