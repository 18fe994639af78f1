"""Every matmul and quantisation kernel compiles for Hopper, at DeepSeek-V3's sizes.

NVIDIA's own assembler makes machine code for the H100 of `parallel.aot`, without one:
tensor cores and TMA must be in use, and no register spilled to memory. Needs the extra
`aot`; skipped without, unless REQUIRE_AOT is set.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import testing
from pallas_kernels.choice import MOSAIC_GPU, choose, require_hopper
from pallas_kernels.fp8_matmul import api as fp8_matmul
from pallas_kernels.fp8_matmul import shapes as fp8_shapes
from pallas_kernels.fp8_quantize import api as fp8_quantize
from pallas_kernels.fp8_quantize import shapes as quantize_shapes
from pallas_kernels.grouped_fp8_matmul import api as grouped_fp8
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.grouped_matmul import shapes as grouped_shapes

MATMUL = "wgmma", "tma", "mbarrier"
COPY = "tma", "mbarrier"
E8, F32, BF16 = jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16


class Case(NamedTuple):
    """A program of `kernels` kernels, and the instructions that each must have."""

    function: Callable
    shapes: tuple
    instructions: tuple = MATMUL
    kernels: int = 1


def shaped(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def up(number):
    return -(-number // 128)


def fp8(name):
    M, N, K, by_block = fp8_shapes.SHAPES["v3"][name]
    scale = shaped(up(N) if by_block else N, up(K))
    operands = shaped(M, K, dtype=E8), shaped(M, up(K)), shaped(N, K, dtype=E8), scale
    out = BF16 if by_block else F32
    run = functools.partial(fp8_matmul.fp8_matmul, out_dtype=out)
    return Case(functools.partial(run, implementation=MOSAIC_GPU), operands)


def routing(n):
    return shaped(n, dtype=jnp.int32), shaped(dtype=jnp.int32)


def grouped_with_gradients(name):
    n, experts, D, F, _, rows = grouped_shapes.SHAPES["v3"][name]

    def run(x, w, g, expert_n, used):
        def product(x, w):
            return grouped.grouped_dot(
                x, w, expert_n, used, BF16, implementation=MOSAIC_GPU
            )

        value, pull = jax.vjp(product, x, w)
        return value, pull(g)

    operands = (
        shaped(n, rows, D, dtype=BF16),
        shaped(experts, D, F),
        shaped(n, rows, F),
    )
    return Case(run, (*operands, *routing(n)), kernels=3)


def grouped_gate(name):
    """Without gradients, where only the result is written."""
    n, experts, D, F, _, rows = grouped_shapes.SHAPES["v3"][name]
    weights = (shaped(experts, D, F, dtype=BF16),) * 2
    run = functools.partial(grouped.grouped_swiglu, implementation=MOSAIC_GPU)
    x = shaped(n, rows, D, dtype=BF16)
    return Case(run, (x, *weights, *routing(n), shaped(n, rows)))


def grouped_gate_with_gradients(name):
    n, experts, D, F, _, rows = grouped_shapes.SHAPES["v3"][name]

    def run(x, gate, up, weight, g, expert_n, used):
        def hidden(x, gate, up, weight):
            return grouped.grouped_swiglu(
                x, gate, up, expert_n, used, weight, BF16, implementation=MOSAIC_GPU
            )

        value, pull = jax.vjp(hidden, x, gate, up, weight)
        return value, pull(g)

    x, g = shaped(n, rows, D, dtype=BF16), shaped(n, rows, F, dtype=BF16)
    weights = (shaped(experts, D, F),) * 2
    operands = x, *weights, shaped(n, rows), g
    return Case(run, (*operands, *routing(n)), kernels=3)


def grouped_codes(name):
    n, experts, D, F, _, rows = grouped_shapes.SHAPES["v3"][name]
    x = shaped(n, rows, D, dtype=E8), shaped(n, rows, up(D))
    w = shaped(experts, F, D, dtype=E8), shaped(experts, up(F), up(D))
    run = functools.partial(grouped_fp8.grouped_fp8_matmul, out_dtype=BF16)
    run = functools.partial(run, implementation=MOSAIC_GPU)
    return Case(run, (*x, *w, *routing(n)))


def grouped_codes_gradient(name):
    n, experts, D, F, _, rows = grouped_shapes.SHAPES["v3"][name]
    x = shaped(n, D, rows, dtype=E8), shaped(n, D)
    g = shaped(n, F, rows, dtype=E8), shaped(n, F)
    run = functools.partial(grouped_fp8.grouped_fp8_weight_gradient, experts=experts)
    run = functools.partial(run, implementation=MOSAIC_GPU)
    return Case(run, (*x, *g, *routing(n)))


def quantised(name, dtype):
    M, N, block, turned = quantize_shapes.SHAPES["v3"][name]
    run = functools.partial(fp8_quantize.quantize, block=block, turned=turned)
    run = functools.partial(run, power_of_two=turned, implementation=MOSAIC_GPU)
    return Case(run, (shaped(M, N, dtype=dtype),), COPY)


def requantised(name):
    M, N, *_ = quantize_shapes.SHAPES["v3"][name]
    run = functools.partial(fp8_quantize.requantize, implementation=MOSAIC_GPU)
    return Case(run, (shaped(M, N, dtype=E8), shaped(M, up(N))), COPY)


def swiglu(name):
    """In float32, as products come."""
    M, N, _, turned = quantize_shapes.SHAPES["v3"][name]
    run = functools.partial(fp8_quantize.quantize_swiglu, turned=turned)
    run = functools.partial(run, implementation=MOSAIC_GPU)
    return Case(run, (shaped(M, N),) * 2, COPY)


def rms_norm(name):
    M, N, _, turned = quantize_shapes.SHAPES["v3"][name]
    run = functools.partial(fp8_quantize.quantize_rms_norm, eps=1e-6, turned=turned)
    run = functools.partial(run, implementation=MOSAIC_GPU)
    return Case(run, (shaped(M, N, dtype=BF16), shaped(N)), COPY)


CASES = (
    {f"fp8_matmul, {name}": fp8(name) for name in fp8_shapes.SHAPES["v3"]}
    | {
        f"{function.__name__}, {name}": function(name)
        for function in (
            grouped_with_gradients,
            grouped_gate,
            grouped_gate_with_gradients,
            grouped_codes,
            grouped_codes_gradient,
        )
        for name in grouped_shapes.SHAPES["v3"]
    }
    | {
        f"fp8_quantize, {name}, {jnp.dtype(dtype)}": quantised(name, dtype)
        for name in quantize_shapes.SHAPES["v3"]
        for dtype in (BF16, F32)
    }
    | {"requantize": requantised("activations, turned")}
    | {
        f"quantize_{function.__name__}, {name}": function(name)
        for function in (swiglu, rms_norm)
        for name in ("activations", "activations, turned")
    }
)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_machine_code_for_hopper(h100s, name):
    case = CASES[name]
    reports = testing.compile_for(h100s[0], case.function, *case.shapes)
    assert len(reports) == case.kernels
    for report in reports:
        testing.assert_hopper(report, case.instructions)


def test_the_h100_is_chosen_for_without_being_there(h100s):
    with pytest.raises(NotImplementedError):
        require_hopper()
    with jax.default_device(h100s[0]):
        assert choose(None, lambda: None) == (MOSAIC_GPU, "")


def test_a_program_without_kernels_proves_nothing(h100s):
    with pytest.raises(RuntimeError, match="no Mosaic GPU kernel"):
        testing.compile_for(h100s[0], jnp.exp, shaped(8))
