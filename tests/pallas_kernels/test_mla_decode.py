"""Tiled latent attention and its oracle against plain loops; junk, memory, trips."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_decode import reference
from pallas_kernels.mla_decode.reference import (
    latent_attention,
    latent_attention_oracle,
)
from tests.agreement import as_dtype, assert_agree, largest

BOTH = [latent_attention, latent_attention_oracle]
SCALE = 0.7


class Case(NamedTuple):
    """Sizes; `page` is the tokens of a page, 0 for a cache without pages."""

    length: int
    capacity: int
    tile: int = 8
    page: int = 0
    batch: int = 5
    heads: int = 3
    latent: int = 5
    rope: int = 2


CASES = {
    "one query": Case(1, 24),
    "one key": Case(1, 1),
    "a tile that divides nothing": Case(2, 23, tile=7),
    "a tile larger than the cache": Case(3, 11, tile=512),
    "tiles of one key": Case(4, 6, tile=1),
    "five queries": Case(5, 37, tile=16),
    "more heads than rows of a piece": Case(2, 9, batch=3, heads=600, latent=2),
    "pieces that divide nothing": Case(5, 19, batch=3, heads=200, latent=2),
    "pages": Case(1, 24, page=8),
    "pages larger than a tile": Case(3, 30, tile=4, page=10),
    "pages that divide nothing": Case(5, 21, tile=7, page=3),
    "more pages than a tile takes": Case(4, 22, tile=512, page=2),
    "pages of one key, one piece a query": Case(2, 5, page=1, heads=400, latent=2),
}
SOME = ["five queries", "pages that divide nothing"]


class Cache(NamedTuple):
    """What a call reads besides the queries; table is None without pages."""

    c_kv: np.ndarray
    k_rope: np.ndarray
    position: np.ndarray
    table: np.ndarray | None


def operands(case, junk=np.nan):
    """Both queries and a cache with `junk` in every key that its row does not see."""
    rng = np.random.default_rng(0)
    lead = case.batch, case.length
    q_lat = rng.normal(size=(*lead, case.heads, case.latent))
    q_rope = rng.normal(size=(*lead, case.heads, case.rope))
    # Ragged on purpose: a row that sees nothing, a full one, then whatever comes, and
    # a query that sees nothing beside others that do.
    position = rng.integers(-1, case.capacity, lead)
    position[0], position[1] = -1, case.capacity - 1 - np.arange(case.length)
    position = np.maximum(position, -1)
    position[2:, 0] = rng.integers(-1, case.capacity + 3, case.batch - 2)
    position[-1, -1] = -1
    hidden = np.arange(case.capacity) > position.max(1, keepdims=True)
    caches = [
        rng.normal(size=(case.batch, case.capacity, width))
        for width in (case.latent, case.rope)
    ]
    for x in caches:
        x[hidden] = junk
    cache = Cache(*caches, position, None)
    return q_lat, q_rope, paged(rng, case, cache, hidden) if case.page else cache


def paged(rng, case, cache, hidden):
    """The same cache in shuffled pages; entries that no position needs point anywhere.

    The pools have as many pages as are in use, so that rows take what others leave.
    """
    per_row = case.capacity // case.page
    used = ~hidden.reshape(case.batch, per_row, case.page).all(-1)
    number = rng.permutation(used.sum())
    table = rng.integers(0, len(number), used.shape)
    table[used] = number

    def pool(x):
        pages = x.reshape(case.batch, per_row, case.page, -1)[used]
        return pages[np.argsort(number)]

    return Cache(pool(cache.c_kv), pool(cache.k_rope), cache.position, table)


def loops(q_lat, q_rope, c_kv, k_rope, position, table=None, scale=SCALE):
    """A query at a time, a key at a time."""
    out = np.zeros_like(q_lat)
    per_row = c_kv.shape[1] * (1 if table is None else table.shape[1])
    for b, at, h in np.ndindex(q_lat.shape[:3]):
        scores, values = [], []
        for s in range(min(position[b, at] + 1, per_row)):
            key = (b, s)
            if table is not None:
                key = table[b, s // c_kv.shape[1]], s % c_kv.shape[1]
            score = q_lat[b, at, h] @ c_kv[key] + q_rope[b, at, h] @ k_rope[key]
            scores.append(scale * score)
            values.append(c_kv[key])
        if scores:
            p = np.exp(np.array(scores) - max(scores))
            out[b, at, h] = p / p.sum() @ np.array(values)
    return out


@functools.cache
def exact(name):
    q_lat, q_rope, cache = operands(CASES[name])
    return loops(q_lat, q_rope, *cache)


def call(function, q_lat, q_rope, cache, scale=SCALE, **options):
    table = () if cache.table is None else (cache.table,)
    run = jax.jit(functools.partial(function, scale=scale, **options))
    return run(q_lat, q_rope, *cache[:3], *table)


def rounded(case, *dtypes):
    """Operands in these dtypes (queries, cache), and the same values in float64."""
    q_lat, q_rope, cache = operands(case)
    query, stored = dtypes
    narrow = [
        *as_dtype([q_lat, q_rope], query),
        *as_dtype([cache.c_kv, cache.k_rope], stored),
    ]
    wide = [np.asarray(x).astype(np.float64) for x in narrow]
    rest = cache.position, cache.table
    return [(*x[:2], Cache(*x[2:], *rest)) for x in (narrow, wide)]


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_what_plain_loops_compute(name):
    with jax.enable_x64(True):
        actual = call(latent_attention_oracle, *operands(CASES[name]))
    assert actual.dtype == jnp.float64
    assert_agree([actual], [exact(name)], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_what_plain_loops_compute(name):
    case = CASES[name]
    with jax.enable_x64(True):
        actual = call(latent_attention, *operands(case), tile=case.tile)
    assert actual.dtype == jnp.float64
    assert_agree([actual], [exact(name)], 1e-12)


@pytest.mark.parametrize("query", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("function", BOTH)
def test_only_operands_are_rounded_never_sums(function, name, stored, query):
    narrow, wide = rounded(CASES[name], query, stored)
    actual = call(function, *narrow)
    assert actual.dtype == jnp.float32
    assert_agree([actual], [loops(*wide[:2], *wide[2])], 2e-6)
    assert_agree([actual], [exact(name)], 3e-2)


@pytest.mark.parametrize("function", BOTH)
def test_what_sees_nothing_is_zero(function):
    q_lat, q_rope, cache = operands(CASES["five queries"])
    nothing = cache._replace(position=np.full_like(cache.position, -1))
    floats = as_dtype([q_lat, q_rope], jnp.float32)
    actual = np.asarray(call(function, *floats, nothing))
    assert actual.shape == q_lat.shape
    assert not actual.any()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", SOME)
def test_what_lies_beyond_a_row_s_positions_changes_no_bit(name, junk, function):
    results = []
    for value in (0.0, junk):
        q_lat, q_rope, cache = operands(CASES[name], value)
        q_lat, q_rope, *pools = as_dtype([q_lat, q_rope, *cache[:2]], jnp.float32)
        out = call(function, q_lat, q_rope, Cache(*pools, *cache[2:]))
        results.append(np.asarray(out))
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("name", SOME)
def test_scores_beyond_the_range_of_exp_do_not_overflow(name):
    q_lat, q_rope, cache = operands(CASES[name])
    floats = as_dtype([q_lat, q_rope], jnp.float32)
    actual = call(latent_attention, *floats, cache, scale=300.0, tile=8)
    expected = loops(q_lat, q_rope, *cache, scale=300.0)
    # Scores of some thousands are rounded to 2^-24 of their size.
    assert_agree([actual], [expected], 1e-3)


@pytest.mark.parametrize("page", [0, 4])
def test_each_row_stops_after_its_last_visible_key(page, monkeypatch):
    visits = set()
    keys = reference._keys

    def watched(pool, table, row, start, size):
        jax.debug.callback(lambda *at: visits.add(tuple(map(int, at))), row, start)
        return keys(pool, table, row, start, size)

    monkeypatch.setattr(reference, "_keys", watched)
    case = Case(2, 64, tile=8, page=page, batch=4)
    q_lat, q_rope, cache = operands(case, junk=0.0)
    last = np.array([-1, 63, 7, 8])
    position = np.stack([last, np.minimum(last, 0)], 1)
    table = None if not page else np.zeros((4, 64 // page), int)
    call(
        latent_attention,
        q_lat,
        q_rope,
        cache._replace(position=position, table=table),
        tile=8,
    )
    jax.effects_barrier()
    assert visits == {(1, 8 * i) for i in range(8)} | {(2, 0), (3, 0), (3, 8)}


def temporaries(function, capacity, page):
    """Bytes that the compiled call holds besides its arguments and its result."""
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    lead = (2, capacity) if not page else (2 * capacity // page, page)
    table = [ints((2, capacity // page))] if page else []
    shapes = f32((2, 4, 8, 64)), f32((2, 4, 8, 16)), f32((*lead, 64)), f32((*lead, 16))
    run = jax.jit(functools.partial(function, scale=SCALE))
    compiled = run.lower(*shapes, ints((2, 4)), *table).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("page", [0, 64])
def test_memory_does_not_grow_with_the_cache(page):
    sizes = 2048, 16384
    oracle = [temporaries(latent_attention_oracle, size, page) for size in sizes]
    tiled = [temporaries(latent_attention, size, page) for size in sizes]
    tile = 512 * (64 + 16) * 4
    assert oracle[1] > 7 * oracle[0] > tile  # what it would look like
    assert tiled[1] - tiled[0] < tile
    assert tiled[1] < 5 * tile


def test_all_scores_never_exist_at_once():
    case = Case(16, 256, batch=3, heads=64, latent=2)
    scores = case.batch * case.length * case.heads * case.capacity
    *floats, cache = operands(case)
    args = *floats, *cache[:3]
    one = functools.partial(latent_attention_oracle, scale=SCALE)
    assert largest(one, *args) >= scores
    tiles = functools.partial(latent_attention, scale=SCALE, tile=32)
    assert largest(tiles, *args) < scores / 32
