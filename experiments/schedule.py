"""Prints or draws a pipeline schedule: who does what when, bubbles, memory.

    python -m experiments.schedule --name dualpipe --ranks 8 --microbatches 20
    python -m experiments.schedule --name interleaved --chunks 4 --ranks 4 \\
        --microbatches 8 --cost F=1,I=1.2,W=0.8,comm=0.1 --svg schedule.svg
    python -m experiments.schedule --name 1f1b --ranks 4 --microbatches 8 --text > mine
    python -m experiments.schedule --name 1f1b --ranks 4 --microbatches 8 --file mine

names   {names}
prints  a picture in letters, F forward, B backward, I input gradient, W weight gradient
        (upper case: digit 0), and how it compares with the formula for its bubble
--text  a line a rank, ops as F0:3, overlapped pairs as F1:2+B0:0: kind, digit, colon,
        microbatch. The digit is 0 where the name above says nothing else; either
        direction of dualpipe counts its own microbatches from 0
--json  {name, ranks, microbatches, stages, stages_of (a rank's, of digit 0, 1, ..),
        forwards_first (every rank's, before its first backward), cost, ticks, makespan,
        lockstep (makespan if each tick takes as long as its longest op), bubble: {idle
        (of each rank), largest, share (of the makespan), formula, expected, unmet (what
        the formula assumes and is not so)}, memory: {live (most microbatches whose
        activations a rank holds, each of one stage), largest, formula, expected,
        deferred (most that wait for a weight gradient only), copies (of the
        parameters)}, table}
--file  checks a table, in the form of --text, that you edited, and shows it in place of
        the schedule's own; a fault is named by rank, tick (from 0) and action

In Python: deepseek_jax.parallel.pipeline (schedules, check, cost).
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.parallel.pipeline import actions, check, cost, schedules
from deepseek_jax.parallel.pipeline.cost import Cost, Timing
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, Schedule
from experiments import common

COLUMNS = 240  # of the picture, at most


def options_of(arguments: list[str]) -> argparse.Namespace:
    width = max(map(len, SCHEDULES))
    names = [f"{name:{width}}  {kind.about}" for name, kind in SCHEDULES.items()]
    about = str(__doc__).replace("{names}", ("\n" + 8 * " ").join(names))
    parser = common.arguments("experiments.schedule", about)
    parser.add_argument("--name", required=True, help="of the schedule")
    parser.add_argument("--ranks", required=True, type=int, metavar="R")
    parser.add_argument(
        "--microbatches", required=True, type=int, metavar="C", help="of a step, in all"
    )
    parser.add_argument(
        "--chunks", type=int, metavar="V", help="stages a rank, of interleaved; 2"
    )
    parser.add_argument(
        "--cost",
        default="",
        metavar="NAME=TIME,..",
        help="of F, I, W (else 1), B (I + W), pair (F + B), comm between ranks (0)",
    )
    parser.add_argument("--file", type=Path, help="a table to show instead")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="everything, as JSON")
    shown.add_argument("--text", action="store_true", help="the table and nothing else")
    shown.add_argument("--svg", type=Path, metavar="FILE", help="draw it")
    shown.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    return parser.parse_args(arguments)


def parse_cost(text: str) -> Cost:
    """The cost model of `--cost`.

    Raises:
      ValueError: it has another form, or `cost.costs` refuses it.
    """
    given = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            raise ValueError(
                f"--cost {text}: {part!r} must be NAME=TIME, as F=1 or pair=2.5"
            ) from None
    return cost.costs(**given)


def read_table(path: Path) -> actions.Table:
    """The table of a file in the text form.

    Raises:
      ValueError: there is no such file, or it holds something else.
    """
    try:
        text = path.read_text()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"--file {path}: must be a text file, as of --text") from None
    return actions.parse(text)


def everything(schedule: Schedule, costs: Cost, timing: Timing) -> dict[str, Any]:
    """What `--json` shows, as the command's help says."""
    memory, expected = check.memory(schedule), cost.expected(schedule, costs)
    formula, largest = cost.FORMULAS[schedule.name], float(timing.idle.max())
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "stages": schedule.stages,
        "stages_of": [
            [schedule.stage_of(rank, digit) for digit in range(schedule.digits)]
            for rank in range(schedule.ranks)
        ],
        "forwards_first": schedule.forwards_first,
        "cost": costs,
        "ticks": len(check.plan(schedule)),
        "makespan": timing.makespan,
        "lockstep": timing.lockstep,
        "bubble": {
            "idle": timing.idle.tolist(),
            "largest": largest,
            "share": timing.share,
            "formula": formula.bubble,
            "expected": expected.bubble,
            "unmet": cost.unmet(schedule, costs),
        },
        "memory": {
            "live": memory.live.tolist(),
            "largest": int(memory.live.max()),
            "formula": formula.activations,
            "expected": expected.activations,
            "deferred": memory.deferred.tolist(),
            "copies": schedule.copies,
        },
        "table": actions.table_text(schedule.table).split("\n"),
    }


def picture(schedule: Schedule, costs: Cost, timing: Timing) -> list[str]:
    """A line a rank, a letter for what it does at a time, a dot where it idles."""
    least = min(time for kind in "FIW" if (time := costs[kind]))
    columns = min(COLUMNS, round(timing.makespan / least))
    middles = (np.arange(columns) + 0.5) * timing.makespan / columns
    rows = []
    for line in cost.blocks(schedule, costs, timing):
        row = np.full(columns, ".")
        for (kind, digit, _), start, end in line:
            row[(start <= middles) & (middles < end)] = kind.lower() if digit else kind
        rows.append("".join(row))
    return rows


def view(schedule: Schedule, costs: Cost, timing: Timing) -> str:
    """What the command prints for people."""
    made = everything(schedule, costs, timing)
    bubble, memory = made["bubble"], made["memory"]
    each = f", each in {memory['copies']} places" if memory["copies"] > 1 else ""
    lines = [
        f"{made['name']}: {made['ranks']} ranks, {made['microbatches']} microbatches, "
        f"{made['stages']} stages{each}",
        "cost " + " ".join(f"{name}={time:g}" for name, time in costs.items()),
        "",
        *picture(schedule, costs, timing),
        "",
        *by_rank(made),
        "",
        f"makespan     {made['makespan']:g}; in lockstep {made['lockstep']:g}",
        f"bubble       {bubble['largest']:g} at most, {bubble['share']:.1%}; "
        f"{bubble['formula']} = {bubble['expected']:g}",
        f"activations  {memory['largest']} at most; "
        f"{memory['formula']} = {memory['expected']}",
        f"parameters   {schedule.digits} of {made['stages']} stages on a rank",
    ]
    if bubble["unmet"]:
        lines.append(f"The bubble's formula assumes {', '.join(bubble['unmet'])}.")
    return "\n".join(lines)


def by_rank(made: dict[str, Any]) -> list[str]:
    """What differs between ranks, as a table."""
    stages = [" ".join(map(str, each)) for each in made["stages_of"]]
    idle = [f"{each:g}" for each in made["bubble"]["idle"]]
    live, deferred = made["memory"]["live"], made["memory"]["deferred"]
    columns = {
        "rank": range(made["ranks"]),
        "stages": stages,
        "idle": idle,
        "live": live,
        "deferred": deferred,
    }
    texts = [[name, *map(str, column)] for name, column in columns.items()]
    widths = [max(map(len, column)) for column in texts]
    return ["  ".join(map(str.rjust, row, widths)) for row in zip(*texts)]


def main(arguments: list[str]) -> None:
    options = options_of(arguments)
    out, form = options.svg or options.png, "svg" if options.svg else "png"
    if out and out.is_dir():
        raise ValueError(f"--{form}: {out} is a folder; name a file")
    costs = parse_cost(options.cost)
    schedule = schedules.build(
        options.name, options.ranks, options.microbatches, options.chunks
    )
    if options.file:
        schedule = dataclasses.replace(schedule, table=read_table(options.file))
    timing = cost.simulate(schedule, costs)
    if out:
        # Here, so that what only prints does not wait for the drawing packages.
        from deepseek_jax.analysis import gantt

        gantt.save(gantt.draw(schedule, costs, timing), out, form)
        print(out)
    elif options.json:
        print(json.dumps(everything(schedule, costs, timing), indent=1))
    elif options.text:
        print(actions.table_text(schedule.table))
    else:
        print(view(schedule, costs, timing))


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
