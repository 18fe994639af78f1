"""Quantile balancing: its exact rule, its histogram, and what repeating it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.config import MoEConfig
from deepseek_jax.eval.routing import maxvio
from deepseek_jax.ops import quantile as maths
from deepseek_jax.ops.balancing import load, quantile
from deepseek_jax.ops.quantile import BINS, edges, histogram, required_bias
from deepseek_jax.ops.routing import route

solve = jax.jit(maths.solve, static_argnums=2)
ROOT = np.linspace(-1, 1, BINS + 1)
EDGE = ROOT * np.abs(ROOT)


def router(experts, top_k, score="sigmoid", groups=1, keep=1):
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        num_groups=groups,
        keep_groups=keep,
        score=score,
    )


def skewed(seed, tokens, experts, spread=1.0, skew=1.0):
    rng = np.random.default_rng(seed)
    noise, offset = rng.normal(size=(tokens, experts)), rng.normal(size=experts)
    return jnp.array(spread * noise + skew * offset), jnp.array(
        rng.random(tokens) < 0.9
    )


def bin_of(x):
    return np.searchsorted(EDGE, x, side="right") - 1


@given(st.integers(0, 2**32 - 1), st.sampled_from(["sigmoid", "softmax"]))
def test_a_token_picks_an_expert_exactly_above_its_required_bias(seed, score):
    with jax.enable_x64(True):
        moe, balancer = router(12, 3, score), quantile(3, 12)
        logits_TE, _ = skewed(seed, 30, 12)
        bias_E = jnp.array(np.random.default_rng(seed).normal(size=12))
        routing = route(logits_TE, bias_E, balancer.select, moe)
        picked_TE = (routing.experts_TK[..., None] == jnp.arange(12)).any(1)
        x_TE = required_bias(routing.scores_TE, routing.choice_TE, 3)
        # The expert at the cut itself needs b_i = a_t - s_ti, up to rounding.
        far = jnp.abs(bias_E - x_TE) > 1e-12
        assert (far.sum(1) == 11).all()
        np.testing.assert_array_equal((bias_E > x_TE)[far], picked_TE[far])


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_required_biases_stay_in_range_whatever_the_bias(seed, top_k):
    """Given that b's (K+1)-th largest is 0: so the histogram needs no state."""
    rng = np.random.default_rng(seed)
    scores_TE = rng.choice([0.0, 0.5, 1.0, rng.random()], (20, 8))
    bias_E = rng.normal(size=8) * 10 ** rng.uniform(-3, 3)
    bias_E -= np.sort(bias_E)[-(top_k + 1)]
    with jax.enable_x64(True):
        choice = jnp.array(scores_TE + bias_E)
        x_TE = np.asarray(required_bias(jnp.array(scores_TE), choice, top_k))
    assert np.abs(x_TE).max() <= 1 + 1e-12


def test_histogram_counts_valid_tokens_in_its_bins():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-1, 1, (500, 3)), rng.normal(size=(500, 3)) * 1e-3])
    x[:2] = [[-1, 0, 1], [-1.5, 0, 1.5]]
    valid = rng.random(1000) < 0.7
    valid[:2] = True
    with jax.enable_x64(True):
        counts = np.asarray(histogram(jnp.array(x), jnp.array(valid)))
    assert counts.dtype == np.int32
    for expert in range(3):
        inside = np.clip(x[valid, expert], -1, 1)
        np.testing.assert_array_equal(counts[expert], np.histogram(inside, EDGE)[0])


def test_edges_are_exact_in_float32():
    np.testing.assert_array_equal(edges(np.dtype(np.float32)), EDGE)


def test_solve_finds_the_quantile_to_one_bin():
    rng = np.random.default_rng(1)
    tokens, experts, top_k = 997, 8, 3  # K/E of 997 tokens is no whole number
    x = np.tanh(rng.normal(size=(tokens, experts)) + rng.normal(size=experts))
    with jax.enable_x64(True):
        counts = histogram(jnp.array(x), jnp.ones(tokens, bool))
        bias = np.asarray(solve(counts, jnp.zeros(experts), top_k))
    assert np.sort(bias)[-(top_k + 1)] == 0
    exact = np.quantile(x, top_k / experts, axis=0)
    shift = (exact - bias).mean()
    width = np.diff(EDGE)[bin_of(exact)].max()
    np.testing.assert_allclose(bias + shift, exact, atol=2 * width)


def test_solve_is_exact_at_counts_whose_products_overflow_int32():
    # 1.6e9 tokens, a K/E quantile at a bin's edge: everything below it in one bin.
    tokens, experts, top_k = 1_600_000_000, 256, 8
    below = tokens // experts * top_k
    counts = np.zeros((experts, BINS), np.int32)
    at = np.arange(experts) + 900
    counts[np.arange(experts), at] = below
    counts[np.arange(experts), at + 1] = tokens - below
    bias = np.asarray(solve(jnp.array(counts), jnp.zeros(experts), top_k))
    expected = EDGE[at + 1]
    np.testing.assert_allclose(
        bias, expected - np.sort(expected)[-(top_k + 1)], atol=1e-7
    )


def test_a_batch_without_valid_tokens_keeps_the_bias():
    bias = jnp.linspace(-0.3, 0.4, 8)
    np.testing.assert_array_equal(solve(jnp.zeros((8, BINS), jnp.int32), bias, 2), bias)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (32, 8)])
def test_repeating_it_on_a_skewed_batch_balances_every_expert(score, experts, top_k):
    with jax.enable_x64(True):
        moe, balancer = router(experts, top_k, score), quantile(top_k, experts)
        logits_TE, valid_T = skewed(0, 3000, experts)

        @jax.jit
        def step(bias_E):
            routing = route(logits_TE, bias_E, balancer.select, moe)
            counts = balancer.observe(routing, valid_T)
            new_E = balancer.update(bias_E, counts, 0)
            return new_E, load(routing, valid_T, experts), counts

        bias_E = balancer.init(experts)
        start = maxvio(step(bias_E)[1])
        for _ in range(60):
            old_E = bias_E
            bias_E, load_E, counts = map(np.asarray, step(bias_E))
        assert start > 2
        assert maxvio(load_E) < 0.05
        # Settled: what is left of the error hides inside the bin that holds b_i.
        np.testing.assert_allclose(bias_E, old_E, atol=1e-3)
        resolution = counts[np.arange(experts), bin_of(np.asarray(old_E))]
        fair = int(valid_T.sum()) * top_k / experts
        assert (np.abs(load_E - fair) <= resolution).all()


def test_node_limits_leave_some_imbalance_but_not_much():
    moe, balancer = router(16, 2, groups=4, keep=2), quantile(2, 16)
    logits_TE, valid_T = skewed(0, 3000, 16)

    def step(bias_E, _):
        routing = route(logits_TE, bias_E, balancer.select, moe)
        counts = balancer.observe(routing, valid_T)
        return balancer.update(bias_E, counts, 0), load(routing, valid_T, 16)

    loads = jax.lax.scan(step, balancer.init(16), None, 30)[1]
    assert maxvio(loads[0]) > 2
    assert maxvio(loads[-1]) < 0.3


def test_it_needs_a_choice_beyond_top_k():
    with pytest.raises(ValueError, match=r"model\.moe\.top_k = 4: must be below"):
        quantile(4, 4)
