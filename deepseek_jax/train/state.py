"""What a run is made of (`Parts`) and what changes from step to step (`TrainState`).

The balancer's state stands beside the parameters, outside the optimizer: no gradient,
no decay, never below float32 (arXiv:2412.19437, section 2.1.2).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deepseek_jax import runtime
from deepseek_jax.config import Config
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ops import balancing
from deepseek_jax.optim.adamw import adamw
from deepseek_jax.optim.schedules import learning_rate
from deepseek_jax.parallel import expert, partition
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.rows import on_devices
from deepseek_jax.precision import delayed, policy
from deepseek_jax.precision.delayed import Histories
from deepseek_jax.typing import Array, Params


class TrainState(NamedTuple):
    """Everything a checkpoint holds of the mathematics."""

    step: Array  # optimizer steps done, int32
    params: Params
    opt_state: Any
    balance: Any  # balancer state with a leading axis over the R routers
    key: Array  # raw random key
    scales: Histories  # of FP8's operands; most policies have none


@dataclass(frozen=True)
class Parts:
    """The objects a configuration stands for, made once a run."""

    config: Config
    mesh: Mesh
    model: Transformer
    balancer: balancing.Balancer
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation


def assemble(config: Config, devices: Sequence[jax.Device] | None = None) -> Parts:
    """Builds the parts of a run; `optim.horizon` must be resolved (not 0).

    Args:
      devices: of the mesh; by default all that JAX has.
    """
    balancer = balancing.build(config.balance, config.model.moe)
    mesh = meshes.make(config.mesh, devices)
    rows = functools.partial(on_devices, mesh=mesh) if mesh.size > 1 else None
    one = runtime.build(config.runtime, rows)
    rt = expert.on_mesh(one, config, mesh)
    schedule = learning_rate(config.optim)
    return Parts(
        config,
        mesh,
        Transformer(config.model, rt, balancer),
        balancer,
        schedule,
        adamw(config.optim, schedule),
    )


def pieces(config: Config) -> policy.Pieces | None:
    """What FP8 training is made of; None: nothing is in FP8."""
    return policy.pieces(config.runtime.compute, config.runtime.fp8)


def init_balance(parts: Parts) -> Any:
    """Fresh balancer state of every router."""
    one = parts.balancer.init(parts.config.model.moe.num_experts)
    routers = parts.config.model.num_routers
    return jax.tree.map(lambda s: jnp.broadcast_to(s, (routers, *s.shape)).copy(), one)


def init_state(parts: Parts, seed: int) -> TrainState:
    """Parameters, optimizer and balancer at step 0, on the mesh as its rules say.

    The numbers do not depend on the mesh.

    Raises:
      ValueError: as `partition.shardings`.
    """

    def init(key: Array) -> TrainState:
        model = parts.config.model
        tokens_BS = jnp.zeros((1, 2 + model.mtp.depth), jnp.int32)
        position_BL = jnp.arange(2)[None]
        balance = init_balance(parts)
        plain = Transformer(model, runtime.Runtime(), parts.balancer)
        params = plain.init(key, tokens_BS, position_BL, balance)["params"]
        return TrainState(
            jnp.zeros((), jnp.int32),
            params,
            parts.optimizer.init(params),
            balance,
            key,
            delayed.empty(params, pieces(parts.config)),
        )

    key = jax.random.PRNGKey(seed)
    placed = shardings(parts, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=placed)(key)


def shardings(parts: Parts, state: TrainState) -> TrainState:
    """Where every array of a state, or of its shapes, lies."""
    placed: TrainState = partition.shardings(parts.config.mesh, parts.mesh, state)
    return placed
