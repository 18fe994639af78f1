"""A small model that has learnt something, for tests of decoding.

Trained on a Markov chain, so that what comes next is neither certain nor random, and
MTP drafts are sometimes right.
"""

import dataclasses
import functools

import jax
import numpy as np

from deepseek_jax import runtime
from deepseek_jax.config import RuntimeConfig
from deepseek_jax.decode.forward import Weights, split
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import make_step
from tests.factory import SMALL, as_f64, random_batch, small

VOCAB, DEPTH = SMALL.vocab_size, 3


def chain(rows: int, length: int, seed: int) -> np.ndarray:
    """Rows of a chain in which every token has four successors, one in two chances."""
    successors = np.random.default_rng(0).integers(0, VOCAB, (VOCAB, 4))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length), dtype=np.int32)
    for i in range(1, length):
        pick = rng.choice(4, rows, p=[0.7, 0.2, 0.07, 0.03])
        tokens[:, i] = successors[tokens[:, i - 1], pick]
    return tokens


@functools.cache
def trained(depth: int = DEPTH, steps: int = 20) -> tuple:
    """Parameters and balance as numpy arrays, and the configuration."""
    config = small(batch=16, length=24, depth=depth)
    parts = assemble(config)
    state, step = init_state(parts, 0), make_step(parts)
    for seed in range(steps):
        batch = random_batch(config)
        tokens = chain(*batch.tokens.shape, seed)
        state, _ = step(state, batch._replace(tokens=tokens))
    host = jax.tree.map(np.asarray, (state.params, state.balance))
    return config, *host


def built(*, f64: bool = False, **changes) -> tuple[Transformer, Weights, tuple]:
    """Model, split weights, and (params, balance); with x64 on if `f64`."""
    config, params, balance = trained()
    if f64:
        params, balance = as_f64((params, balance))
    # Smaller blocks are slow: the tests' emitters copy all rows for each (conftest).
    rt = dataclasses.replace(runtime.build(RuntimeConfig(block=16)), **changes)
    model = Transformer(config.model, rt, balancer_of(config))
    return model, split(model, params, balance), (params, balance)


@functools.cache
def balancer_of(config):
    return assemble(config).balancer
