"""Does the whole of DeepSeek-V3 train and balance at a size that a laptop can afford?

arXiv:2412.19437, sections 2 and 4.2, at 3.2M parameters: MLA, one dense and three MoE
layers with loss-free balancing and the sequence-wise loss, one MTP module. Cost: 300
steps of 16 x 256 tokens, minutes on 2 cores.

  python -m experiments.train --config=experiments/configs/tiny.py --workdir=runs/tiny

Where it differs from section 4.2, and why: the learning rate is 3e-3 after 20 steps of
warmup, since so small a model takes more; the bias speed is 1e-2 and not 1e-3, because
a bias must cross the width of the scores' distribution within the run (speed x steps is
what counts; at 1e-3, 300 steps leave MaxVio at about three times what 1e-2 reaches);
matrices start at 1/sqrt(d) and not 0.006, which is meant for d = 7168. ":smoke" makes
it six steps, to see that everything runs.
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
            model=presets.tiny(),
            data=DataConfig(batch=16, length=256),
            optim=OptimConfig(lr=3e-3, warmup=20),
            balance=BalanceConfig(strategy="v3", speed=1e-2),
            train=TrainConfig(**SMOKE) if arg == "smoke" else TrainConfig(steps=300),
        )
    )
