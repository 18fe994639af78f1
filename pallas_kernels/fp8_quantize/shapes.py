"""Sizes at which quantisation is tested and measured: rows M, columns N.

`v3` is what DeepSeek-V3's layers quantise of 4096 tokens, and one expert's weights.
"""

from typing import NamedTuple

from pallas_kernels.fp8_quantize.reference import BLOCK, TILE, Block


class Shape(NamedTuple):
    """x [M, N], quantised by blocks, of it or of its transpose (`turned`)."""

    M: int
    N: int
    block: Block = TILE
    turned: bool = False


SHAPES: dict[str, dict[str, Shape]] = {
    "ci": {
        "tiles": Shape(64, 128),
        "tiles, ragged": Shape(132, 208),
        "tiles, turned": Shape(144, 72, turned=True),
        "blocks": Shape(132, 208, BLOCK),
        "blocks, turned": Shape(144, 72, BLOCK, turned=True),
    },
    "replica": {
        "activations": Shape(4096, 256),
        "activations, turned": Shape(4096, 256, turned=True),
        "weights": Shape(256, 1024, BLOCK),
    },
    "v3": {
        "activations": Shape(4096, 7168),
        "activations, turned": Shape(4096, 7168, turned=True),
        "weights": Shape(7168, 4096, BLOCK),
        "weights, turned": Shape(7168, 4096, BLOCK, turned=True),
    },
}
