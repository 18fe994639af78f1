"""Which implementation of an operation runs: the one demanded, or the fastest.

"xla" runs anywhere. "mosaic_gpu" is the Pallas kernel for Hopper GPUs; "interpret" the
same kernel simulated on a CPU, for tests. A kernel refuses what it does not do with a
NotImplementedError. Whoever demanded it gets that error; others get "xla", and may ask
for the reason.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu

XLA, MOSAIC_GPU, INTERPRET = "xla", "mosaic_gpu", "interpret"
IMPLEMENTATIONS = XLA, MOSAIC_GPU, INTERPRET
# How kernels are simulated, by implementation; those not here are not.
INTERPRETED = {INTERPRET: mosaic_gpu.InterpretGPUParams(detect_races=True)}

_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


class Choice(NamedTuple):
    """An implementation's name, and why a faster one was passed over ("" if none)."""

    implementation: str
    reason: str = ""


def target() -> Any:
    """The device that is traced for: that of the mesh, the default one, or the first.

    One to compile for, which is not there, becomes the target inside
    `jax.default_device(device)`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device or jax.config.jax_default_device or jax.devices()[0]


def require_hopper() -> None:
    """Raises NotImplementedError unless the program is for a Hopper GPU."""
    kind = getattr(target(), "device_kind", str(target()))
    if not _HOPPER.search(kind):
        raise NotImplementedError(
            f"{MOSAIC_GPU} runs on NVIDIA Hopper GPUs (H100, H200, H800, H20, GH200), "
            f"not on {kind!r}"
        )


Tiled = tuple[tuple[str, int, int], ...]  # an axis, its size, that of its tiles


def check_tiled(tiled: Tiled) -> None:
    """Raises NotImplementedError where TMA cannot copy what is stored in tiles.

    JAX (0.11.2) has it copy an axis as whole tiles, or as one that is shorter.
    """
    for name, size, tile in tiled:
        if size > tile and size % tile:
            raise NotImplementedError(
                f"{name} = {size}: the kernel wants a multiple of {tile}, or fewer"
            )


def choose(
    demanded: str | None, check: Callable[[], None], tiled: Tiled = ()
) -> Choice:
    """The implementation to run.

    Args:
      demanded: a name of IMPLEMENTATIONS, or None for the fastest that can.
      check: raises NotImplementedError if the kernel does not do what is asked of it.
      tiled: as of `check_tiled`; simulated copies have no such limits.

    Raises:
      ValueError: there is no implementation of that name.
      NotImplementedError: the one demanded cannot do it.
    """
    if demanded is not None and demanded not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation = {demanded!r}: must be None for the fastest that can, or "
            f"one of {', '.join(IMPLEMENTATIONS)}"
        )
    if demanded == XLA:
        return Choice(XLA)
    try:
        if demanded != INTERPRET:
            require_hopper()
        check()
        if demanded != INTERPRET:
            check_tiled(tiled)
    except NotImplementedError as error:
        if demanded:
            raise
        return Choice(XLA, str(error))
    return Choice(demanded or MOSAIC_GPU)
