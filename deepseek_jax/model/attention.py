"""Multi-head Latent Attention and its baselines (arXiv:2412.19437, section 2.1.1).

Every kind turns x [B, L, D] into query, key and value heads for `Runtime.attention` and
projects what comes back. The shared rotary key of MLA stays a single head. For a cache
of latents MLA also has the absorbed form, where W_UK moves to the queries and W_UV to
the output, so that no key or value of a head is ever made (arXiv:2405.04434, 2.1.2).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.linear import Linear, RMSNorm
from deepseek_jax.ops.rope import Rotation, rotate, softmax_scale
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array


class MLA(nn.Module):
    """Keys and values come from one latent a token (equations 1-11)."""

    config: ModelConfig
    rt: Runtime

    def setup(self) -> None:
        at, config, rt = self.config.attention, self.config, self.rt
        heads, head_dim = at.num_heads, at.nope_dim + at.rope_dim
        if at.q_rank:
            self.q_a = Linear(at.q_rank, config, rt)
            self.q_norm = RMSNorm(config)
        self.q_b = Linear(heads * head_dim, config, rt)
        self.kv_a = Linear(at.kv_rank + at.rope_dim, config, rt)
        self.kv_norm = RMSNorm(config)
        self.kv_b = Linear(heads * (at.nope_dim + at.value_dim), config, rt)
        self.o = Linear(config.dim, config, rt)

    def query(self, x_BLD: Array, by: Rotation) -> tuple[Array, Array]:
        """Per-head queries: unrotated [B, L, H, N] and rotated [B, L, H, R]."""
        at = self.config.attention
        latent_BLQ = self.q_norm(self.q_a(x_BLD)) if at.q_rank else x_BLD
        heads = (*x_BLD.shape[:2], at.num_heads, at.nope_dim + at.rope_dim)
        nope, rope = jnp.split(self.q_b(latent_BLQ).reshape(heads), [at.nope_dim], -1)
        return nope, rotate(rope, by)

    def latent(self, x_BLD: Array, by: Rotation) -> tuple[Array, Array]:
        """What a cache holds: normed latent [B, L, C] and rotated shared key [B, L, 1,
        R].
        """
        c_kv, k_rope = jnp.split(self.kv_a(x_BLD), [self.config.attention.kv_rank], -1)
        return self.kv_norm(c_kv), rotate(k_rope[:, :, None], by)

    def expand(self, c_kv_BSC: Array) -> tuple[Array, Array]:
        """Per-head unrotated keys [B, S, H, N] and values [B, S, H, O] of latents."""
        at = self.config.attention
        heads = (*c_kv_BSC.shape[:2], at.num_heads, at.nope_dim + at.value_dim)
        k_nope, v = jnp.split(self.kv_b(c_kv_BSC).reshape(heads), [at.nope_dim], -1)
        return k_nope, v

    def expanded(
        self,
        query: tuple[Array, Array],
        latent: tuple[Array, Array],
        segment_BL: Array | None,
    ) -> Array:
        """Attention over these latents, with keys and values of every head."""
        k_nope, v = self.expand(latent[0])
        scale = softmax_scale(self.config.attention)
        with jax.named_scope("core"):
            out_BLHO = self.rt.attention(
                *query, k_nope, latent[1], v, segment_BL, scale=scale
            )
        return self.o(out_BLHO.reshape(*out_BLHO.shape[:2], -1))

    def absorbed(
        self, query: tuple[Array, Array], attend: Callable[..., Array]
    ) -> Array:
        """The same with latents in the place of keys and values.

        Args:
          attend: (q_lat_BLHC, q_rope_BLHR, scale=...) to latent outputs [B, L, H, C].
        """
        at = self.config.attention
        kernel = self.kv_b.variables["params"]["kernel"]
        kernel_CHX = kernel.reshape(at.kv_rank, at.num_heads, -1)
        up_k_CHN, up_v_CHO = jnp.split(kernel_CHX, [at.nope_dim], -1)
        highest = jax.lax.Precision.HIGHEST
        q_lat = jnp.einsum("BLHN,CHN->BLHC", query[0], up_k_CHN, precision=highest)
        with jax.named_scope("core"):
            out_BLHC = attend(q_lat, query[1], scale=softmax_scale(at))
        out_BLHO = jnp.einsum("BLHC,CHO->BLHO", out_BLHC, up_v_CHO, precision=highest)
        return self.o(out_BLHO.reshape(*out_BLHO.shape[:2], -1))

    def __call__(self, x_BLD: Array, by: Rotation, segment_BL: Array | None) -> Array:
        return self.expanded(self.query(x_BLD, by), self.latent(x_BLD, by), segment_BL)


class GroupedQuery(nn.Module):
    """Ordinary attention with `kv_heads` key/value heads; as many as queries is MHA."""

    config: ModelConfig
    rt: Runtime
    kv_heads: int

    @nn.compact
    def __call__(self, x_BLD: Array, by: Rotation, segment_BL: Array | None) -> Array:
        at = self.config.attention
        head_dim = at.nope_dim + at.rope_dim

        def heads(name: str, count: int, dim: int) -> Array:
            y = Linear(count * dim, self.config, self.rt, name=name)(x_BLD)
            return y.reshape(*x_BLD.shape[:2], count, dim)

        q_nope, q_rope = jnp.split(
            heads("q", at.num_heads, head_dim), [at.nope_dim], -1
        )
        k_nope, k_rope = jnp.split(
            heads("k", self.kv_heads, head_dim), [at.nope_dim], -1
        )
        v = heads("v", self.kv_heads, at.value_dim)
        with jax.named_scope("core"):
            out_BLHO = self.rt.attention(
                q_nope,
                rotate(q_rope, by),
                k_nope,
                rotate(k_rope, by),
                v,
                segment_BL,
                scale=softmax_scale(at),
            )
        flat = out_BLHO.reshape(*x_BLD.shape[:2], -1)
        return Linear(self.config.dim, self.config, self.rt, name="o")(flat)


def _mha(config: ModelConfig, rt: Runtime, name: str) -> nn.Module:
    return GroupedQuery(config, rt, config.attention.num_heads, name=name)


def _gqa(config: ModelConfig, rt: Runtime, name: str) -> nn.Module:
    return GroupedQuery(config, rt, config.attention.kv_heads, name=name)


def _mla(config: ModelConfig, rt: Runtime, name: str) -> nn.Module:
    return MLA(config, rt, name=name)


ATTENTION = {"mla": _mla, "mha": _mha, "gqa": _gqa}
