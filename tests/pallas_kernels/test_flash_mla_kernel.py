"""MLA's attention kernels, simulated, and the choice of them, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choice import MOSAIC_GPU, XLA
from pallas_kernels.flash_mla import api, mosaic_gpu
from pallas_kernels.flash_mla.reference import attention
from pallas_kernels.flash_mla.shapes import SHAPES, Shape
from pallas_kernels.testing import KERNEL, distance, interpreted
from tests.agreement import as_dtype
from tests.pallas_kernels.marks import simulated

CI = SHAPES["ci"]
# Of the value and of the five gradients, with operands and results in bfloat16.
BOUNDS = [3e-3] + 5 * [5e-3]


def operands(shape, seed):
    """Five operands and a cotangent, in bfloat16; ids of documents, then padding."""
    rng = np.random.default_rng(seed)
    sizes = [
        (shape.H, shape.N),
        (shape.H, shape.R),
        (shape.G, shape.N),
        (shape.g, shape.R),
        (shape.G, shape.O),
        (shape.H, shape.O),
    ]
    floats = [rng.normal(size=(shape.B, shape.L, *size)) for size in sizes]
    starts = rng.random((shape.B, shape.L)) < 6 / shape.L
    ids = np.where(np.arange(shape.L) < 0.9 * shape.L, np.cumsum(starts, 1), -1)
    return as_dtype(floats, jnp.bfloat16), jnp.asarray(ids) if shape.segments else None


def with_gradients(function, floats, segment):
    *floats, cotangent = floats
    value, pull = jax.vjp(lambda *x: function(*x, segment), *floats)
    return [value, *pull(cotangent.astype(value.dtype))]


def exact(shape, floats, segment):
    """What the oracle says in float64 of the same rounded operands."""
    with jax.enable_x64(True):
        wide = as_dtype(floats, jnp.float64)
        call = functools.partial(attention, scale=scale(shape))
        run = jax.jit(functools.partial(with_gradients, call))
        return [np.asarray(x) for x in run(wide, segment)]


def scale(shape):
    return (shape.N + shape.R) ** -0.5


def of(shape, implementation, **options):
    return functools.partial(
        api.flash_mla, scale=scale(shape), implementation=implementation, **options
    )


def check(shape, compile, implementation, seed):
    floats, segment = operands(shape, seed)
    call = functools.partial(with_gradients, of(shape, implementation))
    actual = compile(call)(floats, segment)
    assert actual[0].dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in actual[1:])
    errors = list(map(distance, actual, exact(shape, floats, segment)))
    # What was not written would be NaN, which is below no bound.
    assert all(map(np.less_equal, errors, BOUNDS)), errors


@pytest.mark.parametrize("name", CI)
def test_xla_is_the_oracle(name):
    check(CI[name], jax.jit, XLA, seed=0)


@pytest.mark.parametrize("name", CI)
def test_the_kernels_are_the_oracle(name):
    check(CI[name], interpreted, KERNEL, seed=1)


def test_documents_scattered_over_the_row():
    shape = Shape(1, 150, 1, 1, N=16, R=16, O=16, segments=True)
    floats, _ = operands(shape, 2)
    segment = jnp.asarray(np.random.default_rng(2).integers(-2, 2, (1, 150)))
    call = functools.partial(with_gradients, of(shape, KERNEL))
    actual = interpreted(call)(floats, segment)
    errors = map(distance, actual, exact(shape, floats, segment))
    assert all(map(np.less_equal, errors, BOUNDS))


def test_tiles_of_other_documents_are_left_out():
    tile = mosaic_gpu.TILE
    ids = np.repeat([3, 4, 4, 9, 9], tile)[: 5 * tile - 7]
    ids[tile - 1] = 4  # the second document begins in the first tile
    _, first, last = mosaic_gpu.segment_tiles(jnp.asarray(ids)[None])
    np.testing.assert_array_equal(first, [[0, 0, 0, 3, 3]])
    np.testing.assert_array_equal(last, [[2, 2, 2, 4, 4]])


def test_scores_beyond_the_range_of_exp_do_not_overflow():
    shape = Shape(1, 140, 1, 1, N=16, R=16, O=16)
    (*floats, _), _ = operands(shape, 3)
    call = functools.partial(api.flash_mla, scale=300.0, implementation=KERNEL)
    actual = interpreted(call)(*floats)
    with jax.enable_x64(True):
        wide = as_dtype(floats, jnp.float64)
        expected = jax.jit(functools.partial(attention, scale=300.0))(*wide)
    assert distance(actual, expected) < 5e-3


def test_wider_operands_are_rounded_if_asked_to():
    shape = Shape(1, 9, 1, 1, N=16, R=16, O=16)
    floats, _ = operands(shape, 4)
    wide = as_dtype(floats, jnp.float32)
    call = of(shape, KERNEL, compute_dtype=jnp.bfloat16)
    actual = interpreted(functools.partial(with_gradients, call))(wide, None)
    narrow = of(shape, KERNEL)
    expected = interpreted(functools.partial(with_gradients, narrow))(floats, None)
    assert all(x.dtype == jnp.float32 for x in actual)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(got, want)


V3 = Shape(1, 256, 4, 4)
REFUSED = {
    "dtype": (V3, jnp.float32, {}, r"q_nope .* float32: the kernel does bfloat16"),
    "width": (V3._replace(N=40), jnp.bfloat16, {}, "q_nope are 40 .* multiple of 16"),
    "too wide": (V3._replace(O=256), jnp.bfloat16, {}, "v are 256 wide: .* up to 128"),
    "no rotation": (V3._replace(R=0), jnp.bfloat16, {}, "q_rope are 0 wide"),
    "scale": (V3, jnp.bfloat16, {"scale": -1.0}, "scale = -1.0: .* above 0"),
}


def described(shape, dtype):
    floats, _ = jax.eval_shape(lambda: operands(shape._replace(L=4), 0))
    return [jax.ShapeDtypeStruct(x.shape, dtype) for x in floats[:5]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_do_is_refused_or_done_by_xla(name):
    shape, dtype, options, message = REFUSED[name]
    x, options = described(shape, dtype), {"scale": 0.1} | options
    call = functools.partial(api.flash_mla, **options)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(call, implementation=KERNEL), *x)
    assert jax.eval_shape(call, *x).dtype == jnp.float32


@simulated
def test_without_a_gpu_the_reason_for_xla_is_given():
    x = mosaic_gpu.Operands(*described(V3, jnp.bfloat16), None)
    name, reason = api.choice(x, scale=0.1)
    assert name == XLA
    assert "NVIDIA Hopper" in reason
    with pytest.raises(NotImplementedError, match="NVIDIA Hopper"):
        api.choice(x, scale=0.1, implementation=MOSAIC_GPU)


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (0, (1, 4, 4), "q_nope has shape .* 4 axes"),
        (1, (1, 5, 4, 64), r"q_rope has shape .* must be \(1, 4, 4, 64\)"),
        (2, (1, 4, 3, 128), "k_nope has 3 heads: must divide the 4"),
        (3, (1, 4, 2, 64), r"k_rope has shape .* must be \(1, 4, 4, 64\)"),
        (4, (1, 4, 1, 128), r"v has shape .* must be \(1, 4, 4, 128\)"),
        (5, (1, 5), r"segment has shape .* must be \(1, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(at, shape, message):
    x = [*described(V3, jnp.bfloat16), jax.ShapeDtypeStruct((1, 4), jnp.int32)]
    x[at] = jax.ShapeDtypeStruct(shape, x[at].dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(api.flash_mla, scale=0.1), *x)
