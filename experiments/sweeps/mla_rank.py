"""How small may the latent be, and what does it cost against a full cache?

MLA with a latent of 8 to 64 numbers (4 heads of 32 and a shared 16 for the positions),
against multi-head attention, grouped-query attention with 2 heads of keys and with one
(arXiv:2405.04434, tables 8 and 9, where MLA is better than all of them). `python -m
experiments.train`'s config.json and `deepseek_jax.model.count` give the cache a token.

Cost: 21 runs of 300 steps, about 95 minutes on 2 cores. ":smoke" is two seeds of 6
steps.

  python -m experiments.sweep --sweep=experiments/sweeps/mla_rank.py --workdir=runs/mla
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps import grid

CONFIG = "experiments/configs/tiny.py"

KIND, RANK = "model.attention.kind", "model.attention.kv_rank"
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"mla{rank}": {RANK: rank} for rank in (8, 16, 32, 64)},
    "mha": {KIND: "mha"},
    "gqa2": {KIND: "gqa", "model.attention.kv_heads": 2},
    "mqa": {KIND: "gqa", "model.attention.kv_heads": 1},
}


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "smoke" takes two seeds and six steps."""
    return grid.runs(SETTINGS, arg)


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("ce", "loss", "grad_norm")
