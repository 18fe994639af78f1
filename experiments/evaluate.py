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
import math
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import deepseek_jax
from deepseek_jax.eval import logits
from deepseek_jax.files import replacing
from experiments import acceptance, common, placement

CHECKPOINT = (
    "a run's workdir (the newest good checkpoint counts), its checkpoints/, one step "
    "of those, or a converted checkpoint; for acceptance also a sweep's workdir"
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


COMMANDS = (add_logits, acceptance.add, placement.add)


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
