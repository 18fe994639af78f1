"""From runs to numbers: a run's summary, and means and spreads over seeds.

MaxVio is that of arXiv:2408.15664, as the trainer recorded it: (max load - mean) / mean
over a batch or the whole validation set, averaged over the main model's MoE layers.
Whether two settings differ is judged from their differences seed by seed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_jax.analysis.runs import Record, Run

SUMMARY_FIELDS = (
    "name",
    "overrides",
    "strategy",
    "seed",
    "steps",
    "eval_ce",
    "maxvio_global",
    "maxvio_batch",
    "dead_experts",
    "tokens_per_s",
    "status",
)
MEASURES = SUMMARY_FIELDS[5:10]
LAST_PART = 0.1  # of the training steps, which `maxvio_batch` averages over
# Student's t at 97.5 % for 1, 2, ... 10 degrees of freedom; the last serves for more.
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def summarize(run: Run) -> Record:
    """A run's entry in summary.json; values that are not known yet are None.

    `eval_ce`, `maxvio_global` and `dead_experts` (their number in all MoE layers of the
    main model) are of the final evaluation over the whole validation set;
    `maxvio_batch` is the mean over the last 10 % of the training steps, known with it;
    `tokens_per_s` is the median over the steps so far but the first, which compiles.
    """
    final, total = run.final or {}, run.total_steps or 0
    timed, rates = run.series("tokens_per_s")
    rates = rates[(timed > (run.train[0]["step"] if run.train else 0)) & (rates > 0)]
    steps, violation = run.series("maxvio_batch")
    late = violation[steps > (1 - LAST_PART) * total]
    dead = final.get("eval_dead_experts")
    values = (
        run.name,
        run.overrides,
        run.strategy,
        run.seed,
        run.steps,
        _number(final.get("eval_ce")),
        _number(final.get("eval_maxvio_global")),
        _number(late.mean()) if final and len(late) else None,
        None if dead is None else int(np.sum(dead[: run.num_moe])),
        float(np.median(rates)) if len(rates) else None,
        run.status,
    )
    return dict(zip(SUMMARY_FIELDS, values, strict=True))


@dataclass(frozen=True)
class Spread:
    """A measure of one setting, by seed."""

    by_seed: dict[int, float]

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return float(np.mean([*self.by_seed.values()]))

    @property
    def std(self) -> float | None:
        """The sample standard deviation between seeds, None for a single one."""
        return float(np.std([*self.by_seed.values()], ddof=1)) if self.n > 1 else None


def spread(pairs: Iterable[tuple[int | None, float | None]]) -> Spread | None:
    """The values that are known, from pairs of seed and value; None if none is."""
    known = {seed or 0: value for seed, value in pairs if value is not None}
    return Spread(known) if known else None


def differ(a: Spread, b: Spread) -> bool:
    """Whether a paired two-sided t-test at 5 % tells two settings apart.

    The pairs are runs of the same seed: they share their first weights and their data,
    which is most of the spread between seeds. Fewer than two pairs show nothing.
    """
    gaps = [
        a.by_seed[seed] - b.by_seed[seed] for seed in a.by_seed if seed in b.by_seed
    ]
    if len(gaps) < 2:
        return False
    error = float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))
    t = T_975[min(len(gaps) - 1, len(T_975)) - 1]
    return abs(float(np.mean(gaps))) > t * error


Curve = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]


def curve(run: Run, key: str) -> Curve:
    """A metric over steps; of a list by router the main model's mean."""
    steps, values = run.series(key)
    return steps, values[:, : run.num_moe].mean(-1) if values.ndim > 1 else values


def difference(run: Run, base: Run, key: str) -> Curve:
    """`run`'s metric minus `base`'s, at the steps that both have."""
    (steps, values), (base_steps, base_values) = curve(run, key), curve(base, key)
    _, mine, theirs = np.intersect1d(steps, base_steps, return_indices=True)
    return steps[mine], values[mine] - base_values[theirs]


def average(curves: Sequence[Curve], points: int = 150) -> tuple[np.ndarray, ...]:
    """Steps, mean and std of the seeds' curves, in at most `points` windows.

    A run that stopped early counts as far as it came; the std is that between the runs'
    window averages, NaN where fewer than two have one. Empty if all curves are.
    """
    curves = [c for c in curves if len(c[0])]
    if not curves:
        return np.array([]), np.array([]), np.array([])
    union = np.unique(np.concatenate([steps for steps, _ in curves]))
    windows = np.array_split(union, min(points, len(union)))
    window_of = np.repeat(np.arange(len(windows)), [len(w) for w in windows])
    values_SX = np.full((len(curves), len(windows)), np.nan)
    for row, (steps, values) in zip(values_SX, curves, strict=True):
        index = window_of[np.searchsorted(union, steps)]
        count = np.bincount(index, minlength=len(windows))
        total = np.bincount(index, values, minlength=len(windows))
        row[count > 0] = total[count > 0] / count[count > 0]
    return np.array([w.mean() for w in windows]), *mean_and_std(values_SX)


def mean_and_std(values_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample std over the first axis, without NaN; std of one value is NaN."""
    known_SX = np.ma.masked_invalid(values_SX)
    std = np.full(values_SX.shape[1], np.nan)
    several = known_SX.count(0) > 1
    std[several] = known_SX[:, several].std(0, ddof=1).filled(np.nan)
    return known_SX.mean(0).filled(np.nan), std


def specialisation_index(record: Record, num_moe: int) -> float | None:
    """How far the choice of experts depends on the domain, in an evaluation.

    The mean over domains and MoE layers of the total variation distance between a
    domain's distribution over experts and the average domain's: 0 if domains are
    treated alike, 1 - 1/domains if no two share an expert. Ours; one number for what
    figure 9 of arXiv:2412.19437 shows.
    """
    load_by_domain = record.get("eval_load_by_domain") or {}
    loads = [np.asarray(load, float)[:num_moe] for load in load_by_domain.values()]
    loads = [load for load in loads if load.size and load.sum(-1).all()]
    if len(loads) < 2:
        return None
    share_dRE = np.stack([load / load.sum(-1, keepdims=True) for load in loads])
    return float(np.abs(share_dRE - share_dRE.mean(0)).sum(-1).mean() / 2)
