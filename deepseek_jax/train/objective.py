"""The training loss (arXiv:2412.19437, sections 2.1.2, 2.2; equations 17-20, 24, 25).

Each cross entropy is a sum over its valid targets divided by their number in the whole
global batch, and each penalty a share of the whole batch's, so micro-batches simply
add. With full targets the MTP denominator is the paper's T.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.data.batch import Batch
from deepseek_jax.model.transformer import Output, Totals, count, marks, reaches
from deepseek_jax.ops.losses import cross_entropy
from deepseek_jax.train.state import Parts
from deepseek_jax.typing import Array, Params


class Losses(NamedTuple):
    """Parts of the loss, each this micro-batch's share of the global batch's."""

    loss: Array
    ce: Array
    mtp_ce: Array  # [J]
    penalty: Array


def bounds(parts: Parts, batch: Batch) -> tuple[Array | None, Array]:
    """The model's `segment_BS` and `valid_BS`, over every column of the batch."""
    isolate = parts.config.data.segment_mask
    return batch.segment if isolate else None, batch.segment > 0


def target_masks(parts: Parts, batch: Batch) -> list[Array]:
    """Per depth, the positions [B, L] whose target counts.

    Token i+k+1 must be a marked target of the document of position i; every input of
    the MTP chain lies between the two, so nothing crosses a document.
    """
    length = parts.config.data.length
    mark_BS = marks(*bounds(parts, batch), batch.tokens)
    depths = range(parts.config.model.mtp.depth + 1)
    return [
        reaches(k + 1, length, mark_BS) & batch.mask[:, k + 1 : k + 1 + length]
        for k in depths
    ]


def targets(parts: Parts, batch: Batch, totals: Totals) -> list[tuple[Array, Array]]:
    """Per depth, the tokens [B, L] to predict and their weights in the mean."""
    length = parts.config.data.length
    return [
        (
            batch.tokens[:, k + 1 : k + 1 + length],
            mask_BL / jnp.maximum(totals.targets[k], 1),
        )
        for k, mask_BL in enumerate(target_masks(parts, batch))
    ]


def input_masks(parts: Parts, batch: Batch) -> list[Array]:
    """Per depth, the positions [B, L] whose inputs are real and of one document."""
    length = parts.config.data.length
    mark_BS = marks(*bounds(parts, batch), batch.tokens)
    depths = range(parts.config.model.mtp.depth + 1)
    return [reaches(k, length, mark_BS) for k in depths]


def router_masks(parts: Parts, batch: Batch) -> Array:
    """Per router, the positions that its load counts, [R, B, L]."""
    main, *mtp = input_masks(parts, batch)
    return jnp.stack([main] * parts.config.model.num_moe + mtp)


def totals(parts: Parts, batch: Batch) -> Totals:
    """Counts over the global batch, taken before its first micro-batch."""
    inputs = count(input_masks(parts, batch))
    targets = jnp.stack([mask.sum() for mask in target_masks(parts, batch)])
    return inputs._replace(targets=targets)


def forward(
    parts: Parts, params: Params, balance: Any, batch: Batch, totals: Totals
) -> Output:
    """The model on a micro-batch, with every MTP module."""
    length, depth = parts.config.data.length, parts.config.model.mtp.depth
    inputs = slice(0, length + depth)
    segment, valid = bounds(parts, batch)
    return parts.model.apply(
        {"params": params},
        batch.tokens[:, inputs],
        batch.position[:, :length],
        balance,
        segment_BS=None if segment is None else segment[:, inputs],
        valid_BS=valid[:, inputs],
        totals=totals,
    )


def objective(
    parts: Parts,
    params: Params,
    balance: Any,
    batch: Batch,
    totals: Totals,
    mtp_weight: Array,
) -> tuple[Array, tuple[Losses, Any]]:
    """A micro-batch's share of the global batch's loss; the rest is auxiliary."""
    out = forward(parts, params, balance, batch, totals)
    hidden = (out.hidden_BLD, *out.mtp_JBLD)
    nll, rt = [], parts.model.rt
    loss_of = rt.rows(
        functools.partial(cross_entropy, dot=rt.dot), whole=(1,), total=True
    )
    for k, (h_BLD, (target_BL, weight_BL)) in enumerate(
        zip(hidden, targets(parts, batch, totals), strict=True)
    ):
        with jax.named_scope(f"head_{k}"):
            nll.append(
                loss_of(
                    h_BLD.reshape(-1, h_BLD.shape[-1]),
                    params["head"],
                    target_BL.reshape(-1),
                    weight_BL.reshape(-1).astype(h_BLD.dtype),
                )
            )
    ce, mtp_ce = nll[0], jnp.stack(nll)[1:]
    penalty = out.aux.penalty.sum()
    loss = ce + penalty
    if nll[1:]:
        loss = loss + mtp_weight * mtp_ce.mean()
    return loss, (Losses(loss, ce, mtp_ce, penalty), out.aux)
