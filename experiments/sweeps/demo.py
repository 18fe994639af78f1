"""Does balancing without an auxiliary loss balance, and what does it cost?

Four strategies on the tiny replica, one seed: no balancing, the loss-free bias, a
sequence-wise auxiliary loss, and DeepSeek-V3's recipe of both (arXiv:2412.19437,
section 2.1.2). The effect on balance is large and plain within a minute of training.
The effect on loss is not: it takes more steps and several seeds (balancing.py).

Cost: 4 runs of 100 steps, about 8 minutes on 2 cores.

  python -m experiments.sweep --sweep=experiments/sweeps/demo.py --workdir=runs/demo

The settings are those of `balancing.py`, which says why they are not the paper's.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "experiments/configs/tiny.py"
STEPS = 100

SETTINGS: dict[str, dict[str, float]] = {
    "none": {},
    "loss_free": {"balance.speed": 1e-2},
    "aux_seq": {"balance.alpha": 1e-2},
    "v3": {"balance.speed": 1e-2, "balance.alpha": 1e-4},
}


def sweep() -> Iterator[dict[str, Any]]:
    """The runs."""
    for strategy, settings in SETTINGS.items():
        yield {
            "name": strategy,
            "balance.strategy": strategy,
            **settings,
            "train.steps": STEPS,
            "train.routing_every": 4,
            "train.eval_every": 50,
            "train.checkpoint_every": 50,
        }


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("loss", "maxvio_batch")
