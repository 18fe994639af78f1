"""Checkpoints with Orbax: written in the background, newest and best kept.

What lies where on the disk, and how damage is found, stands in `folders`. A save ends
with the digests of its files and then one rename, so a checkpoint is whole or not
there. Several processes save and restore together, each its parts of the arrays; the
first does all else. The report (arXiv:2412.19437) says nothing about checkpoints.
"""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from deepseek_jax.checkpoint import streaming
from deepseek_jax.checkpoint.barrier import Barrier, reading
from deepseek_jax.checkpoint.disk import DiskFull, is_disk_full
from deepseek_jax.checkpoint.folders import (
    AVERAGE,
    ITEMS,
    Say,
    choose,
    find_damage,
    newest_good,
    steps,
    write_digests,
)
from deepseek_jax.parallel import processes

UNFINISHED = ".orbax-checkpoint-tmp*"  # appended by Orbax until a save is whole
CHUNK = 64 << 20  # bytes of an array that are stored together, at most
DAMAGED = ".damaged"  # appended to the name of a step that is not whole

# Orbax also logs, with stack traces, the failures that it raises and we report.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Restored(NamedTuple):
    """A checkpoint's content."""

    step: int
    state: Any
    data: Any
    config: dict[str, Any]


def to_stderr(text: str) -> None:
    """The default way to tell the user something."""
    print(text, file=sys.stderr, flush=True)


def read_config(root: Path, step: int | None = None) -> dict[str, Any]:
    """The `config` item of a step, by default the newest good one's.

    Raises:
      ValueError: there is none, or as `folders.choose`.
    """
    chosen = choose(root, step)
    if chosen is None:
        raise ValueError(f"{root} holds no checkpoint")
    return _read_config(root, chosen)


def _read_config(root: Path, step: int) -> dict[str, Any]:
    with reading(alone=True) as reader:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        config: dict[str, Any] = reader.restore(root / str(step), args=args)["config"]
    return config


def restore(
    root: Path,
    like: Any,
    *,
    step: int | None = None,
    partial: bool = False,
    optional: tuple[str, ...] = (),
    accept: Callable[[dict[str, Any]], None] = lambda config: None,
    say: Say = to_stderr,
) -> Restored | None:
    """Restores the newest good checkpoint, or `step`, bit for bit.

    Good is what its digests prove to be whole. An error in reading such a checkpoint
    says nothing against it, and is raised.

    Args:
      root: the checkpoints folder.
      like: the state's pytree of arrays or `jax.ShapeDtypeStruct`s; its shardings are
        those of the result.
      step: only this one.
      partial: `like` names a part of the state, as a dict, and the rest is not read.
      optional: fields of the state, a named tuple, that stay as `like` has them where
        the checkpoint has none, or others or of another shape.
      accept: called with the checkpoint's config before the state is read; raises to
        refuse.
      say: told about every damaged checkpoint that is passed over.

    Returns:
      None where there is no checkpoint at all.

    Raises:
      ValueError: as `folders.choose`; or what `accept` raises.
    """

    def pick() -> int | None:
        chosen = choose(root, step, say)
        if chosen is not None:
            accept(_read_config(root, chosen))
        return chosen

    chosen = processes.first(pick)
    if chosen is None:
        return None
    return _read(root, chosen, like, partial=partial, optional=optional)


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """Layers and experts apart, so that a slice of a large array can be read alone."""
    stacked = tuple(range(max(leaf.ndim - 2, 0)))
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=stacked)


def _read(
    root: Path, step: int, like: Any, *, partial: bool, optional: tuple[str, ...]
) -> Restored:
    def target(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(
            jax.devices()[0]
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    fresh = _unlike(root / str(step), like, optional)
    wanted = like
    if fresh:
        wanted = {k: v for k, v in like._asdict().items() if k not in fresh}
    targets = jax.tree.map(target, wanted)
    arguments = ocp.checkpoint_utils.construct_restore_args(targets)
    with reading() as reader:
        items = reader.restore(
            root / str(step),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    targets,
                    restore_args=arguments,
                    partial_restore=partial or bool(fresh),
                ),
                data=ocp.args.JsonRestore(),
                config=ocp.args.JsonRestore(),
            ),
        )
    state = items["state"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        # Asked for a part, Orbax gives the request back for what is not there.
        if isinstance(leaf, jax.ShapeDtypeStruct):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"checkpoint {root / str(step)} has no {name}")
    if fresh:
        state = like._replace(**state)
    return Restored(step, state, items["data"], items["config"])


def _unlike(step_dir: Path, like: Any, optional: tuple[str, ...]) -> tuple[str, ...]:
    """The optional fields that a checkpoint has none of, or not those of `like`.

    Raises:
      ValueError: it has something else that `like` has not.
    """
    if not optional:
        return ()
    stored = streaming.Reader(step_dir).shapes
    own = {leaf: tuple(x.shape) for leaf, x in streaming.leaves(like).items()}
    more = [leaf for leaf in stored if leaf not in own and leaf[0] not in optional]
    if more:
        raise ValueError(
            f"checkpoint {step_dir} has {'/'.join(more[0])}, which this state has not"
        )

    def part(shapes: Mapping[streaming.Leaf, Any], field: str) -> dict[Any, Any]:
        return {leaf: shape for leaf, shape in shapes.items() if leaf[0] == field}

    return tuple(
        field
        for field in optional
        if not part(stored, field) or part(stored, field) != part(own, field)
    )


def restore_average(root: Path, step: int, like: Any) -> Any | None:
    """The mean of the parameters (`like`, or shapes) that a good step holds, as numpy's
    arrays, whole and in float32; None where it holds none.
    """
    if not (root / str(step) / AVERAGE).is_dir():
        return None
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    args = {AVERAGE: ocp.args.PyTreeRestore(like, restore_args=arguments)}
    with reading() as reader:
        return reader.restore(root / str(step), args=ocp.args.Composite(**args))[
            AVERAGE
        ]


def _eval_ce(metrics: dict[str, float]) -> float:
    return metrics["eval_ce"]


class Checkpoints:
    """The checkpoints of a running training; one writer a folder.

    Keeps the newest `keep_last` and, of those saved with an evaluation, the `keep_best`
    with the lowest `eval_ce`. Opening it removes unfinished saves and renames damaged
    steps. A context manager: leaving it waits for the last save.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        say: Say = to_stderr,
    ):
        self.root, self.say = root.absolute(), say
        self.saving: int | None = None
        processes.first(self._clean)
        self.barrier = Barrier()
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_eval_ce,
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        keep = policies.AnyPreservationPolicy([policies.LatestN(keep_last), best])
        self.manager = ocp.CheckpointManager(
            self.root,
            item_names=(*ITEMS, AVERAGE),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=_eval_ce,  # else Orbax keeps metrics in memory only
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=self.barrier,
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.wait()
        finally:
            self.manager.close()

    def save(
        self,
        step: int,
        state: Any,
        data: Any,
        config: dict[str, Any],
        eval_ce: float | None = None,
        average: Any = None,
    ) -> None:
        """Copies `state` and the parameters' mean, if there is one, and writes them in
        the background; waits for the save before.

        Raises:
          DiskFull: this save or the one before met a full disk.
        """
        self.wait()
        trees = {ITEMS[0]: state} | ({} if average is None else {AVERAGE: average})
        arrays = {
            name: ocp.args.PyTreeSave(tree, jax.tree.map(_chunks, tree))
            for name, tree in trees.items()
        }
        self.saving, self.barrier.committed = step, False
        with self._told():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    **arrays,
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(config),
                ),
                metrics=None if eval_ce is None else {"eval_ce": eval_ce},
                force=True,
            )

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          DiskFull: the save under way met a full disk.
        """
        with self._told():
            self.manager.wait_until_finished()
        self.saving = None

    def _seal(self) -> None:
        """Orbax calls it, in the first process, with all items on disk, under the
        folder's temporary name.
        """
        [folder] = self.root.glob(f"{self.saving}{UNFINISHED}")
        write_digests(folder)

    def _clean(self) -> None:
        self._remove_unfinished()  # Orbax can too, but only behind our back
        self._set_damaged_aside()

    def _remove_unfinished(self) -> None:
        for folder in self.root.glob(f"*{UNFINISHED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _set_damaged_aside(self) -> None:
        for step in steps(self.root):
            folder = self.root / str(step)
            if find_damage(folder):
                shutil.rmtree(f"{folder}{DAMAGED}", ignore_errors=True)
                folder.rename(f"{folder}{DAMAGED}")
                self.say(f"damaged checkpoint {folder} renamed to {step}{DAMAGED}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            if processes.is_first():
                self._remove_unfinished()
            good = newest_good(self.root)
            last = (
                "there is none before it"
                if good is None
                else f"step {good} is the last"
            )
            raise DiskFull(
                f"the disk is full: the checkpoint of step {self.saving} could not be "
                f"written to {self.root}; {last}. Free space or choose another "
                "--workdir, then run the same command again"
            ) from error
