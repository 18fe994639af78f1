"""Tiny random DeepSeek models, made and judged by transformers.

Runs in the environment that tools/peers.sh makes (Python 3.11, torch, transformers):

  .cache/peers/bin/python tests/parity/make_fixtures.py make FOLDER [SEED]
  .cache/peers/bin/python tests/parity/make_fixtures.py check FOLDER...

`make` writes a checkpoint for each entry of MODELS (with a SEED, of LARGER too) with
`save_pretrained`, and beside it expected.npz: tokens [B, L], their float32 logits, what
greedy decoding makes of a prompt and, where there is an MTP module, its logits. `check`
loads checkpoints that have an expected.npz and prints the largest difference of their
logits from it. tests/parity/fixtures is `make` without a seed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from transformers.modeling_layers import MtpModel
from transformers.quantizers import quantizer_finegrained_fp8

# It asks for the package before it reads FP8, and on a CPU does without it.
quantizer_finegrained_fp8.is_accelerate_available = lambda: True

BATCH, LENGTH, PROMPT, NEW = 2, 24, 8, 32

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}


def yarn(mscale: float, all_dim: float, fast: float, slow: float) -> dict:
    """Of the 8 frequencies, those in the middle are blends of fast and slow."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "beta_fast": fast,
        "beta_slow": slow,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }


# Groups of four, so that the best one or two of a group are not all of it.
V3 = COMMON | {
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
}
V2 = COMMON | {"n_shared_experts": 2, "num_nextn_predict_layers": 0}
# Name: (config, fields, dtype, bytes of a shard, MTP modules)
MODELS = {
    "v3": (DeepseekV3Config, V3, "float32", None, 0),
    "v3_no_q_flat": (
        DeepseekV3Config,
        V3
        | {
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "num_mtp_layers": 0,
        },
        "float32",
        None,
        0,
    ),
    "v3_yarn": (
        DeepseekV3Config,
        V3
        | {
            "first_k_dense_replace": 3,
            "num_hidden_layers": 4,
            "rope_parameters": yarn(1.0, 0.8, 32, 1),
        },
        "float32",
        "100KB",
        0,
    ),
    "v3_mtp": (DeepseekV3Config, V3 | {"num_mtp_layers": 1}, "float32", None, 1),
    "v3_bf16": (
        DeepseekV3Config,
        V3
        | {"num_mtp_layers": 2, "num_hidden_layers": 2, "routed_scaling_factor": 1.5},
        "bfloat16",
        "60KB",
        2,
    ),
    "v2_lite": (
        DeepseekV2Config,
        V2 | {"q_lora_rank": None, "rope_parameters": yarn(0.707, 1.0, 16, 2)},
        "float32",
        None,
        0,
    ),
    "v2": (
        DeepseekV2Config,
        V2
        | {
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "first_k_dense_replace": 2,
            "num_hidden_layers": 4,
        },
        "float32",
        None,
        0,
    ),
}
# Too large to be committed: whole FP8 blocks of 128 x 128, several a matrix.
LARGER = {
    "v3_blocks": (
        DeepseekV3Config,
        V3
        | {
            "hidden_size": 256,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 2,
            "kv_lora_rank": 64,
            "q_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
        },
        "float32",
        None,
        0,
    ),
}
CLASSES = {
    DeepseekV3Config: DeepseekV3ForCausalLM,
    DeepseekV2Config: DeepseekV2ForCausalLM,
}


def randomize(module: torch.nn.Module) -> None:
    """Weights that make every part matter; biases of both signs, as large as scores."""
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        if "inv_freq" in name:
            continue
        with torch.no_grad():
            if "e_score_correction_bias" in name:
                half = torch.arange(len(p)) < len(p) // 2
                sign = torch.where(half[torch.randperm(len(p))], 1.0, -1.0)
                p.uniform_(0.5, 1.0).mul_(sign)
            elif p.dim() == 1:
                p.uniform_(0.5, 1.5)
            elif name.endswith(("mlp.gate.weight", "embed_tokens.weight")):
                p.normal_(std=0.5)
            else:
                p.normal_(std=0.7 * p.shape[-1] ** -0.5)


def load(folder: Path):
    """The model in float32; FP8 as the bfloat16 that it stands for."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    dtype = torch.bfloat16 if "quantization_config" in config else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float()
    # Sums in another order than a loop over experts would add to the differences.
    model.config._experts_implementation = "eager"
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


@torch.no_grad()
def greedy(model, prompt: np.ndarray) -> tuple[np.ndarray, float]:
    """The continued prompts, and the smallest lead of a chosen token over the next."""
    tokens, lead = prompt, np.inf
    for _ in range(NEW):
        last = logits_of(model, tokens)[:, -1]
        best = np.sort(last, -1)
        lead = min(lead, float((best[:, -1] - best[:, -2]).min()))
        tokens = np.concatenate([tokens, last.argmax(-1)[:, None]], 1)
    return tokens.astype(np.int32), lead


@torch.no_grad()
def mtp_logits(folder: Path, model, tokens: np.ndarray, depth: int) -> np.ndarray:
    """Logits of the MTP modules by transformers' own class: [J, B, L, V], NaN where the
    token that a module reads lies beyond the end.
    """
    layers = model.config.num_hidden_layers
    # It knows the released model's layer number only.
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{layers + k}.*" for k in range(depth)
    ]
    mtp = MtpModel.from_pretrained(model).eval().float()
    mtp.config._experts_implementation = "eager"
    ids = torch.from_numpy(tokens).long()
    hidden = model.model(ids, use_cache=False).last_hidden_state
    out = np.full((depth, *tokens.shape, model.config.vocab_size), np.nan, np.float32)
    for k in range(1, depth + 1):
        length = tokens.shape[1] - k
        hidden, positions = hidden[:, :length], torch.arange(length)[None]
        embedded = model.model.embed_tokens(ids[:, k:])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        hidden = mtp.layers[k - 1](
            embedded,
            hidden,
            position_embeddings=model.model.rotary_emb(
                embedded, position_ids=positions
            ),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
        )
        out[k - 1, :, :length] = model.lm_head(hidden).numpy()
    return out


def add_mtp(folder: Path, model, depth: int, rng: torch.Generator) -> None:
    """Appends MTP layers in the released form to a saved checkpoint.

    The last shard gets them, with the tensors of the last layer and their shapes.
    """
    layers, dim = model.config.num_hidden_layers, model.config.hidden_size
    index_file = folder / "model.safetensors.index.json"
    sharded = index_file.exists()
    index = json.loads(index_file.read_text()) if sharded else {"weight_map": {}}
    last = max(index["weight_map"].values()) if sharded else "model.safetensors"
    saved = {}
    for file in sorted(folder.glob("*.safetensors")):
        saved |= load_file(file)
    last_layer = f"model.layers.{layers - 1}."
    tensors = load_file(folder / last)

    def noise(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        drawn = torch.rand(like.shape, generator=rng) * (high - low) + low
        return drawn.to(like.dtype)

    for k in range(depth):
        own = {}
        for name, value in saved.items():
            if name.startswith(last_layer):
                short = name.removeprefix(last_layer)
                spread = (value.shape[-1] / 3) ** -0.5
                bounds = (-spread, spread)
                if value.dim() == 1:
                    bounds = (-1.0, 1.0) if "bias" in short else (0.5, 1.5)
                own[short] = noise(value, *bounds)
        norm = saved["model.norm.weight"]
        for short in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
            own[short] = noise(norm, 0.5, 1.5)
        like = torch.empty(dim, 2 * dim, dtype=norm.dtype)
        own["eh_proj.weight"] = noise(like, -0.2, 0.2)
        own["embed_tokens.weight"] = saved["model.embed_tokens.weight"].clone()
        own["shared_head.head.weight"] = saved["lm_head.weight"].clone()
        tensors |= {f"model.layers.{layers + k}.{n}": v for n, v in own.items()}
    save_file(tensors, folder / last, metadata={"format": "pt"})
    if sharded:
        added = dict.fromkeys(tensors, last)
        index["weight_map"] = dict(sorted((index["weight_map"] | added).items()))
        everything = (
            v for f in folder.glob("*.safetensors") for v in load_file(f).values()
        )
        index["metadata"]["total_size"] = sum(v.nbytes for v in everything)
        index["metadata"].pop("total_parameters", None)
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        index_file.write_text(text, "utf-8")


def make(folder: Path, seed: int, models: dict) -> None:
    for number, (name, spec) in enumerate(models.items()):
        config_class, fields, dtype, shard, depth = spec
        where = folder / name
        for attempt in range(20):
            torch.manual_seed(1000 * seed + 20 * number + attempt)
            rng = np.random.default_rng(1000 * seed + 20 * number + attempt)
            model = CLASSES[config_class](config_class(**fields))
            randomize(model)
            model = model.to(getattr(torch, dtype))
            size = {"max_shard_size": shard} if shard else {}
            for old in where.glob("*"):
                old.unlink()
            model.save_pretrained(where, **size)
            if depth:
                generator = torch.Generator().manual_seed(1000 * seed + number)
                add_mtp(where, model, depth, generator)
            model = load(where)
            prompt = rng.integers(0, 96, (BATCH, PROMPT))
            continued, lead = greedy(model, prompt)
            if lead > 1e-3:  # otherwise rounding could decide
                break
        else:
            raise RuntimeError(f"{name}: no seed without a near tie")
        (where / "generation_config.json").unlink(missing_ok=True)
        tokens = rng.integers(0, 96, (BATCH, LENGTH)).astype(np.int32)
        expected = {"tokens": tokens, "greedy": continued}
        expected["logits"] = logits_of(model, tokens)
        if depth:
            expected["mtp_logits"] = mtp_logits(where, model, tokens, depth)
        np.savez_compressed(where / "expected.npz", **expected)
        print(f"{name}: lead {lead:.3f}, |logits| {abs(expected['logits']).max():.2f}")


def check(folders: list[Path]) -> None:
    for folder in folders:
        expected = np.load(folder / "expected.npz")
        model, tokens = load(folder), expected["tokens"]
        error = abs(logits_of(model, tokens) - expected["logits"]).max()
        if "mtp_logits" in expected:
            want = expected["mtp_logits"]
            got = mtp_logits(folder, model, tokens, len(want))
            error = max(error, np.nanmax(abs(got - want)))
        print(f"{folder}\t{error:.3e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["make"]:
        given = sys.argv[3:4]
        make(
            Path(sys.argv[2]),
            int((given or ["0"])[0]),
            MODELS | (LARGER if given else {}),
        )
    elif sys.argv[1:2] == ["check"]:
        check([Path(argument) for argument in sys.argv[2:]])
    else:
        sys.exit(__doc__)
