"""How the model is computed: the one seam between its definition and its
implementations.

`Runtime()` is the plain single-device oracle. Every other runtime agrees with it to
rounding. Build one per run from module-level functions: Linen and jit compare callables
by identity, so a lambda made per call would recompile.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import RuntimeConfig
from deepseek_jax.ops.dispatch import experts_blocks, experts_dense
from deepseek_jax.precision.dots import dot_bf16, dot_f32
from deepseek_jax.typing import Array
from pallas_kernels.flash_mla.reference import attention, chunked_attention
from pallas_kernels.grouped_matmul.reference import grouped_dot

Attend = Callable[..., Array]


def unconstrained(x: Array, name: str) -> Array:
    """Leaves an activation where it is; `name` is its place in the model."""
    return x


@dataclass(frozen=True)
class Runtime:
    """The callables a model is computed with.

    dot(x_TD, w_DF) -> [T, F], at least f32; grouped_dot(x_nbD, w_EDF, expert_n, used)
    -> [n, b, F], block i by expert_n[i]; attention(q_nope_BLHN, q_rope_BLHR,
    k_nope_BSGN, k_rope_BSgR, v_BSGO, segment_BL, scale=) -> [B, L, H, O]; experts(x_TD,
    weights_TK, experts_TK, gate_EDF, up_EDF, down_EFD, grouped_dot=) -> [T, D];
    constrain(x, name) -> x; remat is a `jax.checkpoint` policy, or None to keep every
    residual.
    """

    dot: Callable[[Array, Array], Array] = dot_f32
    grouped_dot: Callable[..., Array] = grouped_dot
    attention: Attend = attention
    experts: Callable[..., Array] = experts_dense
    constrain: Callable[[Array, str], Array] = unconstrained
    remat: Callable[..., Any] | None = None


DOTS = {"f32": dot_f32, "bf16": dot_bf16}
DTYPES = {"f32": None, "bf16": jnp.bfloat16}
REMATS = {"none": None, "full": jax.checkpoint_policies.nothing_saveable}


def build(config: RuntimeConfig) -> Runtime:
    """The runtime that `config` names."""
    dtype = DTYPES[config.compute]
    attentions: dict[str, Attend] = {
        "plain": attention,
        "chunked": functools.partial(chunked_attention, compute_dtype=dtype),
    }
    experts: dict[str, Callable[..., Array]] = {
        "dense": experts_dense,
        "blocks": functools.partial(experts_blocks, block=config.block),
    }
    return Runtime(
        dot=DOTS[config.compute],
        grouped_dot=functools.partial(grouped_dot, compute_dtype=dtype),
        attention=attentions[config.attention],
        experts=experts[config.experts],
        remat=REMATS[config.remat],
    )
