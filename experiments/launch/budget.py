"""What a sweep will cost, told before anything starts.

FLOPs are those of section 2 of arXiv:2001.08361: 6 for each token and weight that
multiplies it, forward and backward, and attention's own, here of its causal half; no
recomputation. Times are rough guesses.
"""

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.analysis import runs
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model.count import Counts, count_parameters
from deepseek_jax.train.hooks import clock
from experiments.launch.plan import Item
from experiments.launch.script import Resources

# Of the speed of a large product, on a CPU (README, "Speed on a CPU", has 51% at 10.7M
# parameters; smaller ones reach less), and of a GPU's peak, which is an assumption.
CPU_SHARE, GPU_SHARE = 0.3, 0.3
H100 = 989e12  # FLOP/s of bfloat16 products, dense, by its data sheet
SIDE, CALLS = 1024, 8  # of the product that is timed

FORMULA = "6 x active parameters x tokens, and attention's products"


@dataclass(frozen=True)
class Cost:
    """Of a run, or of several together."""

    tokens: int
    flops: float


@functools.cache
def counts(model: ModelConfig) -> Counts:
    """Parameters of the main model and of its MTP modules; a second for each model."""
    return count_parameters(model)


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Of a training step, for each token of rows of `length`.

    Counts what multiplies a token: not the embedding, but the head again for each MTP
    module, of whose experts `top_k` work.
    """
    found, at = counts(model), model.attention
    idle = (model.moe.num_experts - model.moe.top_k) * 3 * model.dim * model.moe.ffn_dim
    weights = found.active - found.embedding
    weights += found.mtp + model.mtp.depth * (found.embedding - idle)
    pair = at.num_heads * (at.nope_dim + at.rope_dim + at.value_dim)
    layers = model.num_layers + model.mtp.depth
    return 6 * (weights + layers * pair * (length + 1) / 2)


def cost(config: Config) -> Cost:
    """A whole run's."""
    tokens = config.train.steps * config.data.batch * config.data.length
    return Cost(tokens, tokens * flops_per_token(config.model, config.data.length))


def short(number: float) -> str:
    """1234567 -> "1.2M"."""
    letters = iter("KMGTPEZY")
    letter = ""
    while number >= 999.5:
        number, letter = number / 1000, next(letters)
    return f"{number:.3g}{letter}"


def spread(numbers: Sequence[float]) -> str:
    """One number, or the least and the most."""
    low, high = short(min(numbers)), short(max(numbers))
    return low if low == high else f"{low} to {high}"


def product_rate() -> float:
    """FLOP/s of a large float32 product here, measured in about a second."""
    a = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / statistics.median(times)


def run_rates(items: Sequence[Item], workdir: Path) -> list[float]:
    """FLOP/s of each finished run, by the tokens/s that it recorded."""
    found = []
    for item in items:
        run = runs.read_run(workdir / item.name)
        speeds = [record.get("tokens_per_s") for record in run.train[1:]]
        if run.final and (speeds := [speed for speed in speeds if speed]):
            each = flops_per_token(item.config.model, item.config.data.length)
            found.append(each * statistics.median(speeds))
    return found


def left(items: Sequence[Item], workdir: Path) -> float:
    """FLOPs of the steps that are still to be done."""
    total = 0.0
    for item in items:
        done = runs.read_run(workdir / item.name).steps or 0
        steps = item.config.train.steps
        total += cost(item.config).flops * max(0, steps - done) / steps
    return total


def here(items: Sequence[Item], workdir: Path, workers: int) -> str:
    """How long this machine may take for what is left, and by what that was guessed."""
    if rates := run_rates(items, workdir):
        rate = statistics.median(rates) * workers
        basis = (
            f"{len(rates)} finished runs, {short(statistics.median(rates))}FLOP/s each"
        )
        if workers > 1:
            basis += f", {workers} at a time as fast as one"
    else:
        measured = product_rate()
        rate = CPU_SHARE * measured
        basis = (
            f"{CPU_SHARE:.0%} of the {short(measured)}FLOP/s just measured of a "
            f"product of {SIDE} x {SIDE}"
        )
    seconds = left(items, workdir) / rate
    return (
        f"time here, a rough guess: {clock(seconds)} for what is left, by {basis}; "
        "compiling, half a minute a program and more, is not in it"
    )


def on_gpus(flops: float, resources: Resources) -> str:
    """GPU-hours at a stated utilisation; nothing is known of the GPUs themselves."""
    if not resources.gpus:
        return "time: no guess for processors that aren't known"
    hours = flops / (GPU_SHARE * H100) / 3600
    shown = short(hours) if hours >= 0.01 else "under 0.01"
    return (
        f"GPU-hours: {shown}, were they H100s at {GPU_SHARE:.0%} of "
        f"{short(H100)}FLOP/s; no guess for what they are, nor for compiling, which "
        "takes from half a minute a run on"
    )


def text(
    items: Sequence[Item],
    workdir: Path,
    resources: Resources | None = None,
    workers: int = 1,
) -> str:
    """The block that is printed before a sweep starts.

    Args:
      resources: what a run gets on Slurm, None on this machine.
      workers: runs at a time, on this machine.
    """
    each = [cost(item.config) for item in items]
    sizes = [counts(model) for model in {item.config.model for item in items}]
    tokens, flops = sum(c.tokens for c in each), sum(c.flops for c in each)
    total = spread([size.total + size.mtp for size in sizes])
    active = spread([size.active for size in sizes])
    return "\n".join(
        [
            f"budget: {len(items)} runs",
            f"  parameters: {total}, of which {active} work on a token (main model)",
            f"  tokens: {spread([c.tokens for c in each])} a run, {short(tokens)} in "
            "all",
            f"  training: {short(flops)}FLOP in all ({FORMULA})",
            "  "
            + (
                on_gpus(flops, resources)
                if resources
                else here(items, workdir, workers)
            ),
        ]
    )
