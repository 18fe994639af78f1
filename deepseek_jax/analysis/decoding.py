"""The charts of decoding: what a cache takes, how fast tokens come, what is accepted.

Values come in as plain mappings, so that anything measured can be drawn, by one run or
by hand. Sources of what they show: arXiv:2412.19437, sections 2.1.1 and 5.4.3, and
arXiv:2505.09343, table 1.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from deepseek_jax.analysis.charts import RAMP, Chart, Line, Panel, between


def _colours(count: int) -> list[str]:
    return [between(at) for at in np.linspace(0, len(RAMP) - 1, max(2, count))]


def cache_sizes(bytes_of: Mapping[str, float]) -> Chart:
    """Bytes that a token takes in the caches of several models, as bars of kB."""
    lines = tuple(
        Line(name, colour, [name], np.array([size / 1e3]), style="bar")
        for (name, size), colour in zip(bytes_of.items(), _colours(len(bytes_of)))
    )
    return Chart(
        "cache_sizes",
        "Cache of one token",
        "What a model keeps of every token for as long as its text goes on.",
        (Panel("", "", "kB", lines, from_zero=True),),
        columns=1,
        legend=False,
    )


def by_context(
    values: Mapping[str, Mapping[int, float]], title: str, y_label: str, caption: str
) -> Chart:
    """A line of each label's values over the context's length, both logarithmic."""
    lines = tuple(
        Line(
            label, colour, [*found], np.array([*found.values()], float), style="marked"
        )
        for (label, found), colour in zip(values.items(), _colours(len(values)))
    )
    panel = Panel("", "tokens of context", y_label, lines, log_x=True, log_y=True)
    return Chart("by_context", title, caption, (panel,), columns=1)


def acceptance(
    shares: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    title: str = "Accepted drafts by domain",
) -> Chart:
    """Shares of drafts by domain: a panel a measurement, a line a draft.

    Args:
      shares: measurement -> domain -> (share, standard error) of draft 1, 2, ..
    """
    depth = max(len(each) for found in shares.values() for each in found.values())
    colours = _colours(depth)
    panels = []
    for name, found in shares.items():
        lines = []
        for k in range(max(map(len, found.values()))):
            share, error = np.array([each[k][:2] for each in found.values()]).T
            band = share - error, share + error
            x = [*found]
            lines.append(Line(f"draft {k + 1}", colours[k], x, share, *band, "marked"))
        label = "" if panels else "share"
        panels.append(Panel(name, "", label, tuple(lines), from_zero=True))
    return Chart(
        "acceptance",
        title,
        "Bands are ± one standard error over prompts; a draft counts where all before "
        "it were accepted.",
        tuple(panels),
        columns=len(panels),
    )
