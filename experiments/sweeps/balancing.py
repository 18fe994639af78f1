"""Which balancing strategy costs the least loss, and which balances best?

Eleven strategies, three seeds each, on the tiny replica: the comparison of
arXiv:2412.19437, section 4.5.3 (auxiliary-loss-free against batch-wise and
sequence-wise losses), and of arXiv:2408.15664, with the variants proposed since.

Cost: 33 runs of 300 steps, about 2 hours on 2 cores. ":paper" is the report's own
comparison, five strategies and 15 runs; ":pair" has six more seeds of the two whose
losses the report tells apart, 12 runs; ":smoke" is four runs of 6 steps.

  python -m experiments.sweep --sweep=experiments/sweeps/balancing.py --workdir=runs/b

Settings are those that balance at this length, not the papers': what a bias can do is
its speed x steps, and within 300 steps it must cross the width of the scores'
distribution, which takes 1e-2 and not 1e-3. An auxiliary loss of the paper's 1e-4 does
nothing visible in so short a run, 1e-2 does. Only `v3` keeps 1e-4, as the paper's
complement to the bias that does the work.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"

SETTINGS: dict[str, dict[str, float]] = {
    "none": {},
    "loss_free": {"balance.speed": 1e-2},
    # Steps shrink with the imbalance that is left, so they may begin larger.
    "loss_free_proportional": {"balance.speed": 2e-2},
    # Scores lie near one half, so b moves s*b half as far as it moves s + b.
    "multiplicative": {"balance.speed": 2e-2},
    "loss_free_frozen": {"balance.speed": 1e-2, "balance.freeze_step": 200},
    "aux_batch": {"balance.alpha": 1e-2},
    "aux_seq": {"balance.alpha": 1e-2},
    "aux_global": {"balance.alpha": 1e-2},
    "quantile": {},
    "z_loss": {"balance.z_weight": 1e-3},
    "v3": {"balance.speed": 1e-2, "balance.alpha": 1e-4},
}
PAPER = ("none", "loss_free", "aux_batch", "aux_seq", "v3")
PARTS = {"paper": PAPER, "pair": ("loss_free", "aux_seq"), "smoke": ("none", "v3")}
MORE_SEEDS = range(3, 9)


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` is one of PARTS, of which "smoke" has short runs."""
    settings = {
        name: {"balance.strategy": name, **overrides}
        for name, overrides in SETTINGS.items()
    }
    seeds = MORE_SEEDS if arg == "pair" else grid.SEEDS
    return grid.runs(settings, arg, PARTS, seeds)


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("loss", "maxvio_batch", "penalty", "grad_norm")
