"""Trains one configuration; the same command again goes on where it stopped.

  python -m experiments.train --config=experiments/configs/tiny.py --workdir=runs/tiny

--workdir gets config.json, metrics.jsonl (one record a line), tokenizer/, checkpoints/
and tensorboard/. Ctrl-C saves and exits with 130. JAX_NUM_CPU_DEVICES=4 with
--config.mesh.data=4 splits the rows of a batch over four simulated devices.
"""

from absl import flags

from deepseek_jax import train
from experiments import common

CONFIG = common.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if not there.")
flags.adopt_module_key_flags(common)


def main() -> None:
    common.end_with_parent()
    config = common.require(CONFIG, "--config=experiments/configs/tiny.py")
    workdir = common.require(WORKDIR, "--workdir=runs/tiny")
    train.run(common.from_config_dict(config), workdir)
    print(
        f"Results: {workdir}. What to do with them:\n"
        f"  python -m experiments.report --workdir={workdir}\n"
        f"  python -m experiments.generate --checkpoint={workdir} --prompt=TEXT"
    )


if __name__ == "__main__":
    common.run(main)
