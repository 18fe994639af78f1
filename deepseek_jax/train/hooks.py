"""What watches a run from the host: progress, signals, finiteness, one run a folder.

None of it touches the mathematics; the report (arXiv:2412.19437) has no counterpart.
"""

import fcntl
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import processes
from deepseek_jax.typing import Params

GUARDED = ("loss", "grad_norm")
LOCK = ".lock"


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; everything up to the step named is saved."""


class InUse(ValueError):
    """Another process works in the folder."""


class NotFinite(FloatingPointError):
    """A step whose loss, gradient or evaluation is no number."""

    def __init__(self, step: int, name: str, text: str):
        super().__init__(text)
        self.step, self.name = step, name


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets `received`.

    The second acts as if this were not here. Off the main thread it does nothing.
    Of several processes each may get it a step earlier or later, or only one gets it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[str], None] = print):
        self.received: signal.Signals | None = None
        self.say = say
        self.vote = processes.Vote() if processes.several() else None
        self.before: dict[signal.Signals, Any] = {}

    def stopping(self) -> bool:
        """Whether to stop after this step. To be asked at every step, since all
        processes must stop after the same one.
        """
        mine = self.received is not None
        return mine if self.vote is None else self.vote(mine)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
        self.say(f"{self.received.name}: finishing this step, then saving")


@contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds DIR/.lock, which the system frees when the process ends, however it ends.

    Raises:
      InUse: another process trains in this folder.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"workdir {workdir} is in use: another process trains there"
            ) from None
        yield


def check_free(workdir: Path) -> None:
    """Refuses a folder that is in use, without making anything in it.

    Raises:
      InUse: another process trains in this folder.
    """
    if (workdir / LOCK).exists():
        with exclusive(workdir):
            pass


ADVICE = (
    "the checkpoints before are kept; try a lower optim.lr or a longer optim.warmup"
)


def check_finite(
    step: int, values: Mapping[str, Any], names: Iterable[str] = GUARDED
) -> None:
    """Stops at the first step with a loss or gradient that is no number.

    Raises:
      NotFinite: names the step and the value.
    """
    for name in names:
        if not math.isfinite(values[name]):
            value = float(values[name])
            text = f"{name} is {value} at step {step}: {ADVICE}"
            raise NotFinite(step, name, text)


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.array([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]).all()


def check_params(step: int, params: Params) -> None:
    """Refuses parameters that must not be saved.

    Raises:
      FloatingPointError: the update of `step` made a parameter NaN or infinite.
    """
    if not _all_finite(params):
        raise FloatingPointError(
            f"a parameter is not finite after step {step}: {ADVICE}"
        )


STEP = "step "  # begins a line about a training step


class Progress:
    """One live line on a terminal; elsewhere a plain line every few seconds.

    Of several processes only the first says anything.
    """

    def __init__(self, total: int, stream: TextIO | None = None, every: float = 5.0):
        self.quiet = not processes.is_first()
        self.total, self.every = total, every
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.shown = -math.inf
        self.seen, self.step_s = 0, 0.0

    def update(self, step: int, values: Mapping[str, Any], step_s: float) -> None:
        """Shows a training record; `step_s` is the time since the record before."""
        self.seen += 1
        # The first step compiles; the second starts a running mean.
        share = 1.0 if self.seen <= 2 else 0.1
        self.step_s += share * (step_s - self.step_s)
        now = time.monotonic()
        pause = 0.1 if self.live else self.every
        if now - self.shown < pause and step < self.total:
            return
        self.shown = now
        line = (
            f"{STEP}{step}/{self.total}  loss {values['loss']:.4f}  "
            f"ce {values['ce']:.4f}  maxvio {values['maxvio_batch']:.2f}  "
            f"{values['tokens_per_s']:,.0f} tokens/s"
        )
        if self.seen > 1:
            line += f"  ETA {clock((self.total - step) * self.step_s)}"
        self._print(f"\r{line}\x1b[K" if self.live else f"{line}\n")

    def say(self, text: str) -> None:
        """Prints a line of its own above the live one."""
        self._print(f"\r{text}\x1b[K\n" if self.live else f"{text}\n")

    def wait(self, text: str) -> None:
        """Says what takes time; on a terminal until the next line takes its place."""
        self._print(f"\r{text} ...\x1b[K" if self.live else f"{text}\n")

    def close(self) -> None:
        """Ends the live line."""
        if self.live and self.shown > 0:
            self._print("\n")

    def _print(self, text: str) -> None:
        if self.quiet:
            return
        self.stream.write(text)
        self.stream.flush()


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
