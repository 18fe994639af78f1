"""The command `placement` of `experiments.evaluate`."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.analysis import runs
from deepseek_jax.analysis.charts import COLOURS, GREY, Chart, Line, Panel
from deepseek_jax.checkpoint import folders
from deepseek_jax.eval import placement
from deepseek_jax.files import write_text
from experiments import common

ABOUT = """\
Places a run's experts, some of them copied, on devices so that these have about the
same load (DeepSeek's EPLB), and says how even they are before and after. It minds
neither --groups nor --nodes where the first do not divide over the second.

reads   DIR/metrics.jsonl: the loads of the run's last evaluation, or of the last one up
        to a checkpoint's step; no weights. Placed by the loads that are then measured
        is the best case; --placed-by places by an earlier evaluation of the run
prints  by layer, largest over mean load: of an expert, of a device with the experts in
        order, of a device as placed; then, on each domain's own loads, the mean over
        layers under the placement made by all of them together
writes  --json: {step, placed_by, sizes, mean: {before, after}, domains: {name: {before,
        after}}, layers: [{layer, expert, before, after, places}]}; places: the expert
        at each place, device after device; before is null where the experts do not
        divide over the devices
        --plot: before and after by layer, a .png

In Python: deepseek_jax.parallel.eplb, deepseek_jax.eval.placement.
"""
METRICS = "metrics.jsonl"


def add(commands: Any, options_of_all: common.Parser) -> None:
    parser = commands.add_parser(
        "placement",
        parents=[options_of_all],
        help="device loads before and after placing copies of experts",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, about in (
        ("devices", 8, "in all; 8"),
        ("nodes", 1, "that the devices are on; 1"),
        ("replicas", None, "places on all devices; by default a copy more on each"),
        ("groups", None, "of experts kept on one node; the model's by default"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=about
        )
    parser.add_argument(
        "--placed-by", type=int, metavar="STEP", help="of the evaluation to place by"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """The command."""
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name}: {path} is a folder; name a file")
    found, record = evaluation(options.checkpoint)
    chosen = options.placed_by
    known = record if chosen is None else at_step(found, chosen)
    loads_RE = np.array(record["eval_load"])
    sizes = sizes_of(options, loads_RE.shape[1], found.get("model.moe.num_groups"))
    by_domain = record.get("eval_load_by_domain", {})
    report = placement.measure(
        loads_RE, **sizes, by_domain=by_domain, placed_by=known["eval_load"]
    )
    names = found.router_names(len(loads_RE))
    made = summary(report, loads_RE, names)
    print(table(made))
    if options.json:
        sizes["experts"] = loads_RE.shape[1]
        steps = {"step": record["step"], "placed_by": known["step"]}
        content = {**steps, "sizes": sizes, **made}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    if options.plot:
        # Here, so that other commands do not wait for the drawing packages.
        from deepseek_jax.analysis import plots

        plots.save(chart(report, names), options.plot)


def evaluation(checkpoint: Path) -> tuple[runs.Run, runs.Record]:
    """The run that a checkpoint is of, and its last evaluation up to there.

    Raises:
      ValueError: there is no run, or none of its evaluations has loads.
    """
    workdir, step = checkpoint, None
    if not (workdir / METRICS).is_file():
        root, step = folders.resolve(checkpoint)
        workdir = root.parent
    found = runs.read_run(workdir)
    records = [
        record
        for record in found.evals
        if record.get("eval_load") and (step is None or record["step"] <= step)
    ]
    if not records:
        until = "" if step is None else f" up to step {step}"
        raise ValueError(
            f"--checkpoint {checkpoint}: {workdir / METRICS} has no measured loads"
            f"{until}: give a run that was evaluated (train.eval_every) and has experts"
        )
    return found, records[-1]


def at_step(found: runs.Run, step: int) -> runs.Record:
    """The evaluation of a step.

    Raises:
      ValueError: that step was not evaluated.
    """
    records = {each["step"]: each for each in found.evals if each.get("eval_load")}
    if step not in records:
        raise ValueError(
            f"--placed-by {step}: must be a step with measured loads: {sorted(records)}"
        )
    return records[step]


def sizes_of(
    options: argparse.Namespace, experts: int, groups: int | None
) -> dict[str, int]:
    """The sizes asked for, or by default those of the model and a copy a device.

    Raises:
      ValueError: there are no devices.
    """
    if options.devices < 1:
        raise ValueError(f"--devices {options.devices}: must be at least 1")
    places = (experts // options.devices + 1) * options.devices
    return {
        "devices": options.devices,
        "nodes": options.nodes,
        "replicas": places if options.replicas is None else options.replicas,
        "groups": (groups or 1) if options.groups is None else options.groups,
    }


def summary(
    report: placement.Report, loads_RE: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """What the table and the JSON show, as `ABOUT` says."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    def means(found: placement.Evenness) -> dict[str, float | None]:
        return {key: known(values.mean()) for key, values in found._asdict().items()}

    layers = [
        {
            "layer": name,
            "expert": known(load_E.max() / load_E.mean() if load_E.any() else np.nan),
            "before": known(before),
            "after": known(after),
            "places": places.tolist(),
        }
        for name, load_E, before, after, places in zip(
            names, loads_RE, *report.total, report.placement.phy2log, strict=True
        )
    ]
    domains = {name: means(found) for name, found in report.domains.items()}
    return {"mean": means(report.total), "domains": domains, "layers": layers}


def table(made: dict[str, Any]) -> str:
    """Largest over mean loads for a terminal."""

    def row(name: str, found: dict[str, Any]) -> list[str]:
        numbers = (found.get(key) for key in ("expert", "before", "after"))
        return [name, *("" if x is None else f"{x:.3f}" for x in numbers)]

    lines = [["", "expert", "before", "after"]]
    lines += [row(found["layer"], found) for found in made["layers"]]
    lines.append(row("mean", made["mean"]))
    lines += [row(f"on {name}", found) for name, found in made["domains"].items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def chart(report: placement.Report, names: list[str]) -> Chart:
    """Before and after by layer."""
    lines = tuple(
        Line(label, colour, names, values, style="marked")
        for label, colour, values in (
            ("before", GREY, report.total.before),
            ("after", COLOURS["v3"], report.total.after),
        )
    )
    panel = Panel("", "", "largest / mean load", lines, from_zero=True)
    caption = "1 is even; the slowest device takes this many times its share."
    title = "Load of the busiest device"
    return Chart("placement", title, caption, (panel,), columns=1)
