"""What the benchmark times are kernels that compute what XLA computes.

Here one small shape of each operation is simulated; on a GPU all small ones run, those
of the replicas, and the first one of DeepSeek-V3's.
"""

import itertools

import jax
import pytest

from pallas_kernels import bench_cases
from pallas_kernels.bench_cases import OPERATIONS
from pallas_kernels.choice import XLA
from pallas_kernels.mla_decode import mosaic_gpu as mla_decode
from pallas_kernels.testing import KERNEL, ON_GPU, distance, watched

SMALL = {
    "fp8_matmul": "one tile",
    "fp8_quantize": "tiles",
    "grouped_matmul": "one block",
    "grouped_fp8_matmul": "one block",
    "flash_mla": "one position",
    "mla_decode": "one query",
}
# Both round to 8 or 16 bits, each its own sums; a wrong tile is far beyond.
BOUND = 1e-2


def names(op):
    """Sizes and shapes of an operation that this machine computes."""
    if not ON_GPU:
        return [("ci", SMALL[op])]
    shapes = OPERATIONS[op][0]
    every = [(size, at) for size in ("ci", "replica") for at in shapes[size]]
    return [*every, ("v3", next(iter(shapes["v3"])))]


CASES = [(op, *name) for op in OPERATIONS for name in names(op)]


@pytest.mark.parametrize(("op", "size", "at"), CASES)
def test_a_kernel_computes_what_xla_does(op, size, at, monkeypatch):
    monkeypatch.setattr(bench_cases, "OURS", (XLA, KERNEL))
    if not ON_GPU:  # few shares of the work, or the simulator is long in idle blocks
        monkeypatch.setattr(mla_decode, "PROCESSORS", 2)
    shapes, cases = OPERATIONS[op]
    parts = list(cases(shapes[size][at]))
    if not parts:
        pytest.skip("nothing of it is timed")
    for part, case in parts:
        with watched():
            made = [
                jax.tree.leaves(jax.block_until_ready(case.candidates[name]()()))
                for name in (KERNEL, XLA)
            ]
        for got, want in itertools.zip_longest(*made):
            if jax.numpy.issubdtype(want.dtype, jax.numpy.floating):
                error = distance(got, want)
                assert error <= BOUND, f"{part}: {error:.1e}"
