"""How the model is computed: the one seam between its definition and its
implementations.

`Runtime()` is the plain single-device oracle. Every other runtime agrees with it to
rounding. Build one per run from module-level functions: Linen and jit compare callables
by identity, so a lambda made per call would recompile.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax import kernels
from deepseek_jax.config import AUTO, RuntimeConfig
from deepseek_jax.kernels import dry_run as dry_run
from deepseek_jax.kernels import on_hopper as on_hopper
from deepseek_jax.ops import dispatch
from deepseek_jax.ops.swiglu import swiglu, swiglu_later
from deepseek_jax.precision import policy, recipe
from deepseek_jax.precision.dots import dot_bf16, dot_f32, dot_plain, linear
from deepseek_jax.precision.fp8_dots import CACHE, Gemms
from deepseek_jax.precision.later import Later
from deepseek_jax.typing import Array
from pallas_kernels.choice import XLA as XLA
from pallas_kernels.choice import Choice as Choice
from pallas_kernels.flash_mla.reference import attention
from pallas_kernels.grouped_matmul.reference import grouped_dot_oracle
from pallas_kernels.matmul.reference import PRODUCT
from pallas_kernels.mla_decode.reference import latent_attention_oracle


class Dot(Protocol):
    """x_TD @ w_DF, at least f32: [T, F]."""

    def __call__(self, x_TD: Array, w_DF: Array, /) -> Array: ...


class Linear(Protocol):
    """x [T, D] @ w_DF of the linear map `name` of the model, at least f32: [T, F]."""

    def __call__(self, x: Array | Later, w_DF: Array, name: str | None, /) -> Array: ...


class SwiGLU(Protocol):
    """silu(gate) * up, times each row's weight if any, or what this runtime's linear
    maps and experts make that of.
    """

    def __call__(
        self, gate: Array, up: Array, weight: Array | None = None, /
    ) -> Array | Later: ...


class GroupedDot(Protocol):
    """Block i by w_EDF[expert_n[i]], for i < used: [n, b, F], at least f32."""

    def __call__(
        self, x_nbD: Array, w_EDF: Array, expert_n: Array, used: Array, /
    ) -> Array: ...


class Attention(Protocol):
    """Causal attention within equal segments: [B, L, H, O]."""

    def __call__(
        self,
        q_nope_BLHN: Array,
        q_rope_BLHR: Array,
        k_nope_BSGN: Array,
        k_rope_BSgR: Array,
        v_BSGO: Array,
        segment_BL: Array | None,
        /,
        *,
        scale: float,
    ) -> Array: ...


class LatentAttention(Protocol):
    """Over cached latents, up to each query's position: latents [B, L, H, C]."""

    def __call__(
        self,
        q_lat_BLHC: Array,
        q_rope_BLHR: Array,
        c_kv: Array,
        k_rope: Array,
        position_BL: Array,
        table_BP: Array | None,
        /,
        *,
        scale: float,
    ) -> Array: ...


class Experts(Protocol):
    """sum_k weights_TK[:, k] SwiGLU of expert experts_TK[:, k]: [T, D], dropless.

    At most `most` slots go anywhere; the others have expert E and weight 0. `beside` is
    the caller's own, and comes back: where tokens travel to experts on other devices,
    it is computed before these start, so that the one hides the other.
    """

    def __call__(
        self,
        x_TD: Array,
        weights_TK: Array,
        experts_TK: Array,
        gate_EDF: Array,
        up_EDF: Array,
        down_EFD: Array,
        /,
        *,
        grouped_dot: GroupedDot,
        most: int | None = None,
        beside: Array | None = None,
    ) -> tuple[Array, Array | None]: ...


class Constrain(Protocol):
    """Pins an activation to devices; `name` is its place in the model."""

    def __call__(self, x: Array, name: str, /) -> Array: ...


class Rows(Protocol):
    """`function` on rows of a batch that do not depend on each other.

    The leading axis of every argument is split, but for the arguments numbered in
    `whole`; so are results, or with `total` they are summed.
    """

    def __call__(
        self,
        function: Callable[..., Any],
        /,
        *,
        whole: tuple[int, ...] = (),
        total: bool = False,
    ) -> Callable[..., Any]: ...


def at_home(
    *slots_and_weights: Array,
    experts: Callable[..., Array],
    grouped_dot: GroupedDot,
    most: int | None = None,
    beside: Array | None = None,
) -> tuple[Array, Array | None]:
    """An `Experts` of a function on the slots of a device that holds all experts."""
    return experts(*slots_and_weights, grouped_dot=grouped_dot, most=most), beside


def unconstrained(x: Array, name: str) -> Array:
    """Leaves an activation where it is."""
    return x


def together(
    function: Callable[..., Any], *, whole: tuple[int, ...] = (), total: bool = False
) -> Callable[..., Any]:
    """All rows at once."""
    return function


DENSE = functools.partial(at_home, experts=dispatch.experts_dense)


@dataclass(frozen=True)
class Runtime:
    """The callables a model is computed with.

    The defaults are plain products and autodiff. `dot` is the head's, `linear` all
    others' but the experts' and the gate's. `remat` is a `jax.checkpoint` policy,
    or None to keep every residual. `placed` is where what has a row for each of a batch
    lies; None: on one device.
    """

    dot: Dot = dot_plain
    linear: Linear = linear
    swiglu: SwiGLU = swiglu
    grouped_dot: GroupedDot = grouped_dot_oracle
    attention: Attention = attention
    latent_attention: LatentAttention = latent_attention_oracle
    experts: Experts = DENSE
    constrain: Constrain = unconstrained
    rows: Rows = together
    remat: Callable[..., Any] | None = None
    placed: jax.sharding.Sharding | None = None

    @property
    def devices(self) -> int:
        """Over how many a batch's rows are split."""
        return self.placed.num_devices if self.placed else 1


DOTS = {"f32": dot_f32, "bf16": dot_bf16}
DTYPES = {"f32": None, "bf16": jnp.bfloat16}
REMATS = {
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT, CACHE),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def build(config: RuntimeConfig, rows: Rows | None = None) -> Runtime:
    """The runtime that `config` names.

    What an FP8 policy leaves alone is computed as `bf16` has it.

    Args:
      rows: how a batch is split by a program that sees all of several devices. Linear
        maps need to know: XLA cannot split a kernel.

    Raises:
      ValueError: pieces of FP8 without a policy that has any.
    """
    pieces = policy.pieces(config.compute, config.fp8)
    compute = "bf16" if pieces else config.compute
    demanded = None if config.implementation == AUTO else config.implementation
    by: dict[str, Any] = {
        "compute_dtype": DTYPES[compute],
        "implementation": demanded,
    }
    rt = Runtime(
        dot=DOTS[compute],
        linear=functools.partial(linear, dot=DOTS[compute]),
        grouped_dot=functools.partial(kernels.grouped_dot, **by),
        latent_attention=functools.partial(kernels.latent_attention, **by),
    )
    chunked = functools.partial(kernels.attention, **by)
    attentions: dict[str, Attention] = {"plain": attention, "chunked": chunked}
    own_remat = REMATS["products"]
    if pieces:
        gemms_of = functools.partial(kernels.gemms, rows=rows, implementation=demanded)
        rt = in_fp8(rt, pieces, gemms_of)
        keep = functools.partial(recipe.kept_output, form=pieces.out)
        attentions = {
            "plain": functools.partial(
                recipe.rounded_attention, attention=attention, form=pieces.out
            ),
            "chunked": functools.partial(chunked, keep=keep),
        }
        own_remat = recipe.REMAT
    apart, joined = (
        functools.partial(first, swiglu=rt.swiglu)
        for first in (dispatch.apart, dispatch.joined)
    )
    if pieces is None or recipe.recipe(pieces, "experts") is None:
        of_blocks = functools.partial(kernels.experts_hidden, **by, otherwise=joined)
    else:  # where a matrix has one scale, gate and up are two
        of_blocks = joined if pieces.block else apart
    experts: dict[str, Callable[..., Array]] = {
        "dense": dispatch.experts_dense,
        "blocks": functools.partial(
            dispatch.experts_by_size, block=config.block, of_blocks=of_blocks
        ),
    }
    chosen = functools.partial(experts[config.experts], hidden=apart)
    return replace(
        rt,
        attention=attentions[config.attention],
        experts=functools.partial(at_home, experts=chosen),
        remat={"policy": own_remat, **REMATS}[config.remat],
    )


def in_fp8(
    rt: Runtime, pieces: policy.Pieces, gemms_of: Callable[..., Gemms]
) -> Runtime:
    """The same with linear maps and experts as the pieces of a policy have them."""
    by: dict[str, Any] = {
        "recipe_of": functools.partial(recipe.recipe, pieces),
        "gemms_of": gemms_of,
    }
    return replace(
        rt,
        linear=functools.partial(recipe.linear, **by),
        grouped_dot=functools.partial(recipe.grouped, **by, grouped_dot=rt.grouped_dot),
        swiglu=swiglu_later if pieces.swiglu == "yes" else swiglu,
    )
