"""Trains one configuration; the same command again goes on where it stopped.

  python -m experiments.train --config=experiments/configs/tiny.py --workdir=runs/tiny

--workdir gets config.json, metrics.jsonl (one record a line), tokenizer/, checkpoints/
and tensorboard/. Ctrl-C saves and exits with 130. JAX_NUM_CPU_DEVICES=4 with
--config.mesh.data=4 splits the rows of a batch over four simulated devices.

Several processes, of one machine or many, train one run when each is given this same
command, a --workdir that all can reach, and a --config.mesh of all their devices:
* python -m experiments.launch.processes --processes=4 -- ARGUMENTS starts four here;
* srun python -m experiments.train ..., with more than one task: one task a GPU, or one
  a host with all its GPUs. Process 0 listens on a port that follows from the job's
  number; JAX_COORDINATOR_PORT chooses another, for a second srun inside one job;
* anything else that sets JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID, which go before what srun sets.
JAX_LOCAL_DEVICE_IDS=0,1 gives a process those of the GPUs that it sees. A process that
dies ends the others, at their next exchange or 30 s later, and the same command goes on
from the last checkpoint, also on another number of processes.
"""

from absl import flags

from deepseek_jax import train
from deepseek_jax.parallel import cluster, processes
from experiments import common

CONFIG = common.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if not there.")
flags.adopt_module_key_flags(common)


def main() -> None:
    common.end_with_parent()
    config = common.require(CONFIG, "--config=experiments/configs/tiny.py")
    workdir = common.require(WORKDIR, "--workdir=runs/tiny")
    checked = common.from_config_dict(config)
    cluster.initialize()
    train.run(checked, workdir)
    if processes.is_first():
        print(
            f"Results: {workdir}. What to do with them:\n"
            f"  {common.command('experiments.report')} --workdir={workdir}\n"
            f"  {common.command('experiments.generate')} --checkpoint={workdir} "
            "--prompt=TEXT"
        )


if __name__ == "__main__":
    common.run(main)
