"""A running mean of the parameters on the host, which follows the training steps.

As in arXiv:2412.19437, section 3.2.3: it lies in the host's memory and is updated after
each step while the devices are at the next. The report does not state the decay. A step
takes the memory of the state before it, so that here, besides, one copy of the
parameters lies on the devices while it is on its way to the host.

    mean = decay * mean + (1 - decay) * parameters

with both weights rounded to float32, then each product, then the sum. It starts as the
parameters with which a run starts or, where the checkpoint holds no mean, goes on. It
is saved beside the state, and so after a stop what it would have been, bit for bit. A
step that is not finite leaves the parameters as they were. The mean then takes these
twice, which nobody sees: the run stops before an evaluation or a save.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint import manager
from deepseek_jax.config import Config
from deepseek_jax.parallel import processes
from deepseek_jax.typing import Params


@jax.jit
def _copy(params: Params) -> Params:
    """Arrays of their own: the next step takes the memory of its state's."""
    return jax.tree.map(jnp.copy, params)


class Average:
    """The mean, and the thread that updates it with one copy at a time."""

    def __init__(self, decay: float, start: Any):
        """`start`: a pytree of arrays, of numpy's or on devices of this process."""
        self.mean = jax.tree.map(lambda x: np.array(x, np.float32), start)
        self.decay, self.share = np.float32(decay), np.float32(1 - decay)
        self.worker = ThreadPoolExecutor(1, "average")
        self.pending: Future[None] | None = None

    def update(self, params: Params) -> None:
        """Adds the parameters after a step, behind the caller's back.

        They may be donated afterwards. Waits for the update before, and so for the step
        before: the devices have the present one to do.

        Raises:
          Exception: whatever the update before met.
        """
        self.wait()
        copy = _copy(params)
        for leaf in jax.tree.leaves(copy):
            leaf.copy_to_host_async()
        self.pending = self.worker.submit(self._add, copy)

    def _add(self, params: Params) -> None:
        pairs = zip(jax.tree.leaves(self.mean), jax.tree.leaves(params), strict=True)
        for mean, new in pairs:
            np.multiply(mean, self.decay, out=mean)
            np.add(mean, self.share * np.asarray(new, np.float32), out=mean)

    def wait(self) -> None:
        """Returns when every update is in the mean; raises what one of them met."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def value(self) -> Any:
        """The mean as arrays of numpy, which the next update changes."""
        self.wait()
        return self.mean

    def placed(self, like: Params) -> Params:
        """A copy of the mean on the devices, as what and where `like` lies."""

        def put(mean: np.ndarray, leaf: jax.Array) -> jax.Array:
            return jax.device_put(
                mean.astype(leaf.dtype), leaf.sharding, may_alias=False
            )

        placed: Params = jax.tree.map(put, self.value(), like)
        return placed

    def close(self) -> None:
        """Ends the thread, whose last error is no news any more."""
        self.worker.shutdown(cancel_futures=True)


def check(config: Config) -> None:
    """Refuses a mean where no process has all the parameters.

    Raises:
      ValueError: names the field.
    """
    if config.optim.ema and processes.several():
        raise ValueError(
            f"optim.ema = {config.optim.ema}: must be 0 with several processes, of "
            "which each has but its part of the parameters"
        )


@contextlib.contextmanager
def following(
    config: Config, root: Path, step: int, params: Params
) -> Iterator[Average | None]:
    """The mean of a run that has done `step` steps; None where none is asked for.

    Args:
      root: the checkpoints folder, where a mean may lie beside the step's state.
      params: of that state.
    """
    if not config.optim.ema:
        yield None
        return
    saved = manager.restore_average(root, step, params)
    with contextlib.closing(
        Average(config.optim.ema, params if saved is None else saved)
    ) as mean:
        yield mean
