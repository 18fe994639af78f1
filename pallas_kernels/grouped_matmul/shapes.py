"""Sizes at which grouped products, in bfloat16 and FP8, are tested and measured.

`v3` is what a device of DeepSeek-V3 multiplies with 8 of the 256 experts: 8192 rows for
each, as published of DeepGEMM's grouped kernels with 4 experts, or few for each.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """n blocks of `rows` by E matrices [D, F]; the first `used` blocks hold rows."""

    n: int
    E: int
    D: int
    F: int
    used: int
    rows: int = 128


SHAPES: dict[str, dict[str, Shape]] = {
    "ci": {
        "plain": Shape(3, 2, 128, 256, 3),
        "ragged": Shape(4, 5, 144, 264, 3),
        "none used": Shape(2, 2, 128, 128, 0),
        "one block": Shape(1, 1, 64, 128, 1),
    },
    "replica": {
        "gate and up": Shape(144, 16, 256, 256, 136),
        "down": Shape(144, 16, 128, 256, 136),
    },
    "v3": {
        "gate and up": Shape(256, 4, 7168, 4096, 256),
        "down": Shape(256, 4, 2048, 7168, 256),
        "few rows": Shape(40, 32, 7168, 4096, 36),
    },
}
