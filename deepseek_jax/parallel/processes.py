"""Several processes that train as one: how they agree, share a batch, and end.

JAX runs one program in every process (arXiv:2412.19437, section 3.2, names no runtime).
What only one may do, such as writing a file, the first process does; what one finds
wrong, all raise. With one process every function here is the plain call. Ours.
"""

import hashlib
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.parallel import mesh as meshes

LAST_S = 2.0  # that the first process waits before it ends with an error
# What JAX's errors say when another process is gone.
GONE = ("Gloo", "NCCL", "oordination service", "coordination_service")


def several() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return not several() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in every process; by pickle."""
    if not several():
        return [value]
    raw = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(raw)))
    # Few widths: each is a program to compile.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: len(raw)] = raw
    rows = multihost_utils.process_allgather(padded)
    return [
        pickle.loads(row[:size].tobytes())
        for row, size in zip(rows, sizes, strict=True)
    ]


def together[T](function: Callable[[], T]) -> T:
    """Calls `function` in every process; what one raises, all raise."""
    if not several():
        return function()
    value, error = _attempt(function)
    errors = gather(_portable(error))
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other
    return value  # type: ignore[return-value]


def first[T](function: Callable[[], T]) -> T:
    """Calls `function` in the first process; all get its value, or raise its error."""
    if not several():
        return function()
    value, error = _attempt(function) if is_first() else (None, None)
    value, error = gather((value, _portable(error)))[0]
    if error is not None:
        raise error
    return value


def wait() -> None:
    """Returns when every process is here."""
    gather(None)


def first_then_all[T](function: Callable[[], T]) -> T:
    """Calls it in the first process, then in the others: they find what it made."""
    if not several():
        return function()
    done: list[T] = []
    first(lambda: done.append(function()))
    return together(lambda: done[0] if done else function())


def _attempt[T](function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same if it can't be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses to start where processes were given different values.

    Args:
      values: flat, fit for JSON.

    Raises:
      ValueError: names every field that differs, with the processes' values.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    mine, *others = gather(dict(values))
    changed = [
        f"{name} = {mine.get(name)!r} in process 0, {other.get(name)!r} in process {i}"
        for i, other in enumerate(others, 1)
        for name in sorted(mine.keys() | other.keys())
        if mine.get(name) != other.get(name)
    ]
    raise ValueError(
        f"processes disagree: {'; '.join(changed)}. Give all the same command"
    )


def to_global(mesh: Mesh, batch: Any) -> Any:
    """This process's rows as its part of the global batch, split over all devices."""
    if not several():
        return batch
    rows = meshes.by_rows(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch
    )


def share(mesh: Mesh, batch: Any) -> Any:
    """The global batch of one that every process has whole."""
    if not several():
        return batch
    count, index = jax.process_count(), jax.process_index()
    return to_global(
        mesh,
        jax.tree.map(
            lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], batch
        ),
    )


class Rows:
    """The global batches made of every process's own, and the state of them all."""

    def __init__(self, mesh: Mesh, own: Any):
        self.mesh, self.own = mesh, own

    def __next__(self) -> Any:
        return to_global(self.mesh, next(self.own))

    def get_state(self) -> dict[str, Any]:
        """The lanes of all processes in one dict."""
        return {
            name: state
            for states in gather(self.own.get_state())
            for name, state in states.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from the state of any number of processes."""
        self.own.set_state(state)


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return jnp.any(flags)


class Vote:
    """Asks all processes a question at every step, and has the answer a step later.

    The count goes to the devices behind the step and is fetched when the next one is
    under way, so that no device waits for it.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.asarray(jax.devices()), ("device",))
        self.split = NamedSharding(mesh, PartitionSpec("device"))
        self.pending: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        """Whether at the call before any process said yes."""
        flags = np.full(jax.local_device_count(), mine)
        split = jax.make_array_from_process_local_data(self.split, flags)
        before, self.pending = self.pending, _any(split)
        return before is not None and bool(before)


def is_loss(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that another process is gone."""
    while error is not None:
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and any(
            word in text for word in GONE
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> NoReturn:
    """Ends this process although others may be waiting for it.

    Python's own end would wait for them in JAX. The first process goes last: with it
    goes what the others speak through, and JAX ends them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(LAST_S)
    os._exit(code)
