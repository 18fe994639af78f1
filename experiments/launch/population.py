"""Runs of a sweep that are trained as one program, in a process of their own.

  python -m experiments.launch.population --workdir=DIR NAME NAME ...

`experiments.sweep --vectorize` starts it, for runs that differ only in scalars and seed
(`deepseek_jax.train.population`). What is said of a run goes to its log.txt; the exit
code is 1 if one has failed, 130 on Ctrl-C, when all are saved.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.train import population
from deepseek_jax.train.hooks import Progress
from experiments import common
from experiments.launch import plan

MODULE = "experiments.launch.population"
LOG = "log.txt"


def command(names: Sequence[str], workdir: Path) -> list[str]:
    """The command that trains these runs of the sweep in `workdir`."""
    return [sys.executable, "-m", MODULE, f"--workdir={workdir}", *names]


def teams(planned: plan.Plan, names: Sequence[str], size: int) -> list[list[str]]:
    """Runs that are trained as one program, and alone those that are like no other.

    Raises:
      ValueError: one of them needs a mesh or a pipeline; names it.
    """
    items = {item.name: item for item in planned.items}
    for name in names:
        try:
            population.check(items[name].config)
        except ValueError as error:
            raise ValueError(f"run {name}: {error}") from None
    found = population.teams([items[name].config for name in names], size)
    return [[names[i] for i in each] for each in found]


def told(found: Sequence[Sequence[str]], size: int) -> str:
    """What became of --vectorize, in a line."""
    sizes = [len(each) for each in found]
    together = [n for n in sizes if n > 1]
    alone = sizes.count(1)
    if not together:
        return f"--vectorize {size}: no two runs differ in scalars and seed alone"
    counts = Counter(together)
    parts = [
        f"{n} runs as one program" + (f", {times} times" if times > 1 else "")
        for n, times in counts.items()
    ]
    parts += [f"alone, as they are like no other: {alone}"] if alone else []
    return f"--vectorize {size}: " + "; ".join(parts)


def main(arguments: list[str]) -> int:
    from deepseek_jax.train import population_loop  # not for those who start it

    parser = common.arguments(MODULE, __doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args(arguments)
    common.end_with_parent()
    workdir = options.workdir.absolute()
    items = {item.name: item for item in plan.read(workdir).items}
    if unknown := set(options.names) - set(items):
        raise ValueError(f"{workdir} has no run {min(unknown)!r}")
    configs = [items[name].config for name in options.names]
    with contextlib.ExitStack() as logs:
        tellers = []
        for name, config in zip(options.names, configs, strict=True):
            (workdir / name).mkdir(exist_ok=True)
            log = logs.enter_context((workdir / name / LOG).open("a", buffering=1))
            tellers.append(Progress(config.train.steps, log))
        folders = [workdir / name for name in options.names]
        failures = population_loop.run(configs, folders, tellers)
    return 1 if any(failures) else 0


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
