"""The three products of an FP8 map by kernels: quantised, then multiplied.

`precision.fp8_dots` says which these are (arXiv:2412.19437, section 3.3). Kernels want
whole tiles, and what a product sums over last: operands are filled up with zeros, and
quantised turned.
"""

import functools
from typing import Any

import jax.numpy as jnp

from deepseek_jax.precision.fp8_dots import Blocks, Gemms, Recipe
from deepseek_jax.precision.later import Later, now
from deepseek_jax.precision.quantize import Quantized, Scheme
from deepseek_jax.typing import Array
from pallas_kernels.fp8_matmul import api as fp8_matmul
from pallas_kernels.fp8_quantize import api as fp8_quantize
from pallas_kernels.fp8_quantize.reference import BLOCK, TILE
from pallas_kernels.grouped_fp8_matmul import api as grouped_fp8
from pallas_kernels.grouped_matmul.reference import gated

UNIT = TILE[1]


def gemms(how: str) -> Gemms:
    """The products by an implementation of `pallas_kernels`."""
    return Gemms(
        *(functools.partial(each, how=how) for each in (_fprop, _dgrad, _wgrad))
    )


def _padded(x: Array, axes: tuple[int, ...] = (-2, -1)) -> Array:
    """x with zeros up to whole tiles, which change no scale and no sum."""
    edges = [(0, 0)] * x.ndim
    for axis in axes:
        edges[axis] = 0, -x.shape[axis] % UNIT
    return jnp.pad(x, edges)


def _quantized(
    x: Array | Later, scheme: Scheme, how: str, turned: bool = False
) -> Quantized:
    """Codes and scales of x, or turned of its transpose: what is summed over is last.

    Turned, a scheme's columns of 128 are tiles. SwiGLU of two arrays is not written
    before; experts' two are halves of one, and a kernel would have each copied.
    """
    rule: dict[str, Any] = {
        "power_of_two": scheme.power_of_two,
        "least": scheme.least,
        "turned": turned,
        "implementation": how,
    }
    if isinstance(x, Later) and x.function is gated and len(x.shape) == 2:
        return Quantized(
            *fp8_quantize.quantize_swiglu(*map(_padded, x.rounded), **rule)
        )
    block = BLOCK if scheme.block == BLOCK else TILE
    return Quantized(*fp8_quantize.quantize(_padded(now(x)), block, **rule))


def _multiplied(a: Quantized, b: Quantized, blocks: Blocks | None, how: str) -> Array:
    if blocks is None:
        return fp8_matmul.fp8_matmul(*a, *b, implementation=how)
    return grouped_fp8.grouped_fp8_matmul(*a, *b, *blocks, implementation=how)


def _fprop(
    recipe: Recipe, x: Array | Later, w: Array, blocks: Blocks | None, *, how: str
) -> tuple[Array, Quantized]:
    rows, depth = x.shape[-2:]
    a = _quantized(x, recipe.x, how)
    b = _quantized(w, recipe.w, how, turned=True)
    y = _multiplied(a, b, blocks, how)[..., :rows, : w.shape[-1]]
    return y, Quantized(a.codes[..., :rows, :depth], a.scale[..., :rows, :])


def _dgrad(
    recipe: Recipe, g: Array, w: Array, blocks: Blocks | None, *, how: str
) -> Array:
    a, b = _quantized(g, recipe.g, how), _quantized(w, recipe.w, how)
    return _multiplied(a, b, blocks, how)[..., : g.shape[-2], : w.shape[-2]]


def _wgrad(
    recipe: Recipe, x: Any, g: Array, blocks: Blocks | None, experts: int, *, how: str
) -> Array:
    if isinstance(x, Quantized):
        again = {"power_of_two": recipe.x_t.power_of_two, "least": recipe.x_t.least}
        kept = _padded(x.codes), _padded(x.scale, (-2,))
        a = Quantized(*fp8_quantize.requantize(*kept, **again, implementation=how))
        depth = x.codes.shape[-1]
    else:
        a = _quantized(x, recipe.x_t, how, turned=True)
        depth = x.shape[-1]
    b = _quantized(g, recipe.g_t, how, turned=True)
    if blocks is None:
        dw = _multiplied(a, b, None, how)
    else:
        operands = (part for q in (a, b) for part in (q.codes, q.scale[..., 0]))
        dw = grouped_fp8.grouped_fp8_weight_gradient(
            *operands, *blocks, experts=experts, implementation=how
        )
    return dw[..., :depth, : g.shape[-1]]
