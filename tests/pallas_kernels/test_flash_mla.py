"""Tiled causal attention against all scores at once, and both against plain loops."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_mla.reference import attention, chunked_attention
from tests.agreement import (
    as_dtype,
    assert_agree,
    largest,
    matmul_dtypes,
    with_gradients,
)


class Case(NamedTuple):
    """Sizes; `segments` is how documents lie in a row, None without a mask."""

    length: int
    chunk: int = 128
    batch: int = 2
    heads: int = 4
    groups: int = 4
    rotary: int = 1
    nope: int = 6
    rope: int = 4
    value: int = 3
    segments: str | None = None


CASES = {
    "one position": Case(1),
    "one position, masked": Case(1, segments="packed"),
    "shorter than a chunk": Case(7),
    "a chunk and one position": Case(17, chunk=16, segments="packed"),
    "chunks of one position": Case(4, chunk=1, heads=2, groups=1, segments="packed"),
    "MHA": Case(37, chunk=8, rotary=4, value=10),
    "GQA": Case(37, chunk=20, groups=2, rotary=2, segments="packed"),
    "MQA": Case(37, chunk=30, heads=3, groups=1, segments="scattered"),
    "GQA, one rotary key": Case(17, chunk=16, groups=2, nope=3, value=5),
    "no unrotated part": Case(7, groups=2, rotary=2, nope=0),
    "two tiles a row": Case(190, chunk=32, segments="scattered"),
    "three tiles a row": Case(261, chunk=64, batch=1, groups=2),
    "several pieces": Case(130, batch=9, heads=5, groups=5, nope=2, rope=2),
}
SOME = ["GQA", "two tiles a row"]


def operands(case, seed=0):
    """q_nope, q_rope, k_nope, k_rope, v and a cotangent; the segment ids."""
    rng = np.random.default_rng(seed)
    lead = case.batch, case.length
    shapes = [
        (case.heads, case.nope),
        (case.heads, case.rope),
        (case.groups, case.nope),
        (case.rotary, case.rope),
        (case.groups, case.value),
        (case.heads, case.value),
    ]
    floats = [rng.normal(size=(*lead, *shape)) for shape in shapes]
    return floats, {
        None: None,
        "packed": packed(rng, *lead),
        "scattered": rng.integers(0, 3, lead),
    }[case.segments]


def packed(rng, batch, length):
    """Documents numbered from 1, then padding, id 0."""
    documents = 1 + np.cumsum(rng.random((batch, length)) < 0.2, 1)
    padding = np.arange(length) >= rng.integers(length // 2, length + 1, (batch, 1))
    return np.where(padding, 0, documents)


def evaluate(function, case, dtype=jnp.float64, **options):
    """The value and the five gradients, from operands rounded to `dtype`."""
    floats, segment = operands(case)
    *floats, cotangent = as_dtype(floats, dtype)
    scale = (case.nope + case.rope) ** -0.5
    call = functools.partial(function, scale=scale, **options)
    segment = () if segment is None else (jnp.asarray(segment),)
    return with_gradients(call)(floats, segment, cotangent)


@functools.cache
def exact(name):
    """What the oracle says of a case in float64."""
    with jax.enable_x64(True):
        return [np.asarray(x) for x in evaluate(attention, CASES[name])]


def loops(q_nope, q_rope, k_nope, k_rope, v, segment, scale):
    """Equations 9 and 10, a query at a time."""
    batch, length, heads, _ = q_nope.shape
    groups, rotary = k_nope.shape[2], k_rope.shape[2]
    out = np.zeros((batch, length, heads, v.shape[-1]))
    for b, at, h in np.ndindex(batch, length, heads):
        group = h // (heads // groups)
        shared = 0 if rotary == 1 else group
        mass = 0.0
        for s in range(at + 1):
            if segment is not None and segment[b, s] != segment[b, at]:
                continue
            score = q_nope[b, at, h] @ k_nope[b, s, group]
            score += q_rope[b, at, h] @ k_rope[b, s, shared]
            p = np.exp(scale * score)
            mass += p
            out[b, at, h] += p * v[b, s, group]
        out[b, at, h] /= mass
    return out


@pytest.mark.parametrize("function", [attention, chunked_attention])
@pytest.mark.parametrize("name", ["MHA", "GQA", "MQA", "no unrotated part"])
def test_it_is_what_plain_loops_compute(function, name):
    (*floats, _), segment = operands(CASES[name])
    expected = loops(*floats, segment, scale=0.7)
    with jax.enable_x64(True):
        actual = jax.jit(functools.partial(function, scale=0.7))(*floats, segment)
    assert_agree([actual], [expected], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_tiles_agree_with_the_oracle(name):
    case = CASES[name]
    with jax.enable_x64(True):
        actual = evaluate(chunked_attention, case, chunk=case.chunk)
    assert all(x.dtype == jnp.float64 for x in actual)
    assert_agree(actual, exact(name), 1e-12)


@pytest.mark.parametrize(("compute", "bound"), [(None, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", SOME)
def test_tiles_round_no_more_than_their_operands(name, compute, bound):
    case = CASES[name]
    options = {"chunk": case.chunk, "compute_dtype": compute}
    actual = evaluate(chunked_attention, case, jnp.float32, **options)
    assert all(x.dtype == jnp.float32 for x in actual)
    assert_agree(actual, exact(name), bound)


@pytest.mark.parametrize("function", [attention, chunked_attention])
def test_16_bit_operands_are_summed_in_float32(function):
    case = CASES["GQA"]
    value, *gradients = evaluate(function, case, jnp.bfloat16)
    assert value.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    assert_agree([value, *gradients], exact("GQA"), 3e-2)


def test_every_product_has_rounded_operands_and_a_float32_sum():
    floats, segment = operands(CASES["two tiles a row"])
    *floats, cotangent = as_dtype(floats, jnp.float32)

    def run(*floats):
        function = functools.partial(
            chunked_attention, scale=0.5, chunk=32, compute_dtype=jnp.bfloat16
        )
        return jax.vjp(lambda *floats: function(*floats, segment), *floats)[1](
            cotangent
        )

    dtypes = matmul_dtypes(run, *floats)
    assert set(dtypes) == {("bfloat16", "bfloat16", "float32")}
    assert len(dtypes) >= 7  # two forward, five backward


@pytest.mark.parametrize("segments", [None, "packed"])
def test_scores_beyond_the_range_of_exp_do_not_overflow(segments):
    case = Case(130, chunk=32, segments=segments)
    (*floats, _), segment = operands(case)
    run = jax.jit(functools.partial(chunked_attention, scale=300.0, chunk=32))
    actual = run(*as_dtype(floats, jnp.float32), segment)
    with jax.enable_x64(True):
        expected = jax.jit(functools.partial(attention, scale=300.0))(*floats, segment)
    # Scores up to some 5000 are rounded to 2^-24 of their size.
    assert_agree([actual], [expected], 1e-3)


def test_all_scores_never_exist_at_once():
    case = Case(256, chunk=64, batch=8, heads=8, groups=8)
    scores = case.batch * case.heads * case.length**2
    (*floats, _), _ = operands(case)
    floats = as_dtype(floats, jnp.float32)

    def loss(function, *floats):
        return function(*floats, scale=1.0).sum()

    def gradients(function):
        return jax.grad(functools.partial(loss, function), argnums=(0, 1, 2, 3, 4))

    assert largest(gradients(attention), *floats) >= scores
    assert largest(gradients(chunked_attention), *floats) < scores / 4
