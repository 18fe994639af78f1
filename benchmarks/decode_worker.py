"""Our side of `decode_cpu.py`, in a process of its own, which has its own peak memory.

  python -m benchmarks.decode_worker prepare '{"folder": DIR, "checkpoint": DIR or null,
      "batch": 8, "context": 2048, "peers": true}'
  python -m benchmarks.decode_worker time '{"checkpoint": DIR, "prompts": FILE,
      "batch": 8, "context": 2048, "tokens": 32, "depth": 0}'

`prepare` puts what all sides share into a folder: prompts, a checkpoint if none is
given, and its Hugging Face form. `time` compiles, then answers each line on standard
input with one timed generation: the prompts' prefill up to the first token, and the
decoding of `tokens` more.
"""

import dataclasses
import functools
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax
from benchmarks import config_a
from deepseek_jax.checkpoint import folders, manager, metadata
from deepseek_jax.config import Config, MTPConfig
from deepseek_jax.convert.hf_export import export_hf
from deepseek_jax.data import heldout
from deepseek_jax.data.cache import default_cache
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.decode import cache as caches
from deepseek_jax.decode import engine, forward, request, speculative
from deepseek_jax.decode.sampling import Sampling, sampling
from deepseek_jax.eval import logits
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.typing import Array

DRAFTS = 16  # rounds of drafts that are timed together


def fresh(folder: Path) -> Config:
    """A checkpoint of config A with one MTP module, as it is initialised."""
    config = config_a.config("f32")
    model = dataclasses.replace(config.model, mtp=MTPConfig(depth=1))
    config = dataclasses.replace(config, model=model)
    state = init_state(assemble(config), config.seed)
    about = metadata.describe(config, "", (), "")
    with manager.Checkpoints(folder / folders.FOLDER) as checkpoints:
        kept = {"params": state.params, "balance": state.balance}
        checkpoints.save(0, kept, {}, about)
    return config


def random_prompts(vocab_size: int, batch: int, context: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, context)).tolist()


def text_prompts(
    config: Config, tokenizer: Any, batch: int, context: int
) -> list[list[int]]:
    """Held-out documents: each row's are of one domain, one after another."""
    corpus = open_corpus(config.data, default_cache())
    found = heldout.documents(corpus, tokenizer, 64)
    streams = [itertools.cycle(itertools.chain(*docs)) for docs in found.values()]
    rows = [itertools.islice(streams[i % len(streams)], context) for i in range(batch)]
    return [list(row) for row in rows]


def prepare(given: dict[str, Any]) -> None:
    """Fills the folder and prints where the checkpoint is and how far it drafts."""
    folder, shape = Path(given["folder"]), (given["batch"], given["context"])
    if given["checkpoint"]:
        source = Path(given["checkpoint"])
        config, _, _, tokenizer = deepseek_jax.load(source)
    else:
        source, tokenizer = folder / "run", None
        config = fresh(source)
    if tokenizer:
        prompts = text_prompts(config, tokenizer, *shape)
    else:
        prompts = random_prompts(config.model.vocab_size, *shape)
    request.check(logits.build(config), prompts, 1)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    if given["peers"]:
        export_hf(source, folder / "hf", dtype="f32")
    print(json.dumps({"checkpoint": str(source), "depth": config.model.mtp.depth}))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def draft_rounds(
    model: Transformer,
    weights: forward.Weights,
    state: speculative.State,
    rule: Sampling,
) -> speculative.State:
    """The drafts of DRAFTS steps, without their verification."""

    def body(_: Array, state: speculative.State) -> speculative.State:
        return speculative.draft(model, weights, state, rule)[0]

    return jax.lax.fori_loop(0, DRAFTS, body, state)


def generation(given: dict[str, Any]) -> dict[str, Any]:
    """A function that generates once and tells what that took."""
    config, params, balance, _ = deepseek_jax.load(given["checkpoint"])
    model = logits.build(config)
    weights = forward.split(model, params, balance)
    batch, context, depth = given["batch"], given["context"], given["depth"]
    rows = json.loads(Path(given["prompts"]).read_text())[:batch]
    prompts = [row[:context] for row in rows]
    end, rule = context + 1 + given["tokens"], sampling(batch)
    limit_B = jnp.full(batch, end, jnp.int32)
    stop_N = jnp.full(4, -1, jnp.int32)
    no_limit = np.iinfo(np.int32).max

    def advance(state: speculative.State, budget: int) -> speculative.State:
        steps = jnp.int32(budget)
        state = engine.advance(model, weights, state, rule, limit_B, stop_N, steps)
        return jax.block_until_ready(state)

    def once() -> dict[str, Any]:
        start = time.perf_counter()
        state = engine.prefill(model, weights, prompts, end - context, depth=depth)
        state = advance(state, 1)
        first = time.perf_counter()
        held, steps = int(state.length_B.sum()), int(state.steps_B.max())
        resumed = time.perf_counter()
        state = advance(state, no_limit)
        answer = {
            "prefill_s": first - start,
            "decode_s": time.perf_counter() - resumed,
            "decoded": int(state.length_B.sum()) - held,
            "steps": int(state.steps_B.max()) - steps,
            "tokens_per_step": float((state.length_B - context).sum())
            / int(state.steps_B.sum()),
            "cache_bytes": caches.num_bytes(state.cache) / state.tokens_BS.size,
            "tokens": state.tokens_BS[:, context:end].tolist(),
            "draft_s": 0.0,
        }
        if depth:
            state = state._replace(done_B=jnp.zeros_like(state.done_B))
            start = time.perf_counter()
            jax.block_until_ready(draft_rounds(model, weights, state, rule))
            answer["draft_s"] = (time.perf_counter() - start) / DRAFTS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return answer | {"peak_rss_mb": peak / 1024}

    return once


def main() -> None:
    given = json.loads(sys.argv[2])
    if sys.argv[1] == "prepare":
        try:
            return prepare(given)
        except ValueError as error:
            sys.exit(str(error))
    once = generation(given)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


if __name__ == "__main__":
    main()
