"""Does predicting more tokens help, and how much weight should that have?

No MTP module to four in sequence (arXiv:2412.19437, section 2.2, trains with one), and
one with other weights than the report's 0.3: 0.1, 1, and its schedule, 0.3 and then 0.1
for the last third. By table 4 of the report benchmarks gain and the loss of the next
token does not: `ce` is that loss alone, `loss` has the modules' in it, too. How many
drafts of a run's modules are accepted, `python -m experiments.evaluate acceptance`
tells.

Cost: 24 runs of 300 steps, about 2.5 hours on 2 cores (a module costs a fifth of a
step); ":depths" is none, one and two modules, 9 runs. ":smoke" is two seeds of 6 steps.

  python -m experiments.sweep --sweep=experiments/sweeps/mtp_depth.py --workdir=runs/mtp
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"depth{depth}": {"model.mtp.depth": depth} for depth in range(5)},
    "depth1-weight0.1": {"optim.mtp_weight": 0.1},
    "depth1-weight1": {"optim.mtp_weight": 1.0},
    "depth1-falling": {"optim.mtp_weight_changes": ((grid.STEPS * 2 // 3, 0.1),)},
}


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "depths" takes fewer, "smoke" two seeds and six steps."""
    parts = {"depths": ("depth0", "depth1", "depth2")}
    return grid.runs(SETTINGS, arg, parts)


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("ce", "loss", "maxvio_batch")
