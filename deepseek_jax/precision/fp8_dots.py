"""Linear maps whose products are of FP8 numbers (arXiv:2412.19437, section 3.3).

Fprop is y = x w, Dgrad dx = g w^T and Wgrad dw = x^T g. Scales are shared along the sum
and nowhere else but in weights: 1 x 128 for x in Fprop and g in Dgrad, 128 x 1, over
tokens, for both in Wgrad, blocks of 128 x 128 for w. What the backward pass reads of x
is what was kept of it in FP8, rounded again in the other direction for Wgrad.

Who quantises and multiplies is an argument, `Gemms`: kernels where there are any, else
`MODELS`, for which a recipe says how products are summed, a model of the accumulator.
These multiply codes in bfloat16, in which products of all formats are exact.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.precision.accumulate import Scales, by_tiles
from deepseek_jax.precision.later import Later, now
from deepseek_jax.precision.policy import PRODUCTS
from deepseek_jax.precision.quantize import Quantized, Scheme, dequantize, values
from deepseek_jax.typing import Array, at_least_f32
from pallas_kernels.fp8_quantize.reference import E4M3
from pallas_kernels.grouped_matmul.reference import unrolled
from pallas_kernels.matmul.reference import PRODUCT, product, transposed

CACHE = "fp8_cache"  # what `jax.checkpoint` policies call what is kept in few bits
KEPT = "kept"  # quantised whichever products are


class Product(Protocol):
    """x @ w of codes, the scales of tiles along K applied: [T, N] in float32."""

    def __call__(
        self, x_TK: Array, w_KN: Array, scales: Scales | None = None, tile: int = 128, /
    ) -> Array: ...


Quantizer = Callable[[Array, Scheme], Quantized]

TILES, COLUMNS, BLOCKS = (
    Scheme(block=block) for block in ((1, 128), (128, 1), (128, 128))
)
# Gradients of a mean over many tokens are far below the usual least scale.
SMALL_TILES, SMALL_COLUMNS = (
    replace(scheme, least=E4M3.tiny_amax) for scheme in (TILES, COLUMNS)
)


@dataclass(frozen=True)
class Recipe:
    """What a map's operands are rounded to, each as it lies: x [T, D], w, g [T, F].

    `kept` is what the backward pass reads x as; None: bfloat16. Products that are not
    in `products` are of bfloat16 numbers, summed exactly.
    """

    x: Scheme = TILES
    w: Scheme = BLOCKS
    g: Scheme = SMALL_TILES
    x_t: Scheme = COLUMNS
    g_t: Scheme = SMALL_COLUMNS
    kept: Scheme | None = TILES
    products: tuple[str, ...] = PRODUCTS
    product: Product = by_tiles
    quantize: Quantizer = values

    def operand(self, name: str, x: Array, scheme: Scheme) -> Quantized:
        """What a product reads of x [..., M, N]: of each matrix by itself."""
        if name not in (*self.products, KEPT):
            ones = jnp.ones((*x.shape[:-2], 1, 1), jnp.float32)
            return Quantized(x.astype(jnp.bfloat16), ones)
        return self.quantize(x, scheme)

    def rows(self, name: str, x: Array, scheme: Scheme) -> Quantized:
        """`operand` of rows [T, D] or of their blocks [n, b, D], which are one matrix
        where all of a matrix has one scale.
        """
        plain = scheme.block is not None or name not in (*self.products, KEPT)
        if plain or x.ndim == 2:
            return self.operand(name, x, scheme)
        codes, scale = self.quantize(x.reshape(-1, x.shape[-1]), scheme)
        ones = jnp.ones((*x.shape[:-2], 1, 1), jnp.float32)
        return Quantized(codes.reshape(x.shape), scale * ones)

    def multiply(
        self, name: str, a: Quantized, b: Quantized, schemes: tuple[Scheme, Scheme]
    ) -> Array:
        """a [M, K] @ b [K, N], rounded by these schemes."""
        if name not in self.products:
            return product(a.codes, b.codes)
        rows, width = a.codes.shape
        (m, k), (k_b, n) = (s.block_of(q.codes) for s, q in zip(schemes, (a, b)))
        scale_MJ = jnp.repeat(a.scale, m, 0)[:rows]
        scale_JN = jnp.repeat(b.scale, n, 1)[:, : b.codes.shape[1]]
        tile = math.gcd(*(size for size in (k, k_b) if size < width))
        if not tile:  # one scale for all of a sum
            return self.product(a.codes, b.codes) * (scale_MJ * scale_JN)
        tiles = -(-width // tile)
        scale_MJ = _finer(scale_MJ.T, k, tile, tiles).T
        scale_JN = _finer(scale_JN, k_b, tile, tiles)
        return self.product(a.codes, b.codes, Scales(scale_MJ, scale_JN), tile)

    def keep(self, x: Array, read: Quantized | None = None) -> Any:
        """x as it is kept for the backward pass, from what Fprop read of it if that is
        the same.
        """
        if self.kept is None:
            return x.astype(jnp.bfloat16)
        if read is None or self.kept != self.x or "fprop" not in self.products:
            read = self.rows(KEPT, x, self.kept)
        codes, scale = read
        return Quantized(codes.astype(self.kept.format.dtype), scale)

    def read(self, kept: Any) -> Array:
        """What `keep` kept, or x itself, in at least float32."""
        if self.kept is None or not isinstance(kept, Quantized):
            return at_least_f32(kept)
        return dequantize(kept, self.kept)


def _finer(scale_JN: Array, size: int, tile: int, tiles: int) -> Array:
    """Scales of tiles of `size` along the leading axis as those of smaller tiles."""
    repeats = tiles if len(scale_JN) == 1 else size // tile
    return jnp.repeat(scale_JN, repeats, 0)[:tiles]


def _turned(q: Quantized, scheme: Scheme) -> tuple[Quantized, Scheme]:
    """The transpose, and the scheme that it is rounded by."""
    block = scheme.block and (scheme.block[1], scheme.block[0])
    turned = Quantized(transposed(q.codes), q.scale.swapaxes(-1, -2))
    return turned, replace(scheme, block=block)


def _types(tree: Any) -> Any:
    """Empty arrays that carry the types which gradients must have."""
    return jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), tree)


def _cast(tree: Any, types: Any) -> Any:
    return jax.tree.map(lambda x, like: x.astype(like.dtype), tree, types)


def _kept(recipe: Recipe, x: Array | Later, read: Quantized, named: bool) -> Any:
    """x, or what it will be computed from, as it is kept; `read`: Fprop's operand."""
    if isinstance(x, Later):
        parts = tuple(map(recipe.keep, x.rounded))
        return replace(x, rounded=checkpoint_name(parts, CACHE))
    kept = recipe.keep(x, read)
    return checkpoint_name(kept, CACHE) if named else kept


def _reread(recipe: Recipe, kept: Any) -> tuple[Any, Callable[[Array], Any]]:
    """x, or what was kept of it, and the gradient of what it was given as by x's."""
    if not isinstance(kept, Later):
        return kept, lambda dx: dx
    rounded = tuple(map(recipe.read, kept.rounded))
    x, pull = jax.vjp(Later.now, replace(kept, rounded=rounded))
    return x, lambda dx: pull(dx.astype(x.dtype))[0]


class Blocks(NamedTuple):
    """Block i of rows is multiplied by the matrix of expert_n[i], for i < used."""

    expert_n: Array
    used: Array


class Gemms(NamedTuple):
    """Who quantises and multiplies: a map's three products, in float32.

    x [T, D], w [D, F] and the gradient g [T, F] are not rounded yet; with `Blocks` they
    are [n, b, D], [E, D, F] and [n, b, F], and products of blocks i >= used are zeros.

    Attributes:
      fprop: (recipe, x, w, blocks) -> x w, and what was read of x, by `recipe.x`; x may
        not be computed yet (`Later`).
      dgrad: (recipe, g, w, blocks) -> g w^T.
      wgrad: (recipe, x, g, blocks, E) -> x^T g, where x is what `recipe.keep` kept; no
        tile has rows of two blocks.
    """

    fprop: Callable[..., tuple[Array, Quantized]]
    dgrad: Callable[..., Array]
    wgrad: Callable[..., Array]


def _at(q: Quantized, i: Array) -> Quantized:
    return Quantized(q.codes[i], q.scale[i])


def _multiply(
    recipe: Recipe,
    name: str,
    operands: tuple[Quantized, Quantized],
    schemes: tuple[Scheme, Scheme],
    blocks: Blocks | None,
) -> Array:
    """One product, or each block times its expert's matrix."""
    a, b = operands
    if blocks is None:
        return recipe.multiply(name, a, b, schemes)
    expert_n, used = blocks

    def body(trip: list[tuple[Array, Array]], out_nbF: Array) -> Array:
        products = [
            recipe.multiply(name, _at(a, i), _at(b, expert_n[i]), schemes)
            for i, _ in trip
        ]
        for (i, _), y_bF in zip(trip, products, strict=True):
            out_nbF = out_nbF.at[i].set(y_bF)
        return out_nbF

    shape = (*a.codes.shape[:2], b.codes.shape[-1])
    return unrolled(used, len(expert_n), body, jnp.zeros(shape, jnp.float32))


def _fprop(
    recipe: Recipe, x: Array | Later, w: Array, blocks: Blocks | None
) -> tuple[Array, Quantized]:
    a = recipe.rows("fprop", now(x), recipe.x)
    b = recipe.operand("fprop", w, recipe.w)
    return _multiply(recipe, "fprop", (a, b), (recipe.x, recipe.w), blocks), a


def _dgrad(recipe: Recipe, g: Array, w: Array, blocks: Blocks | None) -> Array:
    a = recipe.rows("dgrad", g, recipe.g)
    b, w_scheme = _turned(recipe.operand("dgrad", w, recipe.w), recipe.w)
    return _multiply(recipe, "dgrad", (a, b), (recipe.g, w_scheme), blocks)


def _wgrad(
    recipe: Recipe, x: Any, g: Array, blocks: Blocks | None, experts: int
) -> Array:
    read = recipe.rows("wgrad", recipe.read(x), recipe.x_t)
    a, x_scheme = _turned(read, recipe.x_t)
    b = recipe.rows("wgrad", g, recipe.g_t)
    schemes = x_scheme, recipe.g_t
    if blocks is None:
        return recipe.multiply("wgrad", a, b, schemes)
    expert_n, used = blocks

    def body(trip: list[tuple[Array, Array]], dw_EDF: Array) -> Array:
        products = [
            recipe.multiply("wgrad", _at(a, i), _at(b, i), schemes) for i, _ in trip
        ]
        for (i, first), dw_DF in zip(trip, products, strict=True):
            dw_EDF = dw_EDF.at[expert_n[i]].add(jnp.where(first, dw_DF, 0))
        return dw_EDF

    shape = experts, a.codes.shape[-2], b.codes.shape[-1]
    return unrolled(used, len(expert_n), body, jnp.zeros(shape, jnp.float32))


MODELS = Gemms(_fprop, _dgrad, _wgrad)  # by the recipe's own quantiser and product


def fp8_dot(
    recipe: Recipe, x: Array | Later, w_DF: Array, gemms: Gemms = MODELS
) -> Array:
    """x [T, D] @ w, in float32: [T, F]."""
    return _product(recipe, gemms, x, w_DF, None)


def fp8_grouped_dot(
    recipe: Recipe,
    x: Array | Later,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    gemms: Gemms = MODELS,
) -> Array:
    """Block i of x [n, b, D] by w_EDF[expert_n[i]] for i < used, zeros elsewhere.

    Returns:
      [n, b, F] in float32. In Wgrad no tile has rows of two blocks.
    """
    return _product(recipe, gemms, x, w_EDF, Blocks(expert_n, used))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    recipe: Recipe, gemms: Gemms, x: Array | Later, w: Array, blocks: Blocks | None
) -> Array:
    return _forward(recipe, gemms, x, w, blocks)[0]


def _forward(
    recipe: Recipe, gemms: Gemms, x: Array | Later, w: Array, blocks: Blocks | None
) -> tuple[Array, tuple[Any, ...]]:
    y, read = gemms.fprop(recipe, x, w, blocks)
    # Maps read norms' outputs, which `jax.checkpoint` had better compute anew. Experts'
    # rows came from afar: what is kept of them saves the way.
    kept = _kept(recipe, x, read, named=blocks is not None)
    return checkpoint_name(y, PRODUCT), (kept, w, blocks, _types(x))


def _backward(
    recipe: Recipe, gemms: Gemms, saved: tuple[Any, ...], g: Array
) -> tuple[Any, ...]:
    kept, w, blocks, types = saved
    dx = gemms.dgrad(recipe, g, w, blocks)
    x, pull = _reread(recipe, kept)
    dw = gemms.wgrad(recipe, x, g, blocks, len(w))
    return _cast(pull(dx), types), dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)
