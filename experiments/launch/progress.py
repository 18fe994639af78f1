"""Where a sweep's runs stand, on the terminal that it was started from. Ours."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepseek_jax.analysis.runs import DONE, FAILED, PENDING, RUNNING
from deepseek_jax.train.hooks import clock

if TYPE_CHECKING:
    from experiments.launch.local import State

QUIET_S = 30.0  # between progress lines where the output is no terminal
WIDTH = 50  # characters of what a run says that it does


class Progress:
    """One live line on a terminal; elsewhere a plain line every half a minute."""

    def __init__(self, state: "State"):
        self.state, self.live = state, sys.stderr.isatty()
        self.total = {n: item.config.train.steps for n, item in state.items.items()}
        self.first = sum(state.steps().values())
        self.shown = self.began = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._print(f"\r{text}\x1b[K\n" if self.live else f"{text}\n")

    def show(self, active: Sequence[Sequence[str]]) -> None:
        """Prints where the active runs stand and when the whole sweep may end.

        Args:
          active: runs by process.
        """
        now = time.monotonic()
        if not active or (not self.live and now - self.shown < QUIET_S):
            return
        self.shown = now
        ended = len(self.state.named(DONE, FAILED))
        parts = "  |  ".join(self._of(name) for name in active)
        line = f"[{ended}/{len(self.total)}] {parts}  ETA {self._eta(now)}"
        if self.live:  # a second row would stay
            line = f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K"
        self._print(line if self.live else f"{line}\n")

    def _of(self, names: Sequence[str]) -> str:
        records = [self.state.followers[name].latest() for name in names]
        parts = [names[0]] + ([f"+{len(names) - 1}"] if names[1:] else [])
        step = min(record.get("step", 0) for record in records)
        parts.append(f"{step}/{self.total[names[0]]}")
        if doing := next(filter(None, map(self.state.doing, names)), ""):
            parts.append(f"({doing[:WIDTH]})")
        for key in self.state.plan.metrics:
            found = [record.get(key) for record in records]
            if values := [x for x in found if isinstance(x, int | float)]:
                ends = dict.fromkeys(f"{end:.4g}" for end in (min(values), max(values)))
                parts.append(f"{key.removesuffix('_batch')} {' to '.join(ends)}")
        return " ".join(parts)

    def _eta(self, now: float) -> str:
        steps = self.state.steps()
        made = sum(steps.values()) - self.first
        unfinished = self.state.named(PENDING, RUNNING)
        left = sum(self.total[name] - steps[name] for name in unfinished)
        return clock(left * (now - self.began) / made) if made > 0 else "?"

    def _print(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
