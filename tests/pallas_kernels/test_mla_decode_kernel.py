"""The latent decoding kernel, simulated, and the choice of it, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choice import INTERPRETED, MOSAIC_GPU, XLA
from pallas_kernels.mla_decode import api, mosaic_gpu
from pallas_kernels.mla_decode.reference import latent_attention_oracle
from pallas_kernels.mla_decode.shapes import SHAPES, Shape
from pallas_kernels.testing import KERNEL, distance, interpreted
from tests.agreement import as_dtype
from tests.pallas_kernels.marks import simulated

CI = SHAPES["ci"]
SCALE = 0.2
BOUND = 3e-3


def operands(shape, seed):
    """Queries and a cache with NaN in all keys that no query of their row sees."""
    rng = np.random.default_rng(seed)
    lead = shape.B, shape.L, shape.H
    queries = [rng.normal(size=(*lead, width)) for width in (shape.C, shape.R)]
    # A full row, then one that sees nothing, then whatever comes.
    last = rng.integers(0, shape.S, shape.B)
    last[:2] = [shape.S - 1, -1][: shape.B]
    position = np.maximum(last[:, None] - np.arange(shape.L)[::-1], -1)
    hidden = np.arange(shape.S) > last[:, None]
    pools = [rng.normal(size=(shape.B, shape.S, width)) for width in (shape.C, shape.R)]
    for pool in pools:
        pool[hidden] = np.nan
    table = None
    if shape.page:
        pages = shape.B * shape.S // shape.page
        number = rng.permutation(pages)
        pools = [x.reshape(pages, shape.page, -1)[np.argsort(number)] for x in pools]
        table = jnp.asarray(number.reshape(shape.B, -1))
    return (*as_dtype(queries + pools, jnp.bfloat16), jnp.asarray(position), table)


def exact(x):
    """What the oracle says in float64 of the same rounded operands."""
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(latent_attention_oracle, scale=SCALE))
        return np.asarray(run(*as_dtype(x[:4], jnp.float64), *x[4:]))


def check(out, x):
    assert out.dtype == jnp.float32
    # What was not written would be NaN, which is below no bound.
    assert distance(out, exact(x)) <= BOUND


@pytest.mark.parametrize("implementation", [XLA, KERNEL])
@pytest.mark.parametrize("name", CI)
def test_it_is_the_oracle(name, implementation, monkeypatch):
    # Few shares of the work, so that the simulator is not long in idle blocks.
    monkeypatch.setattr(mosaic_gpu, "PROCESSORS", 2)
    x = operands(CI[name], seed=1)
    call = functools.partial(api.mla_decode, scale=SCALE, implementation=implementation)
    check((interpreted if implementation == KERNEL else jax.jit)(call)(*x), x)


@pytest.mark.parametrize("parts", [1, 5])
def test_however_the_work_is_shared(parts):
    x = operands(Shape(3, 1, 2, 320, C=32, R=16), seed=2)
    run = functools.partial(
        mosaic_gpu.attend, scale=SCALE, parts=parts, interpret=INTERPRETED.get(KERNEL)
    )
    check(interpreted(run)(*x), x)


@pytest.mark.parametrize("parts", [1, 3, 66])
@pytest.mark.parametrize(
    "last", [[-1], [0], [63], [64], [-1, -1], [500, -1, 0, 64, -1], [4095] * 7]
)
def test_shares_cover_every_tile_once(last, parts):
    begin, (size,), first, stop = map(
        np.asarray, mosaic_gpu.shares(jnp.asarray(last), parts)
    )
    seen, pairs = [], set()
    for p in range(parts):
        for b in range(first[p], stop[p]):
            low, high = max(p * size, begin[b]), min((p + 1) * size, begin[b + 1])
            seen += [(b, tile - begin[b]) for tile in range(low, high)]
            if low < high:
                assert p + b not in pairs
                pairs.add(p + b)
    assert seen == [
        (b, i) for b, x in enumerate(last) for i in range(-(-(x + 1) // 64))
    ]
    assert size <= -(-len(seen) // parts) or size == 1


def test_positions_beyond_the_cache_see_all_of_it():
    *x, _, _ = operands(Shape(1, 1, 2, 70, C=32, R=16), seed=3)
    far = jnp.array([[1000]])
    call = functools.partial(api.mla_decode, scale=SCALE, implementation=KERNEL)
    expected = exact((*x, far, None))
    assert distance(interpreted(call)(*x, far), expected) <= BOUND


BF16 = jnp.bfloat16
V3 = Shape(2, 1, 128, 256, page=64)
REFUSED = {
    "dtype": (V3, (jnp.float32, BF16), "q_lat is float32: the kernel reads bfloat16"),
    "cache": (V3, (BF16, jnp.float32), "c_kv is float32"),
    "latent": (V3._replace(C=48), (BF16, BF16), "latents are 48 wide"),
    "rotation": (V3._replace(R=80), (BF16, BF16), "rotary keys are 80 wide"),
    "pages": (V3._replace(page=32), (BF16, BF16), "pages hold 32 tokens"),
}


def described(shape, query=BF16, cache=BF16):
    x = jax.eval_shape(lambda: operands(shape, 0))
    dtypes = query, query, cache, cache
    floats = [jax.ShapeDtypeStruct(a.shape, d) for a, d in zip(x, dtypes)]
    return [*floats, *x[4:]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_do_is_refused_or_done_by_xla(name):
    shape, dtypes, message = REFUSED[name]
    x = described(shape, *dtypes)
    call = functools.partial(api.mla_decode, scale=SCALE)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(call, implementation=KERNEL), *x)
    assert jax.eval_shape(call, *x).shape == x[0].shape


def test_queries_are_rounded_if_asked_to():
    x = described(V3, query=jnp.float32)
    options = {"scale": SCALE, "compute_dtype": BF16, "implementation": KERNEL}
    out = jax.eval_shape(functools.partial(api.mla_decode, **options), *x)
    assert out.dtype == jnp.float32


@simulated
def test_without_a_gpu_the_reason_for_xla_is_given():
    x = described(V3)
    name, reason = api.choice(*x[:4], x[5])
    assert name == XLA
    assert "NVIDIA Hopper" in reason
    with pytest.raises(NotImplementedError, match="NVIDIA Hopper"):
        api.choice(*x[:4], x[5], implementation=MOSAIC_GPU)


@pytest.mark.parametrize(
    ("at", "shape", "message"),
    [
        (0, (2, 128, 512), "q_lat has shape .* 4 axes"),
        (1, (2, 1, 64, 64), r"q_rope has shape .* must be \(2, 1, 128, 64\)"),
        (2, (8, 64, 256), "c_kv has shape .* must be .*512"),
        (3, (8, 32, 64), r"k_rope has shape .* must be \(8, 64, 64\)"),
        (4, (2, 2), r"position has shape .* must be \(2, 1\)"),
        (5, (3, 4), r"table has shape .* must be \[2, pages\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(at, shape, message):
    x = described(V3)
    x[at] = jax.ShapeDtypeStruct(shape, x[at].dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(api.mla_decode, scale=SCALE), *x)
