"""Rotary position embedding with YaRN (arXiv:2412.19437, sections 2.1.1 and 4.3).

Frequencies and the temperature of the softmax follow DeepSeek's released inference
code, cos/sin magnitudes the Hugging Face configuration's `mscale / mscale_all_dim`. A
rotated vector is stored as two halves (all even, then all odd numbers of the released
layout): query-key products are equal and no strided access is needed; checkpoints on
disk hold interleaved pairs.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import AttentionConfig, RopeConfig
from deepseek_jax.typing import Array


class Rotation(NamedTuple):
    """cos and sin of every position's angles, [B, L, R/2] each."""

    cos: Array
    sin: Array


def frequencies(config: RopeConfig, dim: int) -> np.ndarray:
    """Radians per position, [dim/2] in float64. YaRN blends f and f/factor by
    wavelength.
    """
    base = config.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.factor == 1.0:
        return base

    def turns(rotations: float) -> float:
        """Fractional index whose wave turns `rotations` times in original_length."""
        wave = config.original_length / (2 * math.pi * rotations)
        return dim * math.log(wave) / (2 * math.log(config.theta))

    low = max(math.floor(turns(config.beta_fast)), 0)
    high = min(math.ceil(turns(config.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return base / config.factor * ramp + base * (1 - ramp)


def temperature(factor: float, mscale: float) -> float:
    """YaRN's m = 0.1 mscale ln(factor) + 1, which is 1 without YaRN."""
    return 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: AttentionConfig) -> float:
    """What multiplies every logit: 1/sqrt(head dim), times m^2 under YaRN."""
    m = temperature(config.rope.factor, config.rope.mscale_all_dim)
    return m**2 / math.sqrt(config.nope_dim + config.rope_dim)


def rotation(
    config: RopeConfig, dim: int, position_BL: Array, dtype: jnp.dtype
) -> Rotation:
    """Angles of integer positions [B, L], computed in `dtype` (at least float32)."""
    angle = position_BL[..., None].astype(dtype) * frequencies(config, dim).astype(
        dtype
    )
    magnitude = temperature(config.factor, config.mscale) / temperature(
        config.factor, config.mscale_all_dim
    )
    return Rotation(jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude)


def rotate(x_BLHR: Array, by: Rotation) -> Array:
    """Turns the pairs (i, i + R/2) of every head [B, L, H, R] by their position's
    angle.
    """
    even, odd = jnp.split(x_BLHR, 2, -1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], -1)
