"""Scaled FP8 products against dequantised ones, in XLA and in the simulated kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choice import XLA
from pallas_kernels.fp8_matmul import api, reference
from pallas_kernels.fp8_matmul.shapes import SHAPES, Shape
from pallas_kernels.fp8_quantize.reference import BLOCK, TILE, quantize
from pallas_kernels.testing import KERNEL, Suite, distance
from tests.pallas_kernels.fp8_oracle import BOUND


@functools.partial(jax.jit, static_argnums=1)
def inputs(key, shape):
    """Codes and scales, whose tiles differ in size by orders of magnitude."""
    keys = jax.random.split(key, 4)
    a, b = (jax.random.normal(k, (n, shape.K)) for k, n in zip(keys, shape[:2]))
    a, b = (x * 4.0 ** jax.random.normal(k, (len(x), 1)) for x, k in zip((a, b), keys))
    return *quantize(a, TILE), *quantize(b, BLOCK if shape.by_block else TILE)


SUITE = Suite(
    operation=api.fp8_matmul,
    oracle=reference.matmul_oracle,
    inputs=inputs,
    shapes=SHAPES["ci"],
    bound=BOUND,
)


@pytest.mark.parametrize("shape", SUITE.shapes)
def test_xla_is_the_oracle(shape):
    SUITE.check_values(XLA, shape)


@pytest.mark.parametrize("shape", ["weights", "ragged", "gradient", "one tile"])
def test_the_kernel_is_the_oracle(shape):
    SUITE.check_values(KERNEL, shape, seed=1)


def test_the_oracle_is_what_plain_loops_compute():
    a, a_scale, b, b_scale = map(
        np.asarray, inputs(jax.random.key(0), Shape(3, 5, 136))
    )
    want = np.zeros((3, 5))
    for i, j, k in np.ndindex(3, 5, 136):
        scale = np.float64(a_scale[i, k // 128]) * b_scale[j // 128, k // 128]
        want[i, j] += np.float64(a[i, k]) * np.float64(b[j, k]) * scale
    assert distance(reference.matmul_oracle(a, a_scale, b, b_scale), want) < 1e-6


def test_every_128_are_summed_apart_and_then_scaled():
    a = jnp.concatenate([jnp.full((4, 128), 2.0), jnp.ones((4, 128))], 1)
    b = jnp.ones((16, 256))
    codes = [x.astype(jnp.float8_e4m3fn) for x in (a, b)]
    scale = jnp.repeat(jnp.array([[2.0**16, 0.5]]), 4, 0)
    operands = codes[0], scale, codes[1], jnp.ones((1, 2))
    for implementation in (XLA, KERNEL):
        out = SUITE.run(implementation, *operands)
        np.testing.assert_array_equal(out, np.full((4, 16), 2.0**24 + 64))


def test_the_result_has_the_dtype_asked_for():
    operands = inputs(jax.random.key(0), SHAPES["ci"]["one tile"])
    wide = api.fp8_matmul(*operands)
    for implementation in (XLA, KERNEL):
        run = jax.jit(
            lambda *x, name=implementation: api.fp8_matmul(
                *x, out_dtype=jnp.bfloat16, implementation=name
            )
        )
        out = run(*operands)
        assert out.dtype == jnp.bfloat16
        assert distance(out, wide) < 4e-3


E8 = jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("shape", "dtype", "out_dtype", "complaint"),
    [
        (Shape(8, 16, 100), E8, jnp.float32, "K = 100.*multiple of 16"),
        (Shape(6, 16, 128), E8, jnp.float32, "M = 6.*multiple of 4"),
        (Shape(8, 12, 128), E8, jnp.bfloat16, "N = 12.*multiple of 8"),
        (Shape(8, 16, 128), jnp.float8_e5m2, jnp.float32, "float8_e5m2.*float8_e4m3fn"),
        (Shape(8, 16, 128), E8, jnp.float16, "float16.*bfloat16 or float32"),
    ],
)
def test_the_kernel_says_what_it_does_not_do(shape, dtype, out_dtype, complaint):
    tiles = -(-shape.K // 128)
    a, b = (jnp.zeros((n, shape.K), dtype) for n in shape[:2])
    operands = a, jnp.ones((shape.M, tiles)), b, jnp.ones((1, tiles))
    call = functools.partial(api.fp8_matmul, *operands, out_dtype=out_dtype)
    with pytest.raises(NotImplementedError, match=complaint):
        call(implementation=KERNEL)
    out = jax.eval_shape(call)  # XLA does
    assert out.shape == shape[:2] and out.dtype == out_dtype


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({0: (8, 64)}, r"\(8, 64\) and \(16, 128\)"),
        ({1: (8, 2)}, r"a_scale has shape \(8, 2\): must be \(8, 1\)"),
        ({3: (3, 1)}, r"b_scale has shape \(3, 1\): must be \(1, 1\).*or \(16, 1\)"),
        ({2: (16, 128, 1)}, "must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, complaint):
    shapes = {0: (8, 128), 1: (8, 1), 2: (16, 128), 3: (1, 1)} | change
    dtypes = E8, jnp.float32, E8, jnp.float32
    operands = [jnp.zeros(shapes[i], dtype) for i, dtype in enumerate(dtypes)]
    with pytest.raises(ValueError, match=complaint):
        api.fp8_matmul(*operands)
