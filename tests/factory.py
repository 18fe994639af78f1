"""Small configurations, batches and parts that several test modules share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import (
    AttentionConfig,
    BalanceConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from deepseek_jax.data.batch import Batch

SMALL = ModelConfig(
    vocab_size=61,
    dim=16,
    num_layers=3,
    num_dense=1,
    dense_dim=24,
    init_std=0.0,
    attention=AttentionConfig(
        num_heads=2, q_rank=12, kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5
    ),
    moe=MoEConfig(num_experts=8, top_k=2, ffn_dim=12, num_groups=4, keep_groups=2),
    mtp=MTPConfig(depth=1),
)


def small(
    *,
    batch: int = 8,
    length: int = 12,
    depth: int = 1,
    segment_mask: bool = False,
    **kwargs,
) -> Config:
    """A whole run's config of some thousand parameters; `kwargs` replace its groups."""
    groups = {
        "model": dataclasses.replace(SMALL, mtp=MTPConfig(depth=depth)),
        "data": DataConfig(batch=batch, length=length, segment_mask=segment_mask),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0, horizon=100),
        "balance": BalanceConfig(speed=1e-2),
        "train": TrainConfig(steps=10),
        "runtime": RuntimeConfig(block=8),
    }
    return Config(**(groups | kwargs))


def random_batch(config: Config, seed: int = 0, documents: bool = False) -> Batch:
    """Random tokens; with `documents`, rows of several documents and a padded end."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch, config.data.length + 1 + config.model.mtp.depth)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    segment = np.ones(shape, np.int32)
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    if documents:
        starts = rng.random(shape) < 0.25
        starts[:, 0] = True
        segment = np.cumsum(starts, 1, dtype=np.int32)
        first = np.maximum.accumulate(np.where(starts, position, 0), 1)
        position = (position - first).astype(np.int32)
        padding = np.arange(shape[1]) >= rng.integers(
            shape[1] // 2, shape[1] + 1, (shape[0], 1)
        )
        segment = np.where(padding, 0, segment)
    mask = segment > 0
    domain = np.where(mask, rng.integers(0, 2, shape), -1).astype(np.int32)
    return Batch(tokens, segment, position, mask, domain)


def as_f64(tree):
    """Every float of a pytree in float64; call with x64 on."""
    up = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(lambda x: up(jnp.asarray(x)), tree)
