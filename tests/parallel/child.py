"""Trains a small model in float64 as one of several processes, with mishaps.

python -m tests.parallel.child CORPUS WORKDIR PROCESSES SCHEDULE [MISHAP PROCESS STEP]

SCHEDULE: "none", or that of a pipeline whose ranks the processes are. MISHAP: a signal
that the process sends itself at the step; "seed", another seed than the others have;
"full", a disk that is full at the end of a save.
"""

import dataclasses
import os
import signal
import sys

from deepseek_jax import train
from deepseek_jax.checkpoint import manager
from deepseek_jax.config import Config, MeshConfig, PipelineConfig
from deepseek_jax.parallel import cluster
from deepseek_jax.train import start
from experiments import common
from tests.factory import as_f64
from tests.train import child

STEPS = 20


def config(corpus: str, processes: int, schedule: str) -> Config:
    """`tests.train.child`'s, a device in each process; checkpoints at 5, 10, ..."""
    run = child.config(corpus)
    piped = schedule != "none"
    return dataclasses.replace(
        run,
        mesh=MeshConfig(pipe=processes) if piped else MeshConfig(data=processes),
        pipeline=PipelineConfig(schedule, run.data.batch if piped else 1),
        train=dataclasses.replace(run.train, steps=STEPS),
    )


def main() -> None:
    corpus, workdir, processes, schedule, *mishap = sys.argv[1:]
    run = config(corpus, int(processes), schedule)
    kind, which, step = mishap or ("none", "", "0")
    mine = os.environ.get(cluster.INDEX, "0") == which
    if kind == "seed" and mine:
        run = dataclasses.replace(run, seed=7)
    if kind == "full" and mine:
        manager.write_digests = lambda _: os.write(os.open("/dev/full", 1), b"x")

    def callback(record):
        if mine and kind.startswith("SIG") and record["step"] == int(step):
            os.kill(os.getpid(), getattr(signal, kind))

    init_state = start.init_state
    start.init_state = lambda parts, seed: as_f64(init_state(parts, seed))
    common.end_with_parent()
    cluster.initialize()
    train.run(run, workdir, callback)


if __name__ == "__main__":
    common.guarded(main)
