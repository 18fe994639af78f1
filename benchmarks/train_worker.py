"""Our side of `train_cpu.py`: a process of its own, so that its peak memory is its own.

  python -m benchmarks.train_worker f32

Prints the sizes as JSON, compiles the step, then answers each line on standard input
with one timed step.
"""

import dataclasses
import json
import resource
import sys

from benchmarks import config_a
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import compile_step


def main() -> None:
    compute = sys.argv[1]
    config = config_a.config(compute)
    flops = sum(config_a.flops(config))
    sizes = {
        "batch": config.data.batch,
        "length": config.data.length,
        "model": dataclasses.asdict(config.model),
        "flops": flops,
    }
    print(json.dumps(sizes), flush=True)
    parts, batch = assemble(config), config_a.batch(config)
    state = init_state(parts, config.seed)
    step = compile_step(parts, state, batch)
    gemm = config_a.gemm(compute)

    def train() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()

    for _ in sys.stdin:
        before, seconds, after = gemm(), config_a.timed(train), gemm()
        rate = (before + after) / 2
        answer = {
            "seconds": seconds,
            "gemm_flops": rate,
            "gemm_fraction": flops / seconds / rate,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
