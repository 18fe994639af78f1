"""Quantisation to E4M3 by tiles or blocks, by the fastest implementation there is.

Not differentiable: the custom VJP of a layer that multiplies codes decides what its
gradients are.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.choice import INTERPRETED, XLA, Choice, Tiled, choose
from pallas_kernels.fp8_quantize import mosaic_gpu, reference
from pallas_kernels.fp8_quantize.reference import E4M3, MIN_AMAX, TILE, Block
from pallas_kernels.grouped_matmul.reference import gated

Array = jax.Array


def choice(
    x: Array, block: Block, turned: bool = False, implementation: str | None = None
) -> Choice:
    """Which implementation `quantize` takes for such an x, and why no faster one."""
    return choose(
        implementation, lambda: mosaic_gpu.check(x, block, turned), _tiled(x, turned)
    )


def _tiled(x: Array, turned: bool) -> Tiled:
    """Numbers have tiles of 8 x 128 bytes, and so have codes; turned, those of M."""
    rows, columns = x.shape[-2:]
    last = ("M", rows, 128) if turned else ("N", columns, 128)
    wide = 64 if x.dtype.itemsize == 1 else 128 // x.dtype.itemsize
    return ("M", rows, 8), ("N", columns, wide), last


def quantize(
    x: Array,
    block: Block = TILE,
    *,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
    turned: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """(codes, scales) of x [..., M, N] as `reference.quantize` has them.

    Args:
      block: TILE or BLOCK have kernels.
      power_of_two: scales are rounded up to powers of two.
      least: what a block's largest magnitude counts as at least.
      turned: of the matrix transposed, so that M, which tiles of 1 x 128 then lie
        along, is last: what weight gradients multiply.
      implementation: see `choice.choose`.

    Returns:
      E4M3 [..., M, N] and float32 [..., ceil(M/m), ceil(N/n)]; turned: M, N exchanged.

    Raises:
      ValueError: x is no matrix, or `least` is below that of a normal scale.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check("x", x, least)
    chosen = choice(x, block, turned, implementation).implementation
    if chosen == XLA:
        return reference.quantize_turned(x, turned, block, power_of_two, least)
    return _kernel(x, None, block, turned, power_of_two, least, chosen)


def requantize(
    codes: Array,
    scale: Array,
    *,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Codes [..., M, N] with scales of tiles 1 x 128, turned: tiles along M instead.

    What is kept of a layer's input for the backward pass has scales along channels;
    the weight gradient sums over tokens and wants them along those (section 3.3.2).

    Args:
      scale: [..., M, ceil(N/128)].
      power_of_two, least, implementation: as in `quantize`.

    Returns:
      E4M3 [..., N, M] and float32 [..., N, ceil(M/128)].

    Raises:
      ValueError: scales that do not fit the codes.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check("codes", codes, least)
    wanted = (*codes.shape[:-1], -(-codes.shape[-1] // TILE[1]))
    if scale.shape != wanted:
        raise ValueError(f"scale has shape {scale.shape}: must be {wanted}")
    chosen = choose(
        implementation,
        lambda: mosaic_gpu.check(codes, TILE, True, (mosaic_gpu.CODES,)),
        _tiled(codes, True),
    ).implementation
    if chosen == XLA:
        x = reference.dequantize(codes, scale, TILE)
        return reference.quantize_turned(x, True, TILE, power_of_two, least)
    return _kernel(codes, scale, TILE, True, power_of_two, least, chosen)


def quantize_swiglu(
    gate: Array,
    up: Array,
    *,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
    turned: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`quantize` by tiles of silu(gate) * up, which is never written to memory.

    What the down-projection reads: forward, and `turned` in the backward pass, where
    DeepSeek-V3 computes it anew (section 3.3.3).

    Args:
      power_of_two, least, turned, implementation: as in `quantize`.

    Raises:
      ValueError: gate and up differ in shape or dtype, or are no matrices.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check("gate", gate, least)
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(
            f"gate and up are {gate.dtype} {gate.shape} and {up.dtype} {up.shape}: "
            "must be alike"
        )
    chosen = choice(gate, TILE, turned, implementation).implementation
    if chosen == XLA:
        x = gated(gate, up)
        return reference.quantize_turned(x, turned, TILE, power_of_two, least)
    return _kernel(gate, None, TILE, turned, power_of_two, least, chosen, up)


def quantize_rms_norm(
    x: Array,
    scale_N: Array,
    eps: float,
    *,
    power_of_two: bool = False,
    least: float = MIN_AMAX,
    turned: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`quantize` by tiles of RMSNorm(x) * scale_N, which is never written to memory.

    What attention's and the experts' first products read: forward, and `turned` in the
    backward pass, where DeepSeek-V3 computes it anew (section 3.2.3). One number a row,
    its inverse root mean square, is computed before by XLA, which reads x once for it.

    Args:
      scale_N: the norm's own weights, in any float type.
      eps: added to the mean square.
      power_of_two, least, turned, implementation: as in `quantize`.

    Raises:
      ValueError: x is no matrix, or scale_N has another width.
      NotImplementedError: the implementation demanded does not do it.
    """
    _check("x", x, least)
    if scale_N.shape != x.shape[-1:]:
        raise ValueError(f"scale_N has shape {scale_N.shape}: must be {x.shape[-1:]}")
    chosen = choice(x, TILE, turned, implementation).implementation
    inverse_M = reference.inverse_rms(x, eps)
    if chosen == XLA:
        normed = reference.rms_normed(x, inverse_M, scale_N)
        return reference.quantize_turned(normed, turned, TILE, power_of_two, least)
    norm = inverse_M, scale_N
    return _kernel(x, None, TILE, turned, power_of_two, least, chosen, norm=norm)


def _check(name: str, x: Array, least: float) -> None:
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {x.shape}: must be [..., M, N]")
    if least < E4M3.tiny_amax:
        raise ValueError(f"least = {least}: must be at least {E4M3.tiny_amax}")


def _kernel(
    x: Array,
    scale: Array | None,
    block: Block,
    turned: bool,
    power_of_two: bool,
    least: float,
    chosen: str,
    up: Array | None = None,
    norm: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """The kernel on all leading axes as one."""
    outer = x.shape[:-2]
    x = x.reshape(-1, *x.shape[-2:])
    factors: tuple[mosaic_gpu.Factor, ...] = ()
    if scale is not None:
        scale = scale.reshape(-1, *scale.shape[-2:]).swapaxes(1, 2)
        factors = (mosaic_gpu.Factor(scale, by_row=False),)
    if norm is not None:
        inverse_BM = norm[0].reshape(x.shape[:2])
        scale_BN = jnp.broadcast_to(norm[1].astype(jnp.float32), x.shape[::2])
        factors = (
            mosaic_gpu.Factor(inverse_BM[:, None], by_row=not turned),
            mosaic_gpu.Factor(scale_BN[:, None], by_row=turned),
        )
    up = None if up is None else up.reshape(x.shape)
    rule = power_of_two, least, INTERPRETED.get(chosen)
    codes, made = mosaic_gpu.quantize(x, block, turned, *rule, up, factors)
    made = made.swapaxes(-1, -2) if block == TILE else made
    return codes.reshape(*outer, *codes.shape[1:]), made.reshape(
        *outer, *made.shape[1:]
    )
