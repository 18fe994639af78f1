"""What speculation gains in time: one step of it against one plain step.

The report names 1.8 times the tokens/s (arXiv:2412.19437, section 5.4.3). That is a
property of a machine, a model and a text, so it is measured where drafts were used: the
middle of what came out is decoded again without them. There rows are as long as they
were on average, and a step costs more the longer they are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.decode import engine
from deepseek_jax.decode.forward import Weights
from deepseek_jax.model.transformer import Transformer

STEPS = 128  # plain ones that are timed, at most


class Gain(NamedTuple):
    """Seconds of a step of all rows, and how many times as fast drafts made them."""

    step_s: float  # draft and verification
    plain_step_s: float
    speed_up: float  # time that the same tokens would have taken plainly / time taken


def gain(report: engine.Report, plain: engine.Report) -> Gain:
    """What a report of speculation says next to one of plain steps.

    Plain decoding takes a step for each token of the longest row.
    """
    plain_step_s = plain.decode_s / max(row.steps for row in plain.rows)
    longest = max(len(row.tokens) for row in report.rows)
    return Gain(
        report.decode_s / max(row.steps for row in report.rows),
        plain_step_s,
        longest * plain_step_s / report.decode_s,
    )


def middles(
    prompts: Sequence[Sequence[int]], rows: Sequence[engine.Generation], size: int
) -> list[list[int]]:
    """The texts after which the middle `size` tokens of each row's output came."""
    return [
        [*prompt, *row.tokens[: max(0, len(row.tokens) - size) // 2]]
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def compare(
    model: Transformer,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    report: engine.Report,
    **options: Any,
) -> Gain:
    """Times plain steps, after their compilation, for what `engine.generate` reported.

    One timing of at most STEPS steps: rough where those take milliseconds.

    Args:
      report: of these prompts, with drafts.
      options: `rule`, `dtype`, `page` and `callback` as they were then. A callback's
        own time counts in neither, what it costs to call it in both.
    """
    size = min(STEPS, max(len(row.tokens) for row in report.rows))
    starts = middles(prompts, report.rows, size)
    return gain(report, engine.generate(model, weights, starts, size, **options))
