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
    arg: str | None = None,
    parts: Mapping[str, Iterable[str]] | None = None,
    seeds: Iterable[int] = SEEDS,
    **common: Any,
) -> Iterator[dict[str, Any]]:
    """Every setting with every seed, seed by seed, so that a part of it compares, too.

    Args:
      settings: overrides by the name of what they try.
      arg: what follows the sweep file's ":"; a key of `parts`, or "smoke": two seeds
        and six steps, to see that everything runs.
      parts: the names of the settings that a word takes; "smoke" takes all unless it
        is here.
      common: overrides of all runs, "__" standing for ".".

    Raises:
      ValueError: the word is unknown.
    """
    words = {"smoke": tuple(settings), **(parts or {})}
    if arg is not None and arg not in words:
        known = ", ".join(f":{word}" for word in sorted(words))
        raise ValueError(f":{arg} is unknown to this sweep, which knows {known}")
    smoke = arg == "smoke"
    names = tuple(settings if arg is None else words[arg])
    same = {key.replace("__", "."): value for key, value in common.items()}
    return (
        {
            "name": f"{name}-s{seed}",
            "train.steps": STEPS,
            **same,
            **settings[name],
            "seed": seed,
            **(SMOKE if smoke else {}),
        }
        for seed in (tuple(seeds)[:2] if smoke else seeds)
        for name in names
    )
