"""The attention kernels compile for Hopper, at DeepSeek-V3's and the replicas' sizes.

NVIDIA's own assembler makes machine code for the H100 of `parallel.aot`, without one:
tensor cores and TMA must be in use, and no register spilled to memory. Needs the extra
`aot`; skipped without, unless REQUIRE_AOT is set.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import testing
from pallas_kernels.choice import MOSAIC_GPU
from pallas_kernels.flash_mla import api as flash_mla
from pallas_kernels.flash_mla import shapes as flash_shapes
from pallas_kernels.mla_decode import api as mla_decode
from pallas_kernels.mla_decode import shapes as decode_shapes

PRODUCTS = "wgmma", "tma", "mbarrier"
SUMS = ()  # the sum of parts is made of plain loads and stores
SIZES = "replica", "v3"


def shaped(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def named(shapes):
    return [(size, name) for size in SIZES for name in shapes.SHAPES[size]]


def check(reports, *instructions):
    assert len(reports) == len(instructions)
    for report, wanted in zip(reports, instructions, strict=True):
        testing.assert_hopper(report, wanted)


@pytest.mark.parametrize(("size", "name"), named(flash_shapes))
def test_attention_and_its_gradients(h100s, size, name):
    x = flash_shapes.SHAPES[size][name]
    heads = (x.H, x.N), (x.H, x.R), (x.G, x.N), (x.g, x.R), (x.G, x.O), (x.H, x.O)
    segment = shaped(x.B, x.L, dtype=jnp.int32) if x.segments else None
    call = functools.partial(flash_mla.flash_mla, scale=0.07, implementation=MOSAIC_GPU)

    def run(segment, g, *floats):
        value, pull = jax.vjp(lambda *floats: call(*floats, segment), *floats)
        return value, pull(g.astype(value.dtype))

    *floats, g = (shaped(x.B, x.L, *each) for each in heads)
    check(testing.compile_for(h100s[0], run, segment, g, *floats), *[PRODUCTS] * 3)


@pytest.mark.parametrize(("size", "name"), named(decode_shapes))
def test_decoding(h100s, size, name):
    x = decode_shapes.SHAPES[size][name]
    pages = x.B * x.S // x.page if x.page else x.B
    pool = pages, x.page or x.S
    table = shaped(x.B, x.S // x.page, dtype=jnp.int32) if x.page else None
    queries = shaped(x.B, x.L, x.H, x.C), shaped(x.B, x.L, x.H, x.R)
    cache = shaped(*pool, x.C), shaped(*pool, x.R), shaped(x.B, x.L, dtype=jnp.int32)
    run = functools.partial(mla_decode.mla_decode, scale=0.1, implementation=MOSAIC_GPU)
    reports = testing.compile_for(h100s[0], run, *queries, *cache, table)
    check(reports, PRODUCTS, SUMS)
