"""The charts of a whole study: settings compared, mean and spread over seeds.

Each function makes one chart, or returns None where the runs hold nothing to draw. The
measures are those of section 4.5 of arXiv:2412.19437 and of arXiv:2408.15664.
"""

from dataclasses import replace

import numpy as np

from deepseek_jax.analysis.charts import (
    Chart,
    Line,
    Panel,
    band,
    category_panel,
    chart,
    colours,
    curve_panel,
    curves,
)
from deepseek_jax.analysis.details import load_heatmap
from deepseek_jax.analysis.runs import Run, Study
from deepseek_jax.analysis.seeds import difference, summarize

UNIT = "cross-entropy (nats)"
ALREADY_DRAWN = ("loss", "ce", "eval_ce", "maxvio_batch", "eval_maxvio_global")


def baseline(study: Study) -> str:
    """The label that differences are taken from: 'none' if there, else the first."""
    return "none" if "none" in study.labels else study.labels[0]


def _pairs(study: Study, label: str) -> list[tuple[Run, Run]]:
    """The label's runs, each with the baseline's run of the same seed."""
    bases = {run.seed: run for run in study.of(baseline(study))}
    return [(run, bases[run.seed]) for run in study.of(label) if run.seed in bases]


def loss_curves(study: Study) -> Chart | None:
    """Training and validation cross-entropy over steps; the latter's differences."""
    gaps = {
        label: [difference(*pair, "eval_ce") for pair in _pairs(study, label)]
        for label in study.labels
    }
    several = len(study.labels) > 1
    return chart(
        "loss",
        "Loss over training",
        "Bands are ± one standard deviation over seeds; the last panel shows what the "
        "others cannot, the difference to the baseline of the same seed: a band that "
        "holds 0 is no finding.",
        (
            curve_panel(study, curves(study, "ce"), "training", UNIT),
            curve_panel(
                study, curves(study, "eval_ce"), "validation", UNIT, marked=True
            ),
            curve_panel(
                study, gaps, f"validation, minus {baseline(study)}", marked=True
            )
            if several
            else None,
        ),
        columns=3,
    )


def maxvio_over_time(study: Study) -> Chart | None:
    """MaxVio of the training batches and of the whole validation set over steps."""
    batch, whole = curves(study, "maxvio_batch"), curves(study, "eval_maxvio_global")
    return chart(
        "maxvio",
        "Imbalance over training",
        "Lower is better balanced, 0 is perfect; look at how fast each strategy comes "
        "down and whether it stays down.",
        (
            curve_panel(study, batch, "training batch", "MaxVio", log_y=True),
            curve_panel(
                study, whole, "validation set", "MaxVio", log_y=True, marked=True
            ),
        ),
    )


def routing_flips(study: Study) -> Chart | None:
    """Share of routing decisions that changed since the previous evaluation."""
    flips = curves(study, "eval_routing_flips")
    return chart(
        "flips",
        "Routing flips",
        "The share of expert choices on the same validation text that changed between "
        "evaluations: routing that settles falls towards 0, a bias that keeps "
        "oscillating does not.",
        (
            curve_panel(
                study, flips, "since the previous evaluation", "share", marked=True
            ),
        ),
        columns=1,
    )


def watched(study: Study) -> Chart | None:
    """The scalar metrics that the sweep's `metrics()` names."""
    keys = [key for key in study.watched if key not in ALREADY_DRAWN]
    return chart(
        "watched",
        "Watched metrics",
        "What this sweep asked to see besides, mean and spread over seeds.",
        [curve_panel(study, curves(study, key), key) for key in keys],
    )


def loss_against_maxvio(study: Study) -> Chart | None:
    """Final validation loss against final MaxVio_global: one point a run."""
    points, palette = {}, colours(study)
    for label in study.labels:
        rows = [summarize(run) for run in study.of(label)]
        known = [(r["maxvio_global"], r["eval_ce"]) for r in rows]
        found = np.array([p for p in known if None not in p]).reshape(-1, 2)
        if len(found):
            found[:, 0] = np.maximum(found[:, 0], 1e-3)  # the axis is logarithmic
            points[label] = found
    if not points:
        return None
    lines = [
        Line(label, palette[label], *found.T, style="points")
        for label, found in points.items()
        if len(found) > 1
    ]
    means = [
        np.r_[np.exp(np.log(p[:, 0]).mean()), p[:, 1].mean()] for p in points.values()
    ]
    places = _places(list(points), np.array(means), np.concatenate([*points.values()]))
    for (label, found), (x, y), place in zip(
        points.items(), means, places, strict=True
    ):
        y = np.array([y])
        std = np.array([found[:, 1].std(ddof=1) if len(found) > 1 else np.nan])
        low_high = band(y, std)
        lines.append(Line(label, palette[label], [x], y, *low_high, "mean", place))
    panel = Panel(
        "after the last step, whole validation set",
        "MaxVio_global (log scale)",
        UNIT,
        tuple(lines),
        log_x=True,
    )
    return Chart(
        "loss_against_maxvio",
        "Loss against balance",
        "Down is a better model, left a better balance; small points are runs, large "
        "ones means over seeds with a bar of ± one standard deviation of the loss.",
        (panel,),
        columns=1,
        legend=False,
    )


def _places(names: list[str], means: np.ndarray, points: np.ndarray) -> list[str]:
    """Where each mean's name goes, so that few names cover one another or a mean."""
    scaled, every = (np.c_[np.log(p[:, 0]), p[:, 1]] for p in (means, points))
    low, size = every.min(0), np.ptp(every, 0)
    at = (scaled - low) / np.where(size > 0, size, 1)
    taken = [(x - 0.02, x + 0.02, y - 0.04, y + 0.04) for x, y in at]
    chosen = []
    for name, (x, y) in zip(names, at, strict=True):
        width = 0.014 * len(name)
        boxes = {
            "right": (x + 0.02, x + 0.02 + width, y - 0.03, y + 0.03),
            "left": (x - 0.02 - width, x - 0.02, y - 0.03, y + 0.03),
            "above": (x - width / 2, x + width / 2, y + 0.04, y + 0.1),
            "below": (x - width / 2, x + width / 2, y - 0.1, y - 0.04),
        }
        costs = {
            side: sum(_overlap(box, other) for other in taken)
            + max(0, -box[0])
            + max(0, box[1] - 1)
            for side, box in boxes.items()
        }
        chosen.append(min(costs, key=costs.__getitem__))
        taken.append(boxes[chosen[-1]])
    return chosen


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return 100 * width * max(0.0, min(a[3], b[3]) - max(a[2], b[2]))


def response(study: Study) -> Chart | None:
    """Final loss and MaxVio_global against the one number that a sweep varies."""
    keys = {key for run in study.runs for key in run.overrides} - {"seed"}
    values = {key: [run.overrides.get(key) for run in study.runs] for key in keys}
    numeric = [
        key
        for key, found in values.items()
        if all(type(value) in (int, float) for value in found) and len(set(found)) > 2
    ]
    if len(numeric) != 1:
        return None
    key = numeric[0]
    panels = []
    for measure in ("eval_ce", "maxvio_global"):
        found: dict[str, dict[int, dict[float, float]]] = {}
        for run in sorted(study.runs, key=lambda run: run.overrides[key]):
            value = summarize(run)[measure]
            if value is not None:
                seeds = found.setdefault(run.strategy, {})
                seeds.setdefault(run.seed, {})[run.overrides[key]] = value
        values = {strategy: [*seeds.values()] for strategy, seeds in found.items()}
        panels.append(category_panel(study, values, measure, x_label=key))
    return chart(
        "response",
        f"Effect of {key}",
        "Where both curves are low the setting is good; inside the band (± one "
        "standard deviation over seeds) neighbours are not told apart.",
        panels,
    )


def by_layer(study: Study) -> Chart | None:
    """MaxVio, variation, entropy and dead experts by router after the last step."""
    fields = (
        ("eval_maxvio_layers", "MaxVio_global", True),
        ("eval_cv", "coefficient of variation", True),
        ("eval_entropy", "entropy of the load / ln E", False),
        ("eval_dead_experts", "experts without a token", True),
    )
    panels = []
    for key, title, from_zero in fields:
        values = {
            label: [
                dict(zip(run.router_names(len(found)), found, strict=True))
                for run in study.of(label)
                if run.final and (found := run.final.get(key))
            ]
            for label in study.labels
        }
        panels.append(category_panel(study, values, title, from_zero=from_zero))
    return chart(
        "by_layer",
        "Balance by layer",
        "A mean can hide a layer: look for routers, often the first or MTP's, that are "
        "worse balanced than the rest.",
        panels,
    )


def loss_by_domain(study: Study) -> Chart | None:
    """Final validation cross-entropy on each domain's text, and its differences."""
    key = "eval_ce_by_domain"
    values = {
        label: [
            run.final[key]
            for run in study.of(label)
            if run.final and run.final.get(key)
        ]
        for label in study.labels
    }
    gaps = {
        label: [
            {d: ce - base.final[key][d] for d, ce in run.final[key].items()}
            for run, base in _pairs(study, label)
            if run.final and base.final and run.final.get(key) and base.final.get(key)
        ]
        for label in study.labels
    }
    title = f"minus {baseline(study)}"
    return chart(
        "loss_by_domain",
        "Loss by domain",
        "A strategy that gains on one kind of text and loses on another shows here and "
        "not in the mean; on the right, differences to the baseline of the same seed.",
        (
            category_panel(study, values, "after the last step", y_label=UNIT),
            category_panel(study, gaps, title) if len(study.labels) > 1 else None,
        ),
    )


def overview(study: Study) -> Chart | None:
    """One picture: loss against balance, MaxVio, and two runs' loads over time."""
    scatter, violation = loss_against_maxvio(study), maxvio_over_time(study)
    heats = {run.name: heat for run in study.runs if (heat := load_heatmap(run))}
    finished = [run for run in study.runs if run.final and run.name in heats]
    if scatter is None or violation is None or len(finished) < 2:
        return None
    finished.sort(key=lambda run: summarize(run)["maxvio_global"] or 0.0)
    panels = (
        replace(scatter.panels[0], title="loss against balance, whole validation set"),
        replace(violation.panels[0], title="balance of the training batches"),
        *(
            replace(heats[run.name].panels[0], title=f"expert load, {run.label}")
            for run in (finished[-1], finished[0])
        ),
    )
    return Chart("overview", study.title, "", panels, legend=False)


COMPARISONS = (
    loss_against_maxvio,
    response,
    maxvio_over_time,
    loss_curves,
    by_layer,
    loss_by_domain,
    routing_flips,
    watched,
)
