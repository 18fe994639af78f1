"""Evaluation over the whole validation set: losses and routing, by layer and by domain.

Loads are integer counts of valid tokens summed over the set, so MaxVio_global is the
one of arXiv:2408.15664 (the load of the whole set, then the violation).
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.batch import Batch
from deepseek_jax.eval import routing
from deepseek_jax.ops.losses import token_nll
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision.delayed import remembered
from deepseek_jax.train.objective import forward, router_masks, target_masks, totals
from deepseek_jax.train.state import Parts, TrainState
from deepseek_jax.typing import Array, Params


class Sums(NamedTuple):
    """What one batch adds to an evaluation; all but `experts` are sums."""

    nll: Array  # [1+J, domains]
    targets: Array  # [1+J, domains]
    load: Array  # [R, domains, E]


def make_evaluate_batch(
    parts: Parts, domains: int
) -> Callable[[Params, Any, Batch], tuple[Sums, Array]]:
    """The jitted evaluation of one batch: its sums, and a probe of its selection.

    The probe is the first row's, [R, L, K], -1 where a router counts nothing.
    """
    config = parts.config
    length, experts = config.data.length, config.model.moe.num_experts
    rt = parts.model.rt
    loss_of = rt.rows(functools.partial(token_nll, dot=rt.dot), whole=(1,))

    def evaluate_batch(
        params: Params, balance: Any, batch: Batch
    ) -> tuple[Sums, Array]:
        out = forward(parts, params, balance, batch, totals(parts, batch))
        nll, targets = [], []
        for k, h_BLD in enumerate((out.hidden_BLD, *out.mtp_JBLD)):
            span = slice(k + 1, k + 1 + length)
            nll_T = loss_of(
                h_BLD.reshape(-1, h_BLD.shape[-1]),
                params["head"],
                batch.tokens[:, span].reshape(-1),
            )
            mask_T = target_masks(parts, batch)[k].reshape(-1)
            of_T = (
                jax.nn.one_hot(batch.domain[:, span].reshape(-1), domains)
                * mask_T[:, None]
            )
            nll.append(nll_T @ of_T)
            targets.append(of_T.sum(0))
        chosen_RTK = out.aux.experts
        valid_RBL = router_masks(parts, batch)
        valid_RT = valid_RBL.reshape(chosen_RTK.shape[:2])
        domain_RT = jnp.where(valid_RT, batch.domain[:, :length].reshape(-1), domains)
        slot_RTK = domain_RT[..., None] * experts + chosen_RTK
        load = jax.vmap(lambda slot: jnp.bincount(slot, length=domains * experts))(
            slot_RTK.reshape(chosen_RTK.shape[0], -1)
        )
        sums = Sums(
            jnp.stack(nll), jnp.stack(targets), load.reshape(-1, domains, experts)
        )
        return sums, jnp.where(valid_RBL[:, 0, :, None], chosen_RTK[:, :length], -1)

    # Parameters and biases come from the step and lie where it has put them.
    return jax.jit(
        evaluate_batch,
        in_shardings=(None, None, meshes.by_rows(parts.mesh)),
        out_shardings=meshes.replicated(parts.mesh),
    )


class Evaluation(NamedTuple):
    """Metrics by their `eval_` names, and the probe: every batch's first row."""

    metrics: dict[str, Any]
    probe: np.ndarray  # int16 [R, T, K], -1 where a router counts nothing


def evaluate(
    evaluate_batch: Callable[..., tuple[Sums, Array]],
    parts: Parts,
    state: TrainState,
    batches: Iterable[Batch],
    domains: tuple[str, ...],
    previous: np.ndarray | None = None,
) -> Evaluation:
    """Runs over `batches`; `previous` is the last evaluation's probe, for routing
    flips.

    Raises:
      ValueError: there is no validation batch.
    """
    whole, probes = None, []
    params = remembered(state.params, state.scales)
    for batch in batches:
        sums, chosen_RLK = evaluate_batch(params, state.balance, batch)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        whole = sums if whole is None else jax.tree.map(np.add, whole, sums)
        probes.append(np.asarray(chosen_RLK, np.int16))
    if whole is None:
        raise ValueError("the validation set is empty: raise data.val_fraction")
    probe = np.concatenate(probes, 1)
    metrics = summarise(whole, parts.config.model.num_moe, domains)
    flips = None
    if previous is not None and previous.shape == probe.shape:
        flips = [
            float(routing.flips(before, after, after[:, 0] >= 0))
            for before, after in zip(previous, probe, strict=True)
        ]
    metrics["eval_routing_flips"] = flips
    return Evaluation(metrics, probe)


def summarise(sums: Sums, main: int, domains: tuple[str, ...]) -> dict[str, Any]:
    """The `eval_` metrics of summed batches; the first `main` routers are the main
    model's.
    """
    seen = [d for d in range(len(domains)) if sums.targets[0, d] > 0]
    ce_J = sums.nll.sum(1) / np.maximum(sums.targets.sum(1), 1)
    load_RE = sums.load.sum(1)
    maxvio_R = routing.maxvio(load_RE)
    return {
        "eval_ce": float(ce_J[0]),
        "eval_mtp_ce": ce_J[1:].tolist(),
        "eval_maxvio_global": float(maxvio_R[:main].mean()),
        "eval_maxvio_layers": maxvio_R.tolist(),
        "eval_cv": routing.variation(load_RE).tolist(),
        "eval_entropy": routing.entropy(load_RE).tolist(),
        "eval_dead_experts": routing.dead_experts(load_RE).tolist(),
        "eval_load": load_RE.astype(int).tolist(),
        "eval_ce_by_domain": {
            domains[d]: float(sums.nll[0, d] / sums.targets[0, d]) for d in seen
        },
        "eval_load_by_domain": {
            domains[d]: sums.load[:, d].astype(int).tolist() for d in seen
        },
        "eval_tokens": int(sums.targets[0].sum()),
    }
