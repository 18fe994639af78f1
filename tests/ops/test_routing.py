"""The router against a token-by-token numpy reading of equations 12-16."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax import config
from deepseek_jax.config import MoEConfig
from deepseek_jax.ops.routing import GROUP_SCORES, SCORES, count_experts, route


def add(scores_TE, bias_E):
    return scores_TE + bias_E


def small(**kwargs):
    sizes = {"num_experts": 12, "top_k": 3, "num_groups": 4, "keep_groups": 2}
    return MoEConfig(**(sizes | kwargs))


def reference(logits_TE, bias_E, moe):
    """Weights and experts by loops over tokens and groups, in numpy float64."""
    weights, experts = [], []
    for x in np.asarray(logits_TE, np.float64):
        exp = np.exp(x)
        s = exp / exp.sum() if moe.score == "softmax" else 1 / (1 + np.exp(-x))
        c = s + bias_E
        groups = np.split(np.arange(len(c)), moe.num_groups)
        size = {"max": 1, "top2": 2}[moe.group_score]
        worth = [sum(sorted(c[group])[-size:]) for group in groups]
        kept = [groups[g] for g in np.argsort(worth)[::-1][: moe.keep_groups]]
        allowed = np.concatenate(kept)
        chosen = allowed[np.argsort(-c[allowed])][: moe.top_k]
        w = s[chosen]
        experts.append(chosen)
        weights.append(moe.scale * (w / w.sum() if moe.normalize else w))
    return np.array(weights), np.array(experts)


@pytest.mark.parametrize(
    ("score", "group_score", "keep_groups", "normalize"),
    list(itertools.product(SCORES, GROUP_SCORES, (1, 2, 4), (True, False))),
)
def test_route_is_equations_12_to_16(score, group_score, keep_groups, normalize):
    moe = small(
        score=score,
        group_score=group_score,
        keep_groups=keep_groups,
        normalize=normalize,
    )
    rng = np.random.default_rng(0)
    logits_TE, bias_E = rng.normal(size=(64, 12)) * 2, rng.normal(size=12) * 0.3
    weights, experts = reference(logits_TE, bias_E, moe)
    with jax.enable_x64(True):
        routing = route(jnp.array(logits_TE), jnp.array(bias_E), add, moe)
        np.testing.assert_array_equal(routing.experts_TK, experts)
        np.testing.assert_allclose(routing.weights_TK, weights, rtol=1e-13)
        np.testing.assert_allclose(
            routing.choice_TE - bias_E, routing.scores_TE, atol=1e-15
        )
        assert routing.experts_TK.dtype == jnp.int32


def test_a_worked_example():
    # s of the groups {0,1}, {2,3}, {4,5}, {6,7}; top-2 sums 1.2, 1.1, 1.0, 0.9.
    s = jnp.array([[0.9, 0.3, 0.6, 0.5, 0.8, 0.2, 0.7, 0.2]])
    moe = small(num_experts=8, top_k=2, scale=2.5)
    routing = route(jnp.log(s / (1 - s)), jnp.zeros(8), add, moe)
    # Expert 4, the second best, sits in a dropped group.
    assert routing.experts_TK.tolist() == [[0, 2]]
    np.testing.assert_allclose(routing.weights_TK, [[2.5 * 0.6, 2.5 * 0.4]], rtol=1e-6)
    # 0.3 for expert 7 lifts its group to 1.2 but takes no part in its weight.
    lifted = route(jnp.log(s / (1 - s)), jnp.zeros(8).at[7].set(0.35), add, moe)
    assert lifted.experts_TK.tolist() == [[0, 6]]
    np.testing.assert_allclose(
        lifted.weights_TK, [[2.5 * 0.9 / 1.6, 2.5 * 0.7 / 1.6]], rtol=1e-6
    )


@pytest.mark.parametrize("group_score", GROUP_SCORES)
def test_masked_groups_are_never_picked_when_every_choice_is_negative(group_score):
    moe = small(group_score=group_score)
    logits_TE = jax.random.normal(jax.random.key(0), (256, 12))
    bias_E = jnp.full(12, -3.0)
    routing = route(logits_TE, bias_E, add, moe)
    assert routing.choice_TE.max() < 0
    choice = np.asarray(routing.choice_TE, np.float64).reshape(256, 4, 3)
    best = np.sort(choice, -1)
    value = best[..., -2:].sum(-1) if group_score == "top2" else best[..., -1]
    kept = np.argsort(-value, -1)[:, :2]
    group = np.asarray(routing.experts_TK) // 3
    assert (group[..., None] == kept[:, None, :]).any(-1).all()
    # With 0 instead of -inf the dropped groups would have won every slot.
    zeroed = np.zeros_like(choice)
    rows = np.arange(256)[:, None]
    zeroed[rows, kept] = choice[rows, kept]
    wrong = np.argsort(-zeroed.reshape(256, 12), -1)[:, :3] // 3
    assert not (wrong[..., None] == kept[:, None, :]).any()


def test_weights_come_from_the_scores_themselves():
    # In f32 (s + b) - b would be 0 for all of these.
    logits = jnp.array([[-30.0, -31.0, -32.0, -33.0]])
    moe = MoEConfig(num_experts=4, top_k=2, num_groups=1, keep_groups=1, scale=1.0)
    weights = route(logits, jnp.full(4, 0.5), add, moe).weights_TK
    np.testing.assert_allclose(weights, [jax.nn.softmax(logits[0, :2])], rtol=1e-5)


def test_underflow_gives_zero_weights_and_gradients():
    def total(logits_TE):
        return route(logits_TE, jnp.zeros(12), add, small()).weights_TK.sum()

    value, grad = jax.value_and_grad(total)(jnp.full((2, 12), -200.0))
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("shift", [0.0, -30.0, -60.0, -80.0])
def test_weights_and_their_gradient_hold_down_to_the_smallest_scores(shift):
    moe = MoEConfig(num_experts=4, top_k=3, num_groups=1, keep_groups=1, scale=1.0)
    base = np.array([[0.5, -1.0, -2.0, -4.0]]) + shift
    cotangent = np.array([[1.0, -2.0, 0.5]])

    def pulled(logits_TE):
        routing = route(logits_TE, jnp.zeros(4), add, moe)
        return (routing.weights_TK * cotangent).sum()

    value, grad = jax.value_and_grad(pulled)(jnp.array(base, jnp.float32))
    s = 1 / (1 + np.exp(-base[0, :3]))
    w = s / s.sum()
    dw = cotangent[0] - (w * cotangent[0]).sum()
    np.testing.assert_allclose(value, (w * cotangent[0]).sum(), rtol=1e-4)
    np.testing.assert_allclose(grad, [[*(w * (1 - s) * dw), 0]], rtol=1e-4)


def test_selection_carries_no_gradient_and_weights_do():
    moe = small(normalize=False, scale=1.0)
    logits = jax.random.normal(jax.random.key(1), (5, 12))

    def total(logits_TE, bias_E):
        routing = route(logits_TE, bias_E, add, moe)
        return routing.weights_TK.sum() + routing.choice_TE.sum()

    d_logits, d_bias = jax.grad(total, (0, 1))(logits, jnp.zeros(12))
    routing = route(logits, jnp.zeros(12), add, moe)
    picked = (routing.experts_TK[..., None] == jnp.arange(12)).any(1)
    s = routing.scores_TE
    np.testing.assert_allclose(d_logits, jnp.where(picked, s * (1 - s), 0), rtol=1e-5)
    assert not d_bias.any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_16_bit_logits_are_scored_in_float32(dtype):
    logits = jax.random.normal(jax.random.key(2), (7, 12), dtype)
    routing = route(logits, jnp.zeros(12), add, small())
    exact = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == jnp.float32
    np.testing.assert_allclose(routing.scores_TE, exact, rtol=1e-6)


def test_ties_go_to_the_lower_expert():
    assert route(
        jnp.zeros((1, 12)), jnp.zeros(12), add, small()
    ).experts_TK.tolist() == [[0, 1, 2]]


def test_jit_and_a_layer_axis():
    moe = small()
    logits = jax.random.normal(jax.random.key(3), (2, 9, 12))
    bias = jax.random.normal(jax.random.key(4), (2, 12)) * 0.1
    both = jax.jit(jax.vmap(lambda x, b: route(x, b, add, moe)))(logits, bias)
    for layer in range(2):
        one = route(logits[layer], bias[layer], add, moe)
        np.testing.assert_array_equal(both.experts_TK[layer], one.experts_TK)
        np.testing.assert_allclose(both.weights_TK[layer], one.weights_TK, rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_loads_sum_to_valid_tokens_times_k(seed, share):
    rng = np.random.default_rng(seed)
    logits, valid = rng.normal(size=(40, 12)), rng.random(40) < share
    routing = route(jnp.array(logits), jnp.zeros(12), add, small())
    load = np.asarray(count_experts(routing.experts_TK, jnp.array(valid), 12))
    assert load.dtype == np.int32
    assert load.sum() == valid.sum() * 3
    kept = np.asarray(routing.experts_TK)[valid]
    np.testing.assert_array_equal(load, np.bincount(kept.reshape(-1), minlength=12))


def test_tables_hold_what_the_config_allows():
    assert tuple(SCORES) == config.SCORES
    assert tuple(GROUP_SCORES) == config.GROUP_SCORES
