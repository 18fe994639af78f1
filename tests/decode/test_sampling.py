"""Sampling: against its definitions in float64, and draws against their odds."""

import functools
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from deepseek_jax.decode import sampling as maths
from deepseek_jax.decode.sampling import Sampling, sampling

adjusted = jax.jit(maths.adjusted)
sample = jax.jit(maths.sample)
log_prob = jax.jit(maths.log_prob)
accept = jax.jit(maths.accept)
residual = jax.jit(maths.residual)
keys = jax.jit(maths.keys, static_argnums=2)

B, L, V = 3, 2, 13
INF = np.inf
DRAFT, ACCEPT, RESIDUAL = range(3)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class Kept(NamedTuple):
    p: np.ndarray  # [V], 0 where masked
    clear: np.ndarray  # [V] bool: not so near a limit that rounding decides


def reference(logits, seen, temperature, top_k, top_p, min_p, repetition, margin):
    """The definitions, for one distribution, in float64."""
    x = np.array(logits, np.float64)
    for token in np.flatnonzero(seen):
        x[token] = x[token] * repetition if x[token] < 0 else x[token] / repetition
    order = np.lexsort((np.arange(len(x)), -x))
    clear = np.ones(len(x), bool)
    if temperature == 0:
        return Kept((np.arange(len(x)) == order[0]) * 1.0, clear)
    p = softmax(x / temperature)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        before = np.empty(len(x))
        before[order] = np.cumsum(p[order]) - p[order]
        clear &= np.abs(before - top_p) > margin
        p = np.where(before < top_p, p, 0)
        p /= p.sum()
    clear &= np.abs(p / p.max() - min_p) > margin * min_p
    p = np.where(p >= min_p * p.max(), p, 0)
    return Kept(p / p.sum(), clear)


def row_of(s, b):
    """A row's settings as the numbers that float32 makes of them."""
    return (
        [float(field[b]) for field in s[:1]]
        + [int(s.top_k[b])]
        + [float(field[b]) for field in (s.top_p, s.min_p, s.repetition)]
    )


floats = functools.partial(st.floats, width=32, allow_subnormal=False)
rows_of = functools.partial(arrays.arrays, np.float32, B)
settings = st.builds(
    functools.partial(sampling, B),
    temperature=rows_of(elements=st.sampled_from([0, 0.25, 1, 3])),
    top_k=arrays.arrays(np.int32, B, elements=st.integers(0, V + 2)),
    top_p=rows_of(elements=st.just(1.0) | floats(0.0625, 1)),
    min_p=rows_of(elements=st.just(0.0) | floats(0, 1)),
    repetition=rows_of(elements=st.sampled_from([1, 0.75, 1.5])),
)
# Few values, so that many are equal, or any.
some_logits = arrays.arrays(
    np.float32,
    (B, L, V),
    elements=st.sampled_from([-INF, -2, -1, 0, 0.5, 3]) | floats(-9, 9),
    fill=st.sampled_from([0, -2]),
)
some_seen = arrays.arrays(np.bool_, (B, L, V))


@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-9), (False, 1e-5)])
@given(some_logits, some_seen, settings)
def test_adjusted_distributions_are_what_the_definitions_say(
    x64, tolerance, logits, seen, s
):
    logits[..., 5] = 1.0
    with jax.enable_x64(x64):
        ours = np.asarray(adjusted(jnp.array(logits, float), seen, s), np.float64)
    assert ours.shape == (B, L, V)
    for b, row in np.ndindex(B, L):
        want = reference(logits[b, row], seen[b, row], *row_of(s, b), tolerance)
        kept = ours[b, row] > -INF
        agree = kept == (want.p > 0)
        assert (agree | ~want.clear).all()
        if agree.all():
            np.testing.assert_allclose(softmax(ours[b, row]), want.p, atol=tolerance)


def test_adjusted_at_the_size_of_a_real_vocabulary():
    # 8-bit logits: a third of the vocabulary shares its value with a hundred others.
    x = jax.random.normal(jax.random.key(0), (1, 4, 8192)).astype(jnp.bfloat16)
    order = np.argsort(-np.asarray(x[0], np.float64), -1, kind="stable")
    for top_k, top_p in [
        (50, 1.0),
        (1, 1.0),
        (5000, 1.0),
        (0, 0.9),
        (0, 0.3),
        (40, 0.5),
    ]:
        s = sampling(1, temperature=1.0, top_k=top_k, top_p=top_p)
        ours = np.asarray(adjusted(x, False, s))
        assert ours.dtype == np.float32
        for row in range(4):
            want = reference(x[0, row], [], 1.0, top_k, np.float32(top_p), 0.0, 1.0, 0)
            kept = ours[0, row][order[row]] > -INF
            # A prefix of the order, as long as it should be but for rounding.
            assert kept[: kept.sum()].all()
            slack = 0 if top_p == 1 else 1
            assert abs(kept.sum() - (want.p > 0).sum()) <= slack


def kept(logits, **settings):
    s = sampling(1, **({"temperature": 1.0} | settings))
    out = adjusted(jnp.array(logits, jnp.float32)[None, None], False, s)
    return np.flatnonzero(np.asarray(out)[0, 0] > -INF).tolist()


def test_of_equals_the_lowest_id_comes_first():
    equal = np.zeros(16)
    assert kept(equal, temperature=0) == [0]
    assert kept([0, 3, 1, 3, 3], temperature=0) == [1]
    assert kept(equal, top_k=5) == [0, 1, 2, 3, 4]
    assert kept([0, 3, 1, 3, 3], top_k=2) == [1, 3]
    assert kept([0, 3, 1, 3, 3, 1], top_k=4) == [1, 2, 3, 4]
    # Before the ninth of sixteen lies exactly half of the mass, which is not less.
    assert kept(equal, top_p=0.5) == list(range(8))
    assert kept(equal, top_p=0.51) == list(range(9))
    assert kept(equal, min_p=1) == list(range(16))
    assert kept([-0.0, 0.0], top_k=1) == [0]
    # Different, although 1 less than either is the same float.
    assert kept([0, 1e-20, 1, 0], top_k=2) == [1, 2]
    assert kept([0, 1e-20, 1, 0], top_p=0.5) == [1, 2]
    assert kept([-1.0, 0.0, -0.0], temperature=0) == [1]


def test_top_p_counts_what_top_k_left():
    # 0.4 0.3 0.2 0.1; top-k leaves 4/7 and 3/7.
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert kept(logits, top_p=0.5) == [1, 3]
    assert kept(logits, top_p=0.5, top_k=2) == [1]
    assert kept(logits, top_p=0.75) == [1, 2, 3]
    assert kept(logits, top_p=0.75, top_k=2) == [1, 3]
    assert kept(logits, min_p=0.6) == [1, 3]
    assert kept(logits, top_p=1e-30) == [1]


def test_repetition_lowers_what_was_seen_on_both_sides_of_zero():
    logits = jnp.array([[[2.0, 2.0, -2.0, -2.0, 0.0]]])
    seen = jnp.array([True, False, True, False, True])
    s = sampling(1, temperature=1.0, repetition=2.0)
    x = np.asarray(adjusted(logits, seen, s))[0, 0]
    np.testing.assert_allclose(x - x[4], [1, 2, -4, -2, 0], rtol=1e-6)
    # Greedy decoding heeds it too.
    s = sampling(1, repetition=2.0)
    assert np.asarray(adjusted(logits, seen, s)).argmax() == 1


HUGE = float(np.finfo(np.float32).max)
EXTREMES = [-INF, -HUGE, -1e30, -1.0, -1e-20, 0.0, 1e-20, 1.0, 88.0, HUGE, INF]


@given(
    arrays.arrays(np.float32, (B, L, V), elements=st.sampled_from(EXTREMES)),
    some_seen,
    rows_of(elements=st.sampled_from([0, 1e-45, 1.2e-38, 1e-20, 1, 1e6])),
    rows_of(elements=st.sampled_from([1.2e-38, 1e-6, 0.9, 1])),
    rows_of(elements=st.sampled_from([0, 1e-45, 1])),
    rows_of(elements=st.sampled_from([1e-6, 1, 1e6])),
    st.integers(0, V),
)
def test_extremes_neither_overflow_nor_lose_the_most_probable(
    logits, seen, temperature, top_p, min_p, repetition, top_k
):
    s = sampling(
        B,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition=repetition,
    )
    ours = np.asarray(adjusted(logits, seen, s))
    assert not np.isnan(ours).any()
    assert (ours < INF).all()
    with np.errstate(all="ignore"):
        scale = repetition[:, None, None]
        x = np.where(seen, np.where(logits < 0, logits * scale, logits / scale), logits)
    x = np.minimum(x, HUGE)
    possible = x.max(-1) > -INF
    best = np.take_along_axis(ours, x.argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(best[possible], ours.max(-1)[possible])
    np.testing.assert_array_equal(best[possible], 0)
    tokens = np.asarray(sample(ours, keys(s, jnp.zeros((B, L), int), DRAFT)))
    drawn = np.take_along_axis(ours, tokens[..., None], -1)[..., 0]
    assert (drawn[possible] > -INF).all()


def test_a_change_of_settings_compiles_nothing():
    traces = []

    @jax.jit
    def step(logits, seen, s, position):
        traces.append(1)
        x = maths.adjusted(logits, seen, s)
        return maths.sample(x, maths.keys(s, position, DRAFT)), x

    logits = jax.random.normal(jax.random.key(0), (B, L, V))
    position = jnp.zeros((B, L), jnp.int32)
    seen = jnp.zeros((B, 1, V), bool)
    for s in [
        sampling(B),
        sampling(B, temperature=[0, 1, 2.5], seed=5),
        sampling(B, temperature=1, top_k=np.array([0, 3, 9])),
        sampling(B, temperature=0.7, top_p=0.9, min_p=0.1, repetition=1.1),
        jax.tree.map(jnp.flip, sampling(B, temperature=[0, 1, 2.5], seed=[7, 8, 9])),
    ]:
        tokens, _ = step(logits, seen, s, position)
        assert tokens.dtype == jnp.int32
    assert len(traces) == 1


def test_settings_are_arrays_of_one_row_each():
    s = sampling(3, temperature=0.5, top_k=[1, 2, 3], seed=7)
    types = [field.dtype.name for field in s]
    assert types == ["float32", "int32", "float32", "float32", "float32", "int32"]
    assert [field.shape for field in s] == [(3,)] * 6
    np.testing.assert_array_equal(s.temperature, [0.5] * 3)
    np.testing.assert_array_equal(s.top_k, [1, 2, 3])
    np.testing.assert_array_equal(s.seed, [7, 8, 9])
    np.testing.assert_array_equal(sampling(2, seed=[7, 7]).seed, [7, 7])
    with jax.enable_x64(True):
        assert [field.dtype.name for field in sampling(3)] == types


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"temperature": -0.5},
            r"temperature = -0\.5: must be from 0 \(greedy\) to 1e6",
        ),
        ({"temperature": [1, np.nan]}, r"temperature\[1\] = nan: must be from 0"),
        ({"temperature": 1e39}, r"temperature = 1e\+39: must be"),
        ({"temperature": "hot"}, r"temperature = 'hot': must be from 0"),
        ({"temperature": None}, r"temperature = None: must be from 0"),
        ({"temperature": [1, 2, 3]}, r"temperature has shape \(3,\): .* or 2 of them"),
        ({"top_k": -1}, r"top_k = -1: must be a whole number, at least 0 \(0 is off\)"),
        ({"top_k": 2.0}, r"top_k = 2\.0: must be a whole number"),
        ({"top_k": True}, r"top_k = True: must be a whole number"),
        ({"top_k": 2**31}, r"top_k = 2147483648: must be"),
        ({"top_k": 2**70}, r"top_k = \d+: must be a whole number"),
        ({"top_p": 0}, r"top_p = 0: must be above 0 and at most 1 \(1 is off\)"),
        ({"top_p": [0.5, 1.5]}, r"top_p\[1\] = 1\.5: must be above 0 and at most 1"),
        ({"min_p": 1.1}, r"min_p = 1\.1: must be from 0 \(off\) to 1"),
        (
            {"repetition": 0.0},
            r"repetition = 0\.0: must be from 1e-6 to 1e6 \(1 is off",
        ),
        ({"seed": -1}, r"seed = -1: must be a whole number, 0 to 2147483647"),
        ({"seed": 2**31 - 1}, r"seed = 2147483647: .* gives rows s, s \+ 1"),
    ],
)
def test_bad_settings_are_refused_with_what_would_be_right(setting, message):
    with pytest.raises(ValueError, match=message):
        sampling(2, **setting)


def test_random_numbers_depend_on_seed_position_and_purpose_alone():
    logits = jax.random.normal(jax.random.key(1), (64,))
    q = jax.random.normal(jax.random.key(2), (64,))

    def draws(seeds, positions, row, column):
        """What (seed, position) draws at one place of a batch of others."""
        positions = jnp.array(positions)
        s = sampling(len(seeds), temperature=1.0, seed=seeds)
        shape = (*positions.shape, 64)
        rng = np.random.default_rng(len(seeds))
        x, y = (jnp.array(rng.normal(size=shape), jnp.float32) for _ in range(2))
        x = x.at[row, column].set(logits)
        y = y.at[row, column].set(q)
        tokens = sample(x, keys(s, positions, RESIDUAL))
        fine = accept(x, y, tokens, keys(s, positions, ACCEPT))
        raw = jax.random.key_data(keys(s, positions, DRAFT))
        place = row, column
        return int(tokens[place]), bool(fine[place]), tuple(np.asarray(raw[place]))

    seen = set()
    for seed, position in [(11, 40), (11, 41), (12, 40), (40, 11), (0, 0)]:
        alone = draws([seed], [[position]], 0, 0)
        assert draws([3, seed, 9], [[1, 2], [5, position], [7, 8]], 1, 1) == alone
        assert draws([seed, seed], [[position, 7]] * 2, 0, 0) == alone
        with jax.default_prng_impl("rbg"):
            assert draws([seed, 5], [[position], [position]], 0, 0) == alone
        seen.add(alone[2])
    assert len(seen) == 5


def test_purposes_and_neighbours_draw_different_numbers():
    s = sampling(20, seed=0)
    position = jnp.broadcast_to(jnp.arange(-1, 20), (20, 21))
    data = [jax.random.key_data(keys(s, position, purpose)) for purpose in range(3)]
    every = np.concatenate([np.asarray(x).reshape(-1, 2) for x in data])
    assert len(np.unique(every, axis=0)) == 3 * 20 * 21


def fit(tokens, p):
    """The chance of counts as uneven as these; 0 where something impossible came."""
    counts = np.bincount(tokens, minlength=len(p))
    if counts[p == 0].any():
        return 0.0
    if (p > 0).sum() == 1:
        return 1.0
    counts, p = counts[p > 0], p[p > 0]
    return chisquare(counts, p * counts.sum() / p.sum()).pvalue


N = 30_000
LOGITS = np.array([1.0, -0.5, 2.0, 0.0, -1.5, 1.9, 0.7])
PLACES = jnp.arange(N)[None]


@functools.cache
def keys_of(purpose, seed=0):
    return keys(sampling(1, seed=seed), PLACES, purpose)


def repeat(logits):
    return jnp.broadcast_to(jnp.array(logits, jnp.float32), (1, N, len(logits)))


WAYS = (
    {"temperature": 1.0},
    {"temperature": 0.9},
    {"temperature": 2.0, "top_k": 4},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 6, "min_p": 0.2},
    {"temperature": 0.0},
)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_samples_follow_their_adjusted_distribution_and_no_other(way):
    each = [sampling(1, **settings) for settings in WAYS]
    x = adjusted(repeat(LOGITS), False, each[way])
    tokens = np.asarray(sample(x, keys_of(DRAFT)))[0]
    fits = [fit(tokens, reference(LOGITS, [], *row_of(s, 0), 0).p) for s in each]
    assert fits.pop(way) > 1e-3
    assert max(fits) < 1e-6


def test_greedy_and_sampled_rows_share_a_batch():
    logits = jnp.broadcast_to(jnp.array(LOGITS), (2, 50, len(LOGITS)))
    positions = jnp.broadcast_to(jnp.arange(50), (2, 50))
    s = sampling(2, temperature=[0.0, 1.0], seed=[3, 4])
    tokens = np.asarray(sample(adjusted(logits, False, s), keys(s, positions, DRAFT)))
    assert (tokens[0] == 2).all()
    alone = Sampling(*(field[1:] for field in s))
    x = adjusted(logits[1:], False, alone)
    want = np.asarray(sample(x, keys(alone, positions[1:], DRAFT)))
    np.testing.assert_array_equal(tokens[1:], want)
    assert len(np.unique(want)) > 3


def test_log_probabilities_are_of_the_adjusted_distribution():
    s = sampling(2, temperature=[0.7, 0.0], top_k=4)
    x = adjusted(jnp.broadcast_to(jnp.array(LOGITS), (2, 7, 7)), False, s)
    tokens = jnp.broadcast_to(jnp.arange(7), (2, 7))
    with np.errstate(divide="ignore"):
        want = np.log([reference(LOGITS, [], *row_of(s, b), 0).p for b in range(2)])
    ours = np.asarray(log_prob(x, tokens))
    np.testing.assert_allclose(ours, want, rtol=1e-5)
    np.testing.assert_array_equal(ours[1][2], 0)


def masked(*tokens):
    x = np.random.default_rng(5).normal(size=7)
    x[list(tokens)] = -INF
    return x


PAIRS = {
    "overlapping": (LOGITS, masked()),
    "close": (LOGITS, LOGITS + 0.1 * masked()),
    "equal": (LOGITS, LOGITS),
    "masked": (masked(0, 1), LOGITS - masked() + masked(3, 5)),
    "disjoint": (masked(0, 1, 2, 3), masked(4, 5, 6)),
    "greedy target": (masked(0, 1, 3, 4, 5, 6), LOGITS),
    "greedy draft": (LOGITS, masked(0, 1, 2, 4, 5, 6)),
}


def right(p, q, draft):
    fine = accept(p, q, draft, keys_of(ACCEPT))
    return jnp.where(fine, draft, sample(residual(p, q), keys_of(RESIDUAL)))


def always_accept(p, q, draft):
    return draft


def replace_by_target(p, q, draft):
    fine = accept(p, q, draft, keys_of(ACCEPT))
    return jnp.where(fine, draft, sample(p, keys_of(RESIDUAL)))


def upside_down(p, q, draft):
    fine = accept(q, p, draft, keys_of(ACCEPT))
    return jnp.where(fine, draft, sample(residual(p, q), keys_of(RESIDUAL)))


def one_purpose(p, q, draft):
    fine = accept(p, q, draft, keys_of(ACCEPT))
    return jnp.where(fine, draft, sample(residual(p, q), keys_of(DRAFT)))


def speculated(rule, pair):
    """How well drafting from q and then a rule fits p."""
    p, q = (repeat(x) for x in PAIRS[pair])
    draft = sample(q, keys_of(DRAFT))
    return fit(np.asarray(rule(p, q, draft))[0], softmax(PAIRS[pair][0]))


@pytest.mark.parametrize("pair", PAIRS)
def test_accepting_or_replacing_drafts_gives_the_target_distribution(pair):
    assert speculated(right, pair) > 1e-3


@pytest.mark.parametrize(
    ("rule", "pair"),
    [
        (always_accept, "overlapping"),
        (always_accept, "close"),
        (replace_by_target, "overlapping"),
        (replace_by_target, "masked"),
        (upside_down, "overlapping"),
        (one_purpose, "overlapping"),
    ],
)
def test_the_same_test_rejects_wrong_rules(rule, pair):
    assert speculated(rule, pair) < 1e-6


@pytest.mark.parametrize("pair", PAIRS)
def test_drafts_are_accepted_as_often_as_p_over_q_allows(pair):
    p, q = (softmax(x) for x in PAIRS[pair])
    for draft in np.flatnonzero(q):
        drafts = jnp.full((1, N), draft)
        fine = accept(*map(repeat, PAIRS[pair]), drafts, keys_of(ACCEPT, draft))
        chance = min(1.0, p[draft] / q[draft])
        # Five standard deviations; certainties are certain, but for rounding of p/q.
        spread = 5 * np.sqrt(chance * (1 - chance) / N)
        assert abs(np.mean(fine) - chance) <= spread + 1e-6


@pytest.mark.parametrize("pair", PAIRS)
def test_residual_is_what_p_has_and_q_lacks(pair):
    p, q = (softmax(x) for x in PAIRS[pair])
    want = np.maximum(p - q, 0)
    want = want / want.sum() if want.sum() > 0 else p
    with np.errstate(divide="ignore"):
        want = np.log(want)
    with jax.enable_x64(True):
        ours = np.asarray(residual(*map(jnp.array, PAIRS[pair])))
    np.testing.assert_allclose(ours, want, rtol=1e-9)


@given(some_logits, some_logits, st.integers(0, 9))
def test_greedy_speculation_is_equality_with_the_targets_choice(target, draft, seed):
    s = sampling(B, seed=seed)
    p, q = adjusted(target, False, s), adjusted(draft, False, s)
    position = jnp.arange(B * L).reshape(B, L)
    drafted = sample(q, keys(s, position, DRAFT))
    np.testing.assert_array_equal(drafted, draft.argmax(-1))
    fine = accept(p, q, drafted, keys(s, position, ACCEPT))
    np.testing.assert_array_equal(fine, draft.argmax(-1) == target.argmax(-1))
    replaced = sample(residual(p, q), keys(s, position, RESIDUAL))
    np.testing.assert_array_equal(replaced, target.argmax(-1))
