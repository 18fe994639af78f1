"""A training step on this CPU: tokens/s, memory, and how near it is to GEMM speed.

Forward, backward and AdamW of the model in `config_a.py`, with float32 and with
bfloat16 matmuls (weights and all else float32), each in a process of its own. --peers
adds transformers' DeepseekV3 in float32; it has no balancing. All take turns, step by
step, and ratios are medians over the turns, so that a busy machine slows all alike.
`% of GEMM` is the step's FLOPs over its time over the speed of a 1024^3 product, timed
just before and after. A second table times the parts of the step alone.

  python benchmarks/train_cpu.py --peers --json speed.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from deepseek_jax.files import write_text

ROOT = Path(__file__).resolve().parent.parent
COMPUTES = ("f32", "bf16")
WARMUP = 2


class Failed(Exception):
    """A process of the benchmark gave no answer; the message says which and why."""


class Worker:
    """A process that prints one JSON line at its start, if asked, and one per turn."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise Failed(f"{self.name} stopped with exit code {code}; see above")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        """One timed step."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` says what happened
        return self.read()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def start_ours(compute: str) -> tuple[Worker, dict[str, Any]]:
    """The worker, and the sizes that it tells."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.train_worker", compute]
    worker = Worker(f"ours, {compute}", command, env)
    return worker, worker.read()


def start_peer(sizes: dict[str, Any]) -> Worker:
    """transformers with the same sizes and as many threads as there are cores."""
    model, at, moe = (
        sizes["model"],
        *(sizes["model"][k] for k in ("attention", "moe")),
    )
    fields = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["dim"],
        "intermediate_size": model["dense_dim"],
        "moe_intermediate_size": moe["ffn_dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": at["num_heads"],
        "num_key_value_heads": at["num_heads"],
        "n_shared_experts": moe["num_shared"],
        "n_routed_experts": moe["num_experts"],
        "routed_scaling_factor": moe["scale"],
        "kv_lora_rank": at["kv_rank"],
        "q_lora_rank": at["q_rank"],
        "qk_rope_head_dim": at["rope_dim"],
        "v_head_dim": at["value_dim"],
        "qk_nope_head_dim": at["nope_dim"],
        "n_group": moe["num_groups"],
        "topk_group": moe["keep_groups"],
        "num_experts_per_tok": moe["top_k"],
        "first_k_dense_replace": model["num_dense"],
        "max_position_embeddings": sizes["length"],
    }
    threads = len(os.sched_getaffinity(0))
    shape = sizes["batch"], sizes["length"]
    python = str(ROOT / ".cache/peers/bin/python")
    command = [
        python,
        "tools/transformers_step.py",
        json.dumps([fields, shape, threads]),
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    return Worker("transformers", command, {**clean, "HF_HUB_OFFLINE": "1"})


def alternate(workers: list[Worker], rounds: int) -> list[list[dict[str, Any]]]:
    """Every worker's answers, after a warm-up; each round turns the order around."""
    answers: list[list[dict[str, Any]]] = [[] for _ in workers]
    for turn in range(WARMUP + rounds):
        order = range(len(workers)) if turn % 2 else reversed(range(len(workers)))
        for i in order:
            answers[i].append(workers[i].turn())
        if sys.stderr.isatty():
            print(f"\rround {turn + 1} of {WARMUP + rounds}", end=" ", file=sys.stderr)
    return [each[WARMUP:] for each in answers]


def median(answers: list[dict[str, Any]], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def summary(
    tokens: int, ours: list[dict[str, Any]], peer: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """One variant's entry of the JSON file."""
    seconds, ratio = median(ours, "seconds"), None
    if peer:
        pairs = zip(peer, ours, strict=True)
        ratio = statistics.median(p["seconds"] / o["seconds"] for p, o in pairs)
    return {
        "tokens_per_s": tokens / seconds,
        "step_ms": 1000 * seconds,
        "peak_rss_mb": max(answer["peak_rss_mb"] for answer in ours),
        "gemm_fraction": median(ours, "gemm_fraction"),
        "ratio_to_peer": ratio,
    }


def measure(rounds: int, peers: bool) -> dict[str, dict[str, Any]]:
    """Times the steps and prints the table of variants."""
    started = [start_ours(compute) for compute in COMPUTES]
    workers, sizes = [worker for worker, _ in started], started[0][1]
    try:
        if peers:
            workers.append(start_peer(sizes))
        answers = alternate(workers, rounds)
    finally:
        for worker in workers:
            worker.stop()
    peer = answers[len(COMPUTES)] if peers else None
    tokens = sizes["batch"] * sizes["length"]
    result = {
        compute: summary(tokens, ours, peer)
        for compute, ours in zip(COMPUTES, answers, strict=False)
    }
    print(
        f"{tokens} tokens, {sizes['flops'] / 1e12:.3f} TFLOP a step, "
        f"{len(os.sched_getaffinity(0))} cores, medians of {rounds} rounds\n"
    )
    print(
        "                  tokens/s  step ms  % of GEMM  GEMM GFLOP/s  peak MB   ratio"
    )
    for (compute, row), ours in zip(result.items(), answers, strict=False):
        gemm = median(ours, "gemm_flops") / 1e9
        ratio = f"{row['ratio_to_peer']:.2f}" if peers else "-"
        print(
            f"ours, {compute:4}        {row['tokens_per_s']:8.0f} {row['step_ms']:8.0f}"
            f" {100 * row['gemm_fraction']:10.0f} {gemm:13.0f}"
            f" {row['peak_rss_mb']:8.0f} {ratio:>7}"
        )
    if peer:
        row = summary(tokens, [{**p, "gemm_fraction": 0} for p in peer], None)
        print(
            f"transformers, f32 {row['tokens_per_s']:8.0f} {row['step_ms']:8.0f}"
            f" {'-':>10} {'-':>13} {row['peak_rss_mb']:8.0f} {1:7.2f}"
        )
    return result


def show_parts(compute: str) -> None:
    """The table of parts, printed by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.parts_cpu", compute]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    print(flush=True)
    if subprocess.run(command, cwd=ROOT, env=env).returncode:
        raise Failed(f"the parts, {compute}: see above")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also time transformers; the first time, make its environment (2 GB)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps; 8")
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
        sys.exit("train_cpu: no environment for --peers; see above")
    try:
        result = measure(args.rounds, args.peers)
        for compute in COMPUTES:
            show_parts(compute)
    except Failed as failure:
        sys.exit(f"train_cpu: {failure}")
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
