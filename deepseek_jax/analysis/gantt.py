"""Draws a pipeline schedule as figure 5 of arXiv:2412.19437 does.

A row a rank, time to the right. A block has its kind's colour and its microbatch's
number; an overlapped pair is one block of two colours. The higher the digit
(direction, leg or chunk), the paler the block. Numbers that find no room are left out.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from deepseek_jax.files import replacing
from deepseek_jax.parallel.pipeline import cost
from deepseek_jax.parallel.pipeline.actions import KINDS
from deepseek_jax.parallel.pipeline.cost import Block, Cost, Timing
from deepseek_jax.parallel.pipeline.schedules import Schedule

COLOURS = {"F": "#ee9b2d", "B": "#2f9e5d", "I": "#2a9fb0", "W": "#4f74c9"}
PALEST = 0.6  # share of white
OUTLINE = "#30343b"
ROW, MARGIN = 0.28, 1.1  # inches
WIDTHS = 9.0, 40.0  # inches, at least and at most
FONT, POINTS_A_DIGIT = 7.0, 5.0


def draw(schedule: Schedule, costs: Cost, timing: Timing) -> Figure:
    """The picture of a schedule as `cost.simulate` ran it."""
    rows = cost.blocks(schedule, costs, timing)
    drawn = [block for row in rows for block in row if block.end > block.start]
    shortest = min(block.end - block.start for block in drawn)
    digits = len(str(schedule.per_path - 1))
    wanted = timing.makespan / shortest * (digits * POINTS_A_DIGIT + 3) / 72 + MARGIN
    width = min(max(WIDTHS[0], wanted), WIDTHS[1])
    figure = Figure((width, ROW * schedule.ranks + MARGIN), layout="constrained")
    axes = figure.subplots()
    unit = 72 * (width - MARGIN) / timing.makespan  # points
    for rank, row in enumerate(rows):
        for block in row:
            _draw(axes, rank, block, schedule.digits, unit)
        for start, end in zip(timing.start[rank], timing.end[rank]):
            corner = start, rank - 0.5
            axes.add_patch(Rectangle(corner, end - start, 1, fill=False, ec=OUTLINE))
    axes.set_xlim(0, timing.makespan)
    axes.set_ylim(schedule.ranks - 0.5, -0.5)
    axes.set_yticks(range(schedule.ranks))
    axes.set_ylabel("rank")
    axes.set_xlabel("time")
    axes.set_title(
        f"{schedule.name}, {schedule.microbatches} microbatches: makespan "
        f"{timing.makespan:g}, of which a rank idles {timing.idle.max():g} at most",
        fontsize=10,
    )
    kinds = [kind for kind in KINDS if kind in {block.action.kind for block in drawn}]
    figure.legend(
        handles=[Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in kinds],
        loc="outside lower center",
        ncols=len(kinds),
        frameon=False,
    )
    return figure


def _draw(axes: Axes, rank: int, block: Block, digits: int, unit: float) -> None:
    (kind, digit, microbatch), start, end = block
    white = PALEST * digit / max(1, digits - 1)
    colour = [white + (1 - white) * part for part in to_rgb(COLOURS[kind])]
    axes.add_patch(Rectangle((start, rank - 0.5), end - start, 1, fc=colour))
    if (end - start) * unit >= len(str(microbatch)) * POINTS_A_DIGIT:
        at = (start + end) / 2, rank
        axes.text(*at, str(microbatch), size=FONT, ha="center", va="center_baseline")


def save(figure: Figure, path: Path, form: str) -> None:
    """Writes a picture, png or svg; of one schedule always the same bytes."""
    metadata = {"Date": None} if form == "svg" else {}
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "gantt"}):
        figure.savefig(temporary, format=form, dpi=130, metadata=metadata)
