"""Does a pipeline's schedule change what is learned?

It must not: no pipeline, and the six schedules on four ranks with 8 micro-batches, the
same seed. Losses agree but for float32's rounding, which grows from step to step. What
differs is time and memory (arXiv:2412.19437, table 2; `experiments.schedule`); but
simulated devices share the cores of one machine, so `tokens_per_s` compares the work of
the programs, not their bubbles.

Cost: 7 runs of 40 steps of an 8-layer replica, about 40 minutes on 2 cores. ":smoke"
is 7 runs of 6 steps. With JAX_NUM_CPU_DEVICES=4 in the environment:

  python -m experiments.sweep --sweep=experiments/sweeps/schedules.py --workdir=runs/s
"""

from collections.abc import Iterator
from typing import Any

from deepseek_jax.config import SCHEDULES
from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"

PIPE = {"mesh.pipe": 4, "pipeline.microbatches": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {"pipeline.schedule": name, **PIPE} for name in SCHEDULES[1:]},
}


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "smoke" takes two seeds and six steps."""
    return grid.runs(SETTINGS, arg, seeds=(0,), train__steps=40, model__num_layers=8)


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("loss", "tokens_per_s", "maxvio_batch")
