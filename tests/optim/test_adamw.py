"""AdamW against NumPy, and which parameters decay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.config import OptimConfig
from deepseek_jax.optim.adamw import DECAYS, EPSILON, adamw, decays

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1, clip=1.0)


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(scale * rng.normal(size=shape))  # noqa: E731
    return {
        "embed": make(5, 4),
        "moe": {"norm": {"scale": make(2, 4)}, "router": make(4, 3)},
    }


def numpy_adamw(params, gradients, lr):
    """Decoupled AdamW with global clipping on a flat dict of float64 arrays."""
    first = {k: np.zeros_like(p) for k, p in params.items()}
    second = {k: np.zeros_like(p) for k, p in params.items()}
    for t, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, CONFIG.clip / norm)
            first[k] = CONFIG.b1 * first[k] + (1 - CONFIG.b1) * g
            second[k] = CONFIG.b2 * second[k] + (1 - CONFIG.b2) * g**2
            mean, power = first[k] / (1 - CONFIG.b1**t), second[k] / (1 - CONFIG.b2**t)
            decay = 0.0 if k.endswith("scale") else CONFIG.weight_decay
            params[k] = params[k] - lr * (
                mean / (np.sqrt(power) + EPSILON) + decay * params[k]
            )
    return params


def flat(tree):
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x)
        for p, x in pairs
    }


@pytest.mark.parametrize("scale", [0.01, 10.0])  # below and above the clip
def test_five_steps_equal_a_numpy_adamw(scale):
    with jax.enable_x64(True):
        params = random_tree(0)
        gradients = [random_tree(seed, scale) for seed in range(1, 6)]
        optimizer = adamw(CONFIG, lambda step: 1e-2)
        state, got = optimizer.init(params), params
        for grads in gradients:
            updates, state = optimizer.update(grads, state, got)
            got = jax.tree.map(jnp.add, got, updates)
        expected = numpy_adamw(flat(params), [flat(g) for g in gradients], 1e-2)
        for name, value in flat(got).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)


def test_decay_goes_by_name_and_stops_at_norms():
    mask = decays(random_tree(0))
    assert mask == {"embed": True, "moe": {"norm": {"scale": False}, "router": True}}


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="'moe/mystery'"):
        decays({"moe": {"mystery": jnp.ones(2)}})


def test_every_parameter_of_the_model_is_named_by_exactly_one_rule():
    import re

    from deepseek_jax.train.state import assemble, init_state
    from tests.factory import small

    parts = assemble(small(depth=2))
    params = jax.eval_shape(lambda: init_state(parts, 0)).params
    mask = flat(decays(params))
    used = set()
    for name, decayed in mask.items():
        rules = [p for p, _ in DECAYS if re.search(p, name)]
        assert len(rules) == 1, (name, rules)
        used.update(rules)
        assert decayed == (not name.endswith("scale")), name
    assert used == {pattern for pattern, _ in DECAYS}


def test_moments_kept_in_bf16_are_updated_in_float32():
    """As the report keeps them: the step is near float32's, the state half as large."""
    to_f32 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    params, updates = to_f32(random_tree(0)), {}
    for moments in ("f32", "bf16"):
        config = dataclasses.replace(CONFIG, moments=moments)
        optimizer = adamw(config, optax.constant_schedule(CONFIG.lr))
        state, seen = optimizer.init(params), []
        for seed in range(1, 6):
            update, state = optimizer.update(to_f32(random_tree(seed)), state, params)
            seen.append(update)
        updates[moments] = seen
        dtypes = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
        assert dtypes == {jnp.dtype({"f32": "float32", "bf16": "bfloat16"}[moments])}
    assert {x.dtype for x in jax.tree.leaves(updates["bf16"])} == {jnp.dtype("float32")}
    pairs = list(zip(*map(jax.tree.leaves, updates.values()), strict=True))
    for wide, kept in pairs:
        error = np.linalg.norm(kept - wide) / np.linalg.norm(wide)
        assert error < 2.0**-7
    assert any(np.abs(kept - wide).max() > 0 for wide, kept in pairs)
