"""From a step's device arrays to the records of `metrics.jsonl`.

MaxVio and its companions are those of `eval.routing`: `_batch` because they describe
one global batch (arXiv:2408.15664). Lists run over the R routers, the main model's MoE
layers first and the MTP modules' after them; a mean over layers is over the main
model's alone.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.eval import routing
from deepseek_jax.train.hooks import Progress, check_finite
from deepseek_jax.train.writers import Record, Writer

# Of an evaluation, where the run has them.
ALSO_SHOWN = (
    "eval_ce_average",
    *(f"eval_underflowed_{operand}" for operand in "xwg"),
)
SCALARS = ("loss", "ce", "penalty", "lr", "grad_norm", "speed")


def train_record(
    metrics: Mapping[str, Any], main: int, *, detailed: bool = False
) -> Record:
    """The record of a step without its speed.

    Args:
      metrics: what the step returned, fetched: the names of `SCALARS`, `mtp_ce` [J],
        `load` [R, E], and `bias` [R, E] where the strategy has one.
      main: how many routers belong to the main model.
      detailed: adds the loads and biases of every expert.
    """
    load_RE = np.asarray(metrics["load"])
    maxvio_R = routing.maxvio(load_RE)
    record = {name: float(metrics[name]) for name in SCALARS}
    record["mtp_ce"] = np.asarray(metrics["mtp_ce"]).tolist()
    record["maxvio_batch"] = float(maxvio_R[:main].mean()) if main else float("nan")
    record["maxvio_layers"] = maxvio_R.tolist()
    record["cv"] = routing.variation(load_RE).tolist()
    record["entropy"] = routing.entropy(load_RE).tolist()
    record["dead_experts"] = routing.dead_experts(load_RE).tolist()
    if detailed:
        record["load"] = load_RE.tolist()
        if "bias" in metrics:
            record["bias"] = np.asarray(metrics["bias"]).tolist()
    return record


class Recorder:
    """Takes each step's metrics and records them one step later.

    By then the next step is under way, so fetching keeps no device waiting. Every step
    is checked for finiteness, also those that are not recorded.
    """

    def __init__(
        self,
        config: Config,
        writers: list[Writer],
        progress: Progress,
        callback: Callable[[Record], None] | None = None,
        elapsed_s: float = 0.0,
    ):
        self.config, self.writers, self.progress = config, writers, progress
        self.callback = callback
        self.elapsed_s = elapsed_s
        self.pending: tuple[int, Mapping[str, Any]] | None = None
        self.since = time.monotonic()

    def take(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hands in a dispatched step; records the one before."""
        self.flush()
        self.pending = step, metrics

    def flush(self) -> None:
        """Waits for the step handed in last and records it.

        Raises:
          FloatingPointError: its loss or gradient is not finite.
        """
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        check_finite(step, metrics)
        now = time.monotonic()
        step_s, self.since = now - self.since, now
        self.elapsed_s += step_s
        train = self.config.train
        detailed = step % train.routing_every == 0
        record = train_record(metrics, self.config.model.num_moe, detailed=detailed)
        data = self.config.data
        record["tokens_per_s"] = data.batch * data.length / step_s
        record["elapsed_s"] = self.elapsed_s
        self.progress.update(step, record, step_s)
        if detailed or step % train.log_every == 0:
            self.write(step, record)

    def evaluated(self, step: int, record: Record) -> None:
        """Records an evaluation and shows it.

        Raises:
          FloatingPointError: its cross entropy is not finite.
        """
        check_finite(step, record, ("eval_ce",))
        self.write(step, record)
        text = (
            f"step {step}: eval_ce {record['eval_ce']:.4f}, "
            f"eval_maxvio_global {record['eval_maxvio_global']:.2f}"
        )
        for name in ALSO_SHOWN:
            if name in record:
                text += f", {name} {record[name]:.3g}"
        self.progress.say(text)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands a record to every writer and to the callback."""
        for writer in self.writers:
            writer.write(step, values)
        if self.callback is not None:
            self.callback({"step": step} | dict(values))

    def restart_clock(self) -> None:
        """Leaves an evaluation or a save out of the next step's time."""
        self.since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.close()
        for writer in self.writers:
            writer.close()
