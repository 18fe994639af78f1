"""Trains the runs of a `population` side by side, each in a folder of its own.

All but the program is a run's own: its rows of tokens, records, checkpoints and folder,
with which `loop.run` could go on. A run that fails, or is done earlier than others, is
computed on and no longer looked at. Ours.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax.checkpoint.disk import DiskFull
from deepseek_jax.checkpoint.folders import FOLDER
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import Config
from deepseek_jax.data.batch import Batch
from deepseek_jax.parallel import processes
from deepseek_jax.train import hooks, loop, population, start
from deepseek_jax.train.metrics import Recorder
from deepseek_jax.train.start import Run
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import compiled

# The state and the batch of a step that went wrong.
Look = Callable[[], tuple[TrainState, Batch]]


@dataclass
class Member:
    """A run of the population; `batch` is the last one that it took."""

    opened: Run
    workdir: Path
    state: TrainState | None  # until it lies in the stack
    step: int
    checkpoints: Checkpoints
    recorder: Recorder
    batch: Any = None
    failure: str = ""

    @property
    def config(self) -> Config:
        return self.opened.parts.config

    @property
    def active(self) -> bool:
        return not self.failure and self.step < self.config.train.steps

    def next_batch(self) -> Batch:
        """The rows of its next step, or any if it has none."""
        if self.active or self.batch is None:
            self.batch = next(self.opened.rows)
        return self.batch

    @contextlib.contextmanager
    def guarded(self, look: Look) -> Iterator[None]:
        """A number that is not finite ends this run alone, with its error told."""
        try:
            yield
        except hooks.NotFinite as found:
            self.fail(loop.explained(found, self.opened, *look(), self.recorder))
        except FloatingPointError as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Nothing of this run is looked at any more."""
        self.failure = str(error)
        tell(self.recorder.progress, error)

    def record(self, step: int, metrics: Mapping[str, Any], look: Look) -> None:
        """Records a step, unless the run has failed."""
        if not self.failure:
            with self.guarded(look):
                self.recorder.take(step, metrics)
                self.recorder.flush()

    def conclude(self, state: TrainState, stopping: bool) -> None:
        """Evaluates and saves, as far as that is due, unless the run has failed."""
        if self.failure:
            return
        with self.guarded(lambda: (state, self.batch)):
            loop.conclude(
                self.opened,
                state,
                self.step,
                self.checkpoints,
                self.recorder,
                stopping,
            )


class Taken(NamedTuple):
    """A run's part of a step."""

    index: int  # in the stack
    member: Member
    step: int
    batch: Any


class Pending(NamedTuple):
    """A step that was dispatched: its metrics, and who took it."""

    metrics: Mapping[str, Any]
    parts: list[Taken]

    def record(self, state_of: Callable[[int], TrainState]) -> None:
        """Waits for it and hands each run its own.

        Args:
          state_of: the present state at a place in the stack.
        """
        host = jax.device_get(self.metrics)
        for index, member, step, batch in self.parts:

            def look(index: int = index, batch: Any = batch) -> tuple[TrainState, Any]:
                return state_of(index), batch

            own = {name: x[index] for name, x in host.items()}
            member.record(step, own, look)


def tell(teller: hooks.Progress, error: Exception) -> None:
    """Says why a run ends, as the command of a single one does."""
    teller.say(f"error: {' '.join(str(error).split())}")


def run(
    configs: Sequence[Config],
    workdirs: Sequence[Path],
    tellers: Sequence[hooks.Progress],
) -> list[str]:
    """Trains runs as one program, each in its folder; goes on with what is there.

    Args:
      configs: alike but for `population.SCALARS` and the seed.
      tellers: what is said of each run goes there.

    Returns:
      Why each run has failed, "" where it has not.

    Raises:
      ValueError: they are no team, or this is one of several processes.
      checkpoint.disk.DiskFull: there is no room for a checkpoint.
      hooks.Interrupted: a signal came; everything up to then is saved.
    """
    if processes.several():
        raise ValueError("runs that are trained as one program have one process")
    population.check_team(configs)
    failures = dict.fromkeys(workdirs, "")
    with contextlib.ExitStack() as held:
        members: list[Member] = []
        for config, workdir, teller in zip(configs, workdirs, tellers, strict=True):
            like = members[0].opened if members else None
            try:
                member = enter(config, workdir, teller, like, held)
            except (ValueError, DiskFull) as error:
                failures[workdir] = str(error)
                tell(teller, error)
                continue
            if member is not None:
                members.append(member)
        population.check_team([member.config for member in members])

        def say(text: str) -> None:
            for member in members:
                member.recorder.progress.say(text)

        train(members, held.enter_context(hooks.Interrupt(say)), say)
    return [*(failures | {m.workdir: m.failure for m in members}).values()]


def enter(
    config: Config,
    workdir: Path,
    teller: hooks.Progress,
    like: Run | None,
    held: contextlib.ExitStack,
) -> Member | None:
    """Opens a run and its folder, as `loop.run` does; None: nothing is left to do.

    Raises:
      ValueError, DiskFull: as `loop.run`.
    """
    config = start.continuing(config, workdir, teller.say)
    if start.is_finished(config, workdir):
        teller.say(f"nothing to do: {workdir} has all {config.train.steps} steps")
        return None
    opened = start.open_run(config, workdir, like)
    start.check(opened, workdir)
    held.enter_context(hooks.exclusive(workdir))
    state, step = start.restore(opened, workdir, teller.say)
    keep = {"keep_last": config.train.keep_last, "keep_best": config.train.keep_best}
    checkpoints = Checkpoints(workdir / FOLDER, **keep, say=teller.say)
    held.enter_context(checkpoints)
    recorder = start.record_after(opened, workdir, step, teller, None)
    held.enter_context(recorder)
    return Member(opened, workdir, state, step, checkpoints, recorder)


def train(members: list[Member], interrupt: hooks.Interrupt, say: start.Say) -> None:
    """Steps all members until none is left; each one's last is evaluated and saved.

    They need not be at the same step.

    Raises:
      hooks.Interrupted, DiskFull: as `run`.
    """
    for member in members:
        if not member.active:  # fewer steps are asked for than were done
            with member.guarded(lambda m=member: (m.state, m.next_batch())):
                done = member.opened.evaluate(member.state, member.step)
                member.recorder.evaluated(member.step, done)
    if not any(member.active for member in members):
        return
    mesh = population.make_mesh(len(members))
    values = jax.device_put(
        population.stack([population.scalars(m.config) for m in members]),
        population.split(mesh),
    )
    states = jax.device_put(
        population.stack([m.state for m in members]), population.split(mesh)
    )
    take = population.taker(members[0].opened.parts, mesh)
    for member in members:
        member.state = None
    say(
        f"compiling the training step of {len(members)} runs as one program, on "
        f"{mesh.size} of {len(jax.devices())} devices"
    )
    step, pending = None, Pending({}, [])
    while stepping := [(i, m) for i, m in enumerate(members) if m.active]:
        batch = population.stack([member.next_batch() for member in members])
        if step is None:
            made = population.make_step(members[0].config, mesh)
            step = compiled(made, values, states, batch)
        states, metrics = step(values, states, batch)
        state_of = functools.partial(take, states)
        pending.record(state_of)
        for _, member in stepping:
            member.step += 1
        pending = Pending(metrics, [Taken(i, m, m.step, m.batch) for i, m in stepping])
        stopping = interrupt.stopping()
        due = [
            (i, m)
            for i, m in stepping
            if any(loop.due(m.config.train, m.step, stopping))
        ]
        if due:
            pending.record(state_of)
            pending = Pending({}, [])
            for i, member in due:
                member.conclude(state_of(i), stopping)
            for member in members:
                member.recorder.restart_clock()
        if stopping and any(member.active for member in members):
            last = max(member.step for _, member in stepping)
            raise hooks.Interrupted(f"stopped after step {last}, which is saved")
