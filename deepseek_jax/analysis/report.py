"""One self-contained HTML page and pictures of a sweep or of a single run.

The page (`page.html` is its frame) holds plotly.js once and its figures as JSON and so
needs no network: the table first, then settings against one another, then any two runs
side by side.
"""

import json
import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from deepseek_jax.analysis import plots, precision
from deepseek_jax.analysis.charts import Chart, colours
from deepseek_jax.analysis.comparisons import COMPARISONS, overview
from deepseek_jax.analysis.details import CELLS, DETAILS
from deepseek_jax.analysis.interactive import figure, packed, plotly_js
from deepseek_jax.analysis.precision import PRECISION
from deepseek_jax.analysis.runs import DONE, FAILED, Run, Study, uncollected
from deepseek_jax.analysis.seeds import MEASURES, differ, summarize
from deepseek_jax.analysis.selection import differing
from deepseek_jax.analysis.tables import (
    HEADINGS,
    LOWER_IS_BETTER,
    Table,
    best,
    markdown,
    table,
    text_of,
    verdict,
)
from deepseek_jax.files import write_text

CHARTS = *COMPARISONS, *PRECISION
MAX_PICTURED = 12  # settings whose heatmaps become pictures
MAX_DETAILED = 60  # runs that the page shows side by side
PAGE_CELLS = 120_000  # numbers in the heatmaps of all runs; as many in the biases


def write(study: Study) -> Path:
    """Writes report.html, summary.md and figures/*.png; gives the page.

    The page comes first: the pictures take several times as long.
    """
    path = study.path / "report.html"
    write_text(path, page(study))
    write_text(study.path / "summary.md", markdown(study) + precision.markdown(study))
    folder = study.path / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, chart in pictures(study).items():
        plots.save(chart, folder / f"{stem}.png")
    return path


def pictures(study: Study) -> dict[str, Chart]:
    """The charts that become pictures, by file stem; heatmaps for one run a setting."""
    made = [make(study) for make in (*CHARTS, overview)]
    found = {chart.name: chart for chart in made if chart}
    for label in study.labels[:MAX_PICTURED]:
        runs = study.of(label)
        run = next((run for run in runs if run.status == DONE), runs[0])
        for kind, chart in details(run).items():
            found[f"{kind}-{run.name}"] = chart
    return found


@uncollected()
def page(study: Study) -> str:
    """The page's HTML."""
    comparisons = [chart for make in CHARTS if (chart := make(study))]
    detailed = _first_seeds(study, MAX_DETAILED)
    cells = PAGE_CELLS // max(8, len(detailed))
    by_run = {run.name: details(run, cells) for run in detailed}
    kinds = {name: chart for found in by_run.values() for name, chart in found.items()}
    shown = _shown(study, by_run)
    parts = {
        "title": escape(study.title),
        "body": "\n".join(
            [
                _head(study),
                _result(study),
                *(
                    _section(chart, _plot(f"figure-{chart.name}"))
                    for chart in comparisons
                ),
                _pickers(by_run, shown),
                *(
                    _section(kinds[k], _pair(k, len(shown)))
                    for k in DETAILS
                    if k in kinds
                ),
            ]
        ),
        "plotly": plotly_js(),
        "data": _json(
            {
                "comparisons": {chart.name: figure(chart) for chart in comparisons},
                "details": [kind for kind in DETAILS if kind in kinds],
                "runs": {
                    name: {kind: figure(chart) for kind, chart in found.items()}
                    for name, found in by_run.items()
                },
                "shown": shown,
            }
        ),
    }
    frame = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    before, *rest = frame.split("{{")
    pieces = [before]
    for part in rest:
        name, after = part.split("}}", 1)
        pieces += [parts[name], after]
    return "".join(pieces)


def details(run: Run, cells: int = CELLS) -> dict[str, Chart]:
    """The charts of one run by their name, with at most `cells` numbers each."""
    found = {name: make(run, cells) for name, make in DETAILS.items()}
    return {name: chart for name, chart in found.items() if chart}


def _first_seeds(study: Study, most: int) -> list[Run]:
    """At most so many runs, in the study's order: first seeds before second ones."""
    rank = {run.name: study.of(run.label).index(run) for run in study.runs}
    kept = sorted(study.runs, key=lambda run: rank[run.name])[:most]
    return [run for run in study.runs if run in kept]


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), default=packed)
    return text.replace("<", "\\u003c")


def _shown(study: Study, by_run: Mapping[str, Mapping[str, Chart]]) -> list[str]:
    """The runs first shown: the worst balanced, and the best of those with a bias."""
    drawn = [name for name, found in by_run.items() if found]
    if len(drawn) < 2:
        return drawn
    level = {run.name: summarize(run)["maxvio_global"] or 0.0 for run in study.runs}
    worst = max(drawn, key=level.__getitem__)
    rest = [name for name in drawn if name != worst]
    return [
        worst,
        min(rest, key=lambda name: ("bias" not in by_run[name], level[name])),
    ]


def _head(study: Study) -> str:
    counts: dict[str, int] = {}
    for run in study.runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    state = ", ".join(f"{n} {status}" for status, n in counts.items())
    about = f"<p>{escape(study.about)}</p>" if study.about else ""
    command = (
        f'<code class="block">{escape(study.command)}</code>' if study.command else ""
    )
    return (
        f"<h1>{escape(study.title)}</h1>{about}"
        f'<p class="soft">{escape(_setting(study))} · runs: {state}.</p>{command}'
    )


def _setting(study: Study) -> str:
    """The model and the data in one line, from the first run that has a config."""
    run = next((r for r in study.runs if r.config), None)
    if run is None:
        return "no run has started"
    get = run.get
    tokens = get("data.batch", 0) * get("data.length", 0)
    return (
        f"{get('model.num_layers')} layers ({get('model.num_dense')} dense), width "
        f"{get('model.dim')}, {get('model.moe.num_experts')} experts top-"
        f"{get('model.moe.top_k')} in {get('model.moe.num_groups')} groups keeping "
        f"{get('model.moe.keep_groups')}, {get('model.moe.num_shared')} shared, "
        f"MTP depth {get('model.mtp.depth')} · {run.total_steps:,} steps of "
        f"{tokens:,} tokens"
    )


def _section(chart: Chart, content: str) -> str:
    return (
        f"<section><h2>{escape(chart.title)}</h2>"
        f'<p class="caption">{escape(chart.caption)}</p>{content}</section>'
    )


def _plot(name: str) -> str:
    return f'<div class="plot" id="{name}"></div>'


def _pair(kind: str, sides: int) -> str:
    plots = "".join(f"<div>{_plot(f'{kind}-{side}')}</div>" for side in range(sides))
    return f'<div class="pair">{plots}</div>'


def _pickers(by_run: Mapping[str, Mapping[str, Chart]], shown: list[str]) -> str:
    if len(shown) < 2:
        return ""
    drawn = [name for name, found in by_run.items() if found]
    selects = "".join(
        f'<div><select id="pick-{side}" aria-label="run on the {where}">'
        + "".join(
            f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>"
            for name in drawn
        )
        + "</select></div>"
        for side, (where, chosen) in enumerate(
            zip(("left", "right"), shown, strict=True)
        )
    )
    return (
        '<div class="pickers"><h2>Two runs side by side</h2>'
        f'<div class="pair">{selects}</div></div>'
    )


def _row(cells: Iterable[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(_row(row) for row in rows)
    return (
        f'<div class="scroll"><table><thead>{_row(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _result(study: Study) -> str:
    rows, palette = table(study), colours(study)
    winners = {name: best(rows, name) for name in LOWER_IS_BETTER}
    lines = [
        [
            f'<i class="swatch" style="background:{palette[label]}"></i>'
            + escape(label),
            str(row["eval_ce"].n if row["eval_ce"] else 0),
            *(_cell(name, label, rows, winners.get(name)) for name in HEADINGS),
        ]
        for label, row in rows.items()
    ]
    return (
        "<section><h2>Result</h2>"
        '<p class="caption">Mean ± standard deviation over seeds, from the final '
        "evaluation on the whole validation set (MaxVio batch: the last 10 % of the "
        "training steps). Green is the lowest; ≈ is not told apart from it by these "
        "seeds. Specialisation: how far the choice of experts depends on the domain, 0 "
        "being not at all.</p>"
        f"{_table(['setting', 'seeds', *HEADINGS.values()], lines)}"
        f'<p class="verdict">{escape(verdict(study))}</p>'
        f"{_differences(study)}{_all_runs(study)}</section>"
    )


def _cell(name: str, label: str, rows: Table, winner: str | None) -> str:
    value = rows[label][name]
    mean, _, std = text_of(name, value).partition(" ± ")
    text = f'{mean} <span class="spread">± {std}</span>' if std else mean
    if value is None or winner is None:
        return text
    if label == winner:
        return f'<span class="best">{text}</span>'
    near = value.n > 1 and not differ(value, rows[winner][name])
    return f"≈ {text}" if near else text


def _differences(study: Study) -> str:
    """What the settings' configs differ in."""
    found = differing(study)
    if not found:
        return ""
    lines = [
        [f"<code>{escape(k)}</code>", *map(escape, v.values())]
        for k, v in found.items()
    ]
    head = ["field", *map(escape, study.labels)]
    return (
        f"<details><summary>What the configs differ in ({len(found)} fields)</summary>"
        f"{_table(head, lines)}</details>"
    )


def _all_runs(study: Study) -> str:
    names = ("name", "seed", "steps", *MEASURES, "status")
    lines = []
    for run in study.runs:
        row = summarize(run)
        options = ", ".join(f"{key}={value}" for key, value in run.overrides.items())
        error = (
            f'<br><span class="failed">{escape(run.error)}</span>' if run.error else ""
        )
        link = escape(os.path.relpath(run.path / "config.json", study.path))
        cells = [_plain(row[name]) for name in names[1:]]
        named = f'<a href="{link}">{escape(run.name)}</a>'
        lines.append([named, *cells, f"<code>{escape(options)}</code>{error}"])
    opened = " open" if any(run.status == FAILED for run in study.runs) else ""
    return (
        f'<details class="runs"{opened}><summary>All runs ({len(study.runs)})</summary>'
        f"{_table([*names, 'overrides'], lines)}</details>"
    )


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
    return escape(str(value))
