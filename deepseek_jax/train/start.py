"""Everything before the first step of a run, and of a run that goes on.

Cheap refusals come first: the folder, the config. Then the corpus and tokenizer are
opened (built in the cache, the first time) and compared by hash, and the disk's room is
looked at. The folder is not touched before all of that agrees, and then only under its
lock. Of several processes only the first looks at the folder and changes it. Ours.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax import tokenizer as tokenizers
from deepseek_jax.checkpoint import disk, folders, manager, metadata
from deepseek_jax.config import Config, flatten, to_dict
from deepseek_jax.data import pipeline
from deepseek_jax.data.cache import default_cache
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.parallel import processes
from deepseek_jax.train import (
    average,
    hooks,
    layout,
    numerics,
    pipelined,
    trackers,
    writers,
)
from deepseek_jax.train.evaluate import Evaluation, evaluate, make_evaluate_batch
from deepseek_jax.train.metrics import Recorder
from deepseek_jax.train.state import Parts, TrainState, assemble, init_state
from deepseek_jax.typing import Params

TOKENIZER = "tokenizer"
TENSORBOARD = "tensorboard"

Say = Callable[[str], None]
Callback = Callable[[writers.Record], None]


class Run(NamedTuple):
    """What a run works with besides its state."""

    parts: Parts
    description: metadata.Description
    tokenizer: tokenizers.Tokenizer
    rows: Any  # the training iterator, of global batches
    evaluate: Callable[..., writers.Record]  # as `make_evaluator` returns it
    evaluate_batch: Any = None  # its program


def continuing(config: Config, workdir: Path, say: Say) -> Config:
    """`config` with its horizon fixed, if `workdir` is new or holds its run.

    Raises:
      ValueError: another run is in the folder (every field that differs is named), or
        a process trains there.
    """
    hooks.check_free(workdir)
    saved = saved_description(workdir)
    fixed = metadata.resolve_horizon(config, saved)
    if saved:
        metadata.check_same(saved, {"config": to_dict(fixed)}, workdir)
    horizon = fixed.optim.horizon
    if horizon not in (config.optim.horizon, config.train.steps):
        say(
            f"the learning rate keeps the horizon of the first start, {horizon} steps "
            "(optim.horizon), and its last value after them"
        )
    return fixed


def saved_description(workdir: Path) -> metadata.Description | None:
    """What config.json says of the run in a folder, or else its newest checkpoint."""
    root = workdir / folders.FOLDER
    saved = metadata.read(workdir)
    if saved is None and folders.steps(root):
        saved = manager.read_config(root)
    return saved


def is_finished(config: Config, workdir: Path) -> bool:
    """Whether the last step is saved and evaluated.

    Raises:
      ValueError: there are checkpoints, but none is good.
    """
    step = folders.choose(workdir / folders.FOLDER)
    if step is None or step < config.train.steps:
        return False
    records = writers.read(workdir / writers.METRICS)
    return any(r["step"] == step and "eval_ce" in r for r in records)


def open_run(config: Config, workdir: Path, like: Run | None = None) -> Run:
    """Assembles the model and opens the corpus and the tokenizer.

    Args:
      like: a run that differs in scalars alone, whose evaluation this one shares.

    Raises:
      ValueError: a setting does not fit the devices or processes, or the data, or names
        a tracker that is not here; or there is no kernel where there has to be one.
    """
    trackers.names(config.train.trackers)
    average.check(config)
    if config.pipeline.schedule != "none":
        pipelined.plan(config)
    parts = processes.together(lambda: assemble(config))
    processes.together(lambda: layout.kernels(config))
    return processes.first_then_all(lambda: open_data(parts, workdir, like))


def open_data(parts: Parts, workdir: Path, like: Run | None = None) -> Run:
    """Opens the corpus and the tokenizer, which a run's first start builds.

    Raises:
      ValueError: a setting does not fit the data.
    """
    config = parts.config
    depth, cache = config.model.mtp.depth, default_cache()
    corpus = open_corpus(config.data, cache)
    tokenizer = tokenizers.build(
        config.data.tokenizer, config.model.vocab_size, corpus, cache
    )
    own = pipeline.train_iterator(
        config.data,
        corpus,
        tokenizer,
        depth=depth,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    rows = processes.Rows(parts.mesh, own)
    validation = pipeline.validation(config.data, corpus, tokenizer, depth=depth)
    description = metadata.describe(
        config,
        corpus.hash,
        corpus.domains,
        tokenizer.hash,
        {name: chosen._asdict() for name, chosen in layout.kernels(config).items()},
    )
    program = (like and like.evaluate_batch) or make_evaluate_batch(
        parts, len(corpus.domains)
    )
    evaluate_after = make_evaluator(parts, program, validation, corpus.domains, workdir)
    return Run(parts, description, tokenizer, rows, evaluate_after, program)


def check(run: Run, workdir: Path) -> None:
    """The last refusals before the folder is touched.

    Raises:
      ValueError: the folder's run has another corpus or tokenizer.
      disk.DiskFull: its checkpoints will not fit.
    """
    if saved := saved_description(workdir):
        metadata.check_same(saved, run.description, workdir)
    config = run.parts.config
    like: Any = jax.eval_shape(lambda: init_state(run.parts, config.seed))
    if config.optim.ema:
        like = like, like.params
    kept = config.train.keep_last + config.train.keep_best
    disk.check_space(workdir / folders.FOLDER, like, kept)


def make_evaluator(
    parts: Parts,
    evaluate_batch: Any,
    validation: Iterable[Any],
    domains: tuple[str, ...],
    workdir: Path,
) -> Callable[..., writers.Record]:
    """The evaluation over the whole validation set, which keeps its probe on disk.

    In FP8 it says, too, what its first batch loses. What is returned takes the state
    after a step, that step, and the mean of the parameters if there is one, whose cross
    entropy under the same biases is `eval_ce_average`.
    """
    lost = numerics.recorder(parts)

    def over(state: TrainState, previous: Any = None) -> Evaluation:
        batches = (processes.share(parts.mesh, batch) for batch in validation)
        return evaluate(evaluate_batch, parts, state, batches, domains, previous)

    def evaluate_after(
        state: TrainState, step: int, mean: Params | None = None
    ) -> writers.Record:
        result = over(state, writers.previous_probe(workdir, step))
        record = result.metrics
        if processes.is_first():
            writers.save_probe(workdir, step, result.probe)
        if mean is not None:
            averaged = over(state._replace(params=mean)).metrics
            record["eval_ce_average"] = averaged["eval_ce"]
        if lost is not None:
            first = processes.share(parts.mesh, next(iter(validation)))
            record |= lost(state, first)
        return record

    return evaluate_after


def restore(run: Run, workdir: Path, say: Say) -> tuple[TrainState, int]:
    """The state of the newest good checkpoint and its step, or a fresh one and 0.

    Scales of earlier steps (`precision.delayed`) start anew if the checkpoint has none,
    or histories of another length.
    """
    root = workdir / folders.FOLDER
    state = init_state(run.parts, run.parts.config.seed)
    restored = manager.restore(
        root,
        state,
        optional=("scales",),
        accept=lambda there: metadata.check_same(there, run.description, root),
        say=say,
    )
    if restored is None:
        return state, 0
    run.rows.set_state(restored.data)
    say(f"going on after step {restored.step}")
    saved, now = restored.config["config"], run.description["config"]
    if changed := precision_change(saved, now):
        say(f"from here on in another precision: {changed}")
    return restored.state, restored.step


def precision_change(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs in `runtime.compute` and `runtime.fp8`, which a run may change; ""
    if nothing does.
    """
    names = ("runtime.compute", "runtime.fp8.")
    old, new = (
        {k: v for k, v in flatten(config).items() if k.startswith(names)}
        for config in (there, here)
    )
    found = metadata.differences(old, new)
    return "; ".join(found).replace(" there, ", " before, ").replace(" here", " now")


def record_after(
    run: Run,
    workdir: Path,
    step: int,
    progress: hooks.Progress,
    callback: Callback | None,
) -> Recorder:
    """Writes tokenizer/ and config.json, cuts later records, opens the writers."""
    path = workdir / writers.METRICS

    def prepare() -> float:
        save_tokenizer(run.tokenizer, workdir / TOKENIZER)
        metadata.write(workdir, run.description)
        writers.cut_after(path, step)
        writers.cut_probes(workdir, step)
        seconds = [record.get("elapsed_s") or 0.0 for record in writers.read(path)]
        return max(seconds, default=0.0)

    elapsed_s = processes.first(prepare)
    sinks: list[writers.Writer] = []
    if processes.is_first():
        sinks.append(writers.JsonlWriter(path))
        sinks.append(writers.TensorBoardWriter(workdir / TENSORBOARD, step + 1))
        sinks.extend(trackers.build(run.parts.config, workdir))
    return Recorder(run.parts.config, sinks, progress, callback, elapsed_s)


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Saves the tokenizer, unless it is there already.

    Another one is what a start left behind that never came to its config.json.
    """
    try:
        if tokenizers.load(folder).hash == tokenizer.hash:
            return
    except ValueError:  # none there, or half of one
        pass
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save(folder)
