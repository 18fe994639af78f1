"""The FP8 products of a linear map against numpy, written from the report alone."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.ops.swiglu import swiglu
from deepseek_jax.precision.accumulate import MODELS, Accumulator
from deepseek_jax.precision.fp8_dots import Recipe, fp8_dot, fp8_grouped_dot
from deepseek_jax.precision.later import Later
from deepseek_jax.precision.quantize import Scheme, quantize
from tests.agreement import assert_agree, matmul_dtypes

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448, "e5m2": 57344}


def rounded(x, rows, columns, form="e4m3", least=0.0):
    """x, each block of it over its largest number, cast, and multiplied again."""
    x = np.asarray(x, np.float32)
    if x.ndim > 2:
        return np.stack([rounded(each, rows, columns, form, least) for each in x])
    out = np.zeros(x.shape)
    for i in range(0, len(x), rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns]
            amax = max(np.abs(part).max(), np.float32(least))
            scale = np.float32(amax / np.float32(LARGEST[form])) if amax else 1
            codes = (part / scale).astype(DTYPES[form]).astype(np.float64)
            out[i : i + rows, j : j + columns] = codes * np.float64(scale)
    return out


def operands(rows=300, width=200, out=136, small=1e-7):
    """x, w and a gradient as small as those of a mean over many tokens."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width)) * np.exp(rng.normal(size=(1, width)))
    w = rng.normal(size=(width, out)) * width**-0.5
    g = rng.normal(size=(rows, out)) * small
    return [each.astype(np.float32) for each in (x, w, g)]


@functools.lru_cache
def with_gradients(recipe, dot=fp8_dot):
    @jax.jit
    def run(x, w, g, *others):
        y, pull = jax.vjp(lambda x, w: dot(recipe, x, w, *others), x, w)
        return [y, *pull(g)]

    return run


def expected(x, w, g, tile=128, block=128, rows=1, gradients="e4m3", kept=True):
    """Section 3.3.2: scales along every sum; the backward pass reads what was kept."""
    x8, w8 = rounded(x, 1, tile, least=1e-4), rounded(w, block, block, least=1e-4)
    again = x8 if kept else x.astype(ml_dtypes.bfloat16)
    x_t = rounded(again, tile, 1, least=1e-4)
    return [
        x8 @ w8,
        rounded(g, rows, tile, gradients) @ w8.T,
        x_t.T @ rounded(g, tile, 1, gradients),
    ]


def test_the_three_products_are_those_of_the_report():
    x, w, g = operands()
    got = with_gradients(Recipe())(x, w, g)
    assert all(each.dtype == jnp.float32 for each in got)
    assert_agree(got, expected(x, w, g), 2e-6)
    # And no other groupings: any one changed moves what it should by far more.
    for changed, moved in (
        ({"tile": 64}, (0, 1, 2)),
        ({"block": 64}, (0, 1)),
        ({"rows": 128}, (1,)),
        ({"gradients": "e5m2"}, (1, 2)),
        ({"kept": False}, (2,)),
    ):
        other = expected(x, w, g, **changed)
        for i in moved:
            assert np.abs(got[i] - other[i]).max() > 1e-3 * np.abs(other[i]).max()


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        (Recipe(g=Scheme(block=(128, 128), least=1e-30)), {"rows": 128}),
        (Recipe(kept=None), {"kept": False}),
        (
            Recipe(
                g=Scheme("e5m2", least=1e-30),
                g_t=Scheme("e5m2", (128, 1), least=1e-30),
            ),
            {"gradients": "e5m2"},
        ),
        (
            Recipe(
                *(Scheme(block=None),) * 2,
                Scheme(block=None, least=1e-30),
                Scheme(block=None),
                Scheme(block=None, least=1e-30),
                Scheme(block=None),
            ),
            {"tile": 9999, "block": 9999, "rows": 9999},
        ),
        (Recipe(quantize=quantize), {}),
        (Recipe(product=Accumulator(None, 128)), {}),
    ],
    ids=["block gradients", "bf16 cache", "e5m2", "per tensor", "codes", "promoted"],
)
def test_every_piece_is_what_it_says(recipe, changed):
    x, w, g = operands()
    if changed.get("tile"):  # one scale for a matrix: groups of 9999 both ways

        def whole(a, least=0.0):
            return rounded(a, 9999, 9999, least=least)

        x8 = whole(x, 1e-4)
        want = [x8 @ whole(w), whole(g) @ whole(w).T, whole(x8).T @ whole(g)]
    else:
        want = expected(x, w, g, **changed)
    assert_agree(with_gradients(recipe)(x, w, g), want, 2e-6)


@pytest.mark.parametrize("name", ["hopper", "no_promotion_exact"])
def test_sums_are_those_of_the_model_handed_in(name):
    x, w, g = operands(40, 160, 24)
    exact = with_gradients(Recipe())(x, w, g)
    short = with_gradients(Recipe(product=MODELS[name]))(x, w, g)
    for got, want in zip(short, exact):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-5 < error < 3e-3


@pytest.mark.parametrize("products", [("fprop",), ("dgrad",), ("wgrad",), ()])
def test_a_product_that_is_not_fp8_is_of_bfloat16(products):
    x, w, g = operands()
    got = with_gradients(Recipe(products=products))(x, w, g)
    b = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, w, g)]
    read = rounded(x, 1, 128, least=1e-4).astype(ml_dtypes.bfloat16).astype(float)
    plain = [b[0] @ b[1], b[2] @ b[1].T, read.T @ b[2]]
    names = ("fprop", "dgrad", "wgrad")
    want = [
        eight if name in products else sixteen
        for name, eight, sixteen in zip(names, expected(x, w, g), plain)
    ]
    assert_agree(got, want, 2e-6)


def test_on_a_cpu_nothing_but_bfloat16_is_multiplied():
    x, w, g = operands()
    dtypes = set(matmul_dtypes(with_gradients(Recipe()), x, w, g))
    assert dtypes == {("bfloat16", "bfloat16", "float32")}


def test_swiglu_is_computed_again_from_what_was_kept():
    _, w, g = operands()
    rng = np.random.default_rng(1)
    gate, up = rng.normal(size=(2, len(g), len(w))).astype(np.float32)
    weight = rng.random(len(g)).astype(np.float32)
    later = Later(swiglu, (gate, up), (weight,))
    y, dx, dw = with_gradients(Recipe())(later, w, g)

    def both(gate, up, weight):
        return gate / (1 + np.exp(-gate)) * up * weight[:, None]

    wide = [a.astype(np.float64) for a in (gate, up, weight)]
    hidden = both(*wide)
    kept = [rounded(a, 1, 128, least=1e-4) for a in wide[:2]]
    again = both(*kept, wide[2])
    want_y, dhidden, _ = expected(hidden.astype(np.float32), w, g)
    sig = 1 / (1 + np.exp(-kept[0]))
    slope = sig * (1 + kept[0] * (1 - sig))
    scaled = dhidden * wide[2][:, None]
    want = [
        want_y,
        scaled * slope * kept[1],
        scaled * kept[0] * sig,
        (dhidden * kept[0] * sig * kept[1]).sum(1),
        rounded(again, 128, 1, least=1e-4).T @ rounded(g, 128, 1),
    ]
    # A number on the verge of two codes may fall to either, so the norm is compared.
    for got, true in zip((y, *dx.rounded, *dx.exact, dw), want):
        assert np.linalg.norm(got - true) < 2e-4 * np.linalg.norm(true)


@pytest.mark.parametrize("block", [None, (1, 128)])
def test_blocks_of_rows_are_multiplied_each_by_its_expert(block):
    """Against `fp8_dot`, an expert at a time."""
    rng = np.random.default_rng(2)
    n, b, width, out = 4, 128, 160, 72
    x = rng.normal(size=(n, b, width)).astype(np.float32)
    w = rng.normal(size=(3, width, out)).astype(np.float32)
    g = rng.normal(size=(n, b, out)).astype(np.float32) * 1e-6
    x[3], expert_n, used = 0, np.array([0, 0, 2, 2], np.int32), np.array(3)
    if block is None:
        scheme = Scheme(block=None)
        small = Scheme(block=None, least=1e-30)
        recipe = Recipe(scheme, scheme, small, scheme, small, scheme)
    else:
        recipe = Recipe()
    run = with_gradients(recipe, fp8_grouped_dot)
    y, dx, dw = run(x, w, g, expert_n, used)
    assert not y[3].any() and not dx[3].any() and not dw[1].any()
    if block is None:  # all blocks share their scale
        codes = rounded(x.reshape(-1, width), 9999, 9999).reshape(x.shape)
        want = codes[0] @ rounded(w[0], 9999, 9999)
        assert_agree([y[0]], [want], 2e-6)
        return
    for expert, own in ((0, slice(0, 2)), (2, slice(2, 3))):
        flat = [a[own].reshape(-1, a.shape[-1]) for a in (x, g)]
        want = with_gradients(recipe)(flat[0], w[expert], flat[1])
        got = [a[own].reshape(-1, a.shape[-1]) for a in (y, dx)]
        assert_agree([*got, dw[expert]], want, 1e-6)


def test_rows_of_different_blocks_never_share_a_scale():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 16, 128)).astype(np.float32)
    x[1] *= 1e5
    w, g = np.ones((2, 128, 8), np.float32), np.ones((2, 16, 8), np.float32)
    run = with_gradients(Recipe(), fp8_grouped_dot)
    *_, dw = run(x, w, g, np.array([0, 1], np.int32), np.array(2))
    want = rounded(rounded(x[0], 1, 128), 16, 1).sum(0)
    np.testing.assert_allclose(dw[0, :, 0], want, rtol=1e-5, atol=1e-5)


def test_what_is_kept_has_eight_bits():
    x, w, _ = operands()
    _, pull = jax.vjp(functools.partial(fp8_dot, Recipe()), x, w)
    kept = [a for a in jax.tree.leaves(pull) if hasattr(a, "dtype") and a.size > 1]
    sizes = {str(a.dtype): a.size for a in kept if a.shape != w.shape}
    assert sizes == {"float8_e4m3fn": x.size, "float32": 2 * len(x)}
