"""Generation: prompts of unequal lengths into a cache, then steps until all are done.

Shapes are rounded up to powers of two, and everything else that a request may choose
(lengths, limits, stop tokens, temperatures, seeds) is data, so that one compiled
prefill and one compiled loop serve them all. The loop is a `lax.while_loop`; somebody
who watches gets it in slices. Source of the method: arXiv:2412.19437, section 3.4; of
the steps, `speculative`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.decode import cache as caches
from deepseek_jax.decode import request
from deepseek_jax.decode.cache import bucket
from deepseek_jax.decode.forward import (
    Attend,
    Weights,
    attend_absorbed,
    attend_expanded,
    forward,
    forward_mtp,
)
from deepseek_jax.decode.sampling import Sampling, sampling
from deepseek_jax.decode.speculative import State, mtp_input, step, window
from deepseek_jax.model.count import cache_bytes
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.runtime import XLA, Choice, dry_run
from deepseek_jax.typing import Array

CHUNK = 16384  # prompt tokens that one forward pass of prefill takes, over all rows
SLICE = 8  # steps between two calls of a callback

# Called with the row and its new tokens.
Callback = Callable[[int, list[int]], None]


class Generation(NamedTuple):
    """One row's output."""

    tokens: list[int]  # generated ones, a stop token included
    log_probs: list[float]  # of each, under the model without any sampling rule
    stopped: bool  # by a stop token, not by the limit
    steps: int  # forward passes of the main model after prefill
    judged: list[int]  # how often draft 1, 2, .. J was one that could be kept
    accepted: list[int]  # how often it was; see `speculative.acceptance`


class Report(NamedTuple):
    """All rows' output, and what it took."""

    rows: list[Generation]
    prefill_s: float  # its compilation, the first time, included
    compile_s: float  # of the loop, and a step of it that makes nothing
    decode_s: float  # without what a callback took
    cache_bytes: int


def generate(
    model: Transformer,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    rule: Sampling | None = None,
    stop: Sequence[int] = (),
    depth: int = 0,
    context: int | None = None,
    dtype: Any = jnp.float32,
    page: int = 0,
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Report:
    """Continues prompts.

    Args:
      weights: `forward.split` of a checkpoint's parameters.
      prompts: token ids, one list a row.
      rule: `sampling.sampling` of as many rows; None is greedy.
      stop: tokens that end a row.
      depth: MTP modules that draft; 0 is plain decoding.
      context: the most tokens the model is made for; None does not ask.
      dtype: of the cache.
      page: tokens a page of the cache; 0 gives all rows the longest one's room.
      chunk: prompt tokens of a row that are prefilled at once; bounds memory.
      callback: told about new tokens, a slice of steps at a time.

    Raises:
      ValueError: see `request.check`; before anything is compiled.
    """
    request.check(
        model,
        prompts,
        max_tokens,
        depth=depth,
        context=context,
        page=page,
        chunk=chunk,
    )
    rule = sampling(len(prompts)) if rule is None else rule
    if len(rule.seed) != len(prompts):
        raise ValueError(
            f"rule has {len(rule.seed)} rows: must be {len(prompts)}, one a prompt"
        )
    rule = jax.device_put(rule, model.rt.placed)
    started = time.perf_counter()
    state = prefill(
        model,
        weights,
        prompts,
        max_tokens,
        depth=depth,
        dtype=dtype,
        page=page,
        chunk=chunk,
    )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    limit_B = jax.device_put(lengths + max_tokens, model.rt.placed)
    stop_N = jnp.asarray([*stop, *[-1] * (4 - len(stop) % 4)], jnp.int32)
    jax.block_until_ready(state)
    prefilled = time.perf_counter()
    state = warm_up(model, weights, state, rule, stop_N)
    budget = jnp.int32(SLICE if callback else np.iinfo(np.int32).max)
    compiled, told, paused_s = time.perf_counter(), lengths.copy(), 0.0
    while not np.asarray(state.done_B).all():  # `.all()` of JAX would be compiled here
        state = advance(model, weights, state, rule, limit_B, stop_N, budget)
        if callback:
            tokens_BS, length_B = jax.device_get((state.tokens_BS, state.length_B))
            paused = time.perf_counter()
            for row in np.flatnonzero(length_B > told):
                callback(int(row), tokens_BS[row, told[row] : length_B[row]].tolist())
            told = length_B
            paused_s += time.perf_counter() - paused
    jax.block_until_ready(state)
    ended = time.perf_counter()
    rows = collect(state, lengths, stop)
    return Report(
        rows,
        prefilled - started,
        compiled - prefilled,
        ended - compiled - paused_s,
        caches.num_bytes(state.cache),
    )


def attention(model: Transformer, dtype: Any, page: int = 0) -> Choice:
    """Which implementation a step's attention over the cache takes, and why no faster.

    Args:
      dtype, page: of the cache.
    """
    at, shaped = model.config.attention, jax.ShapeDtypeStruct
    rows = model.rt.devices
    pool = rows, page or bucket(1)
    with dry_run() as notes:
        jax.eval_shape(
            functools.partial(model.rt.latent_attention, scale=1.0),
            shaped((rows, 1, at.num_heads, at.kv_rank), jnp.float32),
            shaped((rows, 1, at.num_heads, at.rope_dim), jnp.float32),
            shaped((*pool, at.kv_rank), dtype),
            shaped((*pool, at.rope_dim), dtype),
            shaped((rows, 1), jnp.int32),
            shaped((rows, 1), jnp.int32) if page else None,
        )
    return notes.get("latent_attention", Choice(XLA, "the runtime has no other"))


def bytes_per_token(config: ModelConfig, depth: int, dtype: Any) -> int:
    """What a token takes in the cache, with `depth` drafting MTP modules."""
    one = cache_bytes(config, jnp.dtype(dtype).itemsize)
    return one + depth * one // config.num_layers


def collect(state: State, lengths: np.ndarray, stop: Sequence[int]) -> list[Generation]:
    """What each row has generated, on the host."""
    tokens_BS, log_prob_BS = np.asarray(state.tokens_BS), np.asarray(state.log_prob_BS)
    rows = []
    for row, end in enumerate(np.asarray(state.length_B)):
        new = tokens_BS[row, lengths[row] : end].tolist()
        rows.append(
            Generation(
                new,
                log_prob_BS[row, lengths[row] : end].tolist(),
                new[-1] in stop,
                int(state.steps_B[row]),
                np.asarray(state.judged_BJ[row]).tolist(),
                np.asarray(state.accepted_BJ[row]).tolist(),
            )
        )
    return rows


def warm_up(
    model: Transformer, weights: Weights, state: State, rule: Sampling, stop_N: Array
) -> State:
    """Compiles `advance` and takes a step that has no room for any token.

    The first step of a program is slower than all others, on a CPU by that of hundreds.
    """
    # Arrays come from where those of later calls do, or all would be compiled again.
    limit_B = jax.device_put(np.array(state.length_B), model.rt.placed)
    done_B, steps_B = jnp.copy(state.done_B), jnp.copy(state.steps_B)
    state = advance(model, weights, state, rule, limit_B, stop_N, jnp.int32(1))
    return jax.block_until_ready(state._replace(done_B=done_B, steps_B=steps_B))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    model: Transformer,
    weights: Weights,
    state: State,
    rule: Sampling,
    limit_B: Array,
    stop_N: Array,
    budget: Array,
) -> State:
    """Steps until all rows are done, at most `budget`."""

    def go_on(carry: tuple[Array, State]) -> Array:
        return (carry[0] < budget) & ~carry[1].done_B.all()

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        done, state = carry
        return done + 1, step(model, weights, state, rule, limit_B, stop_N)

    return jax.lax.while_loop(go_on, body, (jnp.int32(0), state))[1]


def prefill(
    model: Transformer,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    depth: int = 0,
    dtype: Any = jnp.float32,
    page: int = 0,
    chunk: int | None = None,
) -> State:
    """The state before the first step: all but the last token of each prompt is cached.

    The first chunk of all rows attends expanded, later ones absorbed.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # A step may write drafts past a row's limit.
    needs = [int(length) + max_tokens + depth for length in lengths]
    capacity = bucket(max(needs))
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    seen_BV = np.zeros((len(prompts), model.config.vocab_size), np.bool_)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
        seen_BV[row, list(prompt)] = True
    placed, rows = model.rt.placed, len(prompts)
    zeros = functools.partial(jnp.zeros, device=placed)
    kind = jnp.promote_types(weights.embed.dtype, jnp.float32)
    state = State(
        jax.device_put(tokens_BS, placed),
        jax.device_put(lengths, placed),
        zeros(rows, jnp.bool_),
        jax.device_put(seen_BV, placed),
        zeros(tokens_BS.shape, kind),
        zeros((rows, window(depth), model.config.dim), kind),
        caches.create(model.config, needs, depth, dtype=dtype, page=page, at=placed),
        zeros(rows, jnp.int32),
        zeros((rows, depth), jnp.int32),
        zeros((rows, depth), jnp.int32),
    )
    most = chunk or max(16, CHUNK // rows)
    todo, start = int(lengths.max()) - 1, 0
    while start < todo:
        size = min(most, bucket(todo - start))
        attend = attend_absorbed if start else attend_expanded
        state = extend(model, size, attend, weights, state, jnp.int32(start))
        start += size
    return state


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def extend(
    model: Transformer,
    size: int,
    attend: Attend,
    weights: Weights,
    state: State,
    start: Array,
) -> State:
    """Caches the known tokens at positions start .. start+size-1, save the last one."""
    depth, kept = state.accepted_BJ.shape[1], state.hidden_BWD.shape[1]
    there_BL = jnp.broadcast_to(start + jnp.arange(size), (len(state.length_B), size))
    known_B1 = state.length_B[:, None] - 1
    position_BL = jnp.where(there_BL < known_B1, there_BL, -1)

    def tokens_after(k: int) -> Array:
        place_BL = jnp.minimum(there_BL + k, state.tokens_BS.shape[1] - 1)
        return jnp.take_along_axis(state.tokens_BS, place_BL, 1)

    x_BLD, cache = forward(
        model, weights, tokens_after(0), position_BL, state.cache, attend
    )
    if not depth:
        return state._replace(cache=cache)
    h_BLD = mtp_input(model, weights, x_BLD)
    wanted_BW = known_B1 + jnp.arange(-kept, 0) - start  # among these positions
    new_BWD = jnp.take_along_axis(h_BLD, wanted_BW.clip(0, size - 1)[..., None], 1)
    here_BW = (wanted_BW >= 0) & (wanted_BW < size)
    hidden_BWD = jnp.where(here_BW[..., None], new_BWD, state.hidden_BWD)
    hidden_BWD = model.rt.constrain(hidden_BWD, "hidden")
    for k in range(1, depth + 1):
        h_BLD, _, cache = forward_mtp(
            model, weights, k, h_BLD, tokens_after(k), position_BL, cache, attend
        )
    return state._replace(hidden_BWD=hidden_BWD, cache=cache)
