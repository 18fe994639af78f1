"""Numbers that change with the optimizer step: the bias speed, the MTP weight.

The report's own are piecewise constant (arXiv:2412.19437, section 4.2: gamma 0.001,
then 0; lambda 0.3, then 0.1).
"""

from collections.abc import Callable

import jax.numpy as jnp

from deepseek_jax.config import Changes
from deepseek_jax.typing import Array

Schedule = Callable[[Array | int], Array]


def piecewise(value: float, changes: Changes = ()) -> Schedule:
    """`value` until the first change's step, then each change's value from its step on.

    Args:
      value: from step 0.
      changes: (step, value) pairs with increasing steps, as `config` checks them.

    Returns:
      step -> scalar of the default float type. The step is the number of optimizer
      steps finished before, 0 for the first, and may be traced.
    """

    def at(step: Array | int) -> Array:
        now = jnp.asarray(value, float)
        for start, new in changes:
            now = jnp.where(step >= start, new, now)
        return now

    return at
