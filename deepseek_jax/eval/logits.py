"""Logits of given tokens, in blocks of bounded size, computed in float32.

What models are compared by: with a reference implementation, and with themselves after
conversion. Entry [b, i] of the main model's logits predicts token i+1 of row b from
tokens 0..i. That of MTP module k predicts token i+k+1 from tokens 0..i+k
(arXiv:2412.19437, equations 21-23; h^0 as `model.mtp.input_norm` says), so its last k
positions, which lack an input, are NaN. A row is one document from position 0.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import runtime
from deepseek_jax.config import Config, RuntimeConfig
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ops import balancing
from deepseek_jax.typing import Array, Params

POSITIONS = 4096  # of one forward pass, or one row if it is longer
NUMBERS = 1 << 24  # logits held at a time


class Block(NamedTuple):
    """Logits of some of the B * L positions, which are counted row by row."""

    module: int  # 0: the main model, k: MTP module k
    start: int  # of the first
    logits_TV: np.ndarray  # float32


def build(config: Config, how: RuntimeConfig | None = None) -> Transformer:
    """The model of a configuration, by default in float32, however it was trained."""
    return _build(config, how or RuntimeConfig())


@functools.cache  # programs are compiled for the model as an object
def _build(config: Config, how: RuntimeConfig) -> Transformer:
    balancer = balancing.build(config.balance, config.model.moe)
    return Transformer(config.model, runtime.build(how), balancer)


def check(model: Transformer, tokens_BL: np.ndarray, mtp: bool) -> None:
    """Refuses what has no logits.

    Raises:
      ValueError: tokens not int32 [B, L] with B, L > 0, ids that the model doesn't
        have, or `mtp` for a model without MTP modules.
    """
    if tokens_BL.dtype != np.int32 or tokens_BL.ndim != 2 or not tokens_BL.size:
        raise ValueError(
            f"tokens are {tokens_BL.dtype} of shape {list(tokens_BL.shape)}: must be "
            "int32 [B, L], rows of token ids"
        )
    vocab_size = model.config.vocab_size
    outside = (tokens_BL < 0) | (tokens_BL >= vocab_size)
    if outside.any():
        row, position = np.argwhere(outside)[0].tolist()
        raise ValueError(
            f"token {tokens_BL[row, position]} at [{row}, {position}]: must be 0 to "
            f"{vocab_size - 1}, since the model's vocab_size is {vocab_size}"
        )
    if mtp and not model.config.mtp.depth:
        raise ValueError("mtp: the model has no MTP modules (model.mtp.depth = 0)")


def blocks(
    model: Transformer,
    params: Params,
    balance: Any,
    tokens_BL: np.ndarray,
    *,
    mtp: bool = False,
) -> Iterator[Block]:
    """The logits of all positions, block by block, in no promised order.

    Args:
      balance: balancer state with a leading axis over the routers, as checkpoints have.
      mtp: also the logits of every MTP module.

    Raises:
      ValueError: see `check`; before anything is computed.
    """
    check(model, tokens_BL, mtp)
    depth = model.config.mtp.depth if mtp else 0
    return _blocks(model, params, balance, tokens_BL, depth)


def compute(
    model: Transformer,
    params: Params,
    balance: Any,
    tokens_BL: np.ndarray,
    *,
    mtp: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(logits [B, L, V], MTP logits [J, B, L, V]) in memory; J is 0 without `mtp`.

    Raises:
      ValueError: see `check`.
    """
    modules = 1 + (model.config.mtp.depth if mtp else 0)
    shape = (modules, *tokens_BL.shape, model.config.vocab_size)
    all_JBLV = np.empty(shape, np.float32)
    flat_JTV = all_JBLV.reshape(modules, -1, shape[-1])
    for block in blocks(model, params, balance, tokens_BL, mtp=mtp):
        end = block.start + len(block.logits_TV)
        flat_JTV[block.module, block.start : end] = block.logits_TV
    return all_JBLV[0], all_JBLV[1:]


def _blocks(
    model: Transformer,
    params: Params,
    balance: Any,
    tokens_BL: np.ndarray,
    depth: int,
) -> Iterator[Block]:
    count, length = tokens_BL.shape
    passes = -(-count // max(1, POSITIONS // length))
    rows = -(-count // passes)
    chunk = max(1, NUMBERS // model.config.vocab_size)
    for first in range(0, count, rows):
        part = tokens_BL[first : first + rows]
        part = np.pad(part, ((0, rows - len(part)), (0, 0)))  # one shape to compile
        hidden_JTD = _hidden(model, depth, params, balance, part)
        size = min(rows, count - first) * length
        for module in range(depth + 1):
            for start in range(0, size, chunk):
                part_TD = hidden_JTD[module, start : min(start + chunk, size)]
                logits_TV = np.array(_head(model, params, part_TD), np.float32)
                position_T = (start + np.arange(len(logits_TV))) % length
                logits_TV[position_T >= length - module] = np.nan
                yield Block(module, first * length + start, logits_TV)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(
    model: Transformer, depth: int, params: Params, balance: Any, tokens_BL: Array
) -> Array:
    """Normed hidden states of the main model and `depth` MTP modules, [1+J, T, D]."""
    count, length = tokens_BL.shape
    # MTP reads tokens beyond the last: none are there, what it makes of them is NaN.
    tokens_BS = jnp.pad(tokens_BL, ((0, 0), (0, depth)))
    valid_BS = jnp.broadcast_to(jnp.arange(length + depth) < length, tokens_BS.shape)
    position_BL = jnp.broadcast_to(jnp.arange(length), (count, length))
    out: Any = model.apply(
        {"params": params}, tokens_BS, position_BL, balance, valid_BS=valid_BS
    )
    hidden_JBLD = jnp.stack((out.hidden_BLD, *out.mtp_JBLD))
    return hidden_JBLD.reshape(depth + 1, count * length, -1)


@functools.partial(jax.jit, static_argnums=0)
def _head(model: Transformer, params: Params, hidden_TD: Array) -> Array:
    logits_1TV: Any = model.apply({"params": params}, hidden_TD[None], method="logits")
    return logits_1TV[0]
