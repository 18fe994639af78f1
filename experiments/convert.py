"""Converts checkpoints from and to the Hugging Face form of DeepSeek's releases.

    python -m experiments.convert --from-hf DeepSeek-V2-Lite --to runs/v2_lite
    python -m experiments.convert --to-hf out --from runs/tiny [--dtype bf16|fp8|f32]

--from-hf reads a folder with config.json and safetensors: DeepSeek-V2, V2-Lite, V3, R1
and models of their classes (DeepseekV2ForCausalLM, DeepseekV3ForCausalLM), one file or
many with an index, in bfloat16, float16, float32 or block-FP8, with MTP layers or
without. --to makes a workdir of it, for `deepseek_jax.load`, experiments.evaluate and
--from. bfloat16 and float32 stay what they are; FP8 becomes bfloat16, and the original
scales are kept for the way back. Tokenizer files come along.

--from takes a run's workdir (the newest good checkpoint counts), its checkpoints/, one
step of those, or a converted checkpoint; --to-hf makes a folder that transformers
loads. What was converted and not trained since comes out bit for bit as it went in, if
--dtype is what it was: the same tensors in the same files. A model trained here is
given DeepSeek's names; one that transformers has no class for is refused, with the
setting that is to blame.

Whatever the size of the model, memory stays below twice its largest tensor plus 1 GiB.
Nothing appears under the target's name until it is whole.
"""

import argparse
import sys
import time
from pathlib import Path

import jax

from deepseek_jax import tokenizer
from deepseek_jax.convert import hf_export, hf_import
from deepseek_jax.convert.common import TOKENIZER
from experiments import common

DTYPES = """\
what the weights are stored in: bf16 (the default), fp8 as released (E4M3 in blocks of
128 x 128, the rest bf16), or f32; router biases are f32 always"""


class Bar:
    """Progress on stderr: redrawn in a terminal, otherwise a line now and then."""

    def __init__(self, width: int = 30, pause: float = 15.0):
        self.width, self.start, self.shown = width, time.monotonic(), 0.0
        self.redraw = sys.stderr.isatty()
        self.pause = 0.1 if self.redraw else pause

    def __call__(self, done: int, total: int, what: str) -> None:
        """Shows that `done` of `total` bytes are done, `what` the last of them."""
        now = time.monotonic()
        if 0 < done < total and now - self.shown < self.pause:
            return
        self.shown = now
        share = done / max(total, 1)
        filled = "#" * round(share * self.width)
        rate = done / 1e6 / max(now - self.start, 1e-3)
        text = (
            f"[{filled:.<{self.width}}] {share:4.0%} of {total / 1e9:.2f} GB, "
            f"{rate:.0f} MB/s  {what[-44:]}"
        )
        end = "\n" if done == total or not self.redraw else ""
        lead = "\r\033[K" if self.redraw else ""
        print(lead + text, end=end, file=sys.stderr, flush=True)
        if done in (0, total):
            self.start = now  # of the next pass over the files


def parser() -> common.Parser:
    """The command line."""
    found = common.Parser(
        "python -m experiments.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--from-hf", type=Path, metavar="DIR", help="what to import")
    found.add_argument("--to", type=Path, metavar="WORKDIR", help="where; must be new")
    found.add_argument("--to-hf", type=Path, metavar="DIR", help="where; must be new")
    found.add_argument(
        "--from", type=Path, metavar="CKPT", dest="source", help="what to export"
    )
    export = found.add_argument_group("of an export")
    export.add_argument("--dtype", choices=tuple(hf_export.DTYPE_NAMES), help=DTYPES)
    export.add_argument(
        "--ue8m0",
        action="store_true",
        help="fp8 scales are powers of two, as V3.1's; imported ones of that kind stay "
        "so without it",
    )
    export.add_argument(
        "--stacked",
        action=argparse.BooleanOptionalAction,
        help="experts as two tensors a layer, the form that transformers 5 has in "
        "memory; the default is as imported, else one by one",
    )
    export.add_argument(
        "--shard-gb",
        type=float,
        default=hf_export.SHARD / 1e9,
        metavar="GB",
        help="size of a file, unless an imported layout is kept (%(default)g)",
    )
    found.add_argument(
        "--traceback", action="store_true", help="show where an error came from"
    )
    return found


def check(options: argparse.Namespace) -> None:
    """Refuses half a command, and both at once.

    Raises:
      ValueError: as said.
    """
    given = [options.from_hf and options.to, options.to_hf and options.source]
    names = (options.from_hf, options.to, options.to_hf, options.source)
    if sum(map(bool, given)) != 1 or sum(map(bool, names)) != 2:
        raise ValueError(
            "give --from-hf DIR with --to WORKDIR, or --to-hf DIR with --from CKPT; "
            "see python -m experiments.convert --help"
        )
    if options.from_hf and (
        options.dtype or options.ue8m0 or options.stacked is not None
    ):
        raise ValueError(
            "--dtype, --ue8m0 and --stacked are of an export: an import keeps what the "
            "files have"
        )
    if not options.shard_gb > 0:
        raise ValueError(f"--shard-gb = {options.shard_gb}: must be positive")


def check_tokenizer(folder: Path) -> None:
    """Says so if the tokenizer that came along is of no use here."""
    try:
        if folder.is_dir():
            tokenizer.load(folder)
    except ValueError as error:
        print(f"the tokenizer is kept for exports only: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    check(options)
    # Bytes are moved and turned; an accelerator would only stand in the way.
    jax.config.update("jax_platforms", "cpu")
    if options.from_hf:
        config = hf_import.import_hf(options.from_hf, options.to, progress=Bar())
        model = config.model
        print(
            f"{options.to}: {model.num_layers} layers of width {model.dim}, "
            f"{model.moe.num_experts} experts, {model.mtp.depth} MTP modules"
        )
        check_tokenizer(options.to / TOKENIZER)
        return
    hf_export.export_hf(
        options.source,
        options.to_hf,
        dtype=options.dtype or "bf16",
        ue8m0=options.ue8m0,
        stacked=options.stacked,
        shard=int(options.shard_gb * 1e9),
        progress=Bar(),
    )
    print(f"{options.to_hf}: {len(list(options.to_hf.glob('*.safetensors')))} file(s)")


if __name__ == "__main__":
    common.guarded(main)
