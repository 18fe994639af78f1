"""The command `acceptance` of `experiments.evaluate`."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import deepseek_jax
from deepseek_jax.analysis import runs
from deepseek_jax.analysis.seeds import spread
from deepseek_jax.checkpoint import folders, manager, metadata
from deepseek_jax.config import Config
from deepseek_jax.data import heldout
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.decode import forward
from deepseek_jax.eval import acceptance, logits
from deepseek_jax.files import write_text
from experiments import common

ABOUT = """\
Measures how often the main model accepts what its MTP modules draft: in speculative
decoding that continues the beginnings of held-out documents of every domain, and on
the documents' own text, where a module and the main model may name the same token.

reads   the corpus that the run was trained on (data.source)
prints  a table by domain; ± is the standard error over prompts, and in the last line
        the standard deviation over domains. Of a sweep: a table by setting of the runs
        that are done and have modules; ± is the standard deviation over seeds
writes  --out: JSON of the settings and
        domains: {name: {prompts, accepted: [share of drafts 1..J], tokens_per_step}}
        together: the same over all prompts; mean, spread: over domains, by draft
        text: {name: [share of positions where modules 1..J agree]}
        a share is {value, error, of}: of how many; null where nothing can be said. Of a
        sweep: the settings, and runs: {name: all this}

In Python: deepseek_jax.eval.acceptance.
"""
# What acceptance is measured with: type, default, help.
SETTINGS = {
    "prompts": (int, 32, "N", "of each domain, as far as it has documents"),
    "prompt-tokens": (int, 32, "P", "of each prompt"),
    "max-tokens": (int, 128, "N", "after each prompt, unless the document ends before"),
    "temperature": (float, 0.0, "T", "0 is greedy"),
    "seed": (int, 0, "S", "of the first prompt; the others have the next seeds"),
}
Text = dict[str, tuple[acceptance.Ratio, ...]]
Measured = tuple[acceptance.Report, Text]


def add(commands: Any, options_of_all: common.Parser) -> None:
    parser = commands.add_parser(
        "acceptance",
        parents=[options_of_all],
        help="how often MTP drafts are accepted, by depth and domain, or of a sweep",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--depth", type=int, metavar="J", help="drafts a step; all modules by default"
    )
    for name, (kind, default, letter, about) in SETTINGS.items():
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar=letter,
            help=f"{about}; {default}",
        )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """The command."""
    if options.out.is_dir():
        raise ValueError(f"--out: {options.out} is a folder; name a file")
    if options.prompts < 1:
        raise ValueError(f"--prompts {options.prompts}: must be at least 1")
    used = [*SETTINGS, "depth"]
    settings = {name: getattr(options, name.replace("-", "_")) for name in used}
    if (options.checkpoint / metadata.SWEEP).exists():
        run_sweep(options, settings)
        return
    made = measured(options, options.checkpoint)
    print(table(*made))
    settings["depth"] = len(made[0].mean)
    store(options.out, {"settings": settings, **as_json(made)})


def run_sweep(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Each run of a sweep that is done and has modules, stored one by one.

    Raises:
      ValueError: there is none, one has fewer modules than `--depth`, or as `measured`.
    """
    study = runs.read(options.checkpoint)
    chosen = [
        run
        for run in study.runs
        if run.status == runs.DONE and run.get("model.mtp.depth")
    ]
    undone = sum(run.status != runs.DONE for run in study.runs)
    without = len(study.runs) - undone - len(chosen)
    left = f"{undone} runs are not done, {without} have no MTP modules"
    if not chosen:
        raise ValueError(f"--checkpoint {options.checkpoint}: nothing to do, {left}")
    if undone or without:
        print(f"left out: {left}", file=sys.stderr)
    for run in chosen:
        depth = run.get("model.mtp.depth")
        if (options.depth or 0) > depth:
            raise ValueError(
                f"--depth {options.depth}: {run.name} has {depth} MTP modules; leave "
                "--depth out for all of each"
            )
    found: list[tuple[runs.Run, Measured]] = []
    for number, run in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {run.name}", file=sys.stderr, flush=True)
        found.append((run, measured(options, run.path)))
        by_run = {run.name: as_json(made) for run, made in found}
        store(options.out, {"settings": settings, "runs": by_run})
    print(seeds_table(found))


def store(out: Path, found: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all."""
    write_text(out, json.dumps(found, indent=1) + "\n")


def measured(options: argparse.Namespace, checkpoint: Path) -> Measured:
    """Acceptance, and agreement on text, of one checkpoint.

    Raises:
      ValueError: it has no tokenizer or no MTP modules, or as `corpus_of`,
        `heldout.documents` and `acceptance.measure`.
    """
    config, params, balance, tokenizer = deepseek_jax.load(checkpoint)
    if tokenizer is None:
        raise ValueError(
            f"--checkpoint {checkpoint}: has no tokenizer, which text needs"
        )
    if not config.model.mtp.depth:
        raise ValueError(
            f"--checkpoint {checkpoint}: has no MTP modules (model.mtp.depth = 0), and "
            "nothing else drafts"
        )
    corpus = corpus_of(checkpoint, config)
    model, rope = logits.build(config), config.model.attention.rope
    # A token to come, so that a prompt is never a whole document.
    least = options.prompt_tokens + 1
    documents = heldout.documents(corpus, tokenizer, options.prompts, least)
    report = acceptance.measure(
        model,
        forward.split(model, params, balance),
        documents,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        depth=options.depth,
        temperature=options.temperature,
        seed=options.seed,
        stop=(tokenizer.eos_id,),
        context=int(rope.original_length * rope.factor),
    )
    text = acceptance.agreement(model, params, balance, documents)
    return report, text


def as_json(made: Measured) -> dict[str, Any]:
    """What is stored of one checkpoint."""
    report, text = made
    return {**plain(report), "text": plain(text)}


def corpus_of(checkpoint: Path, config: Config) -> Corpus:
    """The corpus that a checkpoint was trained on; of a converted one, `data.source`.

    Raises:
      ValueError: it is not there, or it is another one by now, of which something else
        is held out.
    """
    corpus = open_corpus(config.data)
    trained = manager.read_config(*folders.resolve(checkpoint))["corpus"]["hash"]
    if trained and trained != corpus.hash:
        raise ValueError(
            f"data.source = {config.data.source!r}: is another corpus (hash "
            f"{corpus.hash}) than the checkpoint was trained on (hash {trained}), so "
            "what training held out is not known; bring that one back"
        )
    return corpus


def plain(value: Any) -> Any:
    """Named tuples as dicts and NaN as None, fit for JSON."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def share(value: float, error: float | None, form: str = ".1%") -> str:
    """A number and its error, if there is one, for a terminal."""
    known = error is not None and not math.isnan(error)
    return f"{value:{form}}" + (f" ± {error:{form}}" if known else "")


def table(report: acceptance.Report, text: Text) -> str:
    """Acceptance and agreement by domain, for a terminal."""
    depth, modules = len(report.mean), len(next(iter(text.values())))
    lines = [["domain", "prompts", *columns(depth, modules)]]
    for domain, made in {**report.domains, "together": report.together}.items():
        speed = made.tokens_per_step
        lines.append(
            [domain, str(made.prompts)]
            + [share(one.value, one.error) for one in made.accepted]
            + [share(speed.value, speed.error, ".2f")]
            + [share(one.value, one.error) for one in text.get(domain, ())]
        )
    spread = [share(*each) for each in zip(report.mean, report.spread)]
    lines.append(["over domains", "", *spread])
    return aligned(lines)


def seeds_table(found: list[tuple[runs.Run, Measured]]) -> str:
    """Acceptance over all prompts, and agreement over domains, by setting."""
    drafts = max(len(report.mean) for _, (report, _) in found)
    modules = max(len(next(iter(text.values()))) for _, (_, text) in found)
    lines = [["setting", "seeds", *columns(drafts, modules)]]
    for label in dict.fromkeys(run.label for run, _ in found):
        mine = [(run, *made) for run, made in found if run.label == label]

        def over(value: Any, form: str = ".1%", mine: Any = mine) -> str:
            made = spread((run.seed, known(value(*made))) for run, *made in mine)
            return share(made.mean, made.std, form) if made else ""

        _, report, text = mine[0]
        drafts_here, modules_here = len(report.mean), len(next(iter(text.values())))
        lines.append(
            [label, str(len({run.seed for run, *_ in mine}))]
            + [
                over(lambda report, _, k=k: report.together.accepted[k].value)
                for k in range(drafts_here)
            ]
            + [""] * (drafts - drafts_here)
            + [over(lambda report, _: report.together.tokens_per_step.value, ".2f")]
            + [
                over(lambda _, text, k=k: over_domains(text, k))
                for k in range(modules_here)
            ]
        )
    return aligned(lines)


def known(value: float) -> float | None:
    """None where nothing can be said."""
    return None if math.isnan(value) else value


def over_domains(text: Text, module: int) -> float:
    """The mean of the agreement in domains where there is any text."""
    each = [shares[module].value for shares in text.values()]
    there = [value for value in each if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def columns(drafts: int, modules: int) -> list[str]:
    """Headings of what is measured."""
    return [
        *(f"draft {k}" for k in range(1, drafts + 1)),
        "tokens/step",
        *(f"module {k} on text" for k in range(1, modules + 1)),
    ]


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells under one another; a line may be short."""
    padded = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        ).rstrip()
        for line in padded
    )
