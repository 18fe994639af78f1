"""Block-FP8 weights of released checkpoints (arXiv:2412.19437, section 3.3.2).

`X.weight` holds E4M3 codes, `X.weight_scale_inv` a scale for each block of 128 x 128.
Despite its name the scale multiplies. V3.1 and later have powers of two ("ue8m0").
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.fields import refuse
from pallas_kernels.fp8_quantize import reference as fp8

SUFFIX = "_scale_inv"
POWERS = np.dtype(jnp.float8_e8m0fnu)  # scales that cannot but be powers of two
QUANTIZED, UE8M0 = "quantization_config", "ue8m0"
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
    found = config.get(QUANTIZED)
    if not found:
        return None
    if not isinstance(found, dict):
        refuse(QUANTIZED, found, "must be an object")
    wanted = {"quant_method": ("fp8",), "fmt": ("e4m3", None)}
    wanted["scale_fmt"] = (None, UE8M0, "float")
    for name, allowed in wanted.items():
        value = found.get(name)
        if value not in allowed:
            right = f"must be {allowed[0] or allowed[1]!r}"
            refuse(f"{QUANTIZED}.{name}", value, right)
    block, name = found.get("weight_block_size"), f"{QUANTIZED}.weight_block_size"
    if not isinstance(block, list) or [type(size) for size in block] != [int, int]:
        refuse(name, block, "must be two integers, as [128, 128]")
    if block[0] < 1 or block[1] < 1 or ALIGN % block[0]:
        refuse(name, block, f"the first must divide {ALIGN}")
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


_scales = jax.jit(
    functools.partial(fp8.scales, least=fp8.TINY_AMAX), static_argnums=(1, 2)
)
_encode = jax.jit(fp8.encode, static_argnums=2)
_dequantize = jax.jit(
    functools.partial(fp8.dequantize, dtype=jnp.bfloat16), static_argnums=2
)


@functools.partial(jax.jit, static_argnums=2)
def _describes(x: jax.Array, scale: jax.Array, block: fp8.Block) -> jax.Array:
    """Whether codes times scales can be exactly x, block by block."""
    codes = fp8.encode(x, jnp.where(scale == 0, 1, scale), block)
    again = fp8.dequantize(codes, scale, block, jnp.bfloat16)
    wrong = again.astype(jnp.float32) != x.astype(jnp.float32)
    return ~fp8.blocks(wrong, block).any((-3, -1))


def decode(codes: np.ndarray, scale: np.ndarray, block: fp8.Block) -> np.ndarray:
    """Weights in bfloat16, [out, in]."""
    return np.asarray(_dequantize(codes, scale, block))


def encode(
    x: np.ndarray, form: Format, dtype: np.dtype, original: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of weights [out, in] by the released recipe.

    A block's largest magnitude may be of any size: counted as 1e-4 at least, as in
    DeepSeek's kernels, a block of smaller numbers would lose some of their digits.

    Args:
      dtype: of the scales. Codes belong to the scales as they are stored.
      original: the scales of the file that the weights came from. In a block that they
        still describe exactly, so that nothing is lost, they are kept.
    """
    powers = form.power_of_two or dtype == POWERS
    scale = np.asarray(_scales(x, form.block, powers)).astype(dtype)
    if original is not None:
        kept = _describes(x, original.astype(np.float32), form.block)
        scale = np.where(kept, original, scale)
    wide = scale.astype(np.float32)
    codes = _encode(x, np.where(wide == 0, np.float32(1), wide), form.block)
    return np.asarray(codes), scale
