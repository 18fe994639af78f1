"""The peer of `benchmarks/train_cpu.py --peers`: a step of transformers' DeepseekV3.

Runs in the environment that `tools/peers.sh` makes, which has torch and not JAX. Sizes
come as JSON on the command line; each line on standard input is answered with one timed
step: zero_grad, forward, backward, clipping, torch.optim.AdamW. Experts are the default
grouped_mm, attention is sdpa, float32.
"""

import json
import resource
import sys
import time
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def build(fields: dict[str, Any]) -> DeepseekV3ForCausalLM:
    """The model in training mode."""
    config = DeepseekV3Config(
        **fields,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        tie_word_embeddings=False,
        use_cache=False,
    )
    return DeepseekV3ForCausalLM(config).train()


def main() -> None:
    fields, (batch, length), threads = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = build(fields)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, fields["vocab_size"], (batch, length))
    for _ in sys.stdin:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        answer = {
            "seconds": time.perf_counter() - start,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
