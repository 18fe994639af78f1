"""The loss against a loop over positions written from its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.train.objective import forward, objective, target_masks, totals
from deepseek_jax.train.state import assemble, init_state
from tests.factory import as_f64, random_batch, small


@functools.partial(jax.jit, static_argnums=0)
def everything(parts, state, batch):
    """Loss, its parts, the routers' report, the global counts and the hidden states."""
    counts = totals(parts, batch)
    loss, (losses, aux) = objective(
        parts, state.params, state.balance, batch, counts, 0.3
    )
    out = forward(parts, state.params, state.balance, batch, counts)
    return loss, losses, aux, counts, out


def allowed(segment, row, i, k, isolate):
    """Token i+k+1 is real, and so is every input, all in one document if isolated."""
    span = segment[row, i : i + k + 2]
    return bool((span > 0).all() and (not isolate or len(set(span)) == 1))


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_each_cross_entropy_is_the_mean_over_its_valid_targets(isolate, documents):
    config = small(batch=4, depth=2, segment_mask=isolate)
    batch = random_batch(config, documents=documents)
    batch.mask[0, 4:7] = False  # targets may be masked one by one
    parts = assemble(config)
    length = config.data.length
    with jax.enable_x64(True):
        state = as_f64(init_state(parts, 0))
        loss, losses, aux, counts, out = everything(parts, state, batch)
        head = np.asarray(state.params["head"])
        hidden = [np.asarray(h) for h in (out.hidden_BLD, *out.mtp_JBLD)]
        penalty = float(aux.penalty.sum())
    want = []
    for k, h in enumerate(hidden):
        logits = h @ head
        nll = np.log(np.exp(logits).sum(-1))
        terms = [
            nll[row, i] - logits[row, i, batch.tokens[row, i + k + 1]]
            for row in range(4)
            for i in range(length)
            if allowed(batch.segment, row, i, k, isolate) and batch.mask[row, i + k + 1]
        ]
        want.append(np.mean(terms))
        assert int(counts.targets[k]) == len(terms)
    np.testing.assert_allclose([losses.ce, *losses.mtp_ce], want, rtol=1e-12)
    total = want[0] + 0.3 * np.mean(want[1:]) + penalty
    assert float(loss) == pytest.approx(total, rel=1e-12)
    assert float(losses.penalty) > 0


def test_full_targets_at_every_depth():
    """A row carries L + 1 + J tokens, so depth J divides by T and not by T - J."""
    config = small(batch=4, depth=3)
    masks = target_masks(assemble(config), random_batch(config))
    assert [int(m.sum()) for m in masks] == [4 * config.data.length] * 4


def test_padding_changes_nothing():
    """Rows of padding alone leave loss and loads as they are."""
    config = small(batch=4, segment_mask=True)
    wide = small(batch=6, segment_mask=True)
    batch = random_batch(config, documents=True)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), batch)
    with jax.enable_x64(True):
        results = []
        for setting, rows in ((config, batch), (wide, padded)):
            parts = assemble(setting)
            state = as_f64(init_state(parts, 0))
            loss, _, aux, _, _ = everything(parts, state, rows)
            results.append(jax.device_get((loss, aux.load, aux.penalty)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        results[0],
        results[1],
    )


def test_an_mtp_weight_of_zero_trains_no_mtp_module():
    config = small(depth=2)
    parts, batch = assemble(config), random_batch(config)
    state = init_state(parts, 0)

    @jax.jit
    def gradient(params, weight):
        return jax.grad(loss)(params, weight)

    def loss(params, weight):
        return objective(
            parts, params, state.balance, batch, totals(parts, batch), weight
        )[0]

    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    off = gradient(state.params, 0.0)["mtp_1"]
    off["block"].pop("moe")  # its router still has the balance penalty
    on = gradient(state.params, 0.3)["mtp_1"]
    assert largest(off["norm"]) == 0 < largest(on["norm"])
