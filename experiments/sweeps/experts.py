"""Do shared experts help, and does it help to cut experts finer?

The two ideas of DeepSeekMoE (arXiv:2401.06066, section 3), at equal parameters, in
total and for each token. `shared`: of 16 experts 0, 1 or 2 are everyone's, and 3 serve
each token. `cut`: 1024 numbers of routed experts in 8, 16, 32 or 64, an eighth of them
active, with as many shared ones beside.

Cost: 21 runs of 300 steps, about 100 minutes on 2 cores. ":smoke" is two seeds of 6
steps.

  python -m experiments.sweep --sweep=experiments/sweeps/experts.py --workdir=runs/x
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"

MOE = "model.moe."


def moe(**fields: int) -> dict[str, Any]:
    """Overrides of the MoE layers, without nodes."""
    flat = {"num_groups": 1, "keep_groups": 1, **fields}
    return {MOE + name: value for name, value in flat.items()}


SETTINGS: dict[str, dict[str, Any]] = {
    **{
        f"shared{n}": moe(num_shared=n, num_experts=16 - n, top_k=3 - n)
        for n in (0, 1, 2)
    },
    **{
        f"cut{8 * n}": moe(num_experts=8 * n, top_k=n, num_shared=n, ffn_dim=128 // n)
        for n in (1, 2, 4, 8)
    },
}


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "smoke" takes two seeds and six steps."""
    return grid.runs(SETTINGS, arg)


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("ce", "loss", "maxvio_batch")
