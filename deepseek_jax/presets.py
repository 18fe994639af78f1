"""Model sizes by name, as `ModelConfig` values. A name is only a shorthand for its
fields.

The released models (`v2_lite_16b`, `v2_236b`, `v3_671b`) carry the YaRN of their
configuration files, for contexts up to 128K. Pre-training at 4K had plain RoPE:
`attention.rope.factor = 1` turns it off. How the router is balanced is not the model's
but `BalanceConfig`'s: V3's bias comes with a strategy that keeps one.
"""

import dataclasses

from deepseek_jax.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
)


def tiny() -> ModelConfig:
    """3.2M parameters: every part of DeepSeek-V3, trains in minutes on a laptop."""
    return ModelConfig(
        vocab_size=4096,
        dim=128,
        num_layers=4,
        num_dense=1,
        dense_dim=512,
        init_std=0.0,
        attention=AttentionConfig(
            num_heads=4, q_rank=64, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32
        ),
        moe=MoEConfig(
            num_experts=16, top_k=2, ffn_dim=64, num_groups=4, keep_groups=2, scale=1.0
        ),
        mtp=MTPConfig(depth=1),
    )


def mini() -> ModelConfig:
    """12.7M parameters, for numerics and speed: 16 experts, top-4 in 2 of 4 groups."""
    return ModelConfig(
        vocab_size=8192,
        dim=256,
        num_layers=4,
        num_dense=1,
        dense_dim=1024,
        init_std=0.0,
        attention=AttentionConfig(
            num_heads=8, q_rank=96, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32
        ),
        moe=MoEConfig(
            num_experts=16, top_k=4, ffn_dim=128, num_groups=4, keep_groups=2, scale=1.0
        ),
        mtp=MTPConfig(depth=1),
    )


def v3_671b() -> ModelConfig:
    """DeepSeek-V3 and R1: 671.0B parameters, 37.6B active, and one MTP module.

    arXiv:2412.19437, section 4.2; YaRN as released. `ModelConfig`'s defaults are this
    model's shape without YaRN and MTP.
    """
    return ModelConfig(
        attention=AttentionConfig(rope=RopeConfig(factor=40.0)),
        mtp=MTPConfig(depth=1),
    )


def v2_236b() -> ModelConfig:
    """DeepSeek-V2: 235.7B parameters, 21.4B active (arXiv:2405.04434, section 3.1.2).

    Softmax scores that are not renormalised, groups ranked by their best expert.
    """
    return ModelConfig(
        vocab_size=102_400,
        dim=5120,
        num_layers=60,
        num_dense=1,
        dense_dim=12_288,
        attention=AttentionConfig(rope=_V2_ROPE),
        moe=MoEConfig(
            num_experts=160,
            top_k=6,
            ffn_dim=1536,
            num_shared=2,
            num_groups=8,
            keep_groups=3,
            score="softmax",
            group_score="max",
            normalize=False,
            scale=16.0,
        ),
    )


def v2_lite_16b() -> ModelConfig:
    """DeepSeek-V2-Lite: 15.7B parameters, 2.7B active (arXiv:2405.04434, appendix B).

    No compression of the query and no groups.
    """
    return ModelConfig(
        vocab_size=102_400,
        dim=2048,
        num_layers=27,
        num_dense=1,
        dense_dim=10_944,
        attention=AttentionConfig(num_heads=16, q_rank=0, rope=_V2_ROPE),
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            ffn_dim=1408,
            num_shared=2,
            num_groups=1,
            keep_groups=1,
            score="softmax",
            group_score="max",
            normalize=False,
            scale=1.0,
        ),
    )


_V2_ROPE = RopeConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)


def ablation_16b() -> ModelConfig:
    """About the 15.7B model of V3's ablations (arXiv:2412.19437, section 4.5).

    An approximation: its widths are unpublished. This is V2-Lite's shape at 4K, with
    V3's router and scale.
    """
    return _with_v3_router(v2_lite_16b())


def ablation_229b() -> ModelConfig:
    """About the 228.7B model of V3's ablations (arXiv:2412.19437, section 4.5).

    An approximation: its widths are unpublished. This is V2's shape at 4K (235.7B),
    with V3's router and scale.
    """
    return _with_v3_router(v2_236b())


def _with_v3_router(model: ModelConfig) -> ModelConfig:
    moe = dataclasses.replace(
        model.moe, score="sigmoid", group_score="top2", normalize=True, scale=2.5
    )
    attention = dataclasses.replace(model.attention, rope=RopeConfig())
    return dataclasses.replace(model, attention=attention, moe=moe)


def deepseekmoe_2b() -> ModelConfig:
    """The 2.0B model, 0.3B active, of DeepSeekMoE (arXiv:2401.06066, section 4.1.3).

    Multi-head attention, every layer a mixture: 1 shared and 63 routed experts, 7 of
    them active, each a quarter of a feed-forward. The paper gives no width: all experts
    together are 16 feed-forwards of 8 dim^2 parameters, so one is 2/3 dim wide, here
    rounded up to a multiple of 8. Its vocabulary is "8K".
    """
    return ModelConfig(
        vocab_size=8192,
        dim=1280,
        num_layers=9,
        num_dense=0,
        attention=AttentionConfig(
            kind="mha", num_heads=10, nope_dim=0, rope_dim=128, value_dim=128
        ),
        moe=MoEConfig(
            num_experts=63,
            top_k=7,
            ffn_dim=856,
            num_shared=1,
            num_groups=1,
            keep_groups=1,
            score="softmax",
            group_score="max",
            normalize=False,
            scale=1.0,
        ),
    )
