"""Causal attention of MLA, by the fastest implementation there is."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.choice import INTERPRETED, XLA, Choice, choose
from pallas_kernels.flash_mla import backward, mosaic_gpu
from pallas_kernels.flash_mla.mosaic_gpu import Operands
from pallas_kernels.flash_mla.reference import Keep, chunked_attention, keep_all

Array = jax.Array

__all__ = ["Keep", "choice", "flash_mla"]


class _How(NamedTuple):
    """What is decided before anything is computed; forward and backward agree."""

    implementation: str
    scale: float
    keep: Keep


def choice(
    x: Operands,
    *,
    scale: float,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Choice:
    """Which implementation `flash_mla` takes for such operands, and why no faster.

    Args:
      x: anything with shapes and dtypes.
    """
    return choose(
        implementation,
        lambda: mosaic_gpu.check(x, compute_dtype, scale=scale),
        (("L", x.q_nope.shape[1], 8),),
    )


def flash_mla(
    q_nope_BLHN: Array,
    q_rope_BLHR: Array,
    k_nope_BSGN: Array,
    k_rope_BSgR: Array,
    v_BSGO: Array,
    segment_BL: Array | None = None,
    *,
    scale: float,
    compute_dtype: Any = None,
    keep: Keep | None = None,
    implementation: str | None = None,
) -> Array:
    """Causal attention within equal segments (equations 9-10 of arXiv:2412.19437).

    H query heads read G key heads (G divides H), and one rotary key, or G of them
    (g = 1 or G). S = L.

    Args:
      segment_BL: int; positions attend only where ids are equal; None = no such limit.
      scale: multiplies the scores; a Python number.
      compute_dtype: what operands of products, and the five gradients, are rounded to;
        None keeps them. The kernel multiplies bfloat16 alone.
      keep: output and log-sum-exp to what is returned of the one, and kept of both for
        the backward pass, named for `jax.checkpoint`. The value's width is last.
      implementation: see `choice.choose`.

    Returns:
      [B, L, H, O], at least float32; the kernel has rounded it to bfloat16.

    Raises:
      ValueError: shapes that do not fit each other.
      NotImplementedError: the implementation demanded does not do it.
    """
    x = Operands(q_nope_BLHN, q_rope_BLHR, k_nope_BSGN, k_rope_BSgR, v_BSGO, segment_BL)
    _check(x)
    options = {"scale": float(scale), "compute_dtype": compute_dtype}
    chosen = choice(x, **options, implementation=implementation).implementation
    if chosen == XLA:  # has a backward pass of its own
        return chunked_attention(*x, **options, keep=keep)
    how = _How(chosen, float(scale), keep or keep_all)
    return _attention(how, x[:5], segment_BL)


def _check(x: Operands) -> None:
    """Raises ValueError unless the shapes fit each other."""
    names = dict(zip(x._fields, x, strict=True))
    for name, array in names.items():
        rank = 2 if name == "segment" else 4
        if array is not None and array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}: must have {rank} axes")
    batch, length, heads, nope = x.q_nope.shape
    groups, rope = x.k_nope.shape[2], x.q_rope.shape[3]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"k_nope has {groups} heads: must divide the {heads} of q_nope"
        )
    rotary = 1 if x.k_rope.shape[2] == 1 else groups
    wanted = {
        "q_rope": (batch, length, heads, rope),
        "k_nope": (batch, length, groups, nope),
        "k_rope": (batch, length, rotary, rope),
        "v": (batch, length, groups, x.v.shape[3]),
        "segment": (batch, length),
    }
    for name, shape in wanted.items():
        array = names[name]
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}: must be {shape} beside q_nope "
                f"{x.q_nope.shape} and k_nope {x.k_nope.shape}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, floats: tuple[Array, ...], segment: Array | None) -> Array:
    return _forward(how, floats, segment)[0]


def _forward(
    how: _How, floats: tuple[Array, ...], segment: Array | None
) -> tuple[Array, Any]:
    # Empty arrays carry the types that the gradients must have.
    types = tuple(jnp.zeros((0,), x.dtype) for x in floats)
    rounded: Any = [x.astype(jnp.bfloat16) for x in floats]
    x = Operands._make([*rounded, segment])
    simulated = INTERPRETED.get(how.implementation)
    out, lse = mosaic_gpu.forward(x, scale=how.scale, interpret=simulated)
    out, lse = how.keep(out, lse)
    return out.astype(jnp.float32), (x, out, lse, types)


def _backward(how: _How, saved: Any, g: Array) -> tuple[tuple[Array, ...], None]:
    x, out, lse, types = saved
    simulated = INTERPRETED.get(how.implementation)
    gradients = backward.backward(x, out, lse, g, scale=how.scale, interpret=simulated)
    return tuple(d.astype(t.dtype) for d, t in zip(gradients, types, strict=True)), None


_attention.defvjp(_forward, _backward)
