"""Trains a small model in a process that may kill itself at a given step.

python -m tests.train.child CORPUS WORKDIR [SIGNAL STEP]
"""

import dataclasses
import os
import signal
import sys

from deepseek_jax import train
from deepseek_jax.config import Config, DataConfig, OptimConfig, TrainConfig
from experiments import common
from tests.factory import SMALL, small

STEPS = 24


def config(corpus: str) -> Config:
    """Bytes, three MoE routers, two domains; checkpoints at 5, 10, ..."""
    return small(
        model=dataclasses.replace(SMALL, vocab_size=264),
        data=DataConfig(source=corpus, tokenizer="bytes", batch=4, length=32),
        optim=OptimConfig(lr=1e-2, warmup=3),
        train=TrainConfig(
            steps=STEPS, routing_every=4, eval_every=10, checkpoint_every=5
        ),
    )


def main() -> None:
    corpus, workdir, *stop = sys.argv[1:]

    def callback(record):
        if stop and record["step"] == int(stop[1]):
            os.kill(os.getpid(), getattr(signal, stop[0]))

    train.run(config(corpus), workdir, callback)


if __name__ == "__main__":
    common.guarded(main)
