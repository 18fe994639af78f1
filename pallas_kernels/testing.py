"""What is proven of a kernel without a GPU, and how; for tests and the benchmark only.

`interpreted` runs kernels in JAX's simulator of a GPU, which has them read NaN wherever
nothing was written, and fails on any race but one: a `wgmma` reads shared memory at
once there, so only a reader of the code sees whether a buffer is let go too early.
`compile_for` makes machine code for a Hopper GPU that need not be there, and returns
what NVIDIA's compiler says of it. `Suite` is an operation with its oracle, and the
checks that hold for every one.
"""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.choice import INTERPRET, MOSAIC_GPU

Array = jax.Array

# What tests mean by a kernel: itself if they run on a GPU, else the simulated one.
ON_GPU = (jax.config.jax_platforms or "").startswith("cuda")
KERNEL = MOSAIC_GPU if ON_GPU else INTERPRET

_RACES = "GPURaceDetectionState"


class Raced(AssertionError):
    """Two threads of a kernel touched the same memory in no fixed order."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fails on exit if any kernel interpreted inside raced; leaves no state behind.

    The simulator remembers the races of its last kernel alone; this keeps all. Kernels
    must be through before the exit: `interpreted` sees to that.
    """
    states: list[Any] = []

    def state(*args: Any, **named: Any) -> Any:
        states.append(real(*args, **named))
        return states[-1]

    real = getattr(gpu_callbacks, _RACES)
    try:
        with mock.patch.object(gpu_callbacks, _RACES, state):
            yield
        if any(each.races_found for each in states):
            raise Raced("the kernel races: see RACE DETECTED in what was printed")
    finally:
        # After an error, the simulator's state is that of the kernel that failed.
        gpu_callbacks.reset_gpu_interpret_mode_state()


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled, whose interpreted kernels are watched for races."""
    compiled = jax.jit(function)

    def run(*args: Any) -> Any:
        with watched():
            return jax.block_until_ready(compiled(*args))

    return run


class Report(NamedTuple):
    """A kernel's PTX, and what NVIDIA's assembler said of it."""

    ptx: str
    log: str

    @property
    def registers(self) -> int:
        return max(map(int, re.findall(r"Used (\d+) registers", self.log)))

    @property
    def spills(self) -> int:
        """Bytes stored to and loaded from memory for want of registers."""
        return sum(map(int, re.findall(r"(\d+) bytes spill", self.log)))


_DUMPS = "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS"


def compile_for(
    device: jax.Device, function: Callable[..., Any], *shapes: Any
) -> list[Report]:
    """Compiles `function` for one device and reports on each Mosaic kernel in it.

    Args:
      device: may be one that is only described (`topologies.get_topology_desc`).
      shapes: trees of anything with a shape and a dtype.

    Raises:
      RuntimeError: the program has no Mosaic kernel, or the compiler said nothing.
    """
    place = jax.sharding.SingleDeviceSharding(device)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    # A new function, or the kernel's earlier compilation would be found.
    fresh = jax.jit(lambda *args: function(*args))
    lower = functools.partial(fresh.lower, *jax.tree.map(placed, shapes))
    return compile_lowered(device, lower)[1]


def compile_lowered(
    device: jax.Device, lower: Callable[[], jax.stages.Lowered]
) -> tuple[jax.stages.Compiled, list[Report]]:
    """Compiles what `lower()` returns, for one device or others like it."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = {**dict.fromkeys(_DUMPS, "1"), "MOSAIC_GPU_DUMP_TO": folder}
        with mock.patch.dict(os.environ, dumps), jax.default_device(device):
            compiled = lower().compile()
        texts = [path.with_suffix("") for path in sorted(Path(folder).glob("*.ptx"))]
        reports = [
            Report(*(path.with_suffix(end).read_text() for end in (".ptx", ".ptxas")))
            for path in texts
        ]
    if not reports:
        raise RuntimeError("no PTX was dumped: no Mosaic GPU kernel was compiled")
    return compiled, reports


# What the instructions that make a Hopper kernel fast are called in PTX.
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tma": "cp.async.bulk.tensor",
    "mbarrier": "mbarrier.try_wait",
}


def assert_hopper(
    report: Report, instructions: tuple[str, ...] = ("wgmma", "tma")
) -> None:
    """The kernel is for sm_90a, has these INSTRUCTIONS and keeps to its registers."""
    assert ".target sm_90a" in report.ptx, "the target is not sm_90a"
    for name in instructions:
        assert INSTRUCTIONS[name] in report.ptx, f"no {name} in the kernel's PTX"
    assert report.log, "the assembler reported nothing"
    assert report.spills == 0, f"{report.spills} bytes spilled:\n{report.log}"


def distance(actual: Any, expected: Any) -> float:
    """Frobenius norm of the difference over that of `expected`: one number a tensor."""
    actual, expected = (jnp.asarray(x).astype(jnp.float32) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    norm = jnp.linalg.norm(expected.ravel())
    return float(
        jnp.linalg.norm((actual - expected).ravel()) / jnp.where(norm, norm, 1)
    )


@dataclass(frozen=True)
class Suite:
    """An operation, what it must equal, and where its numbers come from.

    Attributes:
      operation: takes arrays and `implementation=`, returns a tree of arrays.
      oracle: takes the same arrays.
      inputs: arrays from a key and a shape of `shapes`.
      shapes: a few small ones by name, odd ones too.
      bound: largest `distance` from the oracle.
      differentiable: positions of the arrays with a gradient, checked alike.
    """

    operation: Callable[..., Any]
    oracle: Callable[..., Any]
    inputs: Callable[[Array, Any], tuple[Array, ...]]
    shapes: Mapping[str, Any] = field(default_factory=dict)
    bound: float = 1e-6
    differentiable: tuple[int, ...] = ()

    def run(self, implementation: str | None, *arrays: Array) -> Any:
        """The operation's result, watched for races if it is interpreted."""

        def call(*arrays: Array) -> Any:
            return self.operation(*arrays, implementation=implementation)

        one = interpreted(call) if implementation == INTERPRET else jax.jit(call)
        return one(*arrays)

    def check_values(self, implementation: str, shape: str, seed: int = 0) -> None:
        """Fresh random inputs give the oracle's numbers, all of them finite."""
        arrays = self.inputs(jax.random.key(seed), self.shapes[shape])
        actual = self.run(implementation, *arrays)
        _agree(actual, jax.jit(self.oracle)(*arrays), self.bound)

    def check_gradients(self, implementation: str, shape: str, seed: int = 0) -> None:
        """So do the gradients of the sum of the results times random numbers."""
        arrays = self.inputs(jax.random.key(seed), self.shapes[shape])
        out = jax.eval_shape(self.oracle, *arrays)
        key = jax.random.key(seed + 1)
        # Numbers that bfloat16 has, so that rounding them makes no difference.
        g = jax.tree.map(
            lambda x: jax.random.normal(key, x.shape, jnp.bfloat16).astype(x.dtype), out
        )
        oracle = jax.jit(functools.partial(self._gradients, self.oracle))
        named = functools.partial(self.operation, implementation=implementation)
        compiled = interpreted if implementation == INTERPRET else jax.jit
        run = compiled(functools.partial(self._gradients, named))
        _agree(run(g, *arrays), oracle(g, *arrays), self.bound)

    def _gradients(
        self, function: Callable[..., Any], g: Any, *arrays: Array
    ) -> tuple[Array, ...]:
        def of(*some: Array) -> Any:
            given = dict(zip(self.differentiable, some, strict=True))
            return function(*(given.get(i, x) for i, x in enumerate(arrays)))

        value, pull = jax.vjp(of, *(arrays[i] for i in self.differentiable))
        return pull(jax.tree.map(lambda g, x: g.astype(x.dtype), g, value))


def _agree(actual: Any, expected: Any, bound: float) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
        error = distance(got, want)  # NaN is no number below the bound
        assert error <= bound, f"result {number}: {error:.2e} from the oracle"
