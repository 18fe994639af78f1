"""Model sizes by name, as `ModelConfig` values. A name is only a shorthand for its
fields.
"""

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig


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
