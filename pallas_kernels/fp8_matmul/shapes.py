"""Sizes at which FP8 products are tested and measured: rows M, columns N, depth K.

Those of `v3` are DeepSeek-V3's forward products at 4096 tokens, the ones for which
DeepGEMM's rates are published: query and key/value latents at once (1536 + 576), the
query's and the key/value's up-projection, the attention's output, an expert's gate and
up at once, its down-projection; and one weight gradient.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """a [M, K] times b [N, K]^T; `by_block`: b is a weight, scaled by 128 x 128."""

    M: int
    N: int
    K: int
    by_block: bool = True


SHAPES: dict[str, dict[str, Shape]] = {
    "ci": {
        "weights": Shape(256, 256, 384),
        "ragged": Shape(132, 136, 272),
        "gradient": Shape(132, 136, 272, by_block=False),
        "one tile": Shape(64, 128, 128),
    },
    "replica": {
        "ffn": Shape(4096, 1024, 256),
        "attention": Shape(4096, 576, 256),
        "gradient": Shape(256, 1024, 4096, by_block=False),
    },
    "v3": {
        "latents": Shape(4096, 2112, 7168),
        "query": Shape(4096, 24576, 1536),
        "key and value": Shape(4096, 32768, 512),
        "attention output": Shape(4096, 7168, 16384),
        "gate and up": Shape(4096, 4096, 7168),
        "down": Shape(4096, 7168, 2048),
        "gradient": Shape(7168, 4096, 4096, by_block=False),
    },
}
