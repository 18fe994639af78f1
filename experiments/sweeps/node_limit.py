"""What does it cost to keep a token on few nodes?

A token may go to 4 of 16 experts, which lie on 4 nodes: on all of them, or only on the
1, 2 or 3 whose experts suit it best (arXiv:2412.19437, section 2.1.2: 4 of 8). Nodes
are ranked by the sum of their two best scores, as the report does; by the best one
alone, as DeepSeek-V2 did, once more with 2. Fewer nodes are fewer copies sent: see
`python -m experiments.evaluate placement` and `parallel.traffic`.

Cost: 15 runs of 300 steps, about 70 minutes on 2 cores. ":smoke" is two seeds of 6
steps.

  python -m experiments.sweep --sweep=experiments/sweeps/node_limit.py --workdir=runs/n
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"nodes{n}": {"model.moe.keep_groups": n} for n in (1, 2, 3, 4)},
    "nodes2-max": {"model.moe.keep_groups": 2, "model.moe.group_score": "max"},
}


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "smoke" takes two seeds and six steps."""
    return grid.runs(SETTINGS, arg, model__moe__top_k=4)


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("ce", "loss", "maxvio_batch")
