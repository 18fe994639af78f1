"""Measures a checkpoint.

    python -m experiments.evaluate logits --checkpoint runs/tiny --tokens tokens.npy \\
        --out logits.npy [--mtp]
    python -m experiments.evaluate acceptance --checkpoint runs/tiny \\
        --out acceptance.json [--temperature 0.8]
    python -m experiments.evaluate placement --checkpoint runs/tiny --devices 8 \\
        --nodes 2 [--replicas 24] [--json placement.json] [--plot placement.png]

`COMMAND --help` says what a command reads and writes.
"""

import argparse
import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import deepseek_jax
from deepseek_jax.checkpoint import folders, manager
from deepseek_jax.config import Config
from deepseek_jax.data import heldout
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.decode import forward
from deepseek_jax.eval import acceptance, logits
from deepseek_jax.files import replacing, write_text
from experiments import common, placement

CHECKPOINT = (
    "a run's workdir (the newest good checkpoint counts), its checkpoints/, one step "
    "of those, or a converted checkpoint"
)
LOGITS = """\
Computes a checkpoint's logits of given tokens, in float32.

reads   --tokens: .npy, int32 [B, L], rows of token ids; a row is one document that
        starts at position 0 (put the bos id there if the model expects it)
writes  --out: .npy, float32 [B, L, V]; [b, i] predicts token i+1 from tokens 0..i
        with --mtp, beside it, named mtp_ and the same: float32 [J, B, L, V] of J
        multi-token prediction modules; [k-1, b, i] predicts token i+k+1 from tokens
        0..i+k; the last k positions have no such input and are NaN

Files appear under their names when they are whole. In Python:
deepseek_jax.eval.logits.compute.
"""
ACCEPTANCE = """\
Measures how often the main model accepts what its MTP modules draft: in speculative
decoding that continues the beginnings of held-out documents of every domain, and on
the documents' own text, where a module and the main model may name the same token.

reads   the corpus that the run was trained on (data.source)
prints  a table by domain; ± is the standard error over prompts, and in the last line
        the standard deviation over domains
writes  --out: JSON of the settings and
        domains: {name: {prompts, accepted: [share of drafts 1..J], tokens_per_step}}
        together: the same over all prompts; mean, spread: over domains, by draft
        text: {name: [share of positions where modules 1..J agree]}
        a share is {value, error, of}: of how many; null where nothing can be said

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


def add_logits(commands: Any, options_of_all: common.Parser) -> None:
    parser = commands.add_parser(
        "logits",
        parents=[options_of_all],
        help="logits of given tokens, as a .npy file",
        description=LOGITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--mtp", action="store_true", help="also of the MTP modules")
    parser.set_defaults(run=run_logits)


def run_logits(options: argparse.Namespace) -> None:
    """The command `logits`."""
    tokens_BL = read_tokens(options.tokens)
    outs = [options.out, options.out.with_name(f"mtp_{options.out.name}")]
    outs = outs[: 1 + options.mtp]
    for out in outs:
        if out.is_dir() or out.resolve() == options.tokens.resolve():
            raise ValueError(f"--out: {out} is there and no output; name another file")
    config, params, balance, _ = deepseek_jax.load(options.checkpoint)
    model = logits.build(config)
    logits.check(model, tokens_BL, options.mtp)
    one = (*tokens_BL.shape, config.model.vocab_size)
    shapes = [one, (config.model.mtp.depth, *one)][: len(outs)]
    with contextlib.ExitStack() as stack:
        places: list[tuple[BinaryIO, int]] = []  # where each module's logits begin
        for out, shape in zip(outs, shapes):
            file = stack.enter_context(stack.enter_context(replacing(out)).open("wb"))
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            modules = range(math.prod(shape) // math.prod(one))
            places += [(file, file.tell() + 4 * k * math.prod(one)) for k in modules]
        need_space(options.out.parent, shapes)
        for block in logits.blocks(model, params, balance, tokens_BL, mtp=options.mtp):
            place, start = places[block.module]
            place.seek(start + 4 * block.start * one[-1])
            place.write(block.logits_TV.astype("<f4").data)
    for out, shape in zip(outs, shapes):
        print(f"{out}: float32 {list(shape)}")


def read_tokens(path: Path) -> np.ndarray:
    """The array of a .npy file.

    Raises:
      ValueError: no such file, or it is no .npy of numbers.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file)
    except FileNotFoundError:
        raise ValueError(f"--tokens {path}: there is no such file") from None
    except (ValueError, OSError):
        raise ValueError(
            f"--tokens {path} is damaged or no .npy file, as numpy.save writes it"
        ) from None


def need_space(folder: Path, shapes: list[tuple[int, ...]]) -> None:
    """Raises OSError if arrays of float32 don't fit on a folder's disk."""
    need = 4 * sum(math.prod(shape) for shape in shapes)
    if need > (free := shutil.disk_usage(folder).free):
        raise OSError(
            f"the logits take {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at "
            f"{folder}: give fewer tokens or another --out"
        )


def add_acceptance(commands: Any, options_of_all: common.Parser) -> None:
    parser = commands.add_parser(
        "acceptance",
        parents=[options_of_all],
        help="how often MTP drafts are accepted, by depth and domain",
        description=ACCEPTANCE,
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
    parser.set_defaults(run=run_acceptance)


def run_acceptance(options: argparse.Namespace) -> None:
    """The command `acceptance`."""
    if options.out.is_dir():
        raise ValueError(f"--out: {options.out} is a folder; name a file")
    if options.prompts < 1:
        raise ValueError(f"--prompts {options.prompts}: must be at least 1")
    config, params, balance, tokenizer = deepseek_jax.load(options.checkpoint)
    if tokenizer is None:
        raise ValueError(
            f"--checkpoint {options.checkpoint}: has no tokenizer, which text needs"
        )
    corpus = corpus_of(options.checkpoint, config)
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
    used = [*SETTINGS, "depth"]
    settings = {name: getattr(options, name.replace("-", "_")) for name in used}
    settings["depth"] = len(report.mean)
    found = {"settings": settings, **plain(report), "text": plain(text)}
    print(table(report, text))
    write_text(options.out, json.dumps(found, indent=1) + "\n")


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


def table(
    report: acceptance.Report, text: dict[str, tuple[acceptance.Ratio, ...]]
) -> str:
    """Acceptance and agreement by domain, for a terminal."""

    def share(value: float, error: float, form: str = ".1%") -> str:
        known = "" if math.isnan(error) else f" ± {error:{form}}"
        return f"{value:{form}}{known}"

    depth, modules = len(report.mean), len(next(iter(text.values())))
    lines = [
        ["domain", "prompts"]
        + [f"draft {k}" for k in range(1, depth + 1)]
        + ["tokens/step"]
        + [f"module {k} on text" for k in range(1, modules + 1)]
    ]
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
    padded = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in padded
    )


COMMANDS = (add_logits, add_acceptance, placement.add)


def main(arguments: list[str] | None = None) -> None:
    parser = common.Parser(
        "python -m experiments.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options_of_all = common.Parser(add_help=False)
    options_of_all.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT
    )
    options_of_all.add_argument(
        "--traceback", action="store_true", help="show where an error came from"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands, options_of_all)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    common.guarded(main)
