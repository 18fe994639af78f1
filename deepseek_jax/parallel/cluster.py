"""Which processes train together, by what the environment says, and how they meet.

JAX's own detection of a cluster, made strict; the report (arXiv:2412.19437) names no
runtime.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax

ADDRESS, COUNT, INDEX = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
# JAX finds the others by these, which srun sets.
SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
HEARTBEAT_S = 30  # after which a silent process counts as dead
SHUTDOWN_S = 60  # that a process which is done waits for the others


@dataclass(frozen=True)
class Place:
    """What `jax.distributed.initialize` is told; None is left to JAX."""

    address: str | None = None
    count: int | None = None
    index: int | None = None
    devices: tuple[int, ...] | None = None  # of this process, among the visible ones


def place(environment: Mapping[str, str]) -> Place | None:
    """This process's place among several by its environment, None if it is alone.

    JAX_COORDINATOR_ADDRESS (host:port, where process 0 listens), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (from 0) say it; else srun's variables do, with more than one task.

    Raises:
      ValueError: one of the three is missing or no number in range.
    """
    if COUNT in environment or INDEX in environment:
        return _told(environment)
    if not all(environment.get(name) for name in SLURM):
        return None
    if int(environment["SLURM_NTASKS"]) == 1:
        return None
    return Place(devices=_all_devices(environment))


def _told(environment: Mapping[str, str]) -> Place | None:
    for name in (ADDRESS, COUNT, INDEX):
        if not environment.get(name):
            raise ValueError(
                f"{name} is not set: processes need all of {ADDRESS} (host:port of "
                f"process 0), {COUNT} and {INDEX}"
            )
    count = _number(environment, COUNT, 1)
    index = _number(environment, INDEX, 0, count - 1)
    host, _, port = environment[ADDRESS].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"{ADDRESS} = {environment[ADDRESS]!r}: must be host:port, as "
            "localhost:12355"
        )
    return None if count == 1 else Place(environment[ADDRESS], count, index)


def _number(
    environment: Mapping[str, str], name: str, least: int, most: int = 10**6
) -> int:
    text = environment[name]
    if not text.isdigit() or not least <= int(text) <= most:
        raise ValueError(f"{name} = {text!r}: must be a number from {least} to {most}")
    return int(text)


def _all_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The devices of a task that has all it sees; else JAX takes one for each task.

    JAX would take the one numbered by the task, also where there is one task a host, or
    where Slurm shows each task its own device alone.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    alone = environment["SLURM_NTASKS"] == environment.get("SLURM_STEP_NUM_NODES")
    if visible == [""] or not (alone or len(visible) == 1):
        return None
    return tuple(range(len(visible)))


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the others, if the environment names any; before JAX touches a device.

    Also says it if JAX_PLATFORMS asks for a GPU first and there is none, where JAX by
    itself would go on with the CPU.

    A process that dies is noticed at the next collective operation, or after
    `HEARTBEAT_S` seconds; JAX then ends this one with a message.

    Raises:
      ValueError: as `place`; or there is no GPU.
    """
    found = place(environment)
    if found is not None and not jax.distributed.is_initialized():
        _join(found)
    wanted = environment.get("JAX_PLATFORMS", "")
    if wanted.startswith("cuda") and jax.default_backend() == "cpu":
        raise ValueError(
            f"JAX_PLATFORMS = {wanted!r}: JAX finds no GPU here; install jax[cuda13] "
            "in this environment, look at nvidia-smi, or set JAX_PLATFORMS=cpu"
        )


def _join(found: Place) -> None:
    # JAX would catch SIGTERM, at which a run saves.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        found.address,
        found.count,
        found.index,
        local_device_ids=found.devices,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
    )
    jax.devices()  # all processes bring up their devices together
