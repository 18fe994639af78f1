"""Block quantisation in numpy, one block after the other: what tests compare with."""

import ml_dtypes
import numpy as np

from pallas_kernels.testing import ON_GPU

# Of a product's distance from the oracle. The simulator's sums have all of float32's
# digits, those of a Hopper GPU about 14.
BOUND = 5e-4 if ON_GPU else 1e-6


def quantized(x, block, power_of_two, least=0.0):
    """Codes of x [..., M, N] as bytes, and scales, all in float32.

    `least` is what a block's largest magnitude counts as at least; zeros have a scale
    of their own choice, here 1.
    """
    *outer, rows, columns = x.shape
    m, n = block
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty((*outer, -(-rows // m), -(-columns // n)), np.float32)
    for at in np.ndindex(*scales.shape):
        *o, i, j = at
        part = (*o, slice(i * m, i * m + m), slice(j * n, j * n + n))
        amax = max(np.abs(x[part]).max(), np.float32(least))
        scale = np.float32(amax or 448) / np.float32(448)
        if power_of_two:
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        scales[at] = scale
        unit = np.clip(x[part] / scale, -448, 448)
        codes[part] = unit.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes, scales


def assert_codes(made, want):
    """Equal codes, as bytes; but a GPU's division may be off where there is a tie."""
    made = np.asarray(made).view(np.uint8)
    if ON_GPU:
        assert (made != want).mean() < 1e-3
        want = np.where(np.abs(made.astype(int) - want) <= 1, made, want)
    np.testing.assert_array_equal(made, want)
