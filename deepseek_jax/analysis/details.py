"""The charts of one run: where its tokens went, layer by layer and expert by expert.

Each function makes one chart, or returns None where the run holds nothing to draw.
Specialisation by domain is figure 9 of arXiv:2412.19437. Each is told how many numbers
it may hold: long runs are thinned in time and deep models in layers, so that a page of
many runs stays small.
"""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.analysis.charts import RAMP, Chart, Heat, Line, Panel, between
from deepseek_jax.analysis.runs import Run

MAX_ROUTERS = 8
MAX_LINES = 32
CELLS = 20_000
LEAST_TIMES = 8


def relative(load: np.ndarray) -> np.ndarray:
    """Loads [..., E] relative to a uniform spread, which is 1 for every expert."""
    mean = load.mean(-1, keepdims=True)
    return load / np.where(mean > 0, mean, 1)


def _some(count: int, most: int) -> np.ndarray:
    """At most `most` indices out of `count`, evenly spaced, ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _routers(count: int, cells: int, each: int, most: int = MAX_ROUTERS) -> np.ndarray:
    """The routers to show when `each` takes so many of the cells."""
    return _some(count, max(1, min(most, cells // each)))


def load_heatmap(run: Run, cells: int = CELLS) -> Chart | None:
    """Load of every expert relative to uniform over training, a block a router."""
    steps, load_XRE = run.series("load")
    if not len(steps):
        return None
    names = run.router_names(load_XRE.shape[1])
    experts = load_XRE.shape[2]
    routers = _routers(len(names), cells, experts * LEAST_TIMES)
    times = max(LEAST_TIMES, cells // (experts * len(routers)))
    windows = np.array_split(np.arange(len(steps)), min(len(steps), times))
    x = np.array([steps[w].mean() for w in windows])
    share_XRE = relative(np.stack([load_XRE[w].sum(0) for w in windows]))
    blocks = [(names[r], range(1, experts + 1), share_XRE[:, r].T) for r in routers]
    rows, values = _stack([(n, [f"expert {e}" for e in es], v) for n, es, v in blocks])
    middle = {f"{names[r]} · expert {(experts + 1) // 2}": names[r] for r in routers}
    return Chart(
        "load",
        "Expert load over training",
        "Each row is an expert: pale is its fair share, red too many tokens, dark blue "
        "hardly any or none; look for rows that stay red or blue.",
        (Panel("", "step", heat=Heat(x, rows, values, middle)),),
        columns=1,
    )


def specialisation(run: Run, cells: int = CELLS) -> Chart | None:
    """Load by domain relative to uniform in the last evaluation, a block a router."""
    record = run.evals[-1] if run.evals else {}
    loads = record.get("eval_load_by_domain") or {}
    if not loads:
        return None
    load_dRE = np.array(list(loads.values()), float)
    names = run.router_names(load_dRE.shape[1])
    routers = _routers(len(names), cells, load_dRE.shape[0] * load_dRE.shape[2])
    share_dRE = relative(load_dRE)
    rows, values = _stack([(names[r], list(loads), share_dRE[:, r]) for r in routers])
    experts = np.arange(1, load_dRE.shape[2] + 1)
    ticks = {row: row for row in rows if row.strip()}
    return Chart(
        "specialisation",
        "Specialisation by domain",
        "Red marks experts that a domain uses more than their fair share; where the "
        "rows of one layer differ, its experts know their domain.",
        (Panel("", "expert", heat=Heat(experts, rows, values, ticks)),),
        columns=1,
    )


def _stack(
    blocks: Sequence[tuple[str, Sequence[str], np.ndarray]],
) -> tuple[list[str], np.ndarray]:
    """Stacks named blocks of named rows with one empty row between blocks."""
    rows, parts = [], []
    for i, (name, members, values) in enumerate(blocks):
        if i:
            rows.append(" " * i)
            parts.append(np.full((1, values.shape[1]), np.nan))
        rows += [f"{name} · {member}" for member in members]
        parts.append(values)
    return rows, np.concatenate(parts)


def bias_trajectories(run: Run, cells: int = CELLS) -> Chart | None:
    """The routers' biases over training, one line an expert."""
    steps, bias_XRE = run.series("bias")
    if not len(steps):
        return None
    names = run.router_names(bias_XRE.shape[1])
    experts = _some(bias_XRE.shape[2], MAX_LINES)
    routers = _routers(len(names), cells, len(experts) * LEAST_TIMES, most=4)
    most = max(LEAST_TIMES, cells // (len(experts) * len(routers)))
    times = _some(len(steps), min(most, 80))
    panels = []
    for i, r in enumerate(routers):
        lines = tuple(
            Line(
                f"expert {e + 1}",
                between((len(RAMP) - 1) * e / max(1, bias_XRE.shape[2] - 1)),
                steps[times],
                bias_XRE[times, r, e],
            )
            for e in experts
        )
        panels.append(Panel(names[r], "step", "" if i % 2 else "bias", lines))
    return Chart(
        "bias",
        "Bias trajectories",
        "A bias that flattens out has found its level, one that still climbs needs "
        "more steps or a larger speed, a sawtooth means that the speed is too large.",
        tuple(panels),
        legend=False,
    )


DETAILS = {
    "load": load_heatmap,
    "bias": bias_trajectories,
    "specialisation": specialisation,
}
