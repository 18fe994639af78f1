"""Logits in blocks: the model's own, aligned as promised, whatever the block size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.data.batch import Batch
from deepseek_jax.eval import logits
from deepseek_jax.runtime import Runtime
from deepseek_jax.train.objective import input_masks, objective, target_masks, totals
from deepseek_jax.train.state import assemble, init_state
from tests.factory import random_batch, small

DEPTH = 2
CONFIG = small(depth=DEPTH, length=10, batch=5)
PARTS = assemble(CONFIG)
STATE = init_state(PARTS, 0)
MODEL = logits.build(CONFIG)
VOCAB = CONFIG.model.vocab_size
# Biases large enough to change who is selected: leaving them out would be seen.
BIAS = jax.tree.map(
    lambda b: jax.random.normal(jax.random.key(1), b.shape, b.dtype), STATE.balance
)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (5, 9), dtype=np.int32)


OUTSIDE = TOKENS.copy()
OUTSIDE[1, 2] = VOCAB


def compute(tokens, **options):
    return logits.compute(MODEL, STATE.params, BIAS, tokens, **options)


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(np.asarray(x, np.float64), -1))


@pytest.fixture(scope="module")
def whole():
    return compute(TOKENS, mtp=True)


def test_the_models_own_logits(whole):
    """Against the oracle runtime, and without MTP the main logits stay the same."""
    model = dataclasses.replace(MODEL, rt=Runtime())
    rows, length = TOKENS.shape
    position_BL = jnp.broadcast_to(jnp.arange(length - DEPTH), (rows, length - DEPTH))
    variables = {"params": STATE.params}
    out = jax.jit(model.apply)(variables, TOKENS, position_BL, BIAS)
    main, mtp = whole
    assert main.shape == (rows, length, VOCAB) and main.dtype == np.float32
    assert mtp.shape == (DEPTH, rows, length, VOCAB) and mtp.dtype == np.float32
    for mine, hidden_BLD in zip((main, *mtp), (out.hidden_BLD, *out.mtp_JBLD)):
        theirs = model.apply(variables, hidden_BLD, method="logits")
        np.testing.assert_allclose(mine[:, : length - DEPTH], theirs, atol=2e-5)
    alone, none = compute(TOKENS)
    np.testing.assert_allclose(alone, main, atol=2e-5)
    assert none.shape == (0, rows, length, VOCAB)


def test_the_bias_counts(whole):
    unbiased, _ = logits.compute(MODEL, STATE.params, STATE.balance, TOKENS)
    assert np.abs(unbiased - whole[0]).max() > 1e-2


def test_nan_is_where_an_input_is_missing_as_training_masks_it(whole):
    rows, length = TOKENS.shape
    width = length + 1 + DEPTH
    column = np.arange(width)
    real = np.broadcast_to(column < length, (rows, width))
    zeros = np.zeros((rows, width), np.int32)
    batch = Batch(zeros, real.astype(np.int32), zeros, real, zeros)
    data = dataclasses.replace(CONFIG.data, length=length)
    parts = dataclasses.replace(PARTS, config=dataclasses.replace(CONFIG, data=data))
    inputs, targets = input_masks(parts, batch), target_masks(parts, batch)
    main, mtp = whole
    for k, part in enumerate((main, *mtp)):
        finite = np.isfinite(part)
        assert (finite.all(-1) == finite.any(-1)).all()
        np.testing.assert_array_equal(finite.any(-1), inputs[k])
        assert finite.any(-1)[np.asarray(targets[k])].all()
    assert np.isfinite(main).all()
    assert np.isnan(mtp[1, :, -2:]).all() and np.isfinite(mtp[1, :, :-2]).all()


@pytest.mark.parametrize("moved", [0, 4, 8])
def test_what_each_position_may_have_read(moved, whole):
    """Token m reaches the main logits from m on, module k's from m - k on: so the one
    at i has read tokens 0..i+k and not i+k+1, which it predicts.
    """
    other = TOKENS.copy()
    other[:, moved] = (other[:, moved] + 1) % VOCAB
    changed = compute(other, mtp=True)
    for k, (old, new) in enumerate(
        zip((whole[0], *whole[1]), (changed[0], *changed[1]))
    ):
        first = max(moved - k, 0)
        before = slice(0, first)
        np.testing.assert_allclose(new[:, before], old[:, before], atol=1e-6)
        if first < TOKENS.shape[1] - k:
            assert (np.abs(new[:, first] - old[:, first]).max(-1) > 1e-4).all()


def test_the_cross_entropies_are_those_of_training():
    """Row and column of every target: CE of [k-1, b, i] against token i+k+1."""
    batch = random_batch(CONFIG)
    length = CONFIG.data.length
    counts = totals(PARTS, batch)
    loss = functools.partial(jax.jit(objective, static_argnums=0), PARTS)
    _, (losses, _) = loss(STATE.params, BIAS, batch, counts, 0.3)
    main, mtp = compute(batch.tokens[:, : length + DEPTH], mtp=True)
    for k, wanted in enumerate((losses.ce, *losses.mtp_ce)):
        target = batch.tokens[:, k + 1 : k + 1 + length, None]
        part = log_softmax((main, *mtp)[k][:, :length])
        nll = -np.take_along_axis(part, target, -1)
        np.testing.assert_allclose(nll.mean(), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("positions", "numbers"), [(1, 1), (20, 4 * VOCAB), (27, 10**9)]
)
def test_blocks_of_any_size_are_the_whole(positions, numbers, whole, monkeypatch):
    monkeypatch.setattr(logits, "POSITIONS", positions)
    monkeypatch.setattr(logits, "NUMBERS", numbers)
    seen = np.zeros((1 + DEPTH, TOKENS.size), int)
    for block in logits.blocks(MODEL, STATE.params, BIAS, TOKENS, mtp=True):
        assert block.logits_TV.size <= max(numbers, VOCAB)
        seen[block.module, block.start : block.start + len(block.logits_TV)] += 1
    assert (seen == 1).all(), "each position once"
    main, mtp = compute(TOKENS, mtp=True)
    np.testing.assert_allclose(main, whole[0], atol=2e-5)
    np.testing.assert_allclose(mtp, whole[1], atol=2e-5)


def test_parameters_in_bfloat16_are_computed_with_in_float32():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), STATE.params)
    full = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    mine, _ = logits.compute(MODEL, half, BIAS, TOKENS)
    theirs, _ = logits.compute(MODEL, full, BIAS, TOKENS)
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_a_row_shorter_than_the_depth():
    main, mtp = compute(TOKENS[:, :1], mtp=True)
    assert np.isfinite(main).all() and np.isnan(mtp).all()
    np.testing.assert_allclose(main, compute(TOKENS)[0][:, :1], atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS.astype(np.int64), r"int64 of shape \[5, 9\]: must be int32 \[B, L\]"),
        (TOKENS.astype(np.float32), "float32 of shape"),
        (TOKENS[0], r"int32 of shape \[9\]"),
        (TOKENS[:, :0], r"int32 of shape \[5, 0\]"),
        (OUTSIDE, r"token 61 at \[1, 2\]: must be 0 to 60, .* vocab_size is 61"),
        (TOKENS - np.int32(VOCAB), r"token -\d+ at \[0, 0\]: must be 0 to 60"),
    ],
)
def test_tokens_that_are_none(tokens, message):
    with pytest.raises(ValueError, match=message):
        logits.blocks(MODEL, STATE.params, BIAS, tokens)


def test_no_mtp():
    model = logits.build(small(depth=0))
    with pytest.raises(ValueError, match=r"no MTP modules \(model\.mtp\.depth = 0\)"):
        logits.blocks(model, STATE.params, BIAS, TOKENS, mtp=True)
