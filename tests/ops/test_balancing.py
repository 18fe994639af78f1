"""Every strategy's rule by its formula, the algebra, and the bugs not to repeat."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax import config
from deepseek_jax.config import BalanceConfig, MoEConfig
from deepseek_jax.eval.routing import maxvio
from deepseek_jax.ops.balancing import (
    STRATEGIES,
    Context,
    build,
    chain,
    global_loss,
    load,
    loss_free,
    loss_free_frozen,
    loss_free_proportional,
    mean_load,
    multiplicative,
    sequence_loss,
    z_loss,
)
from deepseek_jax.ops.routing import route
from deepseek_jax.schedule import piecewise

EXPERTS, TOP_K, ROWS, LENGTH = 8, 2, 4, 16
MOE = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, num_groups=4, keep_groups=2)
SPEED = piecewise(1e-3)


def skewed(seed=0, tokens=ROWS * LENGTH):
    """Logits that send most tokens to a few experts, and a mask with some padding."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, EXPERTS)) + 2 * rng.normal(size=EXPERTS)
    return jnp.array(logits), jnp.array(rng.random(tokens) < 0.9)


def settings(strategy):
    return BalanceConfig(strategy=strategy, speed=0.02, freeze_step=10, alpha=0.01)


# Update rules.


@pytest.mark.parametrize("top", [3, 1000, 2**31 - 1])
@given(data=st.data())
def test_the_error_is_exact_at_any_load(top, data):
    experts = data.draw(st.sampled_from([2, 7, 40]))
    loads = data.draw(st.lists(st.integers(0, top), min_size=experts, max_size=experts))
    total = sum(loads)
    load_E = jnp.array(loads, jnp.int32)
    whole, rest = mean_load(load_E)
    assert (int(whole), int(rest)) == divmod(total, experts)
    signs = loss_free(piecewise(1.0)).update(jnp.zeros(experts), load_E, 0)
    assert signs.tolist() == [np.sign(total - experts * own) for own in loads]
    ratios = loss_free_proportional(piecewise(1.0)).update(
        jnp.zeros(experts), load_E, 0
    )
    exact = [Fraction(total - experts * own, max(total, 1)) for own in loads]
    np.testing.assert_allclose(ratios, [float(e) for e in exact], rtol=1e-6)


@pytest.mark.parametrize("fair", [62_914_560 * 8 // 256, 2**26, 2**30])
def test_the_sign_holds_where_int32_and_float32_do_not(fair):
    """256 experts near the mean, two far off; the report's batch and larger ones."""
    loads = fair + np.random.default_rng(0).integers(-2, 3, 256)
    loads[:2] = fair // 16, fair * 31 // 16
    total = int(loads.sum())
    exact = np.array([np.sign(total - 256 * int(own)) for own in loads])
    bias = loss_free(SPEED).update(jnp.zeros(256), jnp.array(loads, jnp.int32), 0)
    np.testing.assert_array_equal(bias, np.float32(1e-3) * exact.astype(np.float32))
    # The mean in float32 does not get there.
    rounded = np.sign(loads.astype(np.float32).mean() - loads.astype(np.float32))
    assert (rounded != exact).any()


def test_golden_updates():
    load_E = jnp.array([6, 2, 4, 4], jnp.int32)
    b = jnp.array([0.1, 0.2, 0.3, 0.4])
    u = piecewise(0.01)
    np.testing.assert_allclose(
        loss_free(u).update(b, load_E, 0), [0.09, 0.21, 0.3, 0.4]
    )
    np.testing.assert_allclose(
        loss_free_proportional(u).update(b, load_E, 0), [0.095, 0.205, 0.3, 0.4]
    )
    np.testing.assert_allclose(
        multiplicative(u).update(b, load_E, 0), [0.09, 0.21, 0.3, 0.4]
    )


def test_rankings_add_or_multiply_and_start_neutral():
    scores, state = jnp.array([[0.2, 0.6]]), jnp.array([0.3, -0.1])
    for rule in (loss_free, loss_free_proportional):
        np.testing.assert_allclose(rule(SPEED).select(scores, state), [[0.5, 0.5]])
        assert rule(SPEED).init(2).tolist() == [0, 0]
    rule = multiplicative(SPEED)
    np.testing.assert_allclose(rule.select(scores, state), [[0.06, -0.06]])
    assert rule.init(2).tolist() == [1, 1]


def test_frozen_biases_move_freeze_step_times():
    load_E = jnp.array([3, 1], jnp.int32)
    frozen = loss_free_frozen(piecewise(1.0, ((2, 0.5),)), 3)
    bias, track = frozen.init(2), []
    for step in range(6):
        bias = jax.jit(frozen.update)(bias, load_E, step)
        track.append(float(bias[1]))
    assert track == [1, 2, 2.5, 2.5, 2.5, 2.5]
    assert [float(frozen.speed(step)) for step in range(4)] == [1, 1, 0.5, 0]


def test_speed_changes_reach_the_update():
    balancer = build(
        BalanceConfig(strategy="loss_free", speed=0.5, speed_changes=((2, 0.25),)), MOE
    )
    load_E = jnp.array([3, 1], jnp.int32)
    moved = [float(balancer.update(jnp.zeros(2), load_E, step)[1]) for step in range(4)]
    assert moved == [0.5, 0.5, 0.25, 0.25]


# What other codebases got wrong.


def test_counts_are_summed_over_micro_batches_before_one_sign():
    # Three micro-batches, each lopsided, together balanced: nothing may move.
    parts = [jnp.array(c, jnp.int32) for c in ([6, 0, 3], [0, 6, 3], [3, 3, 3])]
    balancer = loss_free(SPEED)
    assert not balancer.update(jnp.zeros(3), sum(parts), 0).any()
    # And a lopsided sum moves by u, not by the number of micro-batches times u.
    moved = balancer.update(jnp.zeros(3), parts[0] + parts[0], 0)
    np.testing.assert_allclose(moved, [-1e-3, 1e-3, 0], atol=1e-9)


def test_counts_are_summed_over_devices_before_the_sign():
    # Each of two devices sees one expert pair only; globally they are balanced.
    moe = MoEConfig(num_experts=4, top_k=2, num_groups=1, keep_groups=1)
    left, right = [[3.0, 2.0, -3.0, -2.0]], [[-3.0, -2.0, 3.0, 2.0]]
    logits = np.array(left * 8 + right * 8, np.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (["data"], []))
    balancer = loss_free(SPEED)

    def update(logits_TE, bias_E):
        routing = route(logits_TE, bias_E, balancer.select, moe)
        counts = balancer.observe(routing, jnp.ones(len(logits_TE), bool))
        return counts, balancer.update(bias_E, counts, 0)

    step = jax.jit(update, in_shardings=(rows, whole), out_shardings=whole)
    counts, bias = step(jax.device_put(logits, rows), jnp.zeros(4))
    assert counts.tolist() == [8, 8, 8, 8]
    assert not bias.any()


def test_the_bias_keeps_moving_above_one_half():
    balancer, load_E = loss_free(SPEED), jnp.array([0, 2], jnp.int32)
    bias = jnp.full(2, 0.5)
    for step in range(100):
        bias = balancer.update(bias, load_E, step)
    assert balancer.init(2).dtype == bias.dtype == jnp.float32
    np.testing.assert_allclose(bias, [0.6, 0.4], rtol=1e-5)
    assert jnp.bfloat16(0.5) + jnp.bfloat16(1e-3) == jnp.bfloat16(0.5)


def test_the_bias_gets_no_gradient():
    balancer = build(settings("v3"), MOE)
    logits_TE, valid_T = skewed()
    context = Context(valid_T.reshape(ROWS, LENGTH), int(valid_T.sum()), ROWS)

    def total(bias_E):
        routing = route(logits_TE, (bias_E, ()), balancer.select, MOE)
        return routing.weights_TK.sum() + balancer.penalty(routing, context)

    assert not jax.grad(total)(jnp.zeros(EXPERTS)).any()


# The algebra.


def test_chain_composes_rankings_adds_penalties_and_updates_each_by_its_own():
    first, second = loss_free(piecewise(0.5)), multiplicative(piecewise(0.25))
    both = chain(first, sequence_loss(0.3), second, z_loss(0.1))
    logits_TE, valid_T = skewed()
    state = both.init(EXPERTS)
    assert jax.tree.map(jnp.shape, state) == ((EXPERTS,), (), (EXPERTS,), ())
    scores = jax.nn.sigmoid(logits_TE)
    moved = (jnp.arange(8.0), (), jnp.arange(8.0) + 1, ())
    np.testing.assert_allclose(
        both.select(scores, moved), (scores + moved[0]) * moved[2], rtol=1e-6
    )
    routing = route(logits_TE, state, both.select, MOE)
    context = Context(valid_T.reshape(ROWS, LENGTH), int(valid_T.sum()), ROWS)
    expected = sequence_loss(0.3).penalty(routing, context)
    expected += z_loss(0.1).penalty(routing, context)
    np.testing.assert_allclose(both.penalty(routing, context), expected, rtol=1e-6)
    stats = both.observe(routing, valid_T)
    new = both.update(state, stats, 0)
    sign = np.sign(int(valid_T.sum()) * TOP_K / EXPERTS - np.asarray(stats[0]))
    np.testing.assert_array_equal(new[0], 0.5 * sign)
    np.testing.assert_array_equal(new[2], 1 + 0.25 * sign)
    assert new[1] == new[3] == ()


def test_chain_shows_the_first_bias_and_the_first_count():
    speed = piecewise(0.5)
    both = chain(z_loss(0.1), loss_free(speed), global_loss(0.1))
    state = both.init(3)
    assert both.bias is not None and both.count is not None
    assert both.bias(((), "bias", ())) == "bias"
    assert both.count(("a", "b", "c")) == "c"
    assert both.speed(0) == 0.5
    assert len(state) == 3
    with pytest.raises(ValueError, match="at most one balancer may count"):
        chain(global_loss(0.1), global_loss(0.2))
    plain = chain(z_loss(0.1), sequence_loss(0.1))
    assert plain.bias is None and plain.count is None and plain.speed(0) == 0


def test_v3_is_loss_free_with_the_sequence_loss():
    v3 = build(BalanceConfig(strategy="v3", speed=0.01, alpha=0.2), MOE)
    logits_TE, valid_T = skewed()
    routing = route(logits_TE, v3.init(EXPERTS), v3.select, MOE)
    context = Context(valid_T.reshape(ROWS, LENGTH), int(valid_T.sum()), ROWS)
    assert v3.penalty(routing, context) == sequence_loss(0.2).penalty(routing, context)
    counts = load(routing, valid_T, EXPERTS)
    bias, _ = v3.update(v3.init(EXPERTS), (counts, counts), 0)
    expected = loss_free(piecewise(0.01)).update(jnp.zeros(EXPERTS), counts, 0)
    np.testing.assert_array_equal(bias, expected)


def test_global_loss_counts_what_its_switch_says():
    logits_TE, valid_T = skewed()
    bias_E = jnp.linspace(-1, 1, EXPERTS)
    routing = route(logits_TE, bias_E, lambda s, b: s + b, MOE)
    plain = np.argsort(-np.asarray(logits_TE), -1)[:, :TOP_K][np.asarray(valid_T)]
    counts = global_loss(0.1).observe(routing, valid_T)
    np.testing.assert_array_equal(counts, np.bincount(plain.ravel(), minlength=EXPERTS))
    biased = global_loss(0.1, biased=True).observe(routing, valid_T)
    np.testing.assert_array_equal(biased, load(routing, valid_T, EXPERTS))
    assert (counts != biased).any()


# The table.


def test_the_table_holds_what_the_config_allows():
    assert tuple(STRATEGIES) == config.STRATEGIES


@pytest.mark.parametrize("score", config.SCORES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_as_the_trainer_runs_it(name, score):
    """Two layers, two micro-batches, jit; the promises that hold for every strategy."""
    balancer = build(settings(name), dataclasses.replace(MOE, score=score))
    moe = dataclasses.replace(MOE, score=score)
    logits_TE, valid_T = skewed()
    logits_RTE = jnp.stack([logits_TE, -logits_TE])
    halves = list(valid_T.reshape(2, ROWS // 2, LENGTH))

    def layer(logits_TE, state):
        """Statistics, penalty and load of one layer, summed over the micro-batches."""
        routings = [
            route(x, state, balancer.select, moe) for x in jnp.split(logits_TE, 2)
        ]
        pairs = list(zip(routings, halves, strict=True))
        stats = jax.tree.map(
            jnp.add, *(balancer.observe(r, valid.reshape(-1)) for r, valid in pairs)
        )
        load_E = balancer.count(stats) if balancer.needs_counts else None
        penalty = sum(
            balancer.penalty(r, Context(valid, valid_T.sum(), ROWS, load_E))
            for r, valid in pairs
        )
        loads = sum(load(r, valid.reshape(-1), EXPERTS) for r, valid in pairs)
        return stats, jnp.asarray(penalty), loads

    @jax.jit
    def step(state, number):
        stats, penalty_R, load_RE = jax.vmap(layer)(logits_RTE, state)
        new = jax.vmap(balancer.update, (0, 0, None))(state, stats, number)
        return new, stats, penalty_R, load_RE

    def dtypes(tree):
        return {x.dtype for x in jax.tree.leaves(tree)}

    start = jax.tree.map(lambda x: jnp.stack([x, x]), balancer.init(EXPERTS))
    state, stats, _, first_RE = step(start, 0)
    for number in range(1, 40):
        state, _, penalty_R, load_RE = step(state, number)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)
    assert dtypes(stats) == {jnp.dtype("int32")}
    assert (load_RE.sum(-1) == int(valid_T.sum()) * TOP_K).all()
    pays = name.startswith("aux") or name in ("z_loss", "v3")
    assert (penalty_R > 0).all() if pays else not penalty_R.any()
    assert balancer.needs_counts == (name == "aux_global")
    if balancer.bias is None:
        assert jax.tree.leaves(state) == []
        assert balancer.speed(0) == 0
        np.testing.assert_array_equal(load_RE, first_RE)
    else:
        assert dtypes(state) == {jnp.dtype("float32")}
        assert balancer.bias(state).shape == (2, EXPERTS)
        assert (maxvio(load_RE) < maxvio(first_RE)).all()
