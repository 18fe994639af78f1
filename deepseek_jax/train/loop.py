"""The training loop: steps, evaluations and checkpoints, and going on after a stop.

Step k is dispatched before the metrics of step k-1 are fetched. A checkpoint of step k
holds everything that step k+1 depends on, and is only written when all records up to k
are in `metrics.jsonl`; after a restart later records are cut away. So a run that was
killed and started again ends with the same losses and parameters, bit for bit.

Several processes run this loop in step. The first alone writes the folder, but for the
arrays of a checkpoint, which all write together. Ours.
"""

import contextlib
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.folders import FOLDER
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.config import Config, TrainConfig, flatten, to_dict
from deepseek_jax.data.batch import Batch
from deepseek_jax.parallel import processes
from deepseek_jax.train import hooks, layout, numerics, start, writers
from deepseek_jax.train.average import Average, following
from deepseek_jax.train.metrics import Recorder
from deepseek_jax.train.start import Callback, Run
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import compile_step


def run(
    config: Config, workdir: str | Path, callback: Callback | None = None
) -> list[writers.Record]:
    """Trains `config` in `workdir`, or goes on with the run that is there.

    Args:
      config: the run; `optim.horizon` = 0 becomes `train.steps` at the first start.
      workdir: gets config.json, metrics.jsonl, tokenizer/, checkpoints/, tensorboard/.
      callback: called with every new record, in every process.

    Returns:
      All records of `metrics.jsonl`, those of earlier starts too.

    Raises:
      ValueError: a setting, the data or the folder is wrong, or the folder holds
        another run; or processes were given different ones.
      FloatingPointError: a loss, gradient or parameter is not finite.
      checkpoint.disk.DiskFull: there is no room for a checkpoint.
      hooks.Interrupted: a signal came; everything up to then is saved.
    """
    if not isinstance(config, Config):
        raise ValueError(
            f"config is a {type(config).__name__}: must be a config.Config, as "
            "config.from_dict(Config, values) makes one of nested dicts"
        )
    workdir = Path(workdir).absolute()
    progress = hooks.Progress(config.train.steps)
    given = {"workdir": str(workdir)} | flatten(to_dict(config))
    processes.check_same(given)
    config = processes.first(lambda: start.continuing(config, workdir, progress.say))
    if processes.first(lambda: start.is_finished(config, workdir)):
        progress.say(f"nothing to do: {workdir} has all {config.train.steps} steps")
        return writers.read(workdir / writers.METRICS)
    keep = {"keep_last": config.train.keep_last, "keep_best": config.train.keep_best}
    opened = start.open_run(config, workdir)
    processes.first(lambda: start.check(opened, workdir))
    for line in layout.lines(config):
        progress.say(line)
    with contextlib.ExitStack() as lock:
        processes.first(lambda: lock.enter_context(hooks.exclusive(workdir)))
        state, step = start.restore(opened, workdir, progress.say)
        with (
            Checkpoints(workdir / FOLDER, **keep, say=progress.say) as checkpoints,
            start.record_after(opened, workdir, step, progress, callback) as recorder,
            hooks.Interrupt(progress.say) as interrupt,
            following(config, workdir / FOLDER, step, state.params) as mean,
        ):
            train(opened, state, step, checkpoints, recorder, interrupt, mean)
        processes.wait()
    return writers.read(workdir / writers.METRICS)


def train(
    opened: Run,
    state: TrainState,
    done: int,
    checkpoints: Checkpoints,
    recorder: Recorder,
    interrupt: hooks.Interrupt,
    mean: Average | None = None,
) -> TrainState:
    """Steps done+1 .. train.steps; the last one is evaluated and saved.

    `mean`, if given, follows the parameters and is evaluated and saved with them.

    Raises:
      FloatingPointError: a number is not finite; named by map and layer where it is
        one of a linear map's.
    """
    config = opened.parts.config.train
    compiled = None
    taken: dict[int, Any] = {}  # the last two batches, by their steps
    try:
        for step in range(done + 1, config.steps + 1):
            taken = {step - 1: taken.get(step - 1), step: next(opened.rows)}
            if compiled is None:
                recorder.progress.say("compiling the training step")
                compiled = compile_step(opened.parts, state, taken[step])
            state, metrics = compiled(state, taken[step])
            recorder.take(step, metrics)
            if mean is not None:
                mean.update(state.params)
            stopping = interrupt.stopping()
            if any(due(config, step, stopping)):
                conclude(opened, state, step, checkpoints, recorder, stopping, mean)
            if stopping and step < config.steps:
                raise hooks.Interrupted(f"stopped after step {step}, which is saved")
    except hooks.NotFinite as error:
        raise explained(error, opened, state, taken[error.step], recorder) from None
    if done >= config.steps:  # fewer steps are asked for than were done
        recorder.evaluated(done, evaluated(opened, state, done, mean))
    return state


def evaluated(
    opened: Run, state: TrainState, step: int, mean: Average | None
) -> writers.Record:
    """The evaluation of the state after a step, and of the parameters' mean."""
    if mean is None:
        return opened.evaluate(state, step)
    return opened.evaluate(state, step, mean.placed(state.params))


def explained(
    error: hooks.NotFinite,
    opened: Run,
    state: TrainState,
    batch: Batch,
    recorder: Recorder,
) -> FloatingPointError:
    """The error with the map and layer where it began, in the step of this batch.

    An evaluation's has other batches, and is left as it is.
    """
    if error.name not in hooks.GUARDED:
        return error
    recorder.progress.say("looking for the first number that is not finite")
    try:
        where = numerics.explained(opened.parts, state, batch)
    except RuntimeError as failure:  # as when there is no memory for it
        where = f"where, was not found: {failure}"
    return FloatingPointError(f"{error}; {where}")


def due(config: TrainConfig, step: int, stopping: bool) -> tuple[bool, bool]:
    """Whether a step is evaluated, and whether it is saved."""
    last = step == config.steps
    evaluated = last or step % config.eval_every == 0
    return evaluated, last or stopping or step % config.checkpoint_every == 0


def conclude(
    opened: Run,
    state: TrainState,
    step: int,
    checkpoints: Checkpoints,
    recorder: Recorder,
    stopping: bool,
    mean: Average | None = None,
) -> None:
    """Evaluates and saves the state after a step, as far as that is due.

    Raises:
      FloatingPointError: a loss, gradient or parameter is not finite.
      checkpoint.disk.DiskFull: there is no room for the checkpoint.
    """
    looked_at, saved = due(opened.parts.config.train, step, stopping)
    recorder.flush()
    eval_ce = None
    if looked_at:
        recorder.progress.wait(f"evaluating after step {step}")
        record = evaluated(opened, state, step, mean)
        recorder.evaluated(step, record)
        eval_ce = record["eval_ce"]
    if saved:
        hooks.check_params(step, state.params)
        position = opened.rows.get_state()
        average = None if mean is None else mean.value()
        checkpoints.save(step, state, position, opened.description, eval_ce, average)
    recorder.restart_clock()
