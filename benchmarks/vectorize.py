"""Are runs faster as one program than one after the other, on this CPU?

A step of each of some runs of `tiny` that differ in learning rate, bias speed and seed
(`deepseek_jax.train.population`): alone, each by the program of a single run, and as
one program in some forms. Each is a process of its own, and all take turns, so that a
busy machine slows all alike; ratios are medians over the turns. `cores` is CPU time
over time: what of the machine was used. --whole STEPS times whole sweeps, too, with all
that comes before and after the steps.

  python -m benchmarks.vectorize --json experiments/results/vectorize/step.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.train_cpu import ROOT, Failed, Worker, alternate, median
from deepseek_jax import presets
from deepseek_jax.config import BalanceConfig, Config, DataConfig, OptimConfig
from deepseek_jax.data.batch import Batch
from deepseek_jax.files import write_text
from deepseek_jax.train import population
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import compile_step, compiled

ALONE = "alone"
CORES = len(os.sched_getaffinity(0))
# How many devices, and how each goes over its runs.
FORMS = {
    "one by one, a device a core": (CORES, population.one_by_one),
    "one by one, one device": (1, population.one_by_one),
    "vmap, one device": (1, jax.vmap),
}
SWEEP = '''"""Four runs that differ in scalars and seed."""

CONFIG = "experiments/configs/tiny.py"


def sweep():
    for i in range({runs}):
        yield {{
            "name": f"run{{i}}",
            "optim.lr": 1e-3 * (1 + i),
            "balance.speed": 1e-3 * (1 + i),
            "seed": i,
            "train.steps": {steps},
            "train.eval_every": {steps},
            "train.checkpoint_every": {steps},
        }}
'''


def configs(runs: int) -> list[Config]:
    """`tiny` with other scalars and seeds."""
    return [
        Config(
            model=presets.tiny(),
            data=DataConfig(batch=16, length=256),
            optim=OptimConfig(lr=1e-3 * (1 + i), warmup=20, horizon=300),
            balance=BalanceConfig(speed=1e-3 * (1 + i)),
            seed=i,
        )
        for i in range(runs)
    ]


def batch(config: Config) -> Batch:
    """Random tokens of a run's own, one document a row."""
    rng = np.random.default_rng(config.seed)
    shape = config.data.batch, config.data.length + 1 + config.model.mtp.depth
    tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    ones = np.ones(shape, np.int32)
    return Batch(tokens, ones, position, ones > 0, np.zeros_like(tokens))


def alone(runs: int) -> Callable[[], None]:
    """A step of each run, one after the other."""
    each, batches = configs(runs), [*map(batch, configs(runs))]
    parts = assemble(each[0])
    states = [init_state(parts, config.seed) for config in each]
    step = compile_step(parts, states[0], batches[0])

    def turn() -> None:
        for i in range(runs):
            states[i], metrics = step(states[i], batches[i])
            metrics["loss"].block_until_ready()

    return turn


def together(form: str, runs: int) -> Callable[[], None]:
    """A step of all runs, as one program."""
    devices, each = FORMS[form]
    given = configs(runs)
    count = max(n for n in range(1, devices + 1) if runs % n == 0)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]), (population.AXIS,))
    parts = assemble(given[0], jax.devices()[:1])
    values, states = jax.device_put(
        (
            population.stack([*map(population.scalars, given)]),
            population.stack([init_state(parts, config.seed) for config in given]),
        ),
        population.split(mesh),
    )
    rows = population.stack([*map(batch, given)])
    step = compiled(population.make_step(given[0], mesh, each), values, states, rows)

    def turn() -> None:
        nonlocal states
        states, metrics = step(values, states, rows)
        jax.block_until_ready(metrics["loss"])

    return turn


def work(form: str, runs: int) -> None:
    """A process of the benchmark: answers each line of its input with a turn."""
    turn = alone(runs) if form == ALONE else together(form, runs)
    for _ in sys.stdin:
        started, used = time.perf_counter(), time.process_time()
        turn()
        seconds = time.perf_counter() - started
        used = time.process_time() - used
        print(json.dumps({"seconds": seconds, "cpu": used}), flush=True)


def start(form: str, runs: int) -> Worker:
    """The process of a form."""
    devices = 1 if form == ALONE else FORMS[form][0]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    module = [sys.executable, "-m", "benchmarks.vectorize"]
    return Worker(form, [*module, "--runs", str(runs), "--worker", form], env)


def measure(runs: int, rounds: int, forms: list[str]) -> dict[str, Any]:
    """Times the steps, prints the table, and gives the numbers."""
    workers = [start(form, runs) for form in forms]
    try:
        answers = dict(zip(forms, alternate(workers, rounds), strict=True))
    finally:
        for worker in workers:
            worker.stop()
    config = configs(1)[0]
    tokens = runs * config.data.batch * config.data.length
    print(f"a step of {runs} runs, {CORES} cores, medians of {rounds} rounds\n")
    print(f"{'':28} tokens/s  cores  CPU s a run  x alone")
    result = {}
    for form, found in answers.items():
        pairs = zip(answers[ALONE], found, strict=True)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        seconds, cpu = median(found, "seconds"), median(found, "cpu")
        used = statistics.median(each["cpu"] / each["seconds"] for each in found)
        result[form] = {
            "tokens_per_s": tokens / seconds,
            "cores": used,
            "cpu_s_a_run": cpu / runs,
            "ratio_to_alone": ratio,
        }
        print(
            f"{form:28} {tokens / seconds:8.0f} {used:6.2f} {cpu / runs:12.3f} "
            f"{ratio:8.2f}"
        )
    return result


WHOLE = {
    "one after the other": [],
    "--workers": ["--workers", str(CORES)],
    "--vectorize": ["--vectorize"],
}


def whole(runs: int, steps: int) -> dict[str, float]:
    """Seconds of a sweep from its command to its report, in each way, from nothing."""
    result = {}
    print(f"\na sweep of {runs} runs of {steps} steps\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "four.py"
        file.write_text(SWEEP.format(runs=runs, steps=steps))
        for name, flags in WHOLE.items():
            flags = [*flags, str(runs)] if name == "--vectorize" else flags
            workdir = Path(folder) / "sweep"
            module = [sys.executable, "-m", "experiments.sweep", *flags]
            started = time.perf_counter()
            done = subprocess.run(
                [*module, f"--sweep={file}", f"--workdir={workdir}"],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
            )
            if done.returncode:
                raise Failed(f"{name}: exit code {done.returncode}; see above")
            result[name] = time.perf_counter() - started
            shutil.rmtree(workdir)
            print(f"{name:28} {result[name]:8.0f} s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4, help="in one program; 4")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps; 8")
    parser.add_argument(
        "--whole", type=int, metavar="STEPS", help="time whole sweeps too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runs < 2 or args.rounds < 1:
        parser.error("--runs must be 2 or more, and --rounds 1 or more")
    if args.worker:
        work(args.worker, args.runs)
        return
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.vectorize {' '.join(sys.argv[1:])}",
        "cores": CORES,
        "runs": args.runs,
        "rounds": args.rounds,
    }
    try:
        result["step"] = measure(args.runs, args.rounds, [ALONE, *FORMS])
        if args.whole:
            result["whole_s"] = whole(args.runs, args.whole)
    except Failed as error:
        sys.exit(f"error: {error}")
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
