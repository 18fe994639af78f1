"""Folders of runs and sweeps as the trainer writes them, with made-up measurements.

A run's numbers follow from its strategy and seed: loads drift from uneven to the
strategy's level of balance, and losses fall. Shapes and fields are the trainer's.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import config as configs

DOMAINS = ("code", "english", "speech", "arithmetic")
LEVELS = {"none": 5.0, "loss_free": 0.5, "aux_seq": 0.3, "v3": 0.4}  # of MaxVio
TOKENS = 4096


def config(strategy: str = "v3", seed: int = 0, steps: int = 40, **model: Any):
    """A small configuration: 3 MoE layers, one MTP module, 16 experts."""
    moe = configs.MoEConfig(16, 2, 64, num_groups=4, keep_groups=2)
    model = {"num_layers": 4, "num_dense": 1, "dim": 128, **model}
    return configs.Config(
        model=configs.ModelConfig(moe=moe, mtp=configs.MTPConfig(1), **model),
        balance=configs.BalanceConfig(strategy, freeze_step=steps // 2),
        train=replace(configs.TrainConfig(), steps=steps, eval_every=steps // 4 or 1),
        seed=seed,
    )


def _load(rng: np.random.Generator, tilt_RE: np.ndarray, tokens: int) -> np.ndarray:
    share_RE = np.exp(tilt_RE + 0.05 * rng.normal(size=tilt_RE.shape))
    share_RE /= share_RE.sum(-1, keepdims=True)
    return np.stack([rng.multinomial(tokens * 2, share) for share in share_RE])


def _balance(load_RE: np.ndarray, prefix: str = "") -> dict[str, Any]:
    share = load_RE / load_RE.sum(-1, keepdims=True)
    return {
        f"{prefix}load": load_RE.tolist(),
        f"{prefix}cv": (load_RE.std(-1) / load_RE.mean(-1)).tolist(),
        f"{prefix}entropy": (-share * np.log(share + 1e-9)).sum(-1).tolist(),
        f"{prefix}dead_experts": (load_RE == 0).sum(-1).tolist(),
    }


def _maxvio(load_RE: np.ndarray) -> np.ndarray:
    return load_RE.max(-1) / load_RE.mean(-1) - 1


def records(config: configs.Config, steps: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to `steps` (all of them by default)."""
    total = config.train.steps
    strategy, main = config.balance.strategy, config.model.num_moe
    shape = (config.model.num_routers, config.model.moe.num_experts)
    rng = np.random.default_rng([config.seed, sum(map(ord, strategy))])
    level, start = LEVELS.get(strategy, 1.0), 4.0
    direction_RE = rng.normal(size=shape)
    domain_tilt = {d: rng.normal(size=shape) * 0.4 for d in DOMAINS}
    lines = []
    for step in range(1, (total if steps is None else steps) + 1):
        now = level + (start - level) * np.exp(-6 * step / total)
        tilt_RE = direction_RE * np.log1p(now) / 1.8
        load_RE = _load(rng, tilt_RE, TOKENS)
        ce = 8.3 - 3.2 * (step / total) ** 0.4 + 0.02 * rng.normal()
        violation = _maxvio(load_RE)
        line = {
            "step": step,
            "loss": ce + 0.3 * (ce + 0.2),
            "ce": ce,
            "mtp_ce": [ce + 0.2],
            "penalty": 0.0,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "speed": config.balance.speed,
            "maxvio_batch": float(violation[:main].mean()),
            "maxvio_layers": violation.tolist(),
            "tokens_per_s": 7000 + 50 * rng.normal(),
            "elapsed_s": 0.6 * step,
        }
        if step % config.train.routing_every == 0:
            line |= _balance(load_RE)
            if strategy in ("loss_free", "v3"):
                line["bias"] = (-direction_RE * 0.01 * np.sqrt(step)).tolist()
        lines.append(line)
        if step % config.train.eval_every == 0 or step == total:
            lines.append(_evaluation(rng, step, ce, tilt_RE, domain_tilt, main))
    return lines


def _evaluation(rng, step, ce, tilt_RE, domain_tilt, main) -> dict[str, Any]:
    by_domain = {d: _load(rng, tilt_RE + t, TOKENS) for d, t in domain_tilt.items()}
    load_RE = sum(by_domain.values())
    violation = _maxvio(load_RE)
    return {
        "step": step,
        "eval_ce": ce + 0.1 + 0.01 * rng.normal(),
        "eval_mtp_ce": [ce + 0.3],
        "eval_maxvio_global": float(violation[:main].mean()),
        "eval_maxvio_layers": violation.tolist(),
        **_balance(load_RE, "eval_"),
        "eval_ce_by_domain": {d: ce + i / 5 for i, d in enumerate(DOMAINS)},
        "eval_load_by_domain": {d: load.tolist() for d, load in by_domain.items()},
        "eval_routing_flips": [0.5 / step**0.5] * len(tilt_RE) if step > 10 else None,
        "eval_tokens": TOKENS * len(DOMAINS),
    }


def write_run(path: Path, config: configs.Config, steps: int | None = None) -> Path:
    """Writes a run's folder, with the first `steps` steps done."""
    path.mkdir(parents=True, exist_ok=True)
    saved = {
        "config": configs.to_dict(config),
        "corpus": {"hash": "c0ffee", "domains": list(DOMAINS)},
    }
    (path / "config.json").write_text(json.dumps(saved))
    lines = [json.dumps(record) for record in records(config, steps)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def write_sweep(
    path: Path,
    strategies: tuple[str, ...] = tuple(LEVELS),
    seeds: int = 3,
    steps: int = 40,
    routing_every: int = 2,
) -> Path:
    """Writes a finished sweep over strategies and seeds."""
    items, rows = [], []
    for strategy in strategies:
        for seed in range(seeds):
            name = f"{strategy}-s{seed}"
            made = config(strategy, seed, steps)
            made = replace(made, train=replace(made.train, routing_every=routing_every))
            write_run(path / name, made)
            overrides = {"balance.strategy": strategy, "seed": seed}
            items.append({"name": name, "overrides": overrides})
            rows.append({"name": name, "status": "done"})
    sweep = {
        "title": "balancing",
        "about": "Which strategy balances best?",
        "command": "python -m experiments.sweep --sweep=balancing.py --workdir=runs/x",
        "metrics": ["ce", "maxvio_batch"],
        "runs": items,
    }
    (path / "sweep.json").write_text(json.dumps(sweep))
    (path / "summary.json").write_text(json.dumps(rows))
    return path
