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
from deepseek_jax.config import flatten

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


def _else(run: Run) -> tuple[tuple[str, str], ...]:
    """A run's settings but for how it is computed."""
    flat = flatten(run.config)
    return tuple((k, repr(v)) for k, v in flat.items() if not k.startswith("runtime."))


def pairs(study: Study) -> dict[str, list[tuple[Run, Run]]]:
    """By label, runs in 8 bits, each with the bfloat16 run that is like it otherwise.

    Those without such a run are left out.
    """
    bases = {_else(run): run for run in study.runs if run.get(POLICY) == REFERENCE}
    found = {
        label: [
            (run, bases[_else(run)])
            for run in study.of(label)
            if str(run.get(POLICY)).startswith("fp8") and _else(run) in bases
        ]
        for label in study.labels
    }
    return {label: both for label, both in found.items() if both}


def unfinished(study: Study) -> list[str]:
    """Runs of `pairs` that stopped, or are not done yet, with their steps."""
    return [
        f"{run.name} ({run.steps or 0} of {run.total_steps} steps)"
        for both in pairs(study).values()
        for run, _ in both
        if not run.final
    ]


class Cost(NamedTuple):
    """Of one setting, in percent of bfloat16's loss, by seed."""

    label: str
    signed: Spread  # mean over steps of the smoothed difference
    magnitude: Spread  # of its magnitude
    final: Spread  # of the validation loss after the last step


def _last_loss(run: Run) -> float:
    return (run.final or {}).get("eval_ce", np.nan)


def ranking(study: Study) -> list[Cost]:
    """Settings from the one nearest to bfloat16 on, by their finished runs.

    One that stopped early, as a run that diverges does, would look near.
    """
    made = []
    for label, every in pairs(study).items():
        both = [(run, base) for run, base in every if run.final and base.final]
        gaps = [(run.seed, relative(run, base)[1]) for run, base in both]
        signed = spread((seed, float(gap.mean())) for seed, gap in gaps)
        size = spread((seed, float(np.abs(gap).mean())) for seed, gap in gaps)
        final = spread(
            (run.seed, 100 * (_last_loss(run) / _last_loss(base) - 1))
            for run, base in both
        )
        if signed and size and final:
            made.append(Cost(label, signed, size, final))
    return sorted(made, key=lambda cost: cost.magnitude.mean)


def markdown(study: Study) -> str:
    """The ranking as Markdown, and who is not in it; "" if nothing is in 8 bits."""
    costs, rest = ranking(study), unfinished(study)
    left_out = f"\nNot counted, for want of all steps: {', '.join(rest)}.\n"
    if not costs:
        return left_out if rest else ""

    def text(value: Spread) -> str:
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
    return "\n".join(lines) + "\n" + (left_out if rest else "")


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
