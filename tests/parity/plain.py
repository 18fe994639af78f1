"""DeepSeek-V2 and V3 in float64 numpy, from the equations and nothing else.

arXiv:2412.19437, sections 2.1 and 2.2, and the released layout of a checkpoint
(README_WEIGHTS.md of DeepSeek's repository). Shares no code with the library: tensors
come through the safetensors package, rotations are complex numbers, experts a loop.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json, and every tensor in float64."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, raw in safetensors.deserialize(file.read_bytes()):
            flat = np.frombuffer(raw["data"], TYPES[raw["dtype"]])
            tensors[name] = flat.reshape(raw["shape"]).astype(np.float64)
    return json.loads((folder / "config.json").read_text()), tensors


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x, tensors, at):
    gate, up, down = (
        tensors[f"{at}.{n}_proj.weight"].T for n in ("gate", "up", "down")
    )
    return (sigmoid(x @ gate) * (x @ gate) * (x @ up)) @ down


def yarn(config) -> tuple[np.ndarray, float, float]:
    """(radians a position, magnitude of rotated vectors, m of the softmax scale)."""
    dim = config["qk_rope_head_dim"]
    rope = config["rope_parameters"]
    base = rope["rope_theta"]
    frequency = base ** (-np.arange(0, dim, 2) / dim)
    if rope["rope_type"] == "default":
        return frequency, 1.0, 1.0

    def index(turns):
        length = rope["original_max_position_embeddings"]
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(index(rope["beta_fast"])), 0)
    high = min(math.ceil(index(rope["beta_slow"])), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    slow = frequency / rope["factor"]
    log = 0.1 * math.log(rope["factor"])
    m = 1 + log * rope["mscale_all_dim"]
    magnitude = (1 + log * rope["mscale"]) / m
    return slow * ramp + frequency * (1 - ramp), magnitude, m


def rotate(x, frequency, magnitude):
    """x [L, ..., R] of interleaved pairs, each turned by position times frequency."""
    turn = magnitude * np.exp(1j * np.arange(len(x))[:, None] * frequency)
    turn = turn.reshape(len(x), *(1,) * (x.ndim - 2), -1)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attention(x, config, tensors, at):
    def weight(name):
        return tensors[f"{at}.{name}.weight"]

    length, heads = len(x), config["num_attention_heads"]
    nope, latent = config["qk_nope_head_dim"], config["kv_lora_rank"]
    *rotation, m = yarn(config)
    if config["q_lora_rank"]:
        c_q = rms_norm(x @ weight("q_a_proj").T, weight("q_a_layernorm"))
        q = c_q @ weight("q_b_proj").T
    else:
        q = x @ weight("q_proj").T
    q = q.reshape(length, heads, -1)
    joint = x @ weight("kv_a_proj_with_mqa").T
    c_kv = rms_norm(joint[:, :latent], weight("kv_a_layernorm"))
    kv = (c_kv @ weight("kv_b_proj").T).reshape(length, heads, -1)
    key_rope = rotate(joint[:, latent:], *rotation)
    logits = np.einsum("lhn,shn->hls", q[..., :nope], kv[..., :nope])
    logits += np.einsum("lhr,sr->hls", rotate(q[..., nope:], *rotation), key_rope)
    logits *= m**2 / math.sqrt(q.shape[-1])
    logits[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("hls,shv->lhv", p, kv[..., nope:])
    return out.reshape(length, -1) @ weight("o_proj").T


def choose(config, scores, bias, dropped=-np.inf, best=None):
    """The experts of a token; `dropped` is what choices of other groups become, a group
    is worth its `best` ones.
    """
    groups = config["n_group"] or 1
    choice = scores + bias
    grouped = choice.reshape(groups, -1)
    if groups > 1 and config.get("topk_method") != "greedy":
        best = best or (2 if config["model_type"] == "deepseek_v3" else 1)
        worth = np.sort(grouped, -1)[:, -best:].sum(-1)
        lost = np.argsort(-worth, kind="stable")[config["topk_group"] :]
        grouped = grouped.copy()
        grouped[lost] = dropped
    return np.argsort(-grouped.reshape(-1), kind="stable")[
        : config["num_experts_per_tok"]
    ]


def mixture(x, config, tensors, at):
    logits = x @ tensors[f"{at}.gate.weight"].T
    bias = tensors.get(f"{at}.gate.e_score_correction_bias")
    if bias is None:
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        bias = 0.0
    else:
        scores = sigmoid(logits)
    out = swiglu(x, tensors, f"{at}.shared_experts")
    for t, token in enumerate(x):
        chosen = choose(config, scores[t], bias)
        weights = scores[t, chosen]
        if config["norm_topk_prob"]:
            weights = weights / weights.sum()
        for e, w in zip(chosen, weights * config["routed_scaling_factor"]):
            out[t] += w * swiglu(token, tensors, f"{at}.experts.{e}")
    return out


def block(x, config, tensors, layer):
    at = f"model.layers.{layer}"
    normed = rms_norm(x, tensors[f"{at}.input_layernorm.weight"])
    x = x + attention(normed, config, tensors, f"{at}.self_attn")
    normed = rms_norm(x, tensors[f"{at}.post_attention_layernorm.weight"])
    if layer < config["first_k_dense_replace"]:
        return x + swiglu(normed, tensors, f"{at}.mlp")
    return x + mixture(normed, config, tensors, f"{at}.mlp")


def forward(config, tensors, row, depth=0):
    """Logits of one row of tokens: those of the model, then of each MTP module."""
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"].T
    x, layers = embedding[row], config["num_hidden_layers"]
    for layer in range(layers):
        x = block(x, config, tensors, layer)
    h = rms_norm(x, tensors["model.norm.weight"])
    logits = [h @ head]
    for k in range(1, depth + 1):
        at = f"model.layers.{layers + k - 1}"
        own = {n: tensors[f"{at}.{n}.weight"] for n in ("enorm", "hnorm", "eh_proj")}
        seen = rms_norm(embedding[row[k:]], own["enorm"])
        before = rms_norm(h[: len(row) - k], own["hnorm"])
        x = np.concatenate([seen, before], -1) @ own["eh_proj"].T
        x = block(x, config, tensors, layers + k - 1)
        h = rms_norm(x, tensors[f"{at}.shared_head.norm.weight"])
        logits.append(h @ head)
    return logits
