"""Grouped FP8 products against gathered ones, in XLA and in the simulated kernel."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.choice import XLA
from pallas_kernels.fp8_quantize.reference import BLOCK, TILE, quantize
from pallas_kernels.grouped_fp8_matmul import api, reference
from pallas_kernels.grouped_matmul.shapes import SHAPES
from pallas_kernels.testing import KERNEL, Suite, distance
from tests.pallas_kernels.fp8_oracle import BOUND

CI = SHAPES["ci"]


def routing(key, shape):
    """Experts in any order, some without blocks, and which blocks are not used."""
    expert_n = jax.random.randint(key, (shape.n,), 0, shape.E)
    return expert_n, jnp.int32(shape.used), jnp.arange(shape.n) >= shape.used


@functools.partial(jax.jit, static_argnums=1)
def forward_inputs(key, shape):
    """Rows by tiles, weights by blocks; scales of unused blocks are NaN."""
    keys = jax.random.split(key, 3)
    x, x_scale = quantize(jax.random.normal(keys[0], (*shape[:1], 128, shape.D)), TILE)
    w_EFD = jax.random.normal(keys[1], (shape.E, shape.F, shape.D))
    expert_n, used, unused_n = routing(keys[2], shape)
    x_scale = jnp.where(unused_n[:, None, None], jnp.nan, x_scale)
    return x, x_scale, *quantize(w_EFD, BLOCK), expert_n, used


@functools.partial(jax.jit, static_argnums=1)
def gradient_inputs(key, shape):
    """Both operands by tiles along the rows of a block."""
    keys = jax.random.split(key, 3)
    expert_n, used, unused_n = routing(keys[2], shape)
    operands = []
    for part, width in zip(keys, (shape.D, shape.F)):
        codes, scale = quantize(jax.random.normal(part, (shape.n, width, 128)), TILE)
        scale = jnp.where(unused_n[:, None], jnp.nan, scale[..., 0])
        operands += codes, scale
    return *operands, expert_n, used


def weight_gradient(*args, implementation):
    return api.grouped_fp8_weight_gradient(
        *args, experts=5, implementation=implementation
    )


FORWARD = Suite(
    operation=api.grouped_fp8_matmul,
    oracle=reference.blocks_oracle,
    inputs=forward_inputs,
    shapes=CI,
    bound=BOUND,
)
GRADIENT = Suite(
    operation=weight_gradient,
    oracle=functools.partial(reference.weight_gradient_oracle, experts=5),
    inputs=gradient_inputs,
    shapes=CI,
    bound=BOUND,
)


@pytest.mark.parametrize("shape", ["plain", "ragged", "none used"])
@pytest.mark.parametrize("implementation", [XLA, KERNEL])
@pytest.mark.parametrize("suite", [FORWARD, GRADIENT], ids=["forward", "gradient"])
def test_every_implementation_is_the_oracle(suite, implementation, shape):
    suite.check_values(implementation, shape)


def test_what_is_quantised_is_nearly_what_was_not():
    shape, expert_n = CI["plain"], jnp.array([1, 0, 1])
    keys = jax.random.split(jax.random.key(3))
    x = jax.random.normal(keys[0], (shape.n, 128, shape.D))
    w = jax.random.normal(keys[1], (shape.E, shape.F, shape.D))

    @jax.jit
    def both(x, w):
        codes = *quantize(x, TILE), *quantize(w, BLOCK)
        y = api.grouped_fp8_matmul(*codes, expert_n, shape.n)
        return y, jnp.einsum("nbD,nFD->nbF", x, w[expert_n])

    assert distance(*both(x, w)) < 0.05


def test_the_kernel_says_what_it_does_not_do():
    e8, ones = jnp.float8_e4m3fn, jnp.ones
    a, b = jnp.zeros((2, 64, 128), e8), jnp.zeros((1, 16, 128), e8)
    call = functools.partial(
        api.grouped_fp8_matmul,
        a,
        ones((2, 64, 1)),
        b,
        ones((1, 1, 1)),
        jnp.zeros(2, int),
        2,
    )
    with pytest.raises(NotImplementedError, match=r"64 rows.*wants 128"):
        call(implementation=KERNEL)
    assert jax.eval_shape(call).shape == (2, 64, 16)  # XLA does


def test_shapes_that_do_not_fit_are_refused():
    e8, ones, expert_n = jnp.float8_e4m3fn, jnp.ones, jnp.zeros(2, int)
    a, b = jnp.zeros((2, 128, 256), e8), jnp.zeros((1, 16, 256), e8)
    a_scale, b_scale = ones((2, 128, 2)), ones((1, 1, 2))
    call = api.grouped_fp8_matmul
    for bad, complaint in (
        ((a, a_scale, b[..., :128], b_scale, expert_n), r"b has.*\(1, 16, 256\)"),
        ((a, a_scale[..., :1], b, b_scale, expert_n), r"a_scale.*\(2, 128, 2\)"),
        ((a, a_scale, b, ones((1, 16, 2)), expert_n), r"b_scale.*\(1, 1, 2\)"),
        ((a, a_scale, b, b_scale, expert_n[:1]), r"expert_n.*\(2,\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call(*bad, 2)
    with pytest.raises(ValueError, match="256 rows: must be at most 128"):
        weight_gradient(
            a, ones((2, 128)), a, ones((2, 128)), expert_n, 2, implementation=None
        )
