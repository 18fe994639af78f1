"""What FP8 costs: losses relative to bfloat16's, and the numbers that 8 bits lose.

Appendix B of arXiv:2412.19437 compares loss curves smoothed by an exponential moving
average with coefficient 0.9, and finds them within 0.25% of bfloat16's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.analysis.charts import (
    RAMP,
    Chart,
    Line,
    Panel,
    category_panel,
    chart,
    curve_panel,
)
from deepseek_jax.analysis.runs import Run, Study
from deepseek_jax.analysis.seeds import Curve, Spread, curve, spread

POLICY, REFERENCE = "runtime.compute", "bf16"
KEEP = 0.9
REPORTED = 0.25  # percent
OPERANDS = {"x": "inputs", "w": "weights", "g": "gradients"}


def smoothed(values: Sequence[float] | np.ndarray, keep: float = KEEP) -> np.ndarray:
    """The exponential moving average, which starts at the first value."""
    made = np.array(values, float)
    for i in range(1, len(made)):
        made[i] = keep * made[i - 1] + (1 - keep) * made[i]
    return made


def relative(run: Run, base: Run, key: str = "ce") -> Curve:
    """The smoothed curve's difference to `base`'s, in percent of that."""
    (steps, mine), (base_steps, theirs) = (curve(each, key) for each in (run, base))
    both, at, base_at = np.intersect1d(steps, base_steps, return_indices=True)
    mine, theirs = smoothed(mine[at]), smoothed(theirs[base_at])
    return both, 100 * (mine / theirs - 1)


def pairs(study: Study) -> dict[str, list[tuple[Run, Run]]]:
    """By label, runs in 8 bits, each with the bfloat16 run of its seed.

    Runs that differ in more than precision have no partner: there is then no label, or
    more than one, in bfloat16.
    """
    references = {run.label: None for run in study.runs if run.get(POLICY) == REFERENCE}
    if len(references) != 1:
        return {}
    base = {run.seed: run for run in study.of(*references)}
    found = {
        label: [(run, base[run.seed]) for run in study.of(label) if run.seed in base]
        for label in study.labels
        if label not in references
    }
    return {
        label: both
        for label, both in found.items()
        if both and str(both[0][0].get(POLICY)).startswith("fp8")
    }


class Cost(NamedTuple):
    """Of one setting, in percent of bfloat16's loss, by seed."""

    label: str
    signed: Spread  # mean over steps of the smoothed difference
    magnitude: Spread  # of its magnitude
    final: Spread | None  # of the validation loss after the last step


def ranking(study: Study) -> list[Cost]:
    """Settings from the one nearest to bfloat16 on."""
    made = []
    for label, both in pairs(study).items():
        gaps = [(run.seed, relative(run, base)[1]) for run, base in both]
        signed = spread((seed, float(gap.mean())) for seed, gap in gaps if len(gap))
        size = spread((s, float(np.abs(gap).mean())) for s, gap in gaps if len(gap))
        final = spread(
            (run.seed, 100 * (run.final["eval_ce"] / base.final["eval_ce"] - 1))
            for run, base in both
            if run.final and base.final
        )
        if signed and size:
            made.append(Cost(label, signed, size, final))
    return sorted(made, key=lambda cost: cost.magnitude.mean)


def markdown(study: Study) -> str:
    """The ranking as Markdown; "" if there is none."""
    costs = ranking(study)
    if not costs:
        return ""

    def text(value: Spread | None) -> str:
        if value is None:
            return "–"
        std = "" if value.std is None else f" ± {value.std:.3f}"
        return f"{value.mean:+.3f}{std} %"

    lines = [
        "",
        "Loss relative to bfloat16's of the same seed (smoothed, coefficient "
        f"{KEEP}; the report: within {REPORTED}%):",
        "",
        "| setting | n | mean of magnitudes | mean | last validation loss |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in costs:
        size, n = text(each.magnitude).lstrip("+"), each.signed.n
        cells = (each.label, str(n), size, text(each.signed), text(each.final))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def relative_loss(study: Study) -> Chart | None:
    """Smoothed training loss over steps, relative to bfloat16's."""
    found = {
        label: [relative(*pair) for pair in both]
        for label, both in pairs(study).items()
    }
    return chart(
        "precision",
        "Loss relative to bfloat16",
        "Smoothed cross-entropy of training, less that of bfloat16 with the same seed, "
        f"over it; bands are ± one standard deviation over seeds. DeepSeek-V3's report "
        f"has differences below {REPORTED}%.",
        (curve_panel(study, found, "", "%"),) if found else (),
        columns=1,
    )


def underflow(study: Study) -> Chart | None:
    """Shares of numbers that 8 bits round to zero, by map, after the last step."""

    def by_map(run: Run, operand: str) -> dict[str, float]:
        shares = (run.final or {}).get(f"eval_underflowed_{operand}_by_map", {})
        return {where: 100 * float(np.mean(each)) for where, each in shares.items()}

    panels = []
    for operand, name in OPERANDS.items():
        found = {
            label: [made for run in study.of(label) if (made := by_map(run, operand))]
            for label in study.labels
        }
        panels.append(category_panel(study, found, name, y_label="% rounded to zero"))
    return chart(
        "underflow",
        "What 8 bits lose",
        "Numbers of a batch that are not zero and become it, by linear map; mean over "
        "its layers.",
        panels,
        columns=1,
    )


def scales(study: Study) -> Chart | None:
    """Which powers of two the scales of inputs, weights and gradients have."""
    panels = []
    for label in study.labels:
        run = study.of(label)[0]
        lines = []
        for (operand, name), colour in zip(OPERANDS.items(), RAMP[::2]):
            found = np.array((run.final or {}).get(f"eval_scales_{operand}", ()), float)
            if len(found):
                power, count = found.T
                lines.append(Line(name, colour, power, 100 * count / count.sum()))
        if lines:
            panels.append(
                Panel(label, "log2 of the scale", "% of scales", tuple(lines))
            )
    return chart(
        "scales",
        "Scales",
        "Of all maps on one batch after the last step, rounded down to powers of two; "
        "one seed of each setting.",
        panels,
    )


PRECISION = relative_loss, underflow, scales
