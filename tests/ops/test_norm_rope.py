"""RMSNorm and RoPE/YaRN against the formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import AttentionConfig, RopeConfig
from deepseek_jax.ops.norm import rms_norm
from deepseek_jax.ops.rope import frequencies, rotate, rotation, softmax_scale

YARN = RopeConfig(factor=40.0)


def test_rms_norm_matches_its_formula():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 8)), rng.normal(size=8)
    with jax.enable_x64(True):
        got = rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-6)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_rms_norm_of_bf16_works_in_f32():
    assert rms_norm(jnp.ones(4, jnp.bfloat16), jnp.ones(4), 1e-6).dtype == jnp.float32


def test_yarn_blends_between_the_published_dimensions():
    """facts of section 4.3: low 10, high 23 for theta 1e4, 64 dims, length 4096."""
    base = frequencies(RopeConfig(), 64)
    np.testing.assert_allclose(base, 10000.0 ** (-np.arange(32) / 32), rtol=1e-12)
    ratio = frequencies(YARN, 64) / base
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-12)
    ramp = (np.arange(11, 23) - 10) / 13
    np.testing.assert_allclose(ratio[11:23], ramp / 40 + (1 - ramp), rtol=1e-12)


@pytest.mark.parametrize(
    "rope, scale",
    [
        (RopeConfig(), 0.07216878),
        (YARN, 0.13523378),
        (RopeConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707), 0.11472140),
    ],
)
def test_softmax_scale_is_the_published_one(rope, scale):
    assert softmax_scale(AttentionConfig(rope=rope)) == pytest.approx(scale, rel=1e-6)


def test_rotation_is_complex_multiplication_of_interleaved_pairs():
    """Undoing the half layout gives DeepSeek's (2j, 2j+1) complex rotation."""
    rng = np.random.default_rng(1)
    x, position = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 5000, (2, 5))
    with jax.enable_x64(True):
        by = rotation(RopeConfig(), 8, jnp.asarray(position), jnp.float64)
        halves = np.concatenate([x[..., ::2], x[..., 1::2]], -1)
        got = np.asarray(rotate(jnp.asarray(halves), by))
    angle = position[..., None] * 10000.0 ** (-np.arange(4) / 4)
    want = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, :, None]
    np.testing.assert_allclose(got[..., :4] + 1j * got[..., 4:], want, rtol=1e-10)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(2)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 16)))

    def score(i, j):
        turn = lambda at: rotation(YARN, 16, jnp.array([[at]]), jnp.float32)  # noqa: E731
        return float((rotate(q, turn(i)) * rotate(k, turn(j))).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 5), abs=1e-2)
