"""How well routers balance, and what their experts specialise in.

Pure numpy on counts fetched from the device. A load is the number of tokens that each
of E experts received, over a batch (`_batch`) or a validation set (`_global`); leading
axes (routers, domains, steps) stay. Sources: arXiv:2408.15664 (MaxVio),
arXiv:1701.06538 (coefficient of variation), arXiv:2412.19437 (specialisation, figure
9). Ratios are NaN where no expert received anything.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def relative_load(load_RE: ArrayLike) -> Floats:
    """Load over the balanced load: 1 everywhere in perfect balance, at most E/K.

    Of one domain's tokens it is the specialisation of arXiv:2412.19437, figure 9 (there
    up to about 10 with 64 experts).
    """
    load = np.asarray(load_RE, np.float64)
    with np.errstate(invalid="ignore"):
        relative: Floats = load / load.mean(-1, keepdims=True)
    return relative


def maxvio(load_RE: ArrayLike) -> Floats:
    """(max - mean) / mean: 0 is perfect, E/K - 1 is every token on the same K."""
    violation: Floats = relative_load(load_RE).max(-1) - 1
    return violation


def variation(load_RE: ArrayLike) -> Floats:
    """Standard deviation over mean, the experts being the population; 0 is perfect."""
    cv: Floats = relative_load(load_RE).std(-1)
    return cv


def entropy(load_RE: ArrayLike) -> Floats:
    """Entropy of the experts' shares of the load, over its maximum ln E; 1 is perfect.

    Relative and not in nats, so that routers of other sizes compare. Every token on the
    same K experts gives ln K / ln E.
    """
    relative = relative_load(load_RE)
    experts = relative.shape[-1]
    share = relative / experts
    log = np.log(share, where=share > 0, out=np.zeros_like(share))
    relative_entropy: Floats = -(share * log).sum(-1) / np.log(experts)
    return relative_entropy


def dead_experts(load_RE: ArrayLike) -> NDArray[np.int64]:
    """How many experts received nothing at all."""
    dead: NDArray[np.int64] = (np.asarray(load_RE) == 0).sum(-1)
    return dead


def flips(
    before_RTK: ArrayLike, after_RTK: ArrayLike, valid_T: ArrayLike | None = None
) -> Floats:
    """Share of a token's K experts that changed between two evaluations of one text.

    Mean over valid tokens (all of them without `valid_T`), by router: 0 is the same
    experts in any order, 1 all others; a random choice would give 1 - K/E.

    Raises:
      ValueError: the selections differ in shape.
    """
    before, after = np.asarray(before_RTK), np.asarray(after_RTK)
    if before.shape != after.shape:
        raise ValueError(
            f"selections of shapes {before.shape} and {after.shape} differ"
        )
    if valid_T is not None:
        valid = np.asarray(valid_T, bool)
        before, after = before[..., valid, :], after[..., valid, :]
    kept_RTK = (after[..., :, None] == before[..., None, :]).any(-1)
    changed: Floats = 1 - kept_RTK.mean((-2, -1))
    return changed
