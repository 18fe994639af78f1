"""The kernels that a Runtime's callables take: as accurate as without, and told of.

On a CPU kernels run in JAX's simulator of a GPU, which is slow: sizes are tiny.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import config as configs
from deepseek_jax import kernels, runtime
from deepseek_jax.config import (
    AttentionConfig,
    BalanceConfig,
    MeshConfig,
    MoEConfig,
    RuntimeConfig,
)
from deepseek_jax.model.block import MoEBlock
from deepseek_jax.ops import balancing
from deepseek_jax.ops.rope import rotation
from deepseek_jax.ops.swiglu import swiglu
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.rows import on_devices
from deepseek_jax.precision import policy
from deepseek_jax.precision.fp8_dots import MODELS, fp8_dot, fp8_grouped_dot
from deepseek_jax.precision.later import Later
from deepseek_jax.precision.recipe import recipe
from pallas_kernels import choice, testing
from pallas_kernels.choice import INTERPRET, MOSAIC_GPU, XLA
from pallas_kernels.fp8_quantize import api as fp8_quantize
from tests.factory import SMALL

LENGTH = 72
V3 = policy.POLICIES["fp8_v3"]


def test_configs_name_the_implementations_that_there_are():
    assert (configs.AUTO, *choice.IMPLEMENTATIONS) == configs.IMPLEMENTATIONS


def test_a_runtime_on_a_cpu_has_no_kernels_and_says_why():
    rt = runtime.build(RuntimeConfig(compute="bf16"))
    x_1LHN, expert_n, used = jnp.ones((1, 8, 2, 16)), jnp.zeros(2, jnp.int32), 2
    with kernels.dry_run() as notes:
        rt.attention(*[x_1LHN] * 3, x_1LHN[:, :, :1], x_1LHN, None, scale=0.2)
        rt.grouped_dot(jnp.ones((2, 128, 8)), jnp.ones((2, 8, 8)), expert_n, used)
        cache = jnp.ones((1, 16, 32), jnp.bfloat16)
        query, position = jnp.ones((1, 1, 2, 32)), jnp.zeros((1, 1), jnp.int32)
        rt.latent_attention(query, query, cache, cache, position, None, scale=0.2)
    assert set(notes) == {"attention", "grouped_dot", "latent_attention"}
    for chosen in notes.values():
        assert chosen.implementation == XLA and "Hopper" in chosen.reason


def test_a_fallback_is_not_lost_among_choices_that_are_none():
    x, w, expert_n = jnp.ones((2, 128, 8)), jnp.ones((2, 8, 8)), jnp.zeros(2, int)

    def both(x, w, expert_n, used):
        for each in (XLA, None, XLA):
            kernels.grouped_dot(x, w, expert_n, used, implementation=each)

    with kernels.dry_run() as notes:
        jax.eval_shape(both, x, w, expert_n, 2)
    assert "Hopper" in notes["grouped_dot"].reason


@pytest.mark.parametrize("compute", ["bf16", "fp8_v3"])
def test_what_is_demanded_and_cannot_be_is_an_error(compute):
    rt = runtime.build(RuntimeConfig(compute=compute, implementation=MOSAIC_GPU))
    with pytest.raises(
        ValueError,
        match=r"runtime.implementation = 'mosaic_gpu': grouped_dot: .*Hopper",
    ):
        rt.grouped_dot(
            jnp.ones((2, 128, 16)), jnp.ones((2, 16, 16)), jnp.zeros(2, int), 2
        )


@functools.cache
def block():
    """A block of MLA and experts, its arrays, and what to multiply its results by.

    Each expert takes every token, so that no rounding sends one elsewhere. The
    simulator does not run inside of the scan over a model's blocks.
    """
    attention = AttentionConfig(
        num_heads=1, q_rank=24, kv_rank=16, nope_dim=16, rope_dim=16, value_dim=16
    )
    moe = MoEConfig(num_experts=2, top_k=2, ffn_dim=32, num_groups=1, keep_groups=1)
    model = dataclasses.replace(SMALL, dim=32, attention=attention, moe=moe)
    balancer = balancing.build(BalanceConfig(), moe)
    key, shape = jax.random.key(0), (1, LENGTH, model.dim)
    x, g = jax.random.normal(key, (2, *shape))
    segment = (jnp.arange(LENGTH) // 24)[None]
    context = balancing.Context(jnp.ones((1, LENGTH), bool), LENGTH, 1)
    by = rotation(attention.rope, 16, jnp.arange(LENGTH)[None], jnp.float32)
    others = balancer.init(2), context, by, segment
    params = MoEBlock(model, runtime.Runtime(), balancer).init(key, x, *others)
    return model, balancer, params, x, g, others


def results(choice: RuntimeConfig, compile):
    """The block's output and the gradients of everything it has and reads."""
    model, balancer, params, x, g, others = block()
    module = MoEBlock(model, runtime.build(choice), balancer)

    def run(params, x):
        y, pull = jax.vjp(lambda *a: module.apply(*a, *others)[0], params, x)
        return y, pull(g)

    return compile(run)(params, x)


def test_a_block_with_kernels_computes_what_one_without_does():
    """Each may be 3e-3 (output) and 5e-3 (gradients) from exact numbers, so they are
    apart by the square root of two times that.
    """
    found = {}
    for name, compile in ((XLA, jax.jit), (INTERPRET, testing.interpreted)):
        choice = RuntimeConfig(compute="bf16", implementation=name)
        found[name] = results(choice, compile)
        with kernels.dry_run() as notes:
            results(choice, lambda run: functools.partial(jax.eval_shape, run))
        assert {each.implementation for each in notes.values()} == {name}
        assert set(notes) == {"attention", "grouped_dot", "grouped_swiglu"}
    (y, grads), (own_y, own_grads) = found[XLA], found[INTERPRET]
    assert testing.distance(own_y, y) <= 3e-3
    paths = jax.tree_util.tree_leaves_with_path(grads)
    for (path, want), got in zip(paths, jax.tree.leaves(own_grads), strict=True):
        error = testing.distance(got, want)
        assert error <= 2**0.5 * 5e-3, f"{jax.tree_util.keystr(path)}: {error:.1e}"
        assert np.abs(want).max() > 0


@pytest.mark.parametrize(("maps", "own"), [("q_a,o", True), ("q_a,experts", False)])
def test_experts_that_are_not_in_fp8_are_those_of_bf16(maps, own):
    choice = RuntimeConfig(compute="fp8_v3", fp8=policy.Pieces(maps=maps))
    with kernels.dry_run() as notes:
        results(choice, lambda run: functools.partial(jax.eval_shape, run))
    assert ("grouped_swiglu" in notes) == own and "grouped_dot" in notes


def gemms(made, name, x, w, **options):
    return kernels.gemms(made, name, x, w, implementation=INTERPRET, **options)


def operands(*sizes, small=1e-6):
    """x, w and a gradient of x w, of normal numbers."""
    *outer, rows, depth, width = sizes
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*outer, rows, depth)) * np.exp(rng.normal(size=(1, depth)))
    w = rng.normal(size=(2, depth, width) if outer else (depth, width)) * depth**-0.5
    g = rng.normal(size=(*outer, rows, width)) * small
    return [jnp.asarray(each, jnp.float32) for each in (x, w, g)]


def with_gradients(dot, made, compile):
    """[y, gradient of x, of w] of (x, w, g), by any gemms."""

    def run(x, w, g):
        y, pull = jax.vjp(functools.partial(dot, made), x, w)
        return [y, *pull(g)]

    return compile(run)


def assert_near(actual, expected, bound):
    expected = jax.tree.leaves(expected)
    for got, want in zip(jax.tree.leaves(actual), expected, strict=True):
        assert testing.distance(got, want) <= bound


@pytest.mark.parametrize("name", ["q_a", "o", "down"])
def test_fp8_kernels_multiply_as_the_models_do(name, monkeypatch):
    fused = mock.Mock(wraps=fp8_quantize.quantize_swiglu)
    monkeypatch.setattr(fp8_quantize, "quantize_swiglu", fused)
    made = recipe(V3, name)
    x, w, g = operands(145, 161, 47)  # no whole tiles
    if name == "down":  # SwiGLU, computed anew in the backward pass
        x = Later(swiglu, (x, x[:, ::-1]), ())
    found = gemms(made, name, x, w)
    assert found is not MODELS

    def run(gemms, made, x, w):
        return fp8_dot(made, x, w, gemms)

    own = with_gradients(functools.partial(run, found), made, testing.interpreted)
    want = with_gradients(functools.partial(run, MODELS), made, jax.jit)(x, w, g)
    assert_near(own(x, w, g), want, 2e-6)
    assert fused.called == (name == "down")


@pytest.mark.parametrize("later", [False, True])
def test_fp8_kernels_multiply_blocks_as_the_models_do(later):
    made = recipe(V3, "experts")
    x, w, g = operands(3, 128, 32, 48)
    expert_n, used = jnp.asarray([0, 1, 1], jnp.int32), jnp.asarray(2)
    if later:
        weight_nb = jnp.linspace(0, 1, x[..., 0].size).reshape(x.shape[:2])
        x = Later(swiglu, (x, x[..., ::-1]), (weight_nb,))

    def run(gemms, made, x, w):
        return fp8_grouped_dot(made, x, w, expert_n, used, gemms)

    found = gemms(made, "experts", x, w)
    own = with_gradients(functools.partial(run, found), made, testing.interpreted)
    want = with_gradients(functools.partial(run, MODELS), made, jax.jit)(x, w, g)
    assert_near(own(x, w, g), want, 2e-6)


def test_each_device_of_a_mesh_multiplies_its_own_rows():
    made = recipe(V3, "q_a")
    x, w, g = operands(512, 160, 48)
    mesh = meshes.make(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    split = kernels._over(functools.partial(on_devices, mesh=mesh), MODELS)

    def run(gemms, made, x, w):
        return fp8_dot(made, x, w, gemms)

    rows = meshes.by_rows(mesh)
    placed = jax.device_put(x, rows), w, jax.device_put(g, rows)
    own = with_gradients(functools.partial(run, split), made, jax.jit)(*placed)
    want = with_gradients(functools.partial(run, MODELS), made, jax.jit)(x, w, g)
    assert_near(own, want, 1e-6)
    assert len(own[0].sharding.device_set) == 4


REFUSALS = {
    "gradients are e5m2": (policy.POLICIES["fp8_e5m2_grads"], "g is e5m2"),
    "one scale a matrix": (policy.POLICIES["fp8_per_tensor"], "by None"),
    "no promotion": (policy.POLICIES["fp8_no_promotion"], "promoted every None"),
    "short sums": (dataclasses.replace(V3, bits=13, promote=128), "13 bits"),
    "fprop alone": (dataclasses.replace(V3, products="fprop"), "all products"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_a_policy_asks_and_no_kernel_does_is_said(why):
    pieces, reason = REFUSALS[why]
    x, w, _ = operands(128, 128, 128)
    with pytest.raises(ValueError, match=reason):
        gemms(recipe(pieces, "q_a"), "q_a", x, w)


@pytest.mark.parametrize("name", ["fp8_v3", "fp8_v3_hopper"])
def test_what_the_hardware_does_kernels_do(name):
    x, w, _ = operands(128, 128, 128)
    for each in policy.MAPS[:-1]:
        made = recipe(policy.POLICIES[name], each)
        assert gemms(made, each, x, w) is not MODELS


def test_sizes_that_no_kernel_has_are_said():
    x, w, _ = operands(2, 64, 32, 32)
    with pytest.raises(ValueError, match="grouped_dot: blocks have 64 rows"):
        gemms(recipe(V3, "experts"), "experts", x, w)
    x, w, _ = operands(128, 128, 128)
    with pytest.raises(ValueError, match="linear q_a: x is float16"):
        gemms(recipe(V3, "q_a"), "q_a", x.astype(jnp.float16), w)
