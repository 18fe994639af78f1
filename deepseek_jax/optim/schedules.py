"""Learning rates by step: a linear warmup, then constant, cosine or wsd.

arXiv:2412.19437, section 4.2: linear to 2.2e-4 over 2,000 steps, constant for two
thirds of the run, cosine to a tenth, then two short constant tails. `wsd` (warmup,
stable, decay) is that shape without the tails; `cosine` falls from the end of the
warmup on. We differ in counting: step k = 1, 2, ... trains at the rate of k, so the
first step already moves the parameters and the horizon's step is the first at the final
rate. The warmup caps the schedule, so a run shorter than its warmup is well defined and
never peaks.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimConfig
from deepseek_jax.typing import Array


def constant(config: OptimConfig) -> optax.Schedule:
    """The peak rate for ever."""
    return optax.constant_schedule(config.lr)


def cosine(config: OptimConfig) -> optax.Schedule:
    """Half a cosine from the end of the warmup to the horizon, then the final rate."""
    return _fall(config, config.horizon - config.warmup)


def wsd(config: OptimConfig) -> optax.Schedule:
    """The peak rate until the last `decay` share of the horizon, then half a cosine."""
    return _fall(config, round(config.decay * config.horizon))


def _fall(config: OptimConfig, steps: int) -> optax.Schedule:
    steps = max(steps, 1)
    fall = optax.cosine_decay_schedule(config.lr, steps, config.final)
    stable = optax.constant_schedule(config.lr)
    return optax.join_schedules([stable, fall], [config.horizon - steps])


SCHEDULES: dict[str, Callable[[OptimConfig], optax.Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "wsd": wsd,
}


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """The rate as a function of the optimizer steps already done, 0 for the first.

    Raises:
      ValueError: `horizon` is still 0.
    """
    if config.horizon == 0:
        raise ValueError(
            "optim.horizon = 0: must be resolved to a step before the start"
        )
    warmup = optax.linear_schedule(0.0, config.lr, max(config.warmup, 1))
    schedule = SCHEDULES[config.schedule](config)

    def rate(done: Array | int) -> Array:
        step = jnp.asarray(done + 1, float)  # else optax has float32 in float64, too
        return jnp.minimum(warmup(step), schedule(step))

    return rate
