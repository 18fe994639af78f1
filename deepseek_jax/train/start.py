"""Everything before the first step of a run, and of a run that goes on.

Cheap refusals come first: the folder, the config, the disk. Then the corpus and
tokenizer are opened (built, the first time) and compared by hash, and the newest good
checkpoint is restored. Nothing in the folder changes before all of that agrees. Ours.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax import tokenizer as tokenizers
from deepseek_jax.checkpoint import folders, manager, metadata
from deepseek_jax.config import Config, to_dict
from deepseek_jax.data import pipeline
from deepseek_jax.data.cache import default_cache
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.train import hooks, writers
from deepseek_jax.train.evaluate import evaluate, make_evaluate_batch
from deepseek_jax.train.metrics import Recorder
from deepseek_jax.train.state import Parts, TrainState, assemble, init_state

TOKENIZER = "tokenizer"
TENSORBOARD = "tensorboard"

Say = Callable[[str], None]
Callback = Callable[[writers.Record], None]


class Run(NamedTuple):
    """What a run works with besides its state."""

    parts: Parts
    description: metadata.Description
    rows: Any  # the training iterator
    evaluate: Callable[[TrainState, int], writers.Record]  # of the state after a step


def continuing(config: Config, workdir: Path, say: Say) -> Config:
    """`config` with its horizon fixed, if `workdir` is new or holds its run.

    Raises:
      ValueError: another run is in the folder; names every field that differs.
    """
    root = workdir / folders.FOLDER
    saved, step = metadata.read(workdir), folders.newest_good(root)
    if saved is None and step is not None:
        saved = manager.read_config(root, step)
    fixed = metadata.resolve_horizon(config, saved)
    if saved:
        metadata.check_same(saved, {"config": to_dict(fixed)}, workdir)
    horizon = fixed.optim.horizon
    if horizon not in (config.optim.horizon, config.train.steps):
        say(
            f"the learning rate keeps the horizon of the first start, {horizon} steps; "
            "optim.horizon sets another one, for a new run"
        )
    return fixed


def is_finished(config: Config, workdir: Path) -> bool:
    """Whether the last step is saved and evaluated."""
    step = folders.newest_good(workdir / folders.FOLDER)
    if step is None or step < config.train.steps:
        return False
    records = writers.read(workdir / writers.METRICS)
    return any(r["step"] == step and "eval_ce" in r for r in records)


def open_run(config: Config, workdir: Path) -> Run:
    """Assembles the model and opens the corpus and the tokenizer."""
    parts = assemble(config)
    depth, cache = config.model.mtp.depth, default_cache()
    corpus = open_corpus(config.data, cache)
    tokenizer = tokenizers.build(
        config.data.tokenizer, config.model.vocab_size, corpus, cache
    )
    rows = pipeline.train_iterator(
        config.data, corpus, tokenizer, depth=depth, seed=config.seed
    )
    validation = pipeline.validation(config.data, corpus, tokenizer, depth=depth)
    description = metadata.describe(config, corpus.hash, corpus.domains, tokenizer.hash)
    if saved := metadata.read(workdir):
        metadata.check_same(saved, description, workdir)
    if not (workdir / TOKENIZER / "tokenizer.json").exists():
        tokenizer.save(workdir / TOKENIZER)
    evaluate_after = make_evaluator(parts, validation, corpus.domains, workdir)
    return Run(parts, description, rows, evaluate_after)


def make_evaluator(
    parts: Parts, validation: Iterable[Any], domains: tuple[str, ...], workdir: Path
) -> Callable[[TrainState, int], writers.Record]:
    """The evaluation over the whole validation set, which keeps its probe on disk."""
    evaluate_batch = make_evaluate_batch(parts, len(domains))

    def evaluate_after(state: TrainState, step: int) -> writers.Record:
        previous = writers.previous_probe(workdir, step)
        result = evaluate(evaluate_batch, parts, state, validation, domains, previous)
        writers.save_probe(workdir, step, result.probe)
        return result.metrics

    return evaluate_after


def restore(
    run: Run, checkpoints: manager.Checkpoints, say: Say
) -> tuple[TrainState, int]:
    """The state of the newest good checkpoint and its step, or a fresh one and 0."""
    state = init_state(run.parts, run.parts.config.seed)
    checkpoints.check_space(state)
    restored = checkpoints.restore(
        state,
        lambda there: metadata.check_same(there, run.description, checkpoints.root),
    )
    if restored is None:
        return state, 0
    run.rows.set_state(restored.data)
    say(f"going on after step {restored.step}")
    return restored.state, restored.step


def record_after(
    run: Run,
    workdir: Path,
    step: int,
    progress: hooks.Progress,
    callback: Callback | None,
) -> Recorder:
    """Writes config.json, cuts what was recorded after `step`, opens the writers."""
    metadata.write(workdir, run.description)
    path = workdir / writers.METRICS
    writers.cut_after(path, step)
    writers.cut_probes(workdir, step)
    seconds = [record.get("elapsed_s") or 0.0 for record in writers.read(path)]
    sinks: list[writers.Writer] = [
        writers.JsonlWriter(path),
        writers.TensorBoardWriter(workdir / TENSORBOARD, step + 1),
    ]
    return Recorder(
        run.parts.config, sinks, progress, callback, max(seconds, default=0.0)
    )
