"""The replica for numerics and speed: how fast is a step, and does it stay the same?

arXiv:2412.19437, sections 2 and 4.2, at 13M parameters: 8 heads, 16 experts, top-4 out
of 2 of 4 groups, one MTP module. Cost: 1,000 steps of 8 x 512 tokens, an hour or less
on 2 cores.

  python -m experiments.train --config=experiments/configs/mini.py --workdir=runs/mini

It differs from section 4.2 as `tiny` does, with the bias speed at 3e-3 for the longer
run. ":smoke" makes it six steps.
"""

from ml_collections import ConfigDict

from deepseek_jax import presets
from deepseek_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    OptimConfig,
    TrainConfig,
)
from experiments.common import to_config_dict

SMOKE = {"steps": 6, "routing_every": 2, "eval_every": 3, "checkpoint_every": 3}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run; `arg` "smoke" shortens it."""
    if arg not in (None, "", "smoke"):
        raise ValueError(f"--config=...:{arg}: only :smoke is known here")
    return to_config_dict(
        Config(
            model=presets.mini(),
            data=DataConfig(batch=8, length=512),
            optim=OptimConfig(lr=1.5e-3, warmup=50),
            balance=BalanceConfig(strategy="v3", speed=3e-3),
            train=TrainConfig(**SMOKE) if arg == "smoke" else TrainConfig(steps=1000),
        )
    )
