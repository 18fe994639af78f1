"""Records against loads counted by hand, and the recorder's one step of delay."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import TrainConfig
from deepseek_jax.train.hooks import Progress
from deepseek_jax.train.metrics import Recorder, train_record
from tests.factory import small

METRICS = {
    "loss": jnp.float32(3.25),
    "ce": jnp.float32(3.0),
    "mtp_ce": jnp.array([2.5]),
    "penalty": jnp.float32(0.125),
    "lr": jnp.float32(0.5),
    "grad_norm": jnp.float32(2.0),
    "speed": jnp.float32(0.25),
    "load": jnp.array([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]]),
    "bias": jnp.array([[0.5, 0, 0, 0]] * 3),
}


class Sink:
    def __init__(self):
        self.records = []

    def write(self, step, values):
        self.records.append({"step": step} | dict(values))

    def close(self):
        pass


def test_a_record_has_the_routing_of_the_main_model_and_of_every_layer():
    record = train_record(METRICS, main=2)
    assert record == {
        "loss": 3.25,
        "ce": 3.0,
        "mtp_ce": [2.5],
        "penalty": 0.125,
        "lr": 0.5,
        "grad_norm": 2.0,
        "speed": 0.25,
        "maxvio_batch": 1.5,  # (0 + 3) / 2: the MTP module's router is left out
        "maxvio_layers": [0.0, 3.0, 1.0],
        "cv": pytest.approx([0, 3**0.5, 1]),
        "entropy": pytest.approx([1, 0, 0.5]),
        "dead_experts": [0, 3, 2],
    }


def test_a_detailed_record_adds_loads_and_biases():
    record = train_record(METRICS, main=2, detailed=True)
    assert record["load"] == METRICS["load"].tolist()
    assert record["bias"] == METRICS["bias"].tolist()
    bare = {name: value for name, value in METRICS.items() if name != "bias"}
    assert "bias" not in train_record(bare, main=2, detailed=True)


def recorder(callback=None, **train):
    sink = Sink()
    config = small(train=TrainConfig(steps=10, **train))
    progress = Progress(10, io.StringIO())
    return sink, Recorder(config, [sink], progress, callback, elapsed_s=100.0)


def test_a_step_is_recorded_when_the_next_is_under_way():
    seen = []
    sink, taker = recorder(seen.append, log_every=1, routing_every=2)
    for step in (1, 2, 3):
        taker.take(step, METRICS)
        assert [r["step"] for r in sink.records] == list(range(1, step))
    taker.flush()
    taker.flush()
    assert [r["step"] for r in sink.records] == [1, 2, 3]
    assert ["load" in r for r in sink.records] == [False, True, False]
    assert seen == sink.records
    seconds = [r["elapsed_s"] for r in sink.records]
    assert 100 < seconds[0] < seconds[1] < seconds[2] < 110
    assert sink.records[0]["tokens_per_s"] > 0


def test_only_every_nth_step_is_recorded_but_all_routing_is():
    sink, taker = recorder(log_every=3, routing_every=5)
    for step in range(1, 11):
        taker.take(step, METRICS)
    taker.flush()
    assert [r["step"] for r in sink.records] == [3, 5, 6, 9, 10]


def test_a_step_that_is_not_recorded_is_still_checked():
    sink, taker = recorder(log_every=10, routing_every=10)
    taker.take(4, METRICS | {"loss": jnp.float32(np.nan)})
    with pytest.raises(FloatingPointError, match="step 4"):
        taker.take(5, METRICS)
    assert sink.records == []


def test_an_evaluation_is_recorded_and_checked():
    sink, taker = recorder()
    taker.evaluated(4, {"eval_ce": 2.0, "eval_maxvio_global": 0.5})
    assert sink.records == [{"step": 4, "eval_ce": 2.0, "eval_maxvio_global": 0.5}]
    with pytest.raises(FloatingPointError, match="eval_ce is nan at step 6"):
        taker.evaluated(6, {"eval_ce": float("nan"), "eval_maxvio_global": 0.5})
