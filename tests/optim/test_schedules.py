"""Learning rates against the formula in plain Python."""

import math

import numpy as np
import pytest

from deepseek_jax.config import LR_SCHEDULES, OptimConfig
from deepseek_jax.optim.schedules import SCHEDULES, learning_rate

LR, WARMUP, HORIZON, DECAY, FINAL = 3e-3, 20, 300, 0.2, 0.1


def config(schedule, **fields):
    values = {"lr": LR, "warmup": WARMUP, "horizon": HORIZON} | fields
    return OptimConfig(schedule=schedule, decay=DECAY, final=FINAL, **values)


def reference(schedule, step, *, warmup=WARMUP, horizon=HORIZON):
    """The rate of step 1, 2, ... written out in plain Python."""
    start = {
        "constant": math.inf,
        "cosine": min(warmup, horizon - 1),
        "wsd": horizon - max(1, round(DECAY * horizon)),
    }[schedule]
    share = 1.0
    if step > start:
        way = min((step - start) / (horizon - start), 1.0)
        share = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * way)) / 2
    return LR * min(share, step / max(warmup, 1))


def test_every_schedule_of_the_config_has_an_implementation():
    assert tuple(SCHEDULES) == LR_SCHEDULES


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@pytest.mark.parametrize("warmup, horizon", [(20, 300), (0, 300), (20, 10), (5, 1)])
def test_rates_follow_the_formula(schedule, warmup, horizon):
    rate = learning_rate(config(schedule, warmup=warmup, horizon=horizon))
    steps = np.arange(1, 2 * horizon + 30)
    expected = [reference(schedule, s, warmup=warmup, horizon=horizon) for s in steps]
    np.testing.assert_allclose([rate(s - 1) for s in steps], expected, rtol=2e-5)


def test_wsd_has_the_shape_of_the_report():
    rate = learning_rate(config("wsd"))
    assert rate(0) == pytest.approx(LR / WARMUP)  # the first step moves
    assert rate(WARMUP - 1) == pytest.approx(LR)
    assert rate(239) == pytest.approx(LR)  # step 240 is the last at the peak
    assert rate(240) < LR
    assert rate(298) > LR * FINAL
    assert rate(299) == pytest.approx(LR * FINAL)  # the horizon's step
    assert rate(10_000) == pytest.approx(LR * FINAL)


def test_an_unresolved_horizon_is_refused():
    with pytest.raises(ValueError, match=r"optim\.horizon = 0"):
        learning_rate(config("constant", horizon=0))
