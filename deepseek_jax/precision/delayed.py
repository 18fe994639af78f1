"""Scales from earlier steps ("delayed scaling"), to compare with those of the moment.

Section 3.3.2 of arXiv:2412.19437 computes scales from the numbers at hand, where FP8
frameworks infer them from a history of largest magnitudes, as the `DelayedScaling` of
NVIDIA's Transformer Engine does: every operand of a map has one scale, of the largest
magnitude it had in some last steps, and what has grown beyond it saturates.

A map's weight comes to it with these magnitudes (`Remembered`), and the weight's
gradient takes back those of this time. In a first step, and wherever the weight comes
alone, as in decoding, scales are of the moment. So are in any case those of what is
kept for later: SwiGLU's inputs and attention's output.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8_dots import Gemms, Recipe
from deepseek_jax.precision.later import Later, now
from deepseek_jax.precision.policy import Pieces
from deepseek_jax.precision.quantize import Scheme, scale_of
from deepseek_jax.typing import Array, Params, at_least_f32
from pallas_kernels.fp8_quantize.reference import amax

X, G, W = 0, 1, slice(2, None)  # an input, an output's gradient, each matrix of w
EXPERTS = ("gate", "up", "down")  # what the matrices of a layer's experts are called

# By a weight's path, as moe.attn.q_a.kernel: [layers, operands, steps], the last step
# first, operands as above. An MTP module's maps are in no stack of layers: [operands,
# steps]. 0: there was no such step.
Histories = dict[str, Array]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight", "amax"), meta_fields=()
)
@dataclass(frozen=True)
class Remembered:
    """A weight, and the largest magnitudes of its map's operands in earlier steps.

    As a gradient: that of the weight, and the magnitudes of this time.
    """

    weight: Array  # [D, F], or of experts [E, D, F]; the first leaf, as Linen wants it
    amax: Array  # [3], or of experts [2+E]

    def __len__(self) -> int:
        return len(self.weight)

    def __add__(self, other: "Remembered") -> "Remembered":
        """Gradients of two micro-batches as of one."""
        seen = jnp.maximum(self.amax, other.amax)
        return Remembered(self.weight + other.weight, seen)


def is_remembered(x: Any) -> bool:
    """For `jax.tree.map`: what is one thing there."""
    return isinstance(x, Remembered)


def weight_of(w: Array | Remembered) -> Array:
    """The weight alone."""
    return w.weight if isinstance(w, Remembered) else w


def empty(params: Params, pieces: Pieces | None) -> Histories:
    """Histories of all maps in FP8 that no step has filled; none without a policy
    that has some.
    """
    if pieces is None or not pieces.history:
        return {}
    maps = pieces.maps.split(",")
    made = {}
    for path, leaf in _leaves(params):
        *_, parent, name = ["", *path.split(".")]
        if name == "kernel" and parent in maps:
            layers, matrices = leaf.shape[:-2], 1
        elif parent == "moe" and name in EXPERTS and "experts" in maps:
            *layers, matrices = leaf.shape[:-2]
        else:
            continue
        shape = (*layers, 2 + matrices, pieces.history)
        made[path] = jnp.zeros(shape, jnp.float32)
    return made


def remembered(params: Params, histories: Mapping[str, Array]) -> Params:
    """Parameters whose weights come with the largest magnitudes of their histories."""

    def one(path: Any, w: Array) -> Array | Remembered:
        history = histories.get(_name(path))
        return w if history is None else Remembered(w, history.max(-1))

    return jax.tree_util.tree_map_with_path(one, params)


def forgotten(params: Params) -> tuple[Params, dict[str, Array]]:
    """The reverse, of gradients: those of the weights alone, and magnitudes by path."""
    seen = {path: w.amax for path, w in _leaves(params) if is_remembered(w)}
    return jax.tree.map(weight_of, params, is_leaf=is_remembered), seen


def pushed(histories: Histories, seen: Mapping[str, Array]) -> Histories:
    """Histories with the magnitudes of one more step, the oldest of each gone."""
    return {
        path: jnp.concatenate([seen[path][..., None], history[..., :-1]], -1)
        for path, history in histories.items()
    }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_remembered)[0]:
        yield _name(path), leaf


@dataclass(frozen=True)
class _Over:
    """A function's value divided by its last argument."""

    function: Callable[..., Array]

    def __call__(self, *arguments: Array) -> Array:
        *own, scale = arguments
        return at_least_f32(self.function(*own)) / scale


def _over(x: Array | Later, scale: Array) -> Array | Later:
    if isinstance(x, Later):
        return replace(x, function=_Over(x.function), exact=(*x.exact, scale))
    return at_least_f32(x) / scale


def _units(recipe: Recipe, later: bool) -> Recipe:
    """The recipe for operands that come divided by their scales; what a `Later` is
    computed from does not.
    """
    names = ["x", "w", "g", "x_t", "g_t"]
    if recipe.kept is not None and not later:
        names.append("kept")
    return replace(
        recipe, **{name: replace(getattr(recipe, name), unit=True) for name in names}
    )


def largest(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """Largest magnitude over some axes, or all, as histories have it."""
    return amax(x, axes).astype(jnp.float32)


def scale(known: Array, now: Array, scheme: Scheme) -> Array:
    """The scale for the largest magnitude that is known, or else for this time's."""
    return scale_of(jnp.where(known > 0, known, now), scheme)


def finite(seen: Mapping[str, Array]) -> Array:
    """Whether all magnitudes of a step are; what is infinite only saturates."""
    each = [jnp.isfinite(magnitudes).all() for magnitudes in seen.values()]
    return functools.reduce(jnp.logical_and, each, jnp.asarray(True))


Dot = Callable[..., Array]


def multiplied(
    dot: Dot,
    recipe: Recipe,
    gemms: Gemms,
    x: Array | Later,
    w: Array | Remembered,
    *blocks: Array,
) -> Array:
    """`dot(recipe, x, w, *blocks, gemms)`, of a remembered weight by earlier scales.

    Args:
      dot: `fp8_dot`, or `fp8_grouped_dot` with its `expert_n` and `used`.
    """
    by = _remembered if isinstance(w, Remembered) else _at_once
    return by(dot, recipe, gemms, x, w, *blocks)


def _at_once(dot: Dot, recipe: Recipe, gemms: Gemms, *operands: Any) -> Array:
    return dot(recipe, *operands, gemms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _remembered(
    dot: Dot,
    recipe: Recipe,
    gemms: Gemms,
    x: Array | Later,
    w: Remembered,
    *blocks: Array,
) -> Array:
    return _forward(dot, recipe, gemms, x, w, *blocks)[0]


def _forward(
    dot: Dot,
    recipe: Recipe,
    gemms: Gemms,
    x: Array | Later,
    w: Remembered,
    *blocks: Array,
) -> tuple[Array, Any]:
    known, weight = w.amax, w.weight
    seen_x, seen_w = largest(now(x)), largest(weight, (-2, -1)).reshape(-1)
    scale_x = scale(known[X], seen_x, recipe.x)
    scale_w = scale(known[W], seen_w, recipe.w)
    units = _units(recipe, isinstance(x, Later))

    def product(x: Array | Later, weight: Array) -> Array:
        of_w = scale_w.reshape(*weight.shape[:-2], 1, 1)
        return dot(units, _over(x, scale_x), weight / of_w, *blocks, gemms)

    y, pull = jax.vjp(product, x, weight)
    saved = pull, (scale_x, scale_w), (seen_x, seen_w), known[G], blocks
    return y * scale_x * _of_rows(scale_w, blocks, y), saved


def _backward(
    dot: Dot, recipe: Recipe, gemms: Gemms, saved: Any, g: Array
) -> tuple[Any, ...]:
    pull, (scale_x, scale_w), (seen_x, seen_w), known, blocks = saved
    seen_g = largest(g)
    scale_g = scale(known, seen_g, recipe.g)
    dx, dw = pull(g / scale_g)

    # `pull` divides by the scales of x and w as `product` does. The gradient's comes
    # first: the least are far from what float32 has no room for.
    def of_x(d: Array) -> Array:
        whole = d * scale_g * scale_x * _of_rows(scale_w, blocks, d)
        return whole.astype(d.dtype)

    of_w = scale_w.reshape(*dw.shape[:-2], 1, 1)
    dw = (dw * scale_g * scale_x * of_w).astype(dw.dtype)
    seen = jnp.concatenate([seen_x[None], seen_g[None], seen_w])
    return jax.tree.map(of_x, dx), Remembered(dw, seen), *(None for _ in blocks)


def _of_rows(scale_w: Array, blocks: tuple[Array, ...], like: Array) -> Array:
    """The weight's scale, or for each block of rows that of its expert."""
    if not blocks:
        return scale_w[0]
    expert_n, _ = blocks
    return scale_w[expert_n].reshape(-1, *[1] * (like.ndim - 1))


_remembered.defvjp(_forward, _backward)
