"""Continues a prompt with a checkpoint's model, streaming to the terminal.

  python -m experiments.generate --checkpoint=runs/tiny --prompt="The state of"
  python -m experiments.generate --checkpoint=runs/tiny --prompt-file=p.txt \\
      --temperature=0.8 --top-p=0.95 --n=4 --speculative --json

The prompt is the beginning of a document: the tokenizer's bos goes before it, and eos
ends a sample. --speculative lets the MTP modules draft, which changes the speed and
neither greedy output (but where two tokens are equally likely within rounding) nor the
distribution of samples. Speed and acceptance come last, on stderr.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import deepseek_jax
from deepseek_jax.decode import engine, forward, speculative
from deepseek_jax.decode.cache import DTYPES
from deepseek_jax.decode.sampling import sampling
from deepseek_jax.eval import logits
from deepseek_jax.tokenizer import Tokenizer
from experiments import common

RULES = {
    "temperature": (float, 0.0, "0 is greedy"),
    "top-k": (int, 0, "the K most probable tokens only; 0 is off"),
    "top-p": (float, 1.0, "the most probable tokens that make up P; 1 is off"),
    "min-p": (float, 0.0, "tokens with P of the best one's probability; 0 is off"),
    "repetition": (float, 1.0, "divides the logits of tokens seen before; 1 is off"),
    "seed": (int, 0, "of the first sample; the next ones have the next seeds"),
}


def parser() -> argparse.ArgumentParser:
    found = common.arguments("experiments.generate", __doc__)
    found.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a workdir, its checkpoints/, or one step",
    )
    prompt = found.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE")
    found.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="of a sample; 128"
    )
    found.add_argument(
        "--n", type=int, default=1, metavar="K", help="samples of the prompt; 1"
    )
    found.add_argument(
        "--speculative", action="store_true", help="let MTP modules draft"
    )
    found.add_argument(
        "--depth", type=int, metavar="J", help="drafts a step; all modules by default"
    )
    found.add_argument(
        "--cache-dtype", choices=tuple(DTYPES), default="f32", help="f32"
    )
    found.add_argument(
        "--page", type=int, default=0, metavar="N", help="tokens a cache page; 0: none"
    )
    found.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, no streaming"
    )
    for name, (kind, default, about) in RULES.items():
        found.add_argument(
            f"--{name}", type=kind, default=default, help=f"{about}; {default}"
        )
    return found


def read_prompt(options: argparse.Namespace) -> str:
    """The text of --prompt or --prompt-file.

    Raises:
      ValueError: there is no such file, or it is no UTF-8 text.
    """
    if options.prompt_file is None:
        return str(options.prompt)
    try:
        return options.prompt_file.read_text("utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"--prompt-file {options.prompt_file}: there is no such file"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(
            f"--prompt-file {options.prompt_file}: must be text in UTF-8"
        ) from None


def drafts(options: argparse.Namespace, modules: int) -> int:
    """How many tokens a step drafts.

    Raises:
      ValueError: --depth without --speculative, or a model without modules.
    """
    if options.depth is not None and not options.speculative:
        raise ValueError(f"--depth {options.depth}: needs --speculative")
    if options.depth is not None and options.depth < 1:
        raise ValueError(f"--depth {options.depth}: must be at least 1")
    if not options.speculative:
        return 0
    return int(options.depth or max(modules, 1))


class Stream:
    """Prints a row's text as it grows; holds back half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.tokens, self.shown = tokenizer, list[int](), ""

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.tokens += tokens
        text = self.tokenizer.decode(self.tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[len(self.shown) :], end="", flush=True)
        self.shown = text

    def close(self) -> None:
        """Prints what was held back, if nothing came to complete it."""
        print(self.tokenizer.decode(self.tokens)[len(self.shown) :])


def result(
    report: engine.Report, prompt: str, tokenizer: Tokenizer, per_token: int
) -> dict[str, Any]:
    """What --json prints."""
    tokens = sum(len(row.tokens) for row in report.rows)
    steps = sum(row.steps for row in report.rows)
    samples = [
        {
            "text": tokenizer.decode(row.tokens),
            "tokens": row.tokens,
            "log_probs": row.log_probs,
            "stopped": row.stopped,
        }
        for row in report.rows
    ]
    return {
        "prompt": prompt,
        "samples": samples,
        "compile_s": report.compile_s,
        "prefill_s": report.prefill_s,
        "decode_s": report.decode_s,
        "tokens_per_s": tokens / report.decode_s,
        "tokens_per_step": tokens / steps,
        "acceptance": speculative.acceptance(report.rows),
        "cache_bytes": report.cache_bytes,
        "cache_bytes_per_token": per_token,
    }


def summary(found: dict[str, Any]) -> str:
    """One line for people."""
    tokens = sum(len(sample["tokens"]) for sample in found["samples"])
    line = (
        f"{tokens} tokens, {found['tokens_per_s']:.0f} tokens/s "
        f"(compiled in {found['compile_s']:.1f} s), "
        f"cache {found['cache_bytes_per_token']} bytes/token"
    )
    for k, share in enumerate(found["acceptance"], 1):
        line += f", draft {k} accepted {share:.0%}"
    if found["acceptance"]:
        line += f", {found['tokens_per_step']:.2f} tokens/step"
    return line


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.n < 1:
        raise ValueError(f"--n {options.n}: must be at least 1")
    text = read_prompt(options)
    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    rules = {name.replace("-", "_") for name in RULES}
    rule = sampling(options.n, **{name: getattr(options, name) for name in rules})
    config, params, balance, tokenizer = deepseek_jax.load(options.checkpoint)
    if tokenizer is None:
        raise ValueError(
            f"--checkpoint {options.checkpoint}: has no tokenizer, which text needs"
        )
    model, rope = logits.build(config), config.model.attention.rope
    depth = drafts(options, config.model.mtp.depth)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)]] * options.n
    context = int(rope.original_length * rope.factor)
    limits = {"depth": depth, "context": context}
    engine.check(model, prompts, options.max_tokens, page=options.page, **limits)
    weights = forward.split(model, params, balance)
    del params  # or they would be held twice
    stream, streaming = Stream(tokenizer), not options.json and options.n == 1
    if streaming:
        print(text, end="", flush=True)
    report = engine.generate(
        model,
        weights,
        prompts,
        options.max_tokens,
        rule=rule,
        stop=(tokenizer.eos_id,),
        dtype=DTYPES[options.cache_dtype],
        page=options.page,
        callback=stream if streaming else None,
        **limits,
    )
    per_token = engine.bytes_per_token(config.model, depth, DTYPES[options.cache_dtype])
    found = result(report, text, tokenizer, per_token)
    if options.json:
        print(json.dumps(found))
        return
    if streaming:
        stream.close()
    else:
        for number, sample in enumerate(found["samples"], 1):
            print(f"--- sample {number}\n{text}{sample['text']}")
    print(summary(found), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
