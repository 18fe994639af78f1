"""Block-FP8 weights of released checkpoints (arXiv:2412.19437, section 3.3.2).

`X.weight` holds E4M3 codes, `X.weight_scale_inv` a scale for each block of 128 x 128.
Despite its name the scale multiplies. V3.1 and later have powers of two ("ue8m0").
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fp8_quantize import reference as fp8

SUFFIX = "_scale_inv"
CODES = np.dtype(jnp.float8_e4m3fn)
UE8M0 = "ue8m0"
ALIGN = 128  # rows that are converted together are a multiple of it


class Format(NamedTuple):
    """What `quantization_config` says."""

    block: fp8.Block = fp8.BLOCK
    power_of_two: bool = False


def read_format(config: dict[str, Any]) -> Format | None:
    """The FP8 format of a config.json; None when it is not quantised.

    Raises:
      ValueError: it is quantised in another way; names the field.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    wanted = {"quant_method": ("fp8",), "fmt": ("e4m3", None)}
    wanted["scale_fmt"] = (None, UE8M0, "float")
    for name, allowed in wanted.items():
        value = found.get(name)
        if value not in allowed:
            raise ValueError(
                f"config.json: quantization_config.{name} = {value!r} is not "
                f"supported: must be {allowed[0] or allowed[1]!r}"
            )
    block = found.get("weight_block_size")
    if not isinstance(block, list) or [type(size) for size in block] != [int, int]:
        raise ValueError(
            f"config.json: quantization_config.weight_block_size = {block!r} is not "
            "supported: must be two integers, as [128, 128]"
        )
    if block[0] < 1 or block[1] < 1 or ALIGN % block[0]:
        raise ValueError(
            f"config.json: quantization_config.weight_block_size = {block!r} is not "
            f"supported: the first must divide {ALIGN}"
        )
    return Format((block[0], block[1]), found.get("scale_fmt") == UE8M0)


def write_format(form: Format) -> dict[str, Any]:
    """The `quantization_config` of a format."""
    found: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(form.block),
    }
    return found | ({"scale_fmt": UE8M0} if form.power_of_two else {})


def scale_shape(shape: tuple[int, ...], block: fp8.Block) -> tuple[int, int]:
    """Blocks of a matrix, those at ragged edges included."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


_quantize = jax.jit(fp8.quantize, static_argnums=(1, 2))
_encode = jax.jit(fp8.encode, static_argnums=(2,))
_dequantize = jax.jit(
    functools.partial(fp8.dequantize, dtype=jnp.bfloat16), static_argnums=(2,)
)


def decode(codes: np.ndarray, scale: np.ndarray, block: fp8.Block) -> np.ndarray:
    """Weights in bfloat16, [out, in]."""
    return np.asarray(_dequantize(codes, scale, block))


def encode(
    x: np.ndarray, form: Format, original: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of weights [out, in] by the released recipe.

    Args:
      original: the scales of the file that the weights came from. Where they still
        describe them exactly, so that nothing is lost, they are kept.
    """
    if original is not None:
        codes = np.asarray(_encode(x, original, form.block))
        again = decode(codes, original, form.block)
        if np.array_equal(again.astype(np.float32), x.astype(np.float32)):
            return codes, original
    codes, scale = _quantize(x, form.block, form.power_of_two)
    return np.asarray(codes), np.asarray(scale)
