"""Greedy generation on this CPU: tokens/s of prefill and decoding, and cache bytes.

Config A (`config_a.py`) with random weights and prompts, float32, at batch 1 and 8 and
contexts of 128 and 2048 tokens: plain, and speculative with one MTP module. Prefill is
the time to the first token, decoding that of 32 more. --peers adds transformers'
`generate` with the same weights and prompts; it has no MTP. All take turns, and ratios
are medians over the turns, against the faster of its two expert implementations.

Drafts of random weights are never right: there the cost of a draft and of its
verification is what counts. --checkpoint takes a trained model, and its held-out text
for prompts.

  python benchmarks/decode_cpu.py --peers --json decode.json
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for a start by the file's name

from benchmarks.train_cpu import Failed, Worker, alternate, median  # noqa: E402
from deepseek_jax.files import write_text  # noqa: E402

BATCHES, CONTEXTS = (1, 8), (128, 2048)
TOKENS = 32  # decoded after the first
EXPERTS = ("grouped_mm", "eager")
OURS = {"plain": "ours", "speculative": "ours, speculative"}
# What must be how many times as fast as the peer, and where.
TARGETS = (
    ("decode", 5.0, 1, 2048),
    ("decode", 5.0, 8, 2048),
    *(("prefill", 1.3, *case) for case in itertools.product(BATCHES, CONTEXTS)),
)

Answers = list[dict[str, Any]]


class Setting(NamedTuple):
    """What all cases have in common."""

    folder: Path  # of prompts and, with peers, the Hugging Face checkpoint
    checkpoint: str
    depth: int
    peers: bool
    rounds: int


def run_ours(command: str, given: dict[str, Any], name: str) -> Worker:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    module = [sys.executable, "-m", "benchmarks.decode_worker"]
    return Worker(name, [*module, command, json.dumps(given)], env)


def run_peer(given: dict[str, Any], name: str) -> Worker:
    """transformers with as many threads as there are cores."""
    python = str(ROOT / ".cache/peers/bin/python")
    given = {**given, "threads": len(os.sched_getaffinity(0))}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    command = [python, "tools/transformers_generate.py", json.dumps(given)]
    return Worker(name, command, {**clean, "HF_HUB_OFFLINE": "1"})


def prepare(folder: Path, checkpoint: Path | None, peers: bool) -> dict[str, Any]:
    """Prompts and weights for all; says where the checkpoint is, and its MTP depth."""
    given = {
        "folder": str(folder),
        "checkpoint": checkpoint and str(checkpoint.resolve()),
        "batch": max(BATCHES),
        "context": max(CONTEXTS),
        "peers": peers,
    }
    worker = run_ours("prepare", given, "the preparation")
    try:
        return worker.read()
    finally:
        worker.stop()


def start(setting: Setting, batch: int, context: int) -> dict[str, Worker]:
    """The processes of a case, by the names of their rows."""
    given = {
        "checkpoint": setting.checkpoint,
        "folder": str(setting.folder / "hf"),
        "prompts": str(setting.folder / "prompts.json"),
        "batch": batch,
        "context": context,
        "tokens": TOKENS,
    }
    depths = {"plain": 0} | ({"speculative": setting.depth} if setting.depth else {})
    workers = {
        name: run_ours("time", {**given, "depth": depth}, OURS[name])
        for name, depth in depths.items()
    }
    for experts in EXPERTS if setting.peers else ():
        name = f"transformers, {experts}"
        workers[experts] = run_peer({**given, "experts": experts}, name)
    return workers


def ratios(answers: dict[str, Answers], name: str, key: str) -> float | None:
    """How many times as fast as the faster peer: seconds a token, medians of pairs."""
    found = []
    for peer in answers.keys() & set(EXPERTS):
        pairs = zip(answers[peer], answers[name], strict=True)
        found.append(statistics.median(p[key] / o[key] for p, o in pairs))
    return min(found, default=None)


def summary(
    answers: dict[str, Answers], name: str, batch: int, context: int
) -> dict[str, Any]:
    """One row of the table, for the JSON file."""
    mine = answers[name]
    for answer in itertools.chain(*answers.values()):
        answer["token_s"] = answer["decode_s"] / answer["decoded"]
    return {
        "prefill_tokens_per_s": batch * context / median(mine, "prefill_s"),
        "prefill_ratio": ratios(answers, name, "prefill_s"),
        "decode_tokens_per_s": 1 / median(mine, "token_s"),
        "decode_ratio": ratios(answers, name, "token_s"),
        "step_ms": 1000 * statistics.median(a["decode_s"] / a["steps"] for a in mine),
        "draft_ms": 1000 * median(mine, "draft_s"),
        "tokens_per_step": median(mine, "tokens_per_step"),
        "cache_bytes_per_token": mine[0]["cache_bytes"],
        "peak_rss_mb": max(answer["peak_rss_mb"] for answer in mine),
    }


def agreement(answers: dict[str, Answers], name: str) -> dict[str, int]:
    """In how many rows a side generates what plain decoding does."""
    mine, plain = (answers[side][0]["tokens"] for side in (name, "plain"))
    return {"same": sum(map(list.__eq__, mine, plain)), "of": len(plain)}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Times all cases and prints their rows as they come."""
    print(
        "batch context                           prefill          decode      ms/  "
        "cache    peak\n"
        "                                    tokens/s ratio  tokens/s ratio   step "
        "B/token     MB   same tokens"
    )
    cases = []
    for batch, context in itertools.product(BATCHES, CONTEXTS):
        workers = start(setting, batch, context)
        try:
            timed = alternate(list(workers.values()), setting.rounds)
        finally:
            for worker in workers.values():
                worker.stop()
        answers = dict(zip(workers, timed, strict=True))
        case: dict[str, Any] = {"batch": batch, "context": context, "rows": {}}
        for name, worker in workers.items():
            row = summary(answers, name, batch, context) | agreement(answers, name)
            case["rows"][name] = row
            print(f"{batch:5} {context:7}  {worker.name:19}{line(row, name)}")
        cases.append(case)
    return cases


def line(row: dict[str, Any], name: str) -> str:
    """A row's numbers; peers have no ratio to themselves."""
    ratio = {
        key: f"{row[key]:.2f}" if row[key] and name in OURS else "-"
        for key in ("prefill_ratio", "decode_ratio")
    }
    return (
        f"{row['prefill_tokens_per_s']:10.0f} {ratio['prefill_ratio']:>5}"
        f"{row['decode_tokens_per_s']:10.0f} {ratio['decode_ratio']:>5}"
        f"{row['step_ms']:8.2f}{row['cache_bytes_per_token']:8.0f}"
        f"{row['peak_rss_mb']:7.0f}   {row['same']} of {row['of']}"
    )


def show_speculation(cases: list[dict[str, Any]]) -> None:
    """What drafts cost, what they must bring to pay, and what they bring."""
    print(
        "\nspeculation      draft ms  verify ms  plain step ms  tokens/step: needs  has"
    )
    for case in cases:
        row, plain = (case["rows"][name] for name in ("speculative", "plain"))
        verify = row["step_ms"] - row["draft_ms"]
        needs = row["step_ms"] / plain["step_ms"]
        print(
            f"{case['batch']:5} {case['context']:7}    {row['draft_ms']:8.2f}"
            f" {verify:10.2f} {plain['step_ms']:14.2f} {needs:19.2f}"
            f" {row['tokens_per_step']:4.2f}"
        )


def judge(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which targets hold, by plain decoding."""
    rows = {(case["batch"], case["context"]): case["rows"] for case in cases}
    found = []
    print()
    for what, least, batch, context in TARGETS:
        ratio = rows[batch, context]["plain"][f"{what}_ratio"]
        holds = ratio >= least
        found.append({"what": what, "batch": batch, "context": context})
        found[-1] |= {"target": least, "ratio": ratio, "holds": holds}
        print(
            f"{what:7} batch {batch}, context {context:4}: {ratio:6.2f} x transformers,"
            f" target {least}: {'holds' if holds else 'MISSED'}"
        )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also time transformers; the first time, make its environment (2 GB)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a trained model; a workdir"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; 5")
    parser.add_argument(
        "--cores", type=int, metavar="N", help="use N cores only; all by default"
    )
    args = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be at least 1")
    if args.cores is not None and not 1 <= args.cores <= available:
        parser.error(
            f"--cores={args.cores}: must be from 1 to {available}, what is here"
        )
    if args.checkpoint and not args.checkpoint.is_dir():
        parser.error(f"--checkpoint={args.checkpoint}: there is no such folder")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json={args.json}: there is no folder {args.json.parent}")
    if args.json and args.json.is_dir():
        parser.error(f"--json={args.json}: is a folder, must be a file")
    return args


def main() -> None:
    args = arguments()
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if args.peers and subprocess.run(["sh", ROOT / "tools/peers.sh"]).returncode:
        sys.exit("decode_cpu: no environment for --peers; see above")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            shared = prepare(Path(folder), args.checkpoint, args.peers)
            setting = Setting(
                Path(folder), **shared, peers=args.peers, rounds=args.rounds
            )
            result["cases"] = measure(setting)
        except Failed as failure:
            sys.exit(f"decode_cpu: {failure}")
    if shared["depth"]:
        show_speculation(result["cases"])
    if args.peers:
        result["targets"] = judge(result["cases"])
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
