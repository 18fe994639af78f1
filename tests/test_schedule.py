"""Piecewise-constant schedules, traced and not."""

import jax
import jax.numpy as jnp

from deepseek_jax.schedule import piecewise


def test_each_value_holds_from_its_step_on():
    speed = piecewise(1.0, ((3, 0.5), (5, 0.0), (6, 2.0)))
    expected = [1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 2.0, 2.0]
    assert [float(speed(step)) for step in range(8)] == expected
    assert jax.jit(jax.vmap(speed))(jnp.arange(8)).tolist() == expected


def test_without_changes_it_is_constant_and_of_the_default_float_type():
    assert float(piecewise(0.25)(10**9)) == 0.25
    assert piecewise(0.25)(0).dtype == jnp.float32
    with jax.enable_x64(True):
        assert float(piecewise(0.1)(jnp.int32(7))) == 0.1
