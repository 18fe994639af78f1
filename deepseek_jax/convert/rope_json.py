"""The rotary settings of a config.json as a `RopeConfig`, and back.

They stand in `rope_scaling` beside `rope_theta` (DeepSeek's files) or together in
`rope_parameters` (transformers 5). Files may have both, which must then agree. YaRN is
what DeepSeek's own code and transformers make of it (arXiv:2412.19437, section 4.3).
"""

import math
from typing import Any

from deepseek_jax.config import RopeConfig
from deepseek_jax.convert.fields import Fields, integer, named, number, only, refuse

BLOCKS = ("rope_scaling", "rope_parameters")
KINDS = ("rope_type", "type")
THETA = "rope_theta"
OURS = "model.attention.rope"
# YaRN's numbers, by our names.
NUMBERS = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# Settings with a single value that we compute; absent means that value.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "truncate": (True, None),
    "partial_rotary_factor": (1.0, None),
}


def read(config: Fields) -> RopeConfig:
    """The rotary settings of a config.json.

    Raises:
      ValueError: they contradict each other, or ask for something that this library
        does not compute; the message names the field.
    """
    blocks = {at: config[at] for at in BLOCKS if config.get(at)}
    for at, block in blocks.items():
        if not isinstance(block, dict):
            refuse(at, block, "must be an object")
    places = {"": config} | {f"{at}.": block for at, block in blocks.items()}
    thetas = {
        f"{at}{THETA}": number(block, THETA, at=at)
        for at, block in places.items()
        if block.get(THETA) is not None
    }
    if len(set(thetas.values())) > 1:
        there = ", ".join(f"{name} = {value}" for name, value in thetas.items())
        raise ValueError(f"config.json: {there} contradict each other")
    yarns = {at: _read_block(block, f"{at}.") for at, block in blocks.items()}
    at, yarn = next(iter(yarns.items()), (BLOCKS[0], {}))
    if any(other != yarn for other in yarns.values()):
        raise ValueError(f"config.json: {' and '.join(yarns)} contradict each other")
    theirs = {f"{OURS}.{ours}": f"{at}.{name}" for ours, name in NUMBERS.items()}
    with named(theirs | {f"{OURS}.theta": THETA}):
        return RopeConfig(theta=next(iter(thetas.values()), 10_000.0), **yarn)


def _read_block(block: Fields, at: str) -> dict[str, Any]:
    """The fields of a `RopeConfig` but theta; none without YaRN."""
    only(block, [*KINDS, THETA, *NUMBERS.values(), *FIXED], at)
    kinds = {name: block[name] for name in KINDS if block.get(name) is not None}
    name, kind = next(iter(kinds.items()), (KINDS[0], None))
    for other, value in kinds.items():
        if value != kind:
            refuse(f"{at}{other}", value, f"{name} is {kind!r}")
    for other, allowed in FIXED.items():
        if block.get(other) not in allowed:
            refuse(f"{at}{other}", block[other], f"must be {allowed[0]!r}")
    if kind in (None, "default"):
        for other in NUMBERS.values():
            if block.get(other) is not None:
                refuse(f"{at}{name}", kind, f"with {other} it must be 'yarn'")
        return {}
    if kind != "yarn":
        refuse(f"{at}{name}", kind, "must be 'yarn' or 'default'")
    mscale, all_dim = block.get("mscale"), number(block, "mscale_all_dim", 0.0, at)
    if all_dim and not mscale:
        refuse(f"{at}mscale_all_dim", all_dim, "mscale is missing")
    if not all_dim and mscale not in (None, 1):
        # DeepSeek's own code heeds a lone mscale, transformers does not.
        refuse(f"{at}mscale", mscale, "mscale_all_dim is missing")
    return {
        "factor": number(block, "factor", at=at),
        "original_length": integer(block, NUMBERS["original_length"], at=at),
        "beta_fast": number(block, "beta_fast", 32.0, at) or 32.0,
        "beta_slow": number(block, "beta_slow", 1.0, at) or 1.0,
        "mscale": number(block, "mscale", 1.0, at),
        "mscale_all_dim": all_dim,
    }


def write(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling`, as DeepSeek's files have it; None without YaRN."""
    if rope.factor == 1:
        return None
    whole = math.floor(rope.factor) == rope.factor
    scaling = {
        "type": "yarn",
        "factor": int(rope.factor) if whole else rope.factor,
        "original_max_position_embeddings": rope.original_length,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    if rope.mscale_all_dim:
        scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    return scaling
