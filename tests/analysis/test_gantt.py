"""The picture of a schedule against the schedule."""

import io

import matplotlib.image
import pytest
from matplotlib.colors import to_rgb

from deepseek_jax.analysis import gantt
from deepseek_jax.parallel.pipeline import cost, schedules
from deepseek_jax.parallel.pipeline.actions import KINDS
from deepseek_jax.parallel.pipeline.schedules import SCHEDULES


def drawn(name="dualpipe", ranks=4, microbatches=8, *chunks, **given):
    schedule = schedules.build(name, ranks, microbatches, *chunks)
    costs = cost.costs(**given)
    timing = cost.simulate(schedule, costs)
    return schedule, timing, gantt.draw(schedule, costs, timing)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_op_is_drawn_where_it_is(name):
    schedule, timing, figure = drawn(name)
    (axes,) = figure.axes
    outlines = [p for p in axes.patches if not p.get_fill()]
    blocks = [p for p in axes.patches if p.get_fill()]
    ops = [
        (rank, start, end)
        for rank in range(schedule.ranks)
        for start, end in zip(timing.start[rank], timing.end[rank])
    ]
    found = [
        (round(p.get_y() + 0.5), p.get_x(), p.get_x() + p.get_width()) for p in outlines
    ]
    assert found == ops
    listed = [action for line in schedule.table for op in line for action in op]
    assert len(blocks) == len(listed)
    numbers = [int(text.get_text()) for text in axes.texts]
    assert numbers == [action.microbatch for action in listed]
    colours = {
        to_rgb(block.get_facecolor())
        for block, action in zip(blocks, listed)
        if action.kind == "F"
    }
    assert len(colours) == schedule.digits
    assert to_rgb(gantt.COLOURS["F"]) in colours
    assert axes.get_xlim() == (0, timing.makespan)
    assert axes.yaxis_inverted()
    (legend,) = figure.legends
    kinds = {KINDS[action.kind] for action in listed}
    assert {text.get_text() for text in legend.get_texts()} == kinds
    assert f"makespan {timing.makespan:g}" in axes.get_title()


def test_numbers_without_room_are_left_out():
    schedule, _, figure = drawn("1f1b", 2, 120, F=0.01, I=1)
    (axes,) = figure.axes
    texts = {text.get_position()[0] for text in axes.texts}
    count = sum(len(op) for line in schedule.table for op in line)
    assert 0 < len(texts) < count
    assert figure.get_size_inches()[0] == gantt.WIDTHS[1]


def test_actions_that_take_no_time():
    _, _, figure = drawn("zb1p", 2, 4, W=0)
    assert figure.axes[0].patches


@pytest.mark.parametrize("form", ["png", "svg"])
def test_files_are_whole_and_repeatable(form, tmp_path):
    files = [tmp_path / f"{i}.{form}" for i in range(2)]
    for file in files:
        gantt.save(drawn()[-1], file, form)
    assert sorted(tmp_path.iterdir()) == files
    assert files[0].read_bytes() == files[1].read_bytes()
    if form == "png":
        image = matplotlib.image.imread(io.BytesIO(files[0].read_bytes()))
        assert image.shape[0] > 200 and image.shape[1] > 800
        assert image[..., :3].std() > 0.1
