"""The numbers of a study: its table over seeds, what they show, its summary files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.analysis.runs import Record, Study
from deepseek_jax.analysis.seeds import (
    MEASURES,
    SUMMARY_FIELDS,
    Spread,
    differ,
    specialisation_index,
    spread,
    summarize,
)
from deepseek_jax.files import write_text

HEADINGS = {
    "eval_ce": "validation loss",
    "maxvio_global": "MaxVio global",
    "maxvio_batch": "MaxVio batch",
    "dead_experts": "dead experts",
    "specialisation": "specialisation",
    "tokens_per_s": "tokens/s",
}
DECIMALS = {"dead_experts": 1, "tokens_per_s": 0}  # of the mean; 3 unless told
LOWER_IS_BETTER = ("eval_ce", "maxvio_global", "maxvio_batch")


Table = dict[str, dict[str, Spread | None]]


def table(study: Study) -> Table:
    """For each setting, every measure's spread over its finished seeds."""
    rows: Table = {}
    for label in study.labels:
        made = [summarize(run) for run in study.of(label)]
        rows[label] = {
            name: spread((row["seed"], row[name]) for row in made) for name in MEASURES
        }
        rows[label]["specialisation"] = spread(
            (run.seed, specialisation_index(run.final, run.num_moe))
            for run in study.of(label)
            if run.final
        )
    return rows


def best(rows: Table, measure: str) -> str | None:
    """The label with the lowest mean, None if fewer than two have one."""
    known = {label: row[measure].mean for label, row in rows.items() if row[measure]}
    return min(known, key=known.__getitem__) if len(known) > 1 else None


def verdict(study: Study) -> str:
    """What may be said of the validation losses, and what may not."""
    rows = table(study)
    winner = best(rows, "eval_ce")
    if winner is None:
        return "Nothing to compare yet: fewer than two settings have a finished run."
    losses = {label: row["eval_ce"] for label, row in rows.items() if row["eval_ce"]}
    first = losses.pop(winner)
    text = f"Lowest validation loss: {winner}, {text_of('eval_ce', first)} nats"
    counts = sorted({first.n, *(loss.n for loss in losses.values())})
    if counts[-1] == 1:
        return (
            f"{text}. Every setting has one seed: nothing here says how large the "
            "spread between seeds is, so no difference in loss is a finding."
        )
    text += f" ({' to '.join(map(str, sorted({counts[0], counts[-1]})))} seeds). "
    worse = {k: loss for k, loss in losses.items() if differ(first, loss)}
    same = [label for label in losses if label not in worse]
    if worse:
        gaps = (f"{k} (+{loss.mean - first.mean:.3f})" for k, loss in worse.items())
        text += f"Worse beyond the spread of seeds: {', '.join(gaps)}. "
    if same:
        text += f"Not told apart from it: {', '.join(same)}. "
    return text + (
        "Differences below the seed spread are not findings (paired t-test over seeds "
        "at 5 %, not corrected for the number of comparisons)."
    )


def _cells(study: Study) -> list[list[str]]:
    """The table as text, its heading first: mean ± std over seeds of each setting."""
    lines = [["setting", "n", *HEADINGS.values()]]
    for label, row in table(study).items():
        n = row["eval_ce"].n if row["eval_ce"] else 0
        lines.append([label, str(n), *(text_of(name, row[name]) for name in HEADINGS)])
    return lines


def text_table(study: Study) -> str:
    """The table for a terminal."""
    lines = _cells(study)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def markdown(study: Study) -> str:
    """The table and what it shows, as Markdown."""
    head, *rows = _cells(study)
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
    command = f"`{study.command}`\n\n" if study.command else ""
    return f"# {study.title}\n\n{command}{lines}\n\n{verdict(study)}\n"


def text_of(name: str, value: Spread | None) -> str:
    """A measure's mean ± std; speed without the latter, which other processes make."""
    if value is None:
        return "–"
    decimals = DECIMALS.get(name, 3)
    text = f"{value.mean:,.{decimals}f}"
    known = value.std is not None and name != "tokens_per_s"
    return f"{text} ± {value.std:.{decimals}f}" if known else text


def write_summaries(path: Path, rows: Sequence[Record]) -> None:
    """Writes summary.json and summary.csv, each at once."""
    write_text(path / "summary.json", json.dumps(list(rows), indent=1) + "\n")
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, SUMMARY_FIELDS)
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"overrides": json.dumps(row["overrides"])})
    write_text(path / "summary.csv", sheet.getvalue())
