"""The kernels behind a Runtime's callables: which one runs, and why not a faster one.

Each callable decides when a program is traced, from the shapes and dtypes at hand and
the device that is compiled for. What no kernel does is computed as without them, unless
an implementation was demanded. A `dry_run` tells what is decided. Ours.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import fp8_kernels
from deepseek_jax.fp8_kernels import UNIT
from deepseek_jax.precision import recipe as recipes
from deepseek_jax.precision.fp8_dots import MODELS, Blocks, Gemms, Recipe
from deepseek_jax.precision.later import Later
from deepseek_jax.precision.quantize import Quantized
from deepseek_jax.typing import Array
from pallas_kernels.choice import (
    INTERPRET,
    MOSAIC_GPU,
    XLA,
    Choice,
    choose,
    require_hopper,
)
from pallas_kernels.flash_mla import api as flash_mla
from pallas_kernels.flash_mla.mosaic_gpu import Operands
from pallas_kernels.fp8_quantize import api as fp8_quantize
from pallas_kernels.fp8_quantize.reference import E4M3, TILE
from pallas_kernels.grouped_fp8_matmul import api as grouped_fp8
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.mla_decode import api as mla_decode

Split = Callable[..., Callable[..., Any]]  # Runtime.rows
DRY = "dry run"

_notes: ContextVar[dict[str, Choice] | None] = ContextVar("notes", default=None)


def on_hopper() -> bool:
    """Whether programs are compiled for a GPU that kernels are for."""
    try:
        require_hopper()
    except NotImplementedError:
        return False
    return True


@contextlib.contextmanager
def dry_run() -> Iterator[dict[str, Choice]]:
    """Callables only note what they decide, by their names, and give zeros for results.

    So a program is traced inside in little time. Of a callable that decides several
    times, a fallback counts.
    """
    notes: dict[str, Choice] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def _decide(name: str, choice: Callable[[], Choice], demanded: str | None) -> str:
    """The implementation chosen; DRY in a dry run, which it is noted for.

    Raises:
      ValueError: the one demanded cannot do it.
    """
    try:
        chosen = choice()
    except NotImplementedError as error:
        raise ValueError(
            f"runtime.implementation = {demanded!r}: {name}: {error}"
        ) from error
    notes = _notes.get()
    if notes is None:
        return chosen.implementation
    if chosen.reason or name not in notes:
        notes[name] = chosen
    return DRY


def attention(
    *arrays: Array | None,
    scale: float,
    compute_dtype: Any = None,
    keep: flash_mla.Keep | None = None,
    implementation: str | None = None,
) -> Array:
    """`Runtime.attention`; arguments as those of `flash_mla`."""
    options = {"scale": scale, "compute_dtype": compute_dtype}

    def choice() -> Choice:
        operands = Operands._make(arrays)
        return flash_mla.choice(operands, **options, implementation=implementation)

    how = _decide("attention", choice, implementation)
    if how == DRY:
        q_BLHN, *_, v_BSGO = Operands._make(arrays)[:5]
        return jnp.zeros((*q_BLHN.shape[:3], v_BSGO.shape[-1]))
    return flash_mla.flash_mla(*arrays, **options, keep=keep, implementation=how)


def grouped_dot(
    x_nbD: Array,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    *,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """`Runtime.grouped_dot`; arguments as those of `grouped_matmul`."""
    how = _decide(
        "grouped_dot",
        lambda: grouped_matmul.choice(x_nbD, w_EDF, compute_dtype, implementation),
        implementation,
    )
    if how == DRY:
        return jnp.zeros((*x_nbD.shape[:2], w_EDF.shape[-1]))
    return grouped_matmul.grouped_dot(
        x_nbD, w_EDF, expert_n, used, compute_dtype, implementation=how
    )


def experts_hidden(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    grouped_dot: Callable[..., Array],
    *,
    otherwise: Callable[..., Array | Later],
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Array | Later:
    """What experts' down-projections multiply, by `grouped_swiglu`.

    Its kernel reads matrices where they are, which are copied together without it, and
    no sums to gate them. For a backward pass the output is kept beside the sums.

    Args:
      otherwise: what computes it where there is no kernel; `dispatch.Hidden`.
    """
    how = _decide(
        "grouped_swiglu",
        lambda: grouped_matmul.swiglu_choice(
            x_nbD, gate_EDF, compute_dtype, implementation
        ),
        implementation,
    )
    if how == DRY:
        return jnp.zeros((*x_nbD.shape[:2], gate_EDF.shape[-1]))
    operands = x_nbD, gate_EDF, up_EDF
    if how == XLA:
        return otherwise(*operands, weight_nb, expert_n, used, grouped_dot)
    return grouped_matmul.grouped_swiglu(
        *operands, expert_n, used, weight_nb, compute_dtype, implementation=how
    )


def latent_attention(
    q_lat_BLHC: Array,
    q_rope_BLHR: Array,
    c_kv: Array,
    k_rope: Array,
    position_BL: Array,
    table_BP: Array | None,
    *,
    scale: float,
    compute_dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """`Runtime.latent_attention`; arguments as those of `mla_decode`.

    Only the kernel rounds queries; without it they stay as precise as they come.
    """
    x = q_lat_BLHC, q_rope_BLHR, c_kv, k_rope
    options = {"compute_dtype": compute_dtype, "implementation": implementation}
    how = _decide(
        "latent_attention",
        lambda: mla_decode.choice(*x, table_BP, **options),
        implementation,
    )
    if how == DRY:
        return jnp.zeros(q_lat_BLHC.shape)
    return mla_decode.mla_decode(
        *x,
        position_BL,
        table_BP,
        scale=scale,
        compute_dtype=None if how == XLA else compute_dtype,
        implementation=how,
    )


def gemms(
    recipe: Recipe,
    name: str,
    x: Array | Later,
    w: Array,
    *,
    rows: Split | None = None,
    implementation: str | None = None,
) -> Gemms:
    """Who quantises and multiplies for the FP8 map `name`; "experts": in their blocks.

    Args:
      rows: splits what has a row for each token over devices, for a program that sees
        all of them. Experts see their device's rows alone.
    """
    grouped = name == "experts"
    kernel = INTERPRET if implementation == INTERPRET else MOSAIC_GPU
    how = _decide(
        "grouped_dot" if grouped else f"linear {name}",
        lambda: choose(implementation, lambda: _check(recipe, x, w, kernel)),
        implementation,
    )
    if how == DRY:
        return Gemms(_zeros, MODELS.dgrad, MODELS.wgrad)
    return MODELS if how == XLA else _made(how, None if grouped else rows)


def _check(recipe: Recipe, x: Array | Later, w: Array, kernel: str) -> None:
    """Raises NotImplementedError unless kernels do all products of such a map.

    Widths are no matter: what is no whole tile is filled up.
    """
    recipes.check_kernels(recipe)
    for array in (x, w):
        tile = jax.ShapeDtypeStruct((UNIT, UNIT), array.dtype)
        fp8_quantize.choice(tile, TILE, implementation=kernel)
    if len(x.shape) == 3:
        codes = jax.ShapeDtypeStruct((1, UNIT, UNIT), E4M3.dtype)
        grouped_fp8.choice(codes, codes, x.shape[1], jnp.float32, kernel)


@functools.cache  # made once, so that a program is compiled once
def _made(how: str, split: Split | None) -> Gemms:
    own = fp8_kernels.gemms(how)
    return _over(split, own) if split else own


def _over(split: Split, own: Gemms) -> Gemms:
    """Dense products of a mesh, each device multiplying its own rows."""

    def fprop(recipe: Recipe, x: Any, w: Array, _: None) -> tuple[Array, Quantized]:
        run = functools.partial(own.fprop, recipe, blocks=None)
        return split(run, whole=(1,))(x, w)

    def dgrad(recipe: Recipe, g: Array, w: Array, _: None) -> Array:
        run = functools.partial(own.dgrad, recipe, blocks=None)
        return split(run, whole=(1,))(g, w)

    def wgrad(recipe: Recipe, x: Any, g: Array, _: None, experts: int) -> Array:
        run = functools.partial(own.wgrad, recipe, blocks=None, experts=experts)
        return split(run, total=True)(x, g)

    return Gemms(fprop, dgrad, wgrad)


def _zeros(
    recipe: Recipe, x: Array | Later, w: Array, blocks: Blocks | None
) -> tuple[Array, Quantized]:
    """`Gemms.fprop` of a dry run."""
    scale = jnp.zeros((*x.shape[:-1], -(-x.shape[-1] // UNIT)))
    read = Quantized(jnp.zeros(x.shape, E4M3.dtype), scale)
    return jnp.zeros((*x.shape[:-1], w.shape[-1])), read
