"""Routing metrics by hand and against sums written from their definitions."""

import math
import warnings

import numpy as np
import pytest

from deepseek_jax.eval.routing import (
    dead_experts,
    entropy,
    flips,
    maxvio,
    relative_load,
    variation,
)


def test_a_worked_example():
    load = [[4, 4, 4, 4], [8, 4, 4, 0], [8, 8, 0, 0], [16, 0, 0, 0]]
    np.testing.assert_allclose(maxvio(load), [0, 1, 1, 3])
    np.testing.assert_allclose(variation(load), [0, math.sqrt(0.5), 1, math.sqrt(3)])
    np.testing.assert_allclose(entropy(load), [1, 0.75, 0.5, 0], atol=1e-15)
    assert dead_experts(load).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(relative_load(load)[1], [2, 1, 1, 0])


def test_definitions_over_leading_axes_and_at_any_scale():
    rng = np.random.default_rng(0)
    load = rng.integers(0, 50, (2, 3, 16))
    for index in np.ndindex(2, 3):
        own = load[index].tolist()
        mean = sum(own) / 16
        var = sum((c - mean) ** 2 for c in own) / 16
        shares = [c / sum(own) for c in own if c]
        nats = -sum(p * math.log(p) for p in shares)
        np.testing.assert_allclose(maxvio(load)[index], (max(own) - mean) / mean)
        np.testing.assert_allclose(variation(load)[index], math.sqrt(var) / mean)
        np.testing.assert_allclose(entropy(load)[index], nats / math.log(16))
        assert dead_experts(load)[index] == own.count(0)
    huge = load.astype(np.int64) * 10**9
    for metric in (maxvio, variation, entropy, relative_load):
        np.testing.assert_allclose(metric(huge), metric(load), rtol=1e-14)


def test_global_maxvio_is_not_the_mean_of_the_batches():
    batches = np.array([[6, 0], [0, 6]])
    assert maxvio(batches).mean() == 1
    assert maxvio(batches.sum(0)) == 0


def test_specialisation_is_relative_to_uniform_within_each_domain():
    load_DRE = np.array([[[30, 10]], [[5, 15]]])
    np.testing.assert_allclose(relative_load(load_DRE), [[[1.5, 0.5]], [[0.5, 1.5]]])
    np.testing.assert_allclose(relative_load(load_DRE.sum(0)), [[7 / 6, 5 / 6]])


def test_nothing_routed_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in (maxvio, variation, entropy):
            value = metric([[0, 0, 0], [1, 1, 1]])
            assert np.isnan(value[0]) and not np.isnan(value[1])
    assert dead_experts([0, 0, 0]) == 3


def test_flips_count_changed_experts_in_any_order():
    before = [[[0, 1], [2, 3], [4, 5]]]
    after = [[[1, 0], [2, 7], [6, 7]]]
    np.testing.assert_allclose(flips(before, before), [0])
    np.testing.assert_allclose(flips(before, after), [(0 + 0.5 + 1) / 3])
    np.testing.assert_allclose(flips(before, after, [True, True, False]), [0.25])


def test_flips_of_random_choices_come_near_one_minus_k_over_e():
    rng = np.random.default_rng(0)
    before, after = (rng.random((2, 3000, 8)).argsort(-1)[..., :3] for _ in range(2))
    changed = flips(before, after)
    for router in range(2):
        pairs = zip(before[router], after[router], strict=True)
        exact = np.mean([len(set(b) - set(a)) / 3 for a, b in pairs])
        np.testing.assert_allclose(changed[router], exact)
    np.testing.assert_allclose(changed, 1 - 3 / 8, atol=0.02)


def test_flips_need_selections_of_one_shape():
    with pytest.raises(ValueError, match=r"\(1, 4, 2\) and \(1, 5, 2\)"):
        flips(np.zeros((1, 4, 2)), np.zeros((1, 5, 2)))
