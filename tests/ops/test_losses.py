"""Chunked cross entropy against all logits at once, in value, gradient and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.losses import cross_entropy, token_nll
from deepseek_jax.precision.dots import dot_bf16, dot_f32, dot_plain
from tests.agreement import as_dtype, assert_agree, largest, operations, with_gradients

TOKENS, WIDTH, VOCAB = 37, 6, 19
CHUNKS = [1, 8, 36, 37, 1024]


def operands():
    """h, head, targets and weights, a third of which are zero."""
    rng = np.random.default_rng(0)
    h, head = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    weights = rng.random(TOKENS) * (rng.random(TOKENS) < 0.67)
    return h, head, rng.integers(0, VOCAB, TOKENS), weights


def whole(h, head, targets, weights):
    """Every position's nll, the weighted sum, and the latter's gradients."""
    logits = h @ head
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    nll = -np.log(p[np.arange(len(h)), targets])
    dlogits = weights[:, None] * (p - np.eye(head.shape[1])[targets])
    return nll, [weights @ nll, dlogits @ head.T, h.T @ dlogits]


def evaluate(dot, chunk, dtype, cotangent=1.0):
    h, head, targets, weights = operands()
    loss = functools.partial(cross_entropy, dot=dot, chunk=chunk)
    others = jnp.asarray(targets), jnp.asarray(weights, dtype)
    return with_gradients(loss)(as_dtype([h, head], dtype), others, cotangent)


@pytest.mark.parametrize("dot", [dot_plain, dot_f32])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_it_is_the_cross_entropy_of_all_logits(dot, chunk):
    with jax.enable_x64(True):
        actual = evaluate(dot, chunk, jnp.float64, jnp.asarray(1.0))
    assert all(x.dtype == jnp.float64 for x in actual)
    assert_agree(actual, whole(*operands())[1], 1e-13)


@pytest.mark.parametrize("scale", [-2.5, 0.0])
def test_gradients_scale_with_the_upstream_cotangent(scale):
    with jax.enable_x64(True):
        actual = evaluate(dot_f32, 8, jnp.float64, jnp.asarray(scale))
    _, (value, *gradients) = whole(*operands())
    assert_agree(actual, [value, *(scale * g for g in gradients)], 1e-13)


@pytest.mark.parametrize(("dot", "bound"), [(dot_f32, 2e-6), (dot_bf16, 1e-2)])
def test_it_rounds_no_more_than_its_products(dot, bound):
    actual = evaluate(dot, 8, jnp.float32, jnp.asarray(1.0))
    assert all(x.dtype == jnp.float32 for x in actual)
    assert_agree(actual, whole(*operands())[1], bound)


def test_without_gradients_the_loss_is_the_same():
    h, head, targets, weights = operands()
    with jax.enable_x64(True):
        loss = jax.jit(functools.partial(cross_entropy, dot=dot_f32, chunk=8))
        assert_agree(
            [loss(h, head, targets, weights)], whole(*operands())[1][:1], 1e-13
        )


def test_positions_without_weight_get_no_gradient():
    _, dh, _ = evaluate(dot_f32, 8, jnp.float32, jnp.asarray(1.0))
    weightless = operands()[-1] == 0
    assert weightless.any()
    np.testing.assert_array_equal(dh[weightless], 0)
    assert (np.abs(dh[~weightless]).max(-1) > 0).all()


def test_weights_get_no_gradient():
    h, head, targets, weights = as_dtype(operands(), jnp.float32)
    targets = targets.astype(jnp.int32)

    def loss(weights):
        return cross_entropy(h, head, targets, weights, dot=dot_f32, chunk=8)

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(weights), 0)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_nll_is_every_position_s(chunk):
    h, head, targets, _ = operands()
    with jax.enable_x64(True):
        nll = jax.jit(functools.partial(token_nll, dot=dot_f32, chunk=chunk))
        actual = nll(h, head, targets)
    assert actual.shape == (TOKENS,)
    assert_agree([actual], [whole(*operands())[0]], 1e-13)


def test_logits_beyond_the_range_of_exp_do_not_overflow():
    h, head, targets, weights = operands()
    loss = jax.jit(functools.partial(cross_entropy, dot=dot_f32, chunk=8))
    h *= 1000
    actual = loss(*as_dtype([h, head], jnp.float32), targets, np.float32(weights))
    logits = h @ head
    top = logits.max(-1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    expected = weights @ (lse - logits[np.arange(TOKENS), targets])
    assert_agree([actual], [expected], 1e-6)


def test_all_logits_never_exist_at_once():
    tokens, chunk, vocab = 512, 64, 300
    h, head = jnp.zeros((tokens, WIDTH)), jnp.zeros((WIDTH, vocab))
    targets, weights = jnp.zeros(tokens, int), jnp.ones(tokens)

    def loss(h, head):
        return cross_entropy(h, head, targets, weights, dot=dot_f32, chunk=chunk)

    def nll(h, head):
        return token_nll(h, head, targets, dot=dot_f32, chunk=chunk)

    for program in (loss, jax.grad(loss, argnums=(0, 1)), nll):
        assert largest(program, h, head) == chunk * vocab


def test_gradients_cost_three_products_of_a_chunk():
    h, head, targets, weights = operands()

    def loss(h, head):
        return cross_entropy(h, head, targets, weights, dot=dot_f32, chunk=8)

    products = [
        each
        for each in operations(jax.grad(loss, argnums=(0, 1)), h, head)
        if each.primitive.name == "dot_general"
        and any(VOCAB in x.aval.shape for x in (*each.invars, *each.outvars))
    ]
    assert len(products) == 3
