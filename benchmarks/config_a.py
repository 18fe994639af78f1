"""What is timed on a CPU: `presets.mini` without MTP, 10.7M parameters, 8 x 512 tokens.

Balance is the paper's recipe, `v3`. FLOPs count the matmuls and the causal half of
attention, three times (forward, two gradients), and no recomputation: 0.14 TFLOP. An
MTP module counts as a layer, a head and what joins its two inputs.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import presets
from deepseek_jax.config import (
    Config,
    DataConfig,
    MTPConfig,
    OptimConfig,
    RuntimeConfig,
)
from deepseek_jax.data.batch import Batch

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
SQUARE = 1024  # side of the matrices whose product is the GEMM rate


def config(compute: str) -> Config:
    """The whole configuration, with matmuls in `compute`."""
    return Config(
        model=dataclasses.replace(presets.mini(), mtp=MTPConfig(depth=0)),
        data=DataConfig(batch=8, length=512),
        optim=OptimConfig(warmup=10, horizon=1000),
        runtime=RuntimeConfig(compute=compute),
    )


def batch(config: Config) -> Batch:
    """Random tokens, one document a row."""
    rng = np.random.default_rng(0)
    shape = config.data.batch, config.data.length + 1
    tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    ones = np.ones(shape, np.int32)
    return Batch(tokens, ones, position, ones > 0, np.zeros_like(tokens))


class Flops(NamedTuple):
    """FLOPs of one step, forward and backward."""

    core: float
    projections: float
    experts: float  # routed and shared ones, and the router
    dense: float
    head: float


def flops(config: Config) -> Flops:
    """From the shapes alone: 6 per multiplied weight and token, and attention's."""
    model, at, moe = config.model, config.model.attention, config.model.moe
    tokens, length = config.data.batch * config.data.length, config.data.length
    query, value = at.nope_dim + at.rope_dim, at.value_dim
    weights = (
        model.dim * (at.q_rank + at.kv_rank + at.rope_dim)
        + at.q_rank * at.num_heads * query
        + at.kv_rank * at.num_heads * (at.nope_dim + value)
        + at.num_heads * value * model.dim
    )
    active = 3 * (moe.top_k + moe.num_shared) * moe.ffn_dim + moe.num_experts
    pairs = tokens * (length + 1) / 2
    depth = model.mtp.depth
    layers, joined = model.num_layers + depth, 2 * depth * model.dim**2
    return Flops(
        core=6 * layers * pairs * at.num_heads * (query + value),
        projections=6 * tokens * (layers * weights + joined),
        experts=6 * (model.num_moe + depth) * tokens * model.dim * active,
        dense=6 * model.num_dense * tokens * 3 * model.dim * model.dense_dim,
        head=6 * (1 + depth) * tokens * model.dim * model.vocab_size,
    )


def timed(function: Callable[..., Any], *args: Any, repeats: int = 1) -> float:
    """Seconds a call takes, until its results are there."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def gemm(compute: str) -> Callable[[], float]:
    """Measures, at each call, FLOP/s of a square product with operands in `compute`,
    which for FP8 is bfloat16.
    """
    a = jnp.ones((SQUARE, SQUARE), DTYPES.get(compute, jnp.bfloat16))
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a))
    return lambda: 2 * SQUARE**3 / timed(product, a, repeats=8)
