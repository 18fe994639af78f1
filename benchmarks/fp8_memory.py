"""Bytes kept between the forward and the backward pass, by precision policy.

  python -m benchmarks.fp8_memory --json experiments/results/fp8/memory.json

The model up to its hidden states, of `presets.mini` (8 x 512 tokens) and of one dense
and one MoE layer as wide as DeepSeek-V3 (4096 tokens), by shape alone. Counted are the
arrays that the vector-Jacobian product holds, without parameters and copies of them in
another type, or of gate and up side by side. Norms and residuals are float32 in all of
them. For `mini` also what the compiled training step needs beside its arguments.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.extend import core

from benchmarks import config_a
from deepseek_jax import presets, runtime
from deepseek_jax.config import Config, DataConfig, ModelConfig, MTPConfig
from deepseek_jax.config import RuntimeConfig as RC
from deepseek_jax.files import write_text
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.ops import balancing
from deepseek_jax.precision.policy import Pieces
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import compile_step

WIDE = Pieces(kept="bf16", out="bf16")
VARIANTS: dict[str, RC] = {
    "bf16, all kept": RC(compute="bf16", remat="none"),
    "bf16, products kept": RC(compute="bf16", remat="products"),
    "bf16, kept as fp8_v3 keeps": RC(compute="fp8_v3", fp8=WIDE),
    "fp8_v3": RC(compute="fp8_v3"),
    "fp8_v3, all kept": RC(compute="fp8_v3", remat="none"),
}
V3 = dataclasses.replace(
    presets.v3_671b(), num_layers=2, num_dense=1, mtp=MTPConfig(depth=0)
)
SIZES: dict[str, tuple[ModelConfig, tuple[int, int]]] = {
    "mini": (presets.mini(), (8, 512)),
    "V3 width": (V3, (1, 4096)),
}


def kept_bytes(config: Config) -> int:
    """Of all activations that one backward pass of the model needs."""
    balancer = balancing.build(config.balance, config.model.moe)
    model = Transformer(config.model, runtime.build(config.runtime), balancer)
    rows, length = config.data.batch, config.data.length
    tokens_BS = jnp.zeros((rows, length + config.model.mtp.depth), jnp.int32)
    position_BL = jnp.broadcast_to(jnp.arange(length), (rows, length))
    one = balancer.init(config.model.moe.num_experts)
    balance = jax.tree.map(lambda s: jnp.stack([s] * config.model.num_routers), one)
    given = tokens_BS, position_BL, balance
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: model.init(key, *given))

    def pull(params: Any) -> Any:
        def hidden(params: Any) -> Any:
            out = model.apply(params, *given)
            return out.hidden_BLD, out.mtp_JBLD, out.aux.penalty

        return jax.vjp(hidden, params)[1]

    program = jax.make_jaxpr(pull)(params).jaxpr
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    shapes |= {(*shape[:-1], 2 * shape[-1]) for shape in shapes if len(shape) > 2}
    held = {id(x): x for x in program.outvars if not isinstance(x, core.Literal)}
    return sum(
        x.aval.size * x.aval.dtype.itemsize
        for x in held.values()
        if x not in program.invars and x.aval.shape not in shapes
    )


def compiled_bytes(config: Config) -> int:
    """What a training step needs beside its arguments and results."""
    parts, batch = assemble(config), config_a.batch(config)
    state = jax.eval_shape(lambda: init_state(parts, 0))
    memory = compile_step(parts, state, batch).memory_analysis()
    return memory.temp_size_in_bytes


def measure(compiles: bool) -> list[dict[str, Any]]:
    """A row for each size and variant."""
    rows = []
    for size, (model, shape) in SIZES.items():
        tokens = shape[0] * shape[1]
        for name, choice in VARIANTS.items():
            data = DataConfig(batch=shape[0], length=shape[1])
            config = Config(model=model, data=data, runtime=choice)
            kept = kept_bytes(config)
            first = rows[-1]["all_kept"] if rows and rows[-1]["size"] == size else kept
            row = {
                "size": size,
                "variant": name,
                "kept_bytes": kept,
                "bytes_per_token": kept / tokens,
                "ratio": kept / first,
                "all_kept": first,
            }
            if compiles and size == "mini":
                timed = dataclasses.replace(config_a.config("f32"), runtime=choice)
                row["step_temporary_bytes"] = compiled_bytes(timed)
            rows.append(row)
            show(row)
    return [{k: v for k, v in row.items() if k != "all_kept"} for row in rows]


def show(row: dict[str, Any]) -> None:
    temporary = row.get("step_temporary_bytes")
    print(
        f"{row['size']:9} {row['variant']:27} {row['kept_bytes'] / 2**20:8.0f} MiB"
        f" {row['bytes_per_token'] / 2**10:8.1f} KiB a token {row['ratio']:5.2f}"
        + (f"  step {temporary / 2**20:.0f} MiB" if temporary else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument(
        "--no-compile", action="store_true", help="no training step of mini"
    )
    args = parser.parse_args()
    rows = measure(not args.no_compile)
    command = shlex.join(["python", "-m", "benchmarks.fp8_memory", *sys.argv[1:]])
    if args.json:
        write_text(args.json, json.dumps({"command": command, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
