"""How evenly a model's experts load devices, as they lie and as `parallel.eplb` places.

Of measured loads, those of an evaluation, by largest over mean load of a device: the
slowest device is what the others wait for. The redundant experts of arXiv:2412.19437,
section 3.4. Placing by the same loads that are then measured is the best case;
`placed_by` shows what earlier ones are worth, and loads by domain what becomes of it
when only one kind of text comes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek_jax.parallel import eplb

Floats = NDArray[np.float64]


class Evenness(NamedTuple):
    """Largest over mean load of a device, by router; NaN where it is not defined."""

    before: Floats  # [R] experts in order, E / devices on each, none copied
    after: Floats  # [R]


class Report(NamedTuple):
    placement: eplb.Placement
    total: Evenness
    domains: dict[str, Evenness]  # the same placement on one domain's loads


def measure(
    loads_RE: ArrayLike,
    replicas: int,
    *,
    devices: int,
    nodes: int = 1,
    groups: int = 1,
    by_domain: Mapping[str, ArrayLike] | None = None,
    placed_by: ArrayLike | None = None,
) -> Report:
    """Places R routers' experts by their loads and says what devices then have to do.

    Args:
      loads_RE: tokens that each expert received.
      replicas, devices, nodes, groups: as `eplb.place` has them.
      by_domain: loads [R, E] of each domain.
      placed_by: loads [R, E] to place by, if not `loads_RE`.

    Raises:
      ValueError: as `eplb.place` and `eplb.device_loads`.
    """
    known = loads_RE if placed_by is None else placed_by
    placed = eplb.place(known, replicas, devices=devices, nodes=nodes, groups=groups)

    def evenness(loads_RE: ArrayLike) -> Evenness:
        after = eplb.imbalance(eplb.device_loads(loads_RE, placed, devices))
        if placed.counts.shape[1] % devices:
            return Evenness(np.full_like(after, np.nan), after)
        as_is = eplb.contiguous(*placed.counts.shape)
        before = eplb.imbalance(eplb.device_loads(loads_RE, as_is, devices))
        return Evenness(before, after)

    domains = {name: evenness(loads) for name, loads in (by_domain or {}).items()}
    return Report(placed, evenness(loads_RE), domains)
