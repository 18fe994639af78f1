"""The parts of the training step of `config_a.py`, each timed alone: where time goes.

  python -m benchmarks.parts_cpu f32|bf16

Forward and backward of one part with its inputs in memory, times how often a step has
it. `alone` is what its matmul FLOPs would take at the GEMM rate of the same run.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import config_a
from deepseek_jax import runtime
from deepseek_jax.config import COMPUTES, Config
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.linear import SwiGLU, embed
from deepseek_jax.model.moe import MoE
from deepseek_jax.ops import balancing
from deepseek_jax.ops.losses import cross_entropy
from deepseek_jax.ops.rope import rotation, softmax_scale
from deepseek_jax.runtime import Runtime
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.typing import Array
from pallas_kernels.matmul.reference import product, row_product

ROUNDS = 7


class Part(NamedTuple):
    """A part of the step; `bound` is what it waits for besides its matmuls."""

    name: str
    count: int
    flops: float  # of all of them, both ways
    run: Callable[..., Any]
    args: tuple[Any, ...]
    bound: str


def uniform(*shape: int) -> Array:
    return jax.random.uniform(jax.random.key(sum(shape)), shape, minval=-1)


def both_ways(function: Callable[..., Array]) -> Callable[..., Any]:
    """Value and gradients of all arguments, for a cotangent that is no constant."""

    def run(*args: Any) -> Any:
        value, pull = jax.vjp(function, *args)
        return value, pull(value)

    return run


def added(
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    segment: None,
    *,
    scale: float,
) -> Array:
    """In place of attention, so that the projections around it are timed alone."""
    return q_nope + k_nope + v + (q_rope * k_rope).sum(-1, keepdims=True)


def attention_parts(config: Config, rt: Runtime) -> list[Part]:
    at, layers = config.model.attention, config.model.num_layers
    rows, length = config.data.batch, config.data.length
    flops = config_a.flops(config)
    position = jnp.broadcast_to(jnp.arange(length), (rows, length))
    by = rotation(at.rope, at.rope_dim, position, jnp.float32)
    bare = MLA(config.model, Runtime(linear=rt.linear, attention=added))
    x = uniform(rows, length, config.model.dim)
    params = bare.init(jax.random.key(0), x, by, None)
    widths = (at.nope_dim, at.rope_dim, at.nope_dim, at.rope_dim, at.value_dim)
    heads = (at.num_heads, at.num_heads, at.num_heads, 1, at.num_heads)
    operands = tuple(
        uniform(rows, length, count, width)
        for count, width in zip(heads, widths, strict=True)
    )
    core = functools.partial(rt.attention, scale=softmax_scale(at))
    projections = both_ways(lambda params, x: bare.apply(params, x, by, None))
    return [
        Part(
            "attention core",
            layers,
            flops.core,
            both_ways(core),
            operands,
            "exp, masks and sums over scores; products 32 and 48 wide",
        ),
        Part(
            "projections",
            layers,
            flops.projections,
            projections,
            (params, x),
            "narrow products (64 to 512), norms, rotation, head splits",
        ),
    ]


def ffn_parts(config: Config, rt: Runtime) -> list[Part]:
    model, flops = config.model, config_a.flops(config)
    rows, length = config.data.batch, config.data.length
    x = uniform(rows, length, model.dim)
    balancer = balancing.build(config.balance, model.moe)
    moe = MoE(model, rt, balancer)
    tokens = jnp.float32(rows * length)
    valid = jnp.ones((rows, length), bool)
    context = balancing.Context(valid, tokens, jnp.float32(rows), None)
    state = balancer.init(model.moe.num_experts)
    moe_params = moe.init(jax.random.key(0), x, state, context)
    dense = SwiGLU(model.dense_dim, model, rt)
    dense_params = dense.init(jax.random.key(0), x)
    return [
        Part(
            "mixture of experts",
            model.num_moe,
            flops.experts,
            both_ways(lambda params, x: moe.apply(params, x, state, context)[0]),
            (moe_params, x),
            "products of 128 rows, gathers, padding, top-k, SwiGLU",
        ),
        Part(
            "dense FFN",
            model.num_dense,
            flops.dense,
            both_ways(dense.apply),
            (dense_params, x),
            "SwiGLU passes, transposed copies",
        ),
    ]


def end_parts(config: Config, rt: Runtime) -> list[Part]:
    model, parts = config.model, assemble(config)
    tokens = config.data.batch * config.data.length
    state = init_state(parts, config.seed)
    h, head = uniform(tokens, model.dim), state.params["head"]
    targets = jnp.asarray(config_a.batch(config).tokens[:, 1:].reshape(-1))
    weights = jnp.full(tokens, 1 / tokens)

    def loss(h: Array, head: Array) -> Array:
        return cross_entropy(h, head, targets, weights, dot=rt.dot)

    def adamw(grads: Any, params: Any, opt_state: Any) -> Any:
        updates, new = parts.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new

    return [
        Part(
            "head and loss",
            1,
            config_a.flops(config).head,
            both_ways(loss),
            (h, head),
            "softmax passes over logits; transposed copies",
        ),
        Part(
            "embedding",
            1,
            0,
            both_ways(lambda table: embed(table, targets.reshape(8, -1))),
            (state.params["embed"],),
            "memory: gather, scatter-add",
        ),
        Part(
            "AdamW",
            1,
            0,
            adamw,
            (state.params, state.params, state.opt_state),
            "memory: 7 numbers a weight",
        ),
    ]


def products(config: Config, compute: str) -> list[Part]:
    """The two kinds of product of a weight, the second with and without a copy."""
    dtype = config_a.DTYPES[compute]
    tokens, dim = config.data.batch * config.data.length, config.model.dim
    hidden = config.model.dense_dim
    x, w, g = uniform(tokens, dim), uniform(dim, hidden), uniform(tokens, hidden)
    x, w, g = (each.astype(dtype) for each in (x, w, g))
    flops = 2.0 * tokens * dim * hidden

    def plain(x: Array, g: Array) -> Array:
        return jnp.einsum("TD,TF->DF", x, g, preferred_element_type=jnp.float32)

    return [
        Part("x w", 1, flops, product, (x, w), "a dense FFN's forward product"),
        Part("x^T g, as it is", 1, flops, plain, (x, g), "its weight gradient"),
        Part("x^T g, copied", 1, flops, row_product, (x, g), "what we do instead"),
    ]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in COMPUTES:
        sys.exit(f"usage: python -m benchmarks.parts_cpu {'|'.join(COMPUTES)}")
    compute = sys.argv[1]
    config = config_a.config(compute)
    rt, gemm = runtime.build(config.runtime), config_a.gemm(compute)
    parts = attention_parts(config, rt) + ffn_parts(config, rt) + end_parts(config, rt)
    print(
        f"parts, {compute}             ms   alone  GFLOP/s  % of GEMM  what bounds it"
    )
    total = 0.0
    for part in parts + products(config, compute):
        run = jax.jit(part.run)
        jax.block_until_ready(run(*part.args))
        pairs = [(gemm(), config_a.timed(run, *part.args)) for _ in range(ROUNDS)]
        rate, seconds = (sorted(each)[ROUNDS // 2] for each in zip(*pairs, strict=True))
        seconds *= part.count
        speed = part.flops / seconds / 1e9
        print(
            f"{part.name:18} x{part.count} {1e3 * seconds:7.1f}"
            f" {1e3 * part.flops / rate:7.1f} {speed:8.0f} {1e11 * speed / rate:10.0f}"
            f"  {part.bound}",
            flush=True,
        )
        total += seconds if part in parts else 0
    print(f"sum of the step's parts {1e3 * total:5.1f}")


if __name__ == "__main__":
    main()
