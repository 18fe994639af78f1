"""How fast should the bias move?

The bias speed u of loss-free balancing from 0 to 1e-1, three seeds each, on the tiny
replica: figure 4 of arXiv:2408.15664, which finds 1e-4 slow early and 1e-2 oscillating
late over some ten thousand steps, and 1e-3 best. Over 300 steps all of it shifts to
larger speeds, since what a bias can reach is speed x steps.

Cost: 24 runs of 300 steps, about 90 minutes on 2 cores; ":decades" is the whole powers
of ten and 0, 15 runs. With --vectorize=4 runs of different speeds are one program.

  python -m experiments.sweep --sweep=experiments/sweeps/bias_rate.py --workdir=runs/u
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"
SPEEDS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SETTINGS: dict[str, dict[str, Any]] = {f"u{u:g}": {"balance.speed": u} for u in SPEEDS}


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "decades" takes fewer speeds, "smoke" two seeds and six steps."""
    parts = {"decades": ("u0", "u0.0001", "u0.001", "u0.01", "u0.1")}
    return grid.runs(SETTINGS, arg, parts, balance__strategy="loss_free")


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("loss", "maxvio_batch")
