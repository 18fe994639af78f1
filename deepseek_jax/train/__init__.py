"""Training: the objective, the step, and the loop around it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config


def run(
    config: Config,
    workdir: str | Path,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """See `train.loop.run`, which this imports when it is called."""
    from deepseek_jax.train import loop

    return loop.run(config, workdir, callback)
