"""A whole model in FP8: what it multiplies, what it keeps, what recomputing changes."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fp8_memory
from deepseek_jax import presets, runtime
from deepseek_jax.config import Config, DataConfig, MTPConfig, RuntimeConfig
from deepseek_jax.precision.policy import AS_NAMED, Pieces
from deepseek_jax.precision.quantize import Scheme, dequantize, quantize
from deepseek_jax.precision.recipe import kept_output, straight_through
from deepseek_jax.train.objective import objective, totals
from deepseek_jax.train.state import assemble, init_state
from tests.agreement import matmul_dtypes
from tests.factory import SMALL, random_batch, small

FINE = Pieces(forward="e5m6", gradients="e5m6")


def gradients(choice: RuntimeConfig):
    """(function of parameters to (loss, gradients), parameters) of a small model.

    Every expert takes every token, so that no rounding sends one elsewhere.
    """
    moe = dataclasses.replace(SMALL.moe, top_k=8, keep_groups=4)
    model = dataclasses.replace(SMALL, moe=moe, mtp=MTPConfig(depth=0))
    config = small(batch=2, length=16, runtime=choice, model=model)
    parts, batch = assemble(config), random_batch(config)
    state = init_state(parts, 0)

    def loss(params):
        counts = totals(parts, batch)
        value, _ = objective(parts, params, state.balance, batch, counts, 0.3)
        return value

    return jax.value_and_grad(loss), state.params


def test_computing_again_changes_nothing():
    runs = []
    for remat in ("policy", "none"):
        choice = RuntimeConfig(compute="fp8_v3", block=8, remat=remat)
        function, params = gradients(choice)
        runs.append(jax.jit(function)(params))
    first, second = (jax.tree.leaves(run) for run in runs)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_with_more_digits_every_gradient_comes_near_that_of_float32():
    """E5M6 has three more than E4M3, whose errors here are ten times these."""
    grads = []
    for compute, fp8 in (("f32", AS_NAMED), ("fp8_v3", FINE)):
        choice = RuntimeConfig(compute=compute, fp8=fp8, block=8)
        function, params = gradients(choice)
        grads.append(jax.tree.leaves(jax.jit(function)(params)))
    (loss, *exact), (near, *rounded) = grads
    assert 1e-5 < abs(near / loss - 1) < 5e-3
    for want, got in zip(exact, rounded, strict=True):
        assert 3e-3 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.08


def test_only_the_router_multiplies_float32():
    function, params = gradients(RuntimeConfig(compute="fp8_v3", block=8, remat="none"))
    found = Counter(matmul_dtypes(lambda p: function(p)[0], params))
    wide = {kinds for kinds in found if "bfloat16" not in kinds[:2]}
    assert wide == {("float32", "float32", "float32")}
    assert all(a == b for a, b, _ in found)


@pytest.mark.parametrize("form", ["e5m6", "e4m3"])
def test_attentions_output_is_what_its_format_holds(form):
    rng = np.random.default_rng(0)
    out = jnp.asarray(rng.normal(size=(3, 10, 40)) * 10 ** rng.normal(size=(3, 10, 1)))
    got, lse = kept_output(out, out[..., :1], form=form)
    scheme = Scheme(form, power_of_two=True)
    np.testing.assert_array_equal(got, dequantize(quantize(out, scheme), scheme))
    np.testing.assert_array_equal(got, got.astype(jnp.bfloat16))
    again, _ = kept_output(got, lse, form=form)
    np.testing.assert_array_equal(again, got)
    error = np.abs(got / out - 1).max()
    assert error < 2.0 ** -{"e5m6": 7, "e4m3": 4}[form] * 1.01
    np.testing.assert_array_equal(lse, out[..., :1])


def test_the_gradient_goes_straight_through():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)))
    g = jax.grad(lambda x: (straight_through(x, "e5m6") * x[::-1]).sum())(x)
    assert np.isfinite(g).all() and np.abs(g).max() > 0


def test_attention_of_either_path_is_rounded():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 9, 3, 8)), jnp.float32) for _ in range(5)]
    arrays[3] = arrays[3][:, :, :1]
    outs = []
    for path in ("plain", "chunked"):
        rt = runtime.build(RuntimeConfig(compute="fp8_v3", attention=path))
        outs.append(rt.attention(*arrays, None, scale=0.3))
    for out in outs:
        np.testing.assert_array_equal(out, out.astype(jnp.bfloat16))
    np.testing.assert_allclose(*outs, atol=0.03)


def test_less_is_kept_than_in_bf16():
    """0.6 is the bound of mini and of V3's width: `benchmarks/fp8_memory.py`."""
    kept = {}
    for name in ("bf16, all kept", "fp8_v3", "bf16, kept as fp8_v3 keeps"):
        config = Config(
            model=presets.tiny(),
            data=DataConfig(batch=2, length=128),
            runtime=dataclasses.replace(fp8_memory.VARIANTS[name], block=32),
        )
        kept[name] = fp8_memory.kept_bytes(config)
    assert kept["fp8_v3"] < 0.6 * kept["bf16, all kept"]
    assert kept["fp8_v3"] < kept["bf16, kept as fp8_v3 keeps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fp8",
    [
        Pieces(maps="q_a,o"),
        Pieces(products="fprop"),
        Pieces(kept="bf16", swiglu="no", out="bf16"),
        Pieces(tile=32, block=64, powers="yes", rows=32),
    ],
)
def test_pieces_train(fp8):
    function, params = gradients(RuntimeConfig(compute="fp8_v3", fp8=fp8, block=8))
    loss, grads = jax.jit(function)(params)
    assert 3 < loss < 8
    assert all(
        np.isfinite(g).all() and np.abs(g).max() > 0
        for g in map(np.asarray, jax.tree.leaves(grads))
    )
