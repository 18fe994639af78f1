"""Prefill and steps against the whole model: equal, whatever the chunks and cache."""

import contextlib
import dataclasses
import functools
import logging
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import presets, runtime
from deepseek_jax.config import Config, MTPConfig, OptimConfig, RuntimeConfig
from deepseek_jax.decode import cache as caches
from deepseek_jax.decode import engine, forward, request
from deepseek_jax.decode.cache import Layer
from deepseek_jax.decode.sampling import sampling
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.state import assemble, init_state
from pallas_kernels.choice import INTERPRET, XLA
from pallas_kernels.testing import distance, interpreted
from tests.decode import replica
from tests.factory import SMALL, small

LENGTHS = (1, 2, 9, 17, 30)


def prompts(lengths=LENGTHS, seed=1):
    rows = replica.chain(len(lengths), max(lengths), seed)
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def stepwise(model, weights, rows, widths, **options):
    """Logits [B, L, V] of whole rows, the first half prefilled, then `widths` tokens at
    a time; NaN where prefill computed them.
    """
    lengths = np.array([len(row) for row in rows])
    halves = np.maximum(lengths // 2, 1)
    state = engine.prefill(
        model,
        weights,
        [row[:half] for row, half in zip(rows, halves, strict=True)],
        max_tokens=int(lengths.max()),
        **options,
    )
    tokens = np.asarray(filled(rows)[0])
    out = np.full((*tokens.shape, model.config.vocab_size), np.nan)
    at, cache, widths = halves - 1, state.cache, iter(widths * tokens.shape[1])
    run = jax.jit(forward.forward, static_argnums=0)
    while (at < lengths).any():
        there = at[:, None] + np.arange(next(widths))
        position = np.where(there < lengths[:, None], there, -1)
        window = np.take_along_axis(tokens, np.minimum(there, tokens.shape[1] - 1), 1)
        x, cache = run(
            model, weights, jnp.asarray(window), jnp.asarray(position), cache
        )
        got = forward.logits(model, weights, forward.final_norm(model, weights, x))
        for row, i in np.argwhere(position >= 0):
            out[row, position[row, i]] = got[row, i]
        at = at + there.shape[1]
    return out


def whole(model, kept, rows):
    """The same of the model as it is trained; what follows a row does not change it."""
    params, balance = kept
    tokens, position = filled(rows)
    run = jax.jit(lambda *args: model.apply({"params": params}, *args).hidden_BLD)
    all_BLV = np.asarray(run(tokens, position, balance) @ params["head"])
    return [out[: len(row)] for out, row in zip(all_BLV, rows, strict=True)]


def filled(rows):
    """Rows as one array, zeros after the shorter ones, and the positions [B, L]."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return jnp.asarray(tokens), jnp.asarray(position)


@pytest.mark.parametrize(
    ("widths", "options"),
    [
        ([1], {}),
        ([1, 3, 2], {"chunk": 16}),
        ([2], {"page": 4}),
        ([4, 1], {"page": 8, "chunk": 16, "depth": 2}),
    ],
)
def test_the_cache_changes_nothing_in_float64(widths, options):
    with jax.enable_x64(True):
        model, weights, kept = replica.built(f64=True)
        rows = prompts((1, 2, 9, 17, 70))
        got = stepwise(model, weights, rows, widths, dtype=jnp.float64, **options)
        for row, want in zip(got, whole(model, kept, rows), strict=True):
            row = row[: len(want)]
            seen = ~np.isnan(row[:, 0])
            assert seen.sum() > len(want) // 2
            bound = 1e-10 * np.abs(want).max()
            np.testing.assert_allclose(row[seen], want[seen], rtol=0, atol=bound)


@pytest.mark.parametrize("options", [{}, {"chunk": 16, "page": 8}])
def test_in_float32_but_for_ties_of_the_router(options):
    model, weights, kept = replica.built()
    rows = prompts([70, 40, 33, 17, 9, 60, 64, 48])
    got = stepwise(model, weights, rows, [1, 2], **options)
    with jax.enable_x64(True):
        exact, weights64, _ = replica.built(f64=True)
        margins = margin(exact, weights64, rows)
    near = left = total = 0
    for row, want, margin_L in zip(got, whole(model, kept, rows), margins, strict=True):
        row, margin_L = row[: len(want)], margin_L[: len(want)]
        seen = ~np.isnan(row[:, 0])
        # A flip changes what later positions see, so those are left out too.
        clear = seen & (np.minimum.accumulate(margin_L) > 1e-6)
        left, total = left + (seen & ~clear).sum(), total + seen.sum()
        near += (seen & (margin_L <= 1e-6)).sum()
        bound = 2e-5 * np.abs(want).max()
        np.testing.assert_allclose(row[clear], want[clear], rtol=0, atol=bound)
    print(f"{near} of {total} positions near a tie, {left} left out")
    assert near < 1e-3 * total and left < 0.02 * total


def margin(model, weights, rows):
    """Of each position, the least gap between two experts that follow each other, [B,
    L].
    """
    gaps = []

    def select(scores_TE, state):
        choice_TE = model.balancer.select(scores_TE, state)
        gaps.append(np.diff(np.sort(choice_TE)).min(1))
        return choice_TE

    balancer = dataclasses.replace(model.balancer, select=select)
    watched = model.clone(balancer=balancer)
    tokens, position = filled(rows)
    cache = caches.create(model.config, [len(row) for row in rows], dtype=jnp.float64)
    # Nothing is traced here, so `select` sees numbers.
    forward.forward(watched, weights, tokens, position, cache, forward.attend_expanded)
    assert len(gaps) == model.config.num_moe
    return np.min(gaps, 0).reshape(tokens.shape)


def test_a_bfloat16_cache_is_near():
    model, weights, kept = replica.built()
    rows = prompts([40] * 4)
    got = stepwise(model, weights, rows, [1], dtype=jnp.bfloat16)
    for row, want in zip(got, whole(model, kept, rows), strict=True):
        seen = ~np.isnan(row[:, 0])
        error = np.abs(row[seen] - want[seen]).mean() / np.abs(want).max()
        assert 1e-5 < error < 2e-2


@pytest.mark.parametrize("page", [pytest.param(0, marks=pytest.mark.slow), 64])
def test_a_step_with_the_kernel_is_one_without(page):
    """Two tokens a row at once, as drafts are judged; rows of unequal lengths.

    Attention is to be within 3e-3, which each layer adds to what it is given.
    """
    at = dataclasses.replace(SMALL.attention, kv_rank=32, rope_dim=16)
    config = small(depth=0)
    model = dataclasses.replace(config.model, num_layers=2, num_dense=1, attention=at)
    config = dataclasses.replace(config, model=model)
    parts = assemble(config)
    state = init_state(parts, 0)
    rows, made = prompts([70, 9]), {}
    for name, compile in ((XLA, jax.jit), (INTERPRET, interpreted)):
        how = RuntimeConfig(compute="bf16", attention="plain", implementation=XLA)
        rt = runtime.build(how)
        attend = functools.partial(rt.latent_attention, implementation=name)
        rt = dataclasses.replace(rt, latent_attention=attend)
        model = Transformer(config.model, rt, parts.balancer)
        weights = forward.split(model, state.params, state.balance)
        needs = [len(row) for row in rows]
        cache = caches.create(config.model, needs, dtype=jnp.bfloat16, page=page)
        tokens, position = filled(rows)
        early = jnp.where(position < jnp.asarray(needs)[:, None] - 2, position, -1)
        first = jax.jit(forward.forward, static_argnums=(0, 5))
        _, cache = first(model, weights, tokens, early, cache, forward.attend_expanded)
        last = jnp.asarray(needs)[:, None] + jnp.arange(-2, 0)
        new = jnp.take_along_axis(tokens, last, 1)
        step = compile(functools.partial(forward.forward, model))
        made[name] = np.asarray(step(weights, new, last, cache)[0])
        assert engine.attention(model, jnp.bfloat16, page) == (name, "")
    bound = 3e-3 * config.model.num_layers
    assert 0 < distance(made[INTERPRET], made[XLA]) < bound


@pytest.mark.parametrize("page", [0, 4])
def test_the_cache_holds_nothing_but_latents(page):
    model, _, _ = replica.built()
    config, at = model.config, model.config.attention
    lengths = [3, 30, 60]
    cache = caches.create(config, lengths, 2, page=page)
    assert len(cache.layers) == config.num_layers + 2
    for layer in cache.layers:
        assert isinstance(layer, Layer) and len(layer) == 2
        assert layer.c_kv.shape[2:] == (at.kv_rank,)
        assert layer.k_rope.shape[2:] == (at.rope_dim,)
    tokens = np.prod(cache.layers[0].c_kv.shape[:2])
    one = engine.bytes_per_token(config, 2, jnp.float32)
    assert one == (config.num_layers + 2) * (at.kv_rank + at.rope_dim) * 4
    table = 0 if cache.table_BP is None else cache.table_BP.nbytes
    assert caches.num_bytes(cache) == one * tokens + table
    # Rows of 3, 30 and 60 tokens: pages need little more than their sum.
    assert tokens == (3 * 64 if not page else 24 * 4)


def test_pages_are_nobody_elses():
    table = np.asarray(caches.assign([3, 9, 4], page=4, width=5))
    own = [table[0, :1], table[1, :3], table[2, :1]]
    assert sorted(np.concatenate(own)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("size", "room"),
    [(1, 16), (16, 16), (17, 32), (33, 48), (128, 128), (130, 160), (8193, 10240)],
)
def test_shapes_round_up_to_eighths_of_powers_of_two(size, room):
    assert caches.bucket(size) == room
    assert caches.bucket(5, 1) == 5 and caches.bucket(9, 1) == 10


def test_positions_that_are_not_there_are_written_nowhere():
    for table in (None, caches.assign([8, 8], 4, 2)):
        shape = (2, 8) if table is None else (5, 4)
        layer = Layer(jnp.zeros((*shape, 1)), jnp.zeros((*shape, 1)))
        new = Layer(jnp.ones((2, 3, 1)), jnp.ones((2, 3, 1)))
        position = jnp.asarray([[0, -1, 8], [7, 100, -5]])
        for array in caches.append(layer, new, position, table):
            assert array.sum() == 2
            assert np.flatnonzero(array).tolist() == [0, 15]


def test_nothing_is_compiled_again():
    """Not for other lengths in a bucket, limits, stop tokens, rules or seeds."""
    model, weights, _ = replica.built()
    engine.generate(model, weights, prompts([17, 25]), 10, depth=1)
    engine.extend.clear_cache(), engine.advance.clear_cache()
    for lengths, most, stop, rule in [
        ((17, 25), 10, (), sampling(2)),
        ((30, 2), 7, (1, 2), sampling(2, temperature=0.7, top_p=0.9, seed=4)),
        ((25, 9), 12, (3,), sampling(2, temperature=0.1, top_k=3, repetition=1.3)),
    ]:
        rows = prompts(lengths)
        engine.generate(model, weights, rows, most, depth=1, stop=stop, rule=rule)
    assert engine.extend._cache_size() == engine.advance._cache_size() == 1


def test_watching_compiles_nothing_more():
    """Whatever the numbers of new tokens between two calls."""
    model, weights, _ = replica.built()
    heard = []

    def run(most):
        rule = sampling(3, temperature=1.0)
        engine.generate(
            model,
            weights,
            prompts([5, 9, 2]),
            most,
            depth=2,
            rule=rule,
            callback=lambda row, new: heard.append(len(new)),
        )

    run(20)
    with jax.log_compiles(), warnings.catch_warnings(record=True):
        before = len(heard)
        with count_compilations() as compiled:
            run(21)
    assert len(set(heard[before:])) > 3
    assert compiled == []


def test_the_loop_is_compiled_once_for_weights_that_have_their_device():
    """As a checkpoint's do; a second time would count as decoding."""
    model, weights, _ = replica.built()
    weights = jax.device_put(weights, jax.devices()[0])
    engine.advance.clear_cache()
    quiet = warnings.catch_warnings(record=True)
    with jax.log_compiles(), quiet, count_compilations() as compiled:
        engine.generate(model, weights, prompts([17, 25]), 6, depth=1)
    assert sum("jit(advance)" in name for name in compiled) == 1


@contextlib.contextmanager
def count_compilations():
    """The names of programs that are compiled inside."""
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage())
    log = logging.getLogger("jax._src.interpreters.pxla")
    log.addHandler(handler)
    try:
        yield names
    finally:
        log.removeHandler(handler)
        names[:] = [name for name in names if name.startswith("Compiling")]


def test_a_callback_hears_every_token_once_and_its_time_does_not_count():
    model, weights, _ = replica.built()
    heard, slept = {row: [] for row in range(len(LENGTHS))}, 0.0

    def hear(row, new):
        nonlocal slept
        start = time.perf_counter()
        heard[row].extend(new)
        time.sleep(0.05)
        slept += time.perf_counter() - start

    start = time.perf_counter()
    report = engine.generate(model, weights, prompts(), 21, depth=2, callback=hear)
    took = time.perf_counter() - start
    assert report.prefill_s + report.compile_s + report.decode_s <= took - slept
    assert [row.tokens for row in report.rows] == list(heard.values())
    assert all(len(new) == 21 for new in heard.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "there are none"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 61]]}, "prompt 0 has token 61: must be 0 to 60"),
        ({"prompts": [[-1]]}, "has token -1"),
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"depth": 4}, "depth = 4: must be from 0 to 3"),
        ({"depth": -1}, "depth = -1: must be from 0 to 3"),
        ({"context": 10}, "context is 10; ask for at most 7"),
        ({"context": 2}, "context is 2"),
        ({"page": -1}, "page = -1: must be at least 0"),
        ({"chunk": 0}, "chunk = 0: must be at least 1"),
        ({"rule": sampling(3)}, "rule has 3 rows: must be 1"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_compiled(
    change, message, monkeypatch
):
    model, weights, _ = replica.built()
    monkeypatch.setattr(engine, "prefill", pytest.fail)
    request = {"prompts": [[1, 2, 3]], "max_tokens": 8} | change
    with pytest.raises(ValueError, match=message):
        engine.generate(model, weights, **request)


def test_models_without_what_is_needed_are_refused():
    model, _, _ = replica.built()
    config = dataclasses.replace(model.config, mtp=MTPConfig(depth=0))
    with pytest.raises(ValueError, match="the model has none"):
        request.check(model.clone(config=config), [[1]], 1, depth=1)
    at = dataclasses.replace(model.config.attention, kind="mha")
    config = dataclasses.replace(model.config, attention=at)
    with pytest.raises(ValueError, match="decoding needs 'mla'"):
        request.check(model.clone(config=config), [[1]], 1)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_loop_needs_little_more_than_weights_and_cache(depth):
    config = Config(model=presets.mini(), optim=OptimConfig(horizon=1))
    parts = assemble(config)

    def request():
        start = init_state(parts, 0)
        weights = forward.split(parts.model, start.params, start.balance)
        prompts = [[1] * 16] * 8
        state = engine.prefill(
            parts.model, weights, prompts, 8192 - 16 - depth, depth=depth
        )
        return weights._replace(mtp=weights.mtp[:depth]), state

    weights, state = jax.eval_shape(request)
    assert state.tokens_BS.shape == (8, 8192)
    numbers = jnp.zeros(8, jnp.int32)
    compiled = engine.advance.lower(
        parts.model, weights, state, sampling(8), numbers, numbers, numbers[0]
    ).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    needed += 8 * 8192 * engine.bytes_per_token(config.model, depth, jnp.float32)
    assert used < 1.1 * needed


@pytest.mark.parametrize("rows", [16, 40])
def test_the_loop_copies_no_experts(rows):
    """Neither with few slots nor with more, at a context too short to hide it."""
    config = Config(model=presets.mini(), optim=OptimConfig(horizon=1))
    parts = assemble(config)

    def request():
        start = init_state(parts, 0)
        weights = forward.split(parts.model, start.params, start.balance)
        return weights, engine.prefill(parts.model, weights, [[1, 2]] * rows, 14)

    weights, state = jax.eval_shape(request)
    numbers = jnp.zeros(rows, jnp.int32)
    compiled = engine.advance.lower(
        parts.model, weights, state, sampling(rows), numbers, numbers, numbers[0]
    ).compile()
    experts = weights.blocks[-1][0]["moe"]["gate"]
    logits = rows * config.model.vocab_size * 4
    room = 2 * experts.size * 4 + 12 * logits
    assert compiled.memory_analysis().temp_size_in_bytes < room
