"""Evaluation sums against one pass over everything at once."""

import jax
import numpy as np
import pytest

from deepseek_jax.train.evaluate import evaluate, make_evaluate_batch
from deepseek_jax.train.objective import objective, totals
from deepseek_jax.train.state import assemble, init_state
from tests.factory import random_batch, small

DOMAINS = ("code", "speeches", "unseen")


@pytest.fixture(scope="module")
def setting():
    config = small(batch=4, depth=2, segment_mask=True)
    parts = assemble(config)
    return parts, init_state(parts, 0), make_evaluate_batch(parts, len(DOMAINS))


def test_sums_over_batches_are_the_whole_sets(setting):
    parts, state, evaluate_batch = setting
    batches = [random_batch(parts.config, seed, documents=True) for seed in range(3)]
    metrics = evaluate(evaluate_batch, parts, state, batches, DOMAINS).metrics
    whole = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    _, (losses, aux) = jax.jit(
        lambda state: objective(
            parts, state.params, state.balance, whole, totals(parts, whole), 0.3
        )
    )(state)
    assert metrics["eval_ce"] == pytest.approx(float(losses.ce), rel=1e-5)
    np.testing.assert_allclose(metrics["eval_mtp_ce"], losses.mtp_ce, rtol=1e-5)
    np.testing.assert_array_equal(metrics["eval_load"], aux.load)
    load = np.asarray(aux.load[: parts.config.model.num_moe], float)
    want = (load.max(1) / load.mean(1) - 1).mean()
    assert metrics["eval_maxvio_global"] == pytest.approx(want, rel=1e-6)
    by_domain = np.array(list(metrics["eval_load_by_domain"].values()))
    np.testing.assert_array_equal(by_domain.sum(0), aux.load)
    assert list(metrics["eval_ce_by_domain"]) == ["code", "speeches"]


def test_flips_compare_with_the_previous_evaluation(setting):
    parts, state, evaluate_batch = setting
    batches = [random_batch(parts.config, documents=True)]
    first = evaluate(evaluate_batch, parts, state, batches, DOMAINS)
    assert first.metrics["eval_routing_flips"] is None
    again = evaluate(evaluate_batch, parts, state, batches, DOMAINS, first.probe)
    assert again.metrics["eval_routing_flips"] == [0.0] * 4
    moved = state._replace(params=init_state(parts, 1).params)
    other = evaluate(evaluate_batch, parts, moved, batches, DOMAINS, first.probe)
    assert min(other.metrics["eval_routing_flips"]) > 0.1


def test_an_empty_validation_set_is_refused(setting):
    parts, state, evaluate_batch = setting
    with pytest.raises(ValueError, match=r"raise data\.val_fraction"):
        evaluate(evaluate_batch, parts, state, [], DOMAINS)
