"""Device loads of a placement, by hand and where they are not defined."""

import numpy as np
import pytest

from deepseek_jax.eval import placement


def test_a_worked_example():
    loads = [[8, 4, 2, 2], [1, 1, 1, 1]]
    domains = {"code": [[8, 0, 0, 0], [1, 1, 0, 0]], "none": np.zeros((2, 4))}
    made = placement.measure(loads, 6, devices=2, by_domain=domains)
    # Expert 0 of layer 0 has copies of 8/3 each: 4 + 8/3 + 2 against 8/3 + 8/3 + 2 is
    # what the greedy choice deals out of 4, 8/3, 8/3, 8/3, 2, 2.
    assert made.placement.counts[0].tolist() == [3, 1, 1, 1]
    np.testing.assert_allclose(made.total.before, [12 / 8, 1])
    np.testing.assert_allclose(made.total.after, [(4 + 8 / 3 + 2) / 8, 1])
    code = made.domains["code"]
    np.testing.assert_allclose(code.before, [2, 2])
    np.testing.assert_allclose(code.after, [4 / 3, 1])
    assert np.isnan(made.domains["none"]).all()


def test_before_is_not_defined_where_experts_do_not_divide():
    made = placement.measure([[3, 2, 1]], 4, devices=2)
    assert np.isnan(made.total.before).all() and np.isfinite(made.total.after).all()


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="replicas = 5"):
        placement.measure([[1, 1, 1, 1]], 5, devices=2)
    with pytest.raises(ValueError, match=r"loads have shape \[1, 2\]"):
        placement.measure([[1, 1, 1, 1]], 4, devices=2, by_domain={"a": [[1, 1]]})
