"""What does training in FP8 cost in loss, and which piece of the recipe saves it?

The policies of `precision.policy` beside bfloat16, three seeds each, on the replica for
numerics: arXiv:2412.19437, section 3.3 and appendix B, which find FP8 within 0.25% of
bfloat16's loss, and blocks of gradients diverging after 300B tokens. A run here sees
1.2M tokens, so it shows what rounding does to the first steps, not what diverges late.
`fp8_no_promotion` is by the cheap model of the accumulator (`precision.accumulate`).

Cost: 24 runs of 300 steps, most of a night on 2 cores. The report's own comparison,
`fp8_v3` and bfloat16, comes first, and is all there is of ":v3", in 6 runs; ":short" is
all policies in 100 steps, an hour on `tiny`; ":smoke" is four runs of 6 steps.

  python -m experiments.sweep --sweep=experiments/sweeps/fp8.py --workdir=runs/fp8
  python -m experiments.sweep --sweep=experiments/sweeps/fp8.py:short \
      --config=experiments/configs/tiny.py --workdir=runs/fp8_short --vectorize=3
"""

from collections.abc import Iterator
from typing import Any

from deepseek_jax.precision.policy import POLICIES
from experiments.sweeps import grid

CONFIG = "experiments/configs/mini.py"
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"runtime.compute": name} for name in POLICIES if name != "f32"
}
PAIR = {name: SETTINGS[name] for name in ("bf16", "fp8_v3")}
SHORT = 100  # steps


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    """The runs; `arg` "v3" takes two policies, "short" all in fewer steps, and "smoke"
    those two in few and short runs.
    """
    short = arg == "short"
    parts = {"v3": PAIR, "short": SETTINGS}
    steps = SHORT if short else grid.STEPS
    yield from grid.runs(SETTINGS if short else PAIR, arg, parts, train__steps=steps)
    if arg is None:
        yield from grid.runs({k: v for k, v in SETTINGS.items() if k not in PAIR})


def metrics() -> tuple[str, ...]:
    """What to watch."""
    return ("loss", "ce", "grad_norm")
