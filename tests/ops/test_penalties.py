"""The auxiliary losses against equations 17-20 written out in numpy, token by token."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import MoEConfig
from deepseek_jax.ops.balancing import (
    Context,
    batch_loss,
    global_loss,
    sequence_loss,
    z_loss,
)
from deepseek_jax.ops.routing import Routing, route

EXPERTS, TOP_K, ROWS, LENGTH = 8, 2, 6, 10
MOE = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, num_groups=4, keep_groups=2)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def select(scores_TE, bias_E):
    return scores_TE + bias_E


@functools.partial(jax.jit, static_argnums=2)
def routed(logits_TE, bias_E, moe=MOE):
    return route(logits_TE, bias_E, select, moe)


def batch(seed=0, score="sigmoid"):
    """Routing of ROWS x LENGTH tokens; rows end in padding, and one is nothing else."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS * LENGTH, EXPERTS)) + rng.normal(size=EXPERTS)
    lengths = rng.integers(3, LENGTH + 1, ROWS)
    lengths[2] = 0
    valid = np.arange(LENGTH) < lengths[:, None]
    bias = jnp.array(rng.normal(size=EXPERTS) * 0.3)
    moe = dataclasses.replace(MOE, score=score)
    return routed(jnp.array(logits), bias, moe), valid


def context(valid, load_E=None):
    return Context(jnp.array(valid), int(valid.sum()), int(valid.any(1).sum()), load_E)


def parts(routing, valid, pieces):
    """The micro-batches, strided over rows."""
    for i in range(pieces):

        def rows(x, i=i):
            x = x.reshape(ROWS, LENGTH, *x.shape[1:])[i::pieces]
            return x.reshape(-1, *x.shape[2:])

        yield (
            Routing(*map(rows, routing)),
            context(valid)._replace(valid_BL=jnp.array(valid[i::pieces])),
        )


def equations(s_TE, picked_TK):
    """sum_i f_i P_i of a set of tokens: equations 17-20 with T = len(s_TE)."""
    total = 0.0
    for i in range(EXPERTS):
        f = (
            EXPERTS
            / (TOP_K * len(s_TE))
            * sum(i in picks for picks in picked_TK.tolist())
        )
        total += f * np.mean([s[i] / s.sum() for s in s_TE])
    return total


def picks(routing, biased):
    scores = np.asarray(routing.scores_TE)
    plain = np.argsort(-scores, -1)[:, :TOP_K]
    return np.asarray(routing.experts_TK) if biased else plain


CASES = list(itertools.product(["sigmoid", "softmax"], [False, True]))


@pytest.mark.parametrize(("score", "biased"), CASES)
def test_sequence_loss_is_equations_17_to_20_averaged_over_rows(score, biased):
    routing, valid = batch(score=score)
    s = np.asarray(routing.scores_TE).reshape(ROWS, LENGTH, EXPERTS)
    chosen = picks(routing, biased).reshape(ROWS, LENGTH, TOP_K)
    rows = [equations(s[r][valid[r]], chosen[r][valid[r]]) for r in (0, 1, 3, 4, 5)]
    penalty = sequence_loss(0.3, biased).penalty(routing, context(valid))
    np.testing.assert_allclose(penalty, 0.3 * np.mean(rows), rtol=1e-13)


@pytest.mark.parametrize(("score", "biased"), CASES)
def test_batch_and_global_loss_are_the_equations_over_all_valid_tokens(score, biased):
    routing, valid = batch(score=score)
    flat = valid.reshape(-1)
    s, chosen = np.asarray(routing.scores_TE)[flat], picks(routing, biased)[flat]
    for loss in (batch_loss, global_loss):
        penalty = loss(0.3, biased).penalty(routing, context(valid))
        np.testing.assert_allclose(penalty, 0.3 * equations(s, chosen), rtol=1e-13)


@pytest.mark.parametrize("biased", [False, True])
def test_batch_loss_weighs_micro_batches_by_their_valid_tokens(biased):
    routing, valid = batch()
    loss, expected = batch_loss(1.0, biased), 0.0
    for piece, own in parts(routing, valid, 2):
        flat = np.asarray(own.valid_BL).reshape(-1)
        s, chosen = np.asarray(piece.scores_TE)[flat], picks(piece, biased)[flat]
        expected += equations(s, chosen) * flat.sum() / valid.sum()
    shares = [loss.penalty(*piece) for piece in parts(routing, valid, 2)]
    np.testing.assert_allclose(sum(shares), expected, rtol=1e-13)
    whole = loss.penalty(routing, context(valid))
    assert abs(sum(shares) - whole) > 1e-3  # it is not the global loss


@pytest.mark.parametrize("pieces", [2, 3, 6])
@pytest.mark.parametrize("loss", [sequence_loss, global_loss, z_loss])
def test_shares_of_micro_batches_add_up_with_their_gradients(loss, pieces):
    routing, valid = batch()
    balancer = loss(0.7)

    def whole(logits_TE):
        routing = route(logits_TE, jnp.zeros(EXPERTS), select, MOE)
        return balancer.penalty(routing, context(valid))

    def shares(logits_TE):
        routing = route(logits_TE, jnp.zeros(EXPERTS), select, MOE)
        load_E = None
        if balancer.needs_counts:
            seen = [
                balancer.observe(piece, own.valid_BL.reshape(-1))
                for piece, own in parts(routing, valid, pieces)
            ]
            load_E = balancer.count(sum(seen))
        return sum(
            balancer.penalty(piece, own._replace(load_E=load_E))
            for piece, own in parts(routing, valid, pieces)
        )

    expected, actual = (
        jax.jit(jax.value_and_grad(f))(routing.logits_TE) for f in (whole, shares)
    )
    assert jnp.abs(expected[1]).max() > 1e-4
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-14)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-16)


@pytest.mark.parametrize("loss", [sequence_loss, batch_loss, global_loss])
@pytest.mark.parametrize("biased", [False, True])
def test_perfect_balance_costs_exactly_alpha(loss, biased):
    # Token t prefers experts t and t + 1 (mod E): every expert is picked equally often.
    tokens = np.arange(2 * EXPERTS)
    distance = (np.arange(EXPERTS) - tokens[:, None]) % EXPERTS
    moe = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, num_groups=1, keep_groups=1)
    logits = jnp.array(np.where(distance < TOP_K, 2.0, -1.0))
    routing = routed(logits, jnp.zeros(EXPERTS), moe)
    valid = np.ones((2, EXPERTS), bool)
    penalty = loss(1e-4, biased).penalty(routing, context(valid))
    np.testing.assert_allclose(penalty, 1e-4, rtol=1e-14)
    # All tokens on the same K experts cost more.
    worst = routed(jnp.tile(logits[:1], (2 * EXPERTS, 1)), jnp.zeros(EXPERTS), moe)
    assert loss(1e-4, biased).penalty(worst, context(valid)) > 1.5e-4


@pytest.mark.parametrize("loss", [sequence_loss, batch_loss, global_loss])
def test_gradients_flow_through_p_alone(loss):
    routing, valid = batch()
    alpha = 0.3
    chosen = picks(routing, False).reshape(ROWS, LENGTH, TOP_K)
    hits = (chosen[..., None] == np.arange(EXPERTS)).any(2) & valid[..., None]
    own = {
        sequence_loss: (hits.sum(1, keepdims=True), valid.sum(1)[:, None, None]),
        batch_loss: (hits.sum((0, 1)), valid.sum()),
        global_loss: (hits.sum((0, 1)), valid.sum()),
    }
    count, tokens = own[loss]
    f = EXPERTS / TOP_K * count / np.maximum(tokens, 1)
    rows = valid.any(1).sum() if loss is sequence_loss else 1

    def with_constant_f(scores_TE):
        p = (scores_TE / scores_TE.sum(-1, keepdims=True)).reshape(
            ROWS, LENGTH, EXPERTS
        )
        share = jnp.where(valid[..., None], f * p, 0) / np.maximum(tokens, 1)
        return alpha * share.sum() / rows

    def penalty(scores_TE):
        return loss(alpha).penalty(
            routing._replace(scores_TE=scores_TE), context(valid)
        )

    expected = jax.jit(jax.grad(with_constant_f))(routing.scores_TE)
    actual = jax.jit(jax.grad(penalty))(routing.scores_TE)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-18)
    assert not actual.reshape(ROWS, LENGTH, EXPERTS)[~valid].any()


@pytest.mark.parametrize("loss", [sequence_loss, batch_loss, global_loss, z_loss])
def test_padding_counts_nowhere(loss):
    routing, valid = batch()
    noise = jax.random.normal(jax.random.key(0), routing.logits_TE.shape) * 5
    logits = jnp.where(valid.reshape(-1, 1), routing.logits_TE, noise)
    other = routed(logits, jnp.zeros(EXPERTS))
    plain = routed(routing.logits_TE, jnp.zeros(EXPERTS))
    penalty = jax.jit(loss(0.3).penalty)
    np.testing.assert_allclose(
        penalty(other, context(valid)), penalty(plain, context(valid)), rtol=1e-14
    )


@pytest.mark.parametrize("loss", [sequence_loss, batch_loss, global_loss, z_loss])
def test_a_batch_of_padding_costs_nothing(loss):
    routing, valid = batch()

    def penalty(scores_TE, logits_TE):
        moved = routing._replace(scores_TE=scores_TE, logits_TE=logits_TE)
        return loss(0.3).penalty(moved, context(np.zeros_like(valid)))

    both = jax.jit(jax.value_and_grad(penalty, (0, 1)))
    value, grads = both(routing.scores_TE, routing.logits_TE)
    assert value == 0
    assert not any(g.any() for g in grads)


def test_z_loss_is_the_mean_squared_log_partition():
    routing, valid = batch()
    logits = np.asarray(routing.logits_TE)[valid.reshape(-1)]
    expected = 0.01 * np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    penalty = z_loss(0.01).penalty(routing, context(valid))
    np.testing.assert_allclose(penalty, expected, rtol=1e-13)
