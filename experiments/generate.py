"""Continues a prompt with a checkpoint's model, streaming to the terminal.

  python -m experiments.generate --checkpoint=runs/tiny --prompt="The state of"
  python -m experiments.generate --checkpoint=runs/tiny --prompt-file=p.txt \\
      --temperature=0.8 --top-p=0.95 --n=4 --speculative --json

The prompt is the beginning of a document: the tokenizer's bos goes before it, and eos
ends a sample. --speculative lets the MTP modules draft, which changes the speed and
neither greedy output (but where two tokens are equally likely within rounding) nor the
distribution of samples. By default everything is computed in float32.

With --compute=bf16 --cache-dtype=bf16 products are of bfloat16 numbers, and on a Hopper
GPU attention over the cache is a kernel (with --page, pages of whole 64 tokens), which
a line on stderr tells; elsewhere they only round. Tokens within rounding of each other
may then change places.

--mesh spreads the model's experts over all devices, and the samples too, of which each
device then makes as many (JAX_NUM_CPU_DEVICES=n in the environment simulates n devices
on a CPU). With --replicas there are P places for experts: the busiest by the loads of
the run's last evaluation get copies, and all are placed so that devices have about the
same load (`experiments.evaluate placement`). The output stays the same.

Figures come last, on stderr. tokens/s is of decoding alone: loading, compilation, the
prompt and printing don't count. With --speculative also: the share of draft 1, 2, ..
that was accepted, of how often it was judged (where those before it were accepted);
tokens per step; and the speed-up over plain decoding, for which the middle of each
sample, 128 tokens at most, is decoded again without drafts, in the same process and
after compilation. --no-compare saves the seconds that this takes.

--json prints, in place of all that, {prompt, samples: [{text, tokens, log_probs,
stopped}], tokens_per_s, tokens_per_step, acceptance, speed: {step_s, plain_step_s,
speed_up}, mesh: {axes, devices, experts, places, step, load_before, load_after}, ...};
log_probs are the model's own, before temperature and other rules; loads are the busiest
device's over the mean, on average over layers, by the evaluation after that step;
`attention` is {implementation, reason} of attention over the cache; prefill_s has its
own compilation in it, which compile_s has not.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import deepseek_jax
from deepseek_jax.checkpoint import folders, manager, metadata
from deepseek_jax.config import Config, RuntimeConfig
from deepseek_jax.decode import engine, forward, request, speculative, speed
from deepseek_jax.decode.cache import DTYPES
from deepseek_jax.decode.sampling import Sampling, sampling
from deepseek_jax.eval import logits
from deepseek_jax.runtime import Choice
from deepseek_jax.tokenizer import Tokenizer
from experiments import common, spread

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
        "--max-tokens",
        type=int,
        default=128,
        metavar="N",
        help="most tokens of a sample, after the prompt (default 128)",
    )
    found.add_argument(
        "--n", type=int, default=1, metavar="K", help="samples (default 1)"
    )
    found.add_argument(
        "--speculative", action="store_true", help="let the MTP modules draft"
    )
    found.add_argument(
        "--depth", type=int, metavar="J", help="drafts a step; all modules by default"
    )
    found.add_argument(
        "--no-compare",
        action="store_true",
        help="don't time plain decoding for the speed-up",
    )
    found.add_argument(
        "--compute",
        choices=("f32", "bf16"),
        default="f32",
        help="what products multiply (default f32)",
    )
    found.add_argument(
        "--cache-dtype", choices=tuple(DTYPES), default="f32", help="(default f32)"
    )
    found.add_argument(
        "--page",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a cache page; 0 is one piece a sample (default 0)",
    )
    spread.add(found)
    found.add_argument("--json", action="store_true", help="one JSON object on stdout")
    for name, (kind, default, about) in RULES.items():
        found.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="X",
            help=f"{about} (default {default:g})",
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
    except (FileNotFoundError, IsADirectoryError):
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


def announce(
    options: argparse.Namespace,
    config: Config,
    longest: int,
    plan: spread.Plan | None,
    attention: Choice,
) -> None:
    """Says on stderr what takes time, and if positions come that training never had.

    A converted checkpoint doesn't tell how long the rows of its training were.
    """
    about = manager.read_config(*folders.resolve(options.checkpoint))
    if about["kind"] == metadata.KIND and longest > config.data.length:
        print(
            f"warning: the model was trained on rows of {config.data.length} tokens "
            f"(data.length); prompt and --max-tokens come to {longest}, and what lies "
            "beyond may be poor",
            file=sys.stderr,
        )
    if not options.json:
        if plan:
            print(spread.line(plan.about), file=sys.stderr)
        if options.compute != "f32":
            why = f" ({attention.reason})" if attention.reason else ""
            named = f"attention over the cache: {attention.implementation}{why}"
            print(named, file=sys.stderr)
        print("compiling", file=sys.stderr)


def result(
    report: engine.Report,
    gain: speed.Gain | None,
    prompt: str,
    tokenizer: Tokenizer,
    per_token: int,
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
        "speed": gain._asdict() if gain else None,
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
    if gain := found["speed"]:
        line += (
            f", speed-up {gain['speed_up']:.2f}x ({1e3 * gain['step_s']:.3g} ms a "
            f"step, {1e3 * gain['plain_step_s']:.3g} ms without drafts)"
        )
    return line


def generate(options: argparse.Namespace, text: str, rule: Sampling) -> dict[str, Any]:
    """Shows samples as they come, or at last, and returns what --json prints.

    Raises:
      ValueError: a request that cannot be served; before anything is compiled.
    """
    plan = spread.plan(options)
    config, params, balance, tokenizer = deepseek_jax.load(options.checkpoint)
    if tokenizer is None:
        raise ValueError(
            f"--checkpoint {options.checkpoint}: has no tokenizer, which text needs"
        )
    model = logits.build(config, RuntimeConfig(compute=options.compute))
    rope = config.model.attention.rope
    depth = drafts(options, config.model.mtp.depth)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)]] * options.n
    context = int(rope.original_length * rope.factor)
    limits: dict[str, Any] = {"depth": depth, "context": context}
    request.check(model, prompts, options.max_tokens, page=options.page, **limits)
    weights = forward.split(model, params, balance)
    del params  # or they would be held twice
    if plan:
        model, weights = spread.carry_out(plan, model, weights)
    dtype = DTYPES[options.cache_dtype]
    attention = engine.attention(model, dtype, options.page)
    announce(options, config, len(prompts[0]) + options.max_tokens, plan, attention)
    stream = None if options.json or options.n > 1 else Stream(tokenizer)
    if stream:
        print(text, end="", flush=True)
    how: dict[str, Any] = {"rule": rule, "dtype": dtype, "page": options.page}
    report = engine.generate(
        model,
        weights,
        prompts,
        options.max_tokens,
        stop=(tokenizer.eos_id,),
        callback=stream,
        **limits,
        **how,
    )
    if stream:
        stream.close()
    elif not options.json:
        for number, row in enumerate(report.rows, 1):
            print(f"--- sample {number}\n{text}{tokenizer.decode(row.tokens)}")
    gain = None
    if depth and not options.no_compare:
        how["callback"] = (lambda row, tokens: None) if stream else None
        gain = speed.compare(model, weights, prompts, report, **how)
    per_token = engine.bytes_per_token(config.model, depth, dtype)
    found = result(report, gain, text, tokenizer, per_token)
    mesh = plan.about if plan else None
    return {**found, "mesh": mesh, "attention": attention._asdict()}


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.n < 1:
        raise ValueError(f"--n {options.n}: must be at least 1")
    text = read_prompt(options)
    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    rules = {name.replace("-", "_") for name in RULES}
    rule = sampling(options.n, **{name: getattr(options, name) for name in rules})
    found = generate(options, text, rule)
    if options.json:
        print(json.dumps(found))
    else:
        print(summary(found), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(common.guarded(main, sys.argv[1:]))
