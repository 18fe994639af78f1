"""AdamW with clipping by the global norm (arXiv:2412.19437, section 4.2).

The report gives beta 0.9 and 0.95, weight decay 0.1 and clipping at 1.0. It states
neither epsilon (we take Adam's 1e-8) nor which parameters decay: ours do by name, all
but the norms' scales; there are no biases, and the router's bias is no parameter.
Moments have the parameters' dtype, or bfloat16 as the report's do (section 3.3.3);
either way they are updated in the parameters' dtype.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
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


def rounded(
    inner: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformation:
    """`inner`, whose state is kept in `dtype` between steps where it is floating."""

    def cast(state: Any, dtypes: Any) -> Any:
        return jax.tree.map(lambda x, dtype: x.astype(dtype), state, dtypes)

    def kept(state: Any) -> Any:
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )

    def init(params: Params) -> Any:
        return kept(inner.init(params))

    def update(grads: Any, state: Any, params: Params) -> tuple[Any, Any]:
        wide = jax.tree.map(lambda x: x.dtype, jax.eval_shape(inner.init, params))
        updates, new = inner.update(grads, cast(state, wide), params)
        return updates, kept(new)

    return optax.GradientTransformation(init, update)


MOMENTS: dict[str, Any] = {"f32": None, "bf16": jnp.bfloat16}


def adamw(
    config: OptimConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Clips by the global norm, then AdamW with decoupled decay where `decays` says."""
    inner = optax.adamw(
        learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=EPSILON,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    if dtype := MOMENTS[config.moments]:
        inner = rounded(inner, dtype)
    return optax.chain(optax.clip_by_global_norm(config.clip), inner)
