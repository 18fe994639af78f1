"""What a compiled program needs goes with what the checker says of its table."""

import functools

import pytest

from benchmarks import pipeline_memory
from benchmarks.pipeline_memory import Size

# The benchmark's own: what a compiler's layout adds or saves does not grow with the
# size, and with half the length it was as large as what ZB1P holds more.
SIZE = Size()
ACTIVATION = 4 * SIZE.rows * SIZE.length * SIZE.dim
OTHERS = ("1f1b", "zb1p", "dualpipe")


@functools.cache
def measured(schedule, microbatches, keep="inputs"):
    return pipeline_memory.measure(schedule, keep, microbatches, SIZE)


@pytest.mark.slow
def test_gpipe_grows_with_its_microbatches():
    few, many = (measured("gpipe", n) for n in (16, 48))
    assert many.formula - few.formula == 32 * ACTIVATION
    growth = (many.measured - few.measured) / (32 * ACTIVATION)
    assert 0.95 < growth < 1.1
    assert many.feeds == 3 * few.feeds


@pytest.mark.slow
@pytest.mark.parametrize("schedule", OTHERS)
def test_the_others_do_not(schedule):
    few, many = (measured(schedule, n) for n in (16, 48))
    assert many[4:8] == few[4:8]  # what they hold
    assert abs(many.measured - few.measured) < ACTIVATION  # for 32 micro-batches more


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", *OTHERS])
def test_compiling_does_not_take_longer(schedule):
    """CPU seconds, of which a few more may pass by chance."""
    few, many = (measured(schedule, n) for n in (16, 48))
    assert many.seconds < 1.5 * few.seconds


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["inputs", "products"])
def test_schedules_in_their_order(keep):
    """1F1B needs least; ZB1P the gradients that wait, too, and DualPipe one more."""
    plain, late, both = (measured(name, 16, keep) for name in OTHERS)
    assert plain.formula < late.formula
    assert plain.formula < both.formula
    assert plain.rings < late.rings < both.rings
    assert plain.measured <= late.measured
    assert plain.measured < both.measured
