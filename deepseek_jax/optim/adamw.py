"""AdamW with clipping by the global norm (arXiv:2412.19437, section 4.2).

The report gives beta 0.9 and 0.95, weight decay 0.1 and clipping at 1.0. It states
neither epsilon (we take Adam's 1e-8) nor which parameters decay: ours do by name, all
but the norms' scales; there are no biases, and the router's bias is no parameter.
Moments have the parameters' dtype; the report's are bfloat16.
"""

import re
from typing import Any

import jax
import optax

from deepseek_jax.config import OptimConfig
from deepseek_jax.typing import Params

EPSILON = 1e-8

# The first pattern found in a parameter's path, "moe/attention/norm/scale", decides.
DECAYS = (
    (r"(^|/)scale$", False),
    (r"(^|/)(embed|head|kernel|gate|up|down|router)$", True),
)


def decays(params: Params) -> Any:
    """A pytree of bools like `params`: True where weight decay applies.

    Raises:
      ValueError: a parameter that no rule of `DECAYS` names.
    """

    def one(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, decayed in DECAYS:
            if re.search(pattern, name):
                return decayed
        raise ValueError(f"parameter {name!r}: no rule of optim.adamw.DECAYS names it")

    return jax.tree_util.tree_map_with_path(one, params)


def adamw(
    config: OptimConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW with decoupled decay where `decays` says."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            eps=EPSILON,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
