"""Sizes at which MLA's causal attention is tested and measured.

`v3` is DeepSeek-V3's: pre-training at 4K, the two steps of context extension, and two
of its 128 heads at the full 128K, where a device holds a share of them.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """B rows of L; H query heads on G key heads, g rotary keys; widths N, R, O."""

    B: int
    L: int
    H: int
    G: int
    g: int = 1
    N: int = 128
    R: int = 64
    O: int = 128  # noqa: E741
    segments: bool = False


SHAPES: dict[str, dict[str, Shape]] = {
    "ci": {
        "one position": Shape(1, 1, 1, 1, N=32, R=16, O=32),
        "masked tail": Shape(1, 130, 1, 1, N=32, R=16, O=32),
        "segments": Shape(1, 300, 1, 1, N=32, R=16, O=32, segments=True),
        "two heads, one rotary key": Shape(1, 100, 2, 2, N=32, R=16, O=48),
        "grouped": Shape(2, 65, 2, 1, N=16, R=32, O=64, segments=True),
        "rotary keys by head": Shape(1, 70, 2, 2, g=2, N=64, R=16, O=32),
        "v3 heads": Shape(1, 129, 1, 1),
    },
    "replica": {
        "tiny": Shape(16, 256, 4, 4, N=32, R=16, O=32),
        "mini": Shape(8, 512, 8, 8, N=32, R=16, O=32, segments=True),
    },
    "v3": {
        "4K": Shape(1, 4096, 128, 128),
        "4K, documents": Shape(1, 4096, 128, 128, segments=True),
        "8K": Shape(1, 8192, 128, 128),
        "32K": Shape(1, 32768, 32, 32),
        "128K": Shape(1, 131072, 2, 2),
    },
}
