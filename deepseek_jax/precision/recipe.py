"""From the pieces of an FP8 policy to the functions that a Runtime is made of.

Section 3.3 of arXiv:2412.19437: linear maps and experts multiply FP8 numbers; the
embedding, the head, the gate, norms and the attention core do not, and are what
`bf16` has. Of attention's output E5M6 with scales that are powers of two is kept, for
its own backward pass and for the projection after it. Here both passes read that: it is
as if attention's output had seven significant digits, where E4M3 leaves four.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.precision.accumulate import Accumulator, by_tiles
from deepseek_jax.precision.delayed import Remembered, multiplied, weight_of
from deepseek_jax.precision.dots import dot_bf16
from deepseek_jax.precision.fp8_dots import (
    CACHE,
    MODELS,
    Gemms,
    Product,
    Quantizer,
    Recipe,
    fp8_dot,
    fp8_grouped_dot,
)
from deepseek_jax.precision.later import Later, now
from deepseek_jax.precision.policy import PRODUCTS, Pieces
from deepseek_jax.precision.quantize import (
    Quantized,
    Scheme,
    dequantize,
    pack_e5m6,
    quantize,
    unpack_e5m6,
    values,
)
from deepseek_jax.typing import Array
from pallas_kernels.fp8_quantize.reference import FORMATS, MIN_AMAX, Block

# Products that `jax.checkpoint` keeps of a block beside the caches. Norms, the
# up-projections after MLA's and SwiGLU are computed anew: section 3.2.3.
PRODUCTS_KEPT = ("q_a", "kv_a", "q", "k", "v", "o")
REMAT = jax.checkpoint_policies.save_only_these_names(CACHE, *PRODUCTS_KEPT)


def recipe(
    pieces: Pieces,
    name: str | None,
    quantizer: Quantizer = values,
    product: Product | None = None,
) -> Recipe | None:
    """What the linear map `name` rounds; None: it is no FP8 map.

    Args:
      product: multiplies and sums in place of a model of that.
    """
    if name not in pieces.maps.split(","):
        return None
    output = name == "o"

    def scheme(form: str, block: Block, small: bool = False) -> Scheme:
        whole = not all(block)
        least = FORMATS[form].tiny_amax if small else MIN_AMAX
        powers = pieces.powers == "yes" or output
        return Scheme(form, None if whole else block, powers, least)

    forward, gradients, tile = pieces.forward, pieces.gradients, pieces.tile
    tiles = scheme(forward, (1, tile))
    keeps = pieces.kept == "fp8" and not output  # that is few bits already
    return Recipe(
        x=tiles,
        w=scheme(forward, (pieces.block, pieces.block)),
        g=scheme(gradients, (pieces.rows, tile), small=True),
        x_t=scheme(forward, (tile, 1)),
        g_t=scheme(gradients, (tile, 1), small=True),
        kept=tiles if keeps else None,
        products=tuple(pieces.products.split(",")),
        product=product or _product(pieces),
        quantize=quantizer,
    )


def _product(pieces: Pieces) -> Product:
    if not pieces.bits and not pieces.promote:
        return by_tiles
    bits, promote = pieces.bits or None, pieces.promote or None
    return Accumulator(bits, promote, exact=pieces.exact == "yes")


def check_kernels(found: Recipe) -> None:
    """Raises NotImplementedError unless this is what FP8 kernels for Hopper compute.

    Their tensor cores sum 128 products at a time, as short as those are, which is the
    best that they do where a policy asks for exact sums.
    """
    for name in ("x", "w", "g", "x_t", "g_t"):
        own, wanted = getattr(found, name), getattr(Recipe(), name)
        if (own.form, own.block) != (wanted.form, wanted.block):
            raise NotImplementedError(
                f"{name} is {own.form} by {own.block}: the kernel wants "
                f"{wanted.form} by {wanted.block}"
            )
    if set(found.products) != set(PRODUCTS):
        raise NotImplementedError(
            f"{','.join(found.products)} are in FP8: the kernel does all products"
        )
    sums = found.product
    if isinstance(sums, Accumulator) and (
        sums.bits not in (None, 14) or sums.promote != 128
    ):
        raise NotImplementedError(
            f"sums have {sums.bits} bits, promoted every {sums.promote}: the kernel's "
            "have 14, every 128"
        )


def by_models(found: Recipe, name: str, x: Array | Later, w: Array) -> Gemms:
    """Who quantises and multiplies where there are no kernels."""
    return MODELS


def linear(
    x: Array | Later,
    w_DF: Array | Remembered,
    name: str | None = None,
    *,
    recipe_of: Callable[[str | None], Recipe | None],
    gemms_of: Callable[..., Gemms] = by_models,
) -> Array:
    """A linear map of the model, in FP8 or bfloat16: [T, F] in at least float32."""
    found = recipe_of(name)
    if found is None:
        y_TF = dot_bf16(now(x), weight_of(w_DF))
    else:
        made = gemms_of(found, name, x, weight_of(w_DF))
        y_TF = multiplied(fp8_dot, found, made, x, w_DF)
    return checkpoint_name(y_TF, name or "")


def grouped(
    x: Array | Later,
    w_EDF: Array | Remembered,
    expert_n: Array,
    used: Array,
    *,
    recipe_of: Callable[[str | None], Recipe | None],
    grouped_dot: Callable[..., Array],
    gemms_of: Callable[..., Gemms] = by_models,
) -> Array:
    """The experts' product, as `Runtime.grouped_dot`, which is it where not in FP8."""
    found = recipe_of("experts")
    if found is None:
        return grouped_dot(now(x), weight_of(w_EDF), expert_n, used)
    made = gemms_of(found, "experts", x, weight_of(w_EDF))
    return multiplied(fp8_grouped_dot, found, made, x, w_EDF, expert_n, used)


def kept_output(out: Array, lse: Array, *, form: str) -> tuple[Array, Array]:
    """What attention's backward pass and the map after it read, of out [..., O]; a
    format's scales are powers of two, for 128 numbers of a head at most.
    """
    lse = checkpoint_name(lse, CACHE)
    if form == "bf16":
        stored = checkpoint_name(out.astype(jnp.bfloat16), CACHE)
        return stored.astype(out.dtype), lse
    scheme, packs = Scheme(form, power_of_two=True), form == "e5m6"
    codes, scale = quantize(out, scheme)
    packed = pack_e5m6(codes) if packs else codes
    packed, scale = checkpoint_name((packed, scale), CACHE)
    codes = unpack_e5m6(packed, out.shape[-1]) if packs else packed
    return dequantize(Quantized(codes, scale), scheme).astype(out.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(out: Array, form: str) -> Array:
    """`kept_output` of attention [B, L, H, O] that keeps what it likes itself."""
    flat = out.reshape(-1, *out.shape[2:])
    return kept_output(flat, flat[..., :1], form=form)[0].reshape(out.shape)


def _straight_forward(out: Array, form: str) -> tuple[Array, None]:
    return straight_through(out, form), None


def _straight_backward(form: str, _: None, g: Array) -> tuple[Array]:
    return (g,)


straight_through.defvjp(_straight_forward, _straight_backward)


def rounded_attention(
    *arrays: Array | None, scale: float, attention: Callable[..., Array], form: str
) -> Array:
    """`attention`, its output rounded as what would be kept of it."""
    return straight_through(attention(*arrays, scale=scale), form)
