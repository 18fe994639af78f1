"""Sizes at which absorbed latent attention is tested and measured.

`v3` is DeepSeek-V3's: 128 heads that read latents of 512 and keys of 64, in pages of 64
tokens or without, one query position or two (a guess to verify); many rows with caches
of thousands of tokens, and one row with 128K.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """B rows of L queries on up to S keys; H heads, widths C, R; page 0 = none."""

    B: int
    L: int
    H: int
    S: int
    C: int = 512
    R: int = 64
    page: int = 0


SHAPES: dict[str, dict[str, Shape]] = {
    "ci": {
        "one query": Shape(1, 1, 4, 100, C=32, R=16),
        "ragged, pages": Shape(4, 2, 40, 256, C=64, R=16, page=64),
        "large pages": Shape(2, 4, 4, 256, C=32, R=32, page=128),
        "v3 widths": Shape(2, 1, 64, 200),
    },
    "replica": {
        "tiny": Shape(16, 2, 4, 256, C=32, R=16),
        "mini": Shape(16, 2, 8, 512, C=64, R=16, page=64),
    },
    "v3": {
        "128 rows, 4K": Shape(128, 1, 128, 4096, page=64),
        "128 rows, 4K, two positions": Shape(128, 2, 128, 4096, page=64),
        "32 rows, 8K, without pages": Shape(32, 1, 128, 8192),
        "one row, 128K": Shape(1, 1, 128, 131072, page=64),
        "four positions": Shape(32, 4, 128, 4096, page=64),
    },
}
