"""Cross entropy over a large vocabulary without ever holding all logits.

The head's product, softmax and gradient are taken `chunk` positions at a time, so
memory is chunk x V instead of T x V. Under differentiation each chunk's gradient is
computed right after its logits, in the forward pass: it costs the same three products
as plain autodiff (a rematerialised chunk costs four) and keeps only dh_TD and dhead_DV.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.typing import Array

Dot = Callable[[Array, Array], Array]


def cross_entropy(
    h_TD: Array,
    head_DV: Array,
    targets_T: Array,
    weights_T: Array,
    *,
    dot: Dot,
    chunk: int = 1024,
) -> Array:
    """sum_t weights_T[t] * -log softmax(h_TD @ head_DV)[t, targets_T[t]], a scalar.

    Args:
      h_TD: normed final hidden states.
      head_DV: output matrix.
      targets_T: [T] int, the token to predict.
      weights_T: [T] float; mask / number of valid targets gives the mean. It gets no
        gradient.
      dot: the Runtime's matmul.
      chunk: positions whose logits exist at the same time.
    """
    h_TD, targets_T, weights_T = _padded(chunk, h_TD, targets_T, weights_T)
    return _summed(dot, chunk, h_TD, head_DV, targets_T, weights_T)


def token_nll(
    h_TD: Array, head_DV: Array, targets_T: Array, *, dot: Dot, chunk: int = 1024
) -> Array:
    """-log softmax(h_TD @ head_DV)[t, targets_T[t]] for every position: [T]."""
    size = len(h_TD)
    h_TD, targets_T = _padded(chunk, h_TD, targets_T)
    pieces = _pieces(chunk, h_TD, targets_T)
    nll_ct = lax.map(lambda piece: _nll(dot(piece[0], head_DV), piece[1]), pieces)
    return nll_ct.reshape(-1)[:size]


def _padded(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Pads the leading axis with zeros to whole chunks (or to one short one)."""
    size = len(arrays[0])
    extra = -size % min(chunk, size)
    return tuple(jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)


def _pieces(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    rows = min(chunk, len(arrays[0]))
    return tuple(x.reshape(-1, rows, *x.shape[1:]) for x in arrays)


def _nll(logits_tV: Array, targets_t: Array) -> Array:
    target_t = jnp.take_along_axis(logits_tV, targets_t[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits_tV, -1) - target_t


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    dot: Dot,
    chunk: int,
    h_TD: Array,
    head_DV: Array,
    targets_T: Array,
    weights_T: Array,
) -> Array:
    def body(piece: tuple[Array, ...]) -> Array:
        h_tD, targets_t, weights_t = piece
        return jnp.dot(weights_t, _nll(dot(h_tD, head_DV), targets_t))

    return lax.map(body, _pieces(chunk, h_TD, targets_T, weights_T)).sum()


def _summed_forward(
    dot: Dot,
    chunk: int,
    h_TD: Array,
    head_DV: Array,
    targets_T: Array,
    weights_T: Array,
) -> tuple[Array, tuple[Array, Array]]:
    def body(
        carry: tuple[Array, Array], piece: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        loss, dhead_DV = carry
        h_tD, targets_t, weights_t = piece
        logits_tV, pull = jax.vjp(dot, h_tD, head_DV)
        lse_t = jax.nn.logsumexp(logits_tV, -1)
        target_t = jnp.take_along_axis(logits_tV, targets_t[:, None], -1)[:, 0]
        hit_tV = targets_t[:, None] == jnp.arange(logits_tV.shape[-1])
        p_tV = jnp.exp(logits_tV - lse_t[:, None])
        dh_tD, dhead = pull(weights_t[:, None] * (p_tV - hit_tV))
        loss += jnp.dot(weights_t, lse_t - target_t)
        return (loss, dhead_DV + dhead), dh_tD

    wide = jnp.promote_types(h_TD.dtype, jnp.float32)
    start = jnp.zeros((), wide), jnp.zeros_like(head_DV)
    pieces = _pieces(chunk, h_TD, targets_T, weights_T)
    (loss, dhead_DV), dh_ctD = lax.scan(body, start, pieces)
    return loss, (dh_ctD.reshape(h_TD.shape), dhead_DV)


def _summed_backward(
    dot: Dot, chunk: int, saved: tuple[Array, Array], g: Array
) -> tuple[Array | None, ...]:
    dh_TD, dhead_DV = saved
    return (
        (g * dh_TD).astype(dh_TD.dtype),
        (g * dhead_DV).astype(dhead_DV.dtype),
        None,
        None,
    )


_summed.defvjp(_summed_forward, _summed_backward)
