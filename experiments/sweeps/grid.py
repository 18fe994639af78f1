"""The runs of a sweep over named settings and seeds, as most sweeps here are. Ours."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

STEPS = 300
SEEDS = (0, 1, 2)
SMOKE = {
    "train.steps": 6,
    "train.routing_every": 2,
    "train.eval_every": 3,
    "train.checkpoint_every": 6,
}


def runs(
    settings: Mapping[str, Mapping[str, Any]],
    smoke: bool = False,
    seeds: Iterable[int] = SEEDS,
    **common: Any,
) -> Iterator[dict[str, Any]]:
    """Every setting with every seed, seed by seed, so that a part of it compares, too.

    Args:
      settings: overrides by the name of what they try.
      smoke: two seeds and six steps, to see that everything runs.
      common: overrides of all runs, "__" standing for ".".
    """
    same = {key.replace("__", "."): value for key, value in common.items()}
    for seed in tuple(seeds)[:2] if smoke else seeds:
        for name, overrides in settings.items():
            yield {
                "name": f"{name}-s{seed}",
                "train.steps": STEPS,
                **same,
                **overrides,
                "seed": seed,
                **(SMOKE if smoke else {}),
            }


def is_smoke(file: str, arg: str | None) -> bool:
    """Whether a sweep's argument asks for a short one.

    Raises:
      ValueError: it is another word.
    """
    if arg not in (None, "smoke"):
        raise ValueError(f"{file}:{arg}: only :smoke is known here")
    return arg == "smoke"
