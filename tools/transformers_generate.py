"""The peer of `benchmarks/decode_cpu.py --peers`: transformers' `generate`, greedily.

Runs in the environment that `tools/peers.sh` makes, which has torch and not JAX. The
case comes as JSON on the command line; each line on standard input is answered with one
timed generation: up to the first token, and `tokens` more. Attention is sdpa, float32;
`experts` is grouped_mm, the default, or eager.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


class Clock(BaseStreamer):
    """Notes when the prompt (first) and then every new token comes by."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(given: dict[str, Any]) -> DeepseekV3ForCausalLM:
    """The model as it is used for inference; without MTP, which it has no class for."""
    logging.set_verbosity_error()  # else it lists all tensors of the MTP module
    logging.disable_progress_bar()
    return DeepseekV3ForCausalLM.from_pretrained(
        given["folder"],
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation=given["experts"],
    ).eval()


@torch.inference_mode()
def once(
    model: DeepseekV3ForCausalLM, prompts: torch.Tensor, tokens: int
) -> dict[str, Any]:
    """Generates `tokens` after the first one."""
    clock, start = Clock(), time.perf_counter()
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=tokens + 1,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
        return_dict_in_generate=True,
    )
    _, first, *_, last = clock.times
    held = [
        tensor for layer in output.past_key_values.layers for tensor in layer_of(layer)
    ]
    positions = prompts.shape[0] * (prompts.shape[1] + tokens)
    return {
        "prefill_s": first - start,
        "decode_s": last - first,
        "decoded": prompts.shape[0] * tokens,
        "steps": tokens,
        "tokens_per_step": 1.0,
        "cache_bytes": sum(tensor.nbytes for tensor in held) / positions,
        "tokens": output.sequences[:, prompts.shape[1] :].tolist(),
        "draft_s": 0.0,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def layer_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer of the cache holds; by name, keys and values."""
    return layer.keys, layer.values


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    model = load(given)
    rows = json.loads(Path(given["prompts"]).read_text())[: given["batch"]]
    prompts = torch.tensor([row[: given["context"]] for row in rows])
    for _ in sys.stdin:
        print(json.dumps(once(model, prompts, given["tokens"])), flush=True)


if __name__ == "__main__":
    main()
