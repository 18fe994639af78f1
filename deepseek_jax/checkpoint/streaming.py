"""Checkpoints larger than memory: arrays written and read a slice at a time.

`Writer` makes what `manager.restore` reads. Orbax lays out the tree, with a single
number in the place of each large array; then TensorStore puts the arrays there, in
chunks that are written one by one, uncompressed. `Reader` reads slices of any
checkpoint, whoever wrote it. Ours; the report (arXiv:2412.19437) says nothing of it.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from deepseek_jax.checkpoint.disk import DiskFull
from deepseek_jax.checkpoint.folders import ITEMS, write_digests

Leaf = tuple[str, ...]  # keys from the root of the state
Index = tuple[int | slice, ...]

STATE = ITEMS[0]
CACHE = 128 << 20  # bytes of chunks that a reader keeps: slices of one come together


class Spec(NamedTuple):
    """An array to be filled later; `chunk` is what is written at once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes on disk, where every chunk is a whole one."""
        pairs = zip(self.shape, self.chunk, strict=True)
        return math.prod(-(-n // c) * c for n, c in pairs) * self.dtype.itemsize


def _is_spec(node: Any) -> bool:
    return isinstance(node, Spec)


def _name(leaf: Leaf) -> str:
    """What Orbax calls a leaf on disk."""
    return ".".join(leaf)


def leaves(tree: Any) -> dict[Leaf, Any]:
    """The leaves of a pytree of dicts, named and plain tuples, by their keys."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_spec)[0]
    return {tuple(_key(entry) for entry in path): leaf for path, leaf in flat}


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    raise AssertionError(entry)


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(use_ocdbt=False),
            data=ocp.JsonCheckpointHandler(),
            config=ocp.JsonCheckpointHandler(),
        )
    )


def check_room(folder: Path, size: int) -> None:
    """Refuses to begin what will not fit on the disk of an existing folder.

    Raises:
      DiskFull: names the need, the room and the folder.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiskFull(
            f"{size / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free at {folder}"
        )


class Writer:
    """A step being written. A context manager: leaving it without an error waits for
    the last write and records the digests that make the step a whole one.
    """

    def __init__(self, step_dir: Path, state: Any, config: Mapping[str, Any]):
        """Lays out a step.

        Args:
          step_dir: must not exist.
          state: pytree whose leaves are arrays or `Spec`s of arrays to come.
          config: the step's `config` item.
        """
        self.step_dir = step_dir.absolute()
        skeleton = jax.tree.map(
            lambda leaf: np.zeros((), leaf.dtype) if _is_spec(leaf) else leaf,
            state,
            is_leaf=_is_spec,
        )
        with _orbax() as writer:
            writer.save(
                self.step_dir,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(skeleton),
                    data=ocp.args.JsonSave({}),
                    config=ocp.args.JsonSave(dict(config)),
                ),
            )
        self.arrays = {
            leaf: self._create(leaf, spec)
            for leaf, spec in leaves(state).items()
            if _is_spec(spec)
        }
        self.pending: Any = None

    def _create(self, leaf: Leaf, spec: Spec) -> Any:
        folder = self.step_dir / STATE / _name(leaf)
        shutil.rmtree(folder)
        description = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": spec.shape,
                "chunks": spec.chunk,
                "dtype": ts.dtype(spec.dtype).to_json()
                if spec.dtype.kind == "V"
                else spec.dtype.str,
                "compressor": None,
            },
            # As Orbax: chunks of zeros are stored too, so a missing one is damage.
            "store_data_equal_to_fill_value": True,
        }
        context = ts.Context({"file_io_sync": False})
        return ts.open(description, create=True, context=context).result()

    def write(self, leaf: Leaf, index: Index, value: np.ndarray) -> None:
        """Writes a slice; it should consist of whole chunks."""
        self._wait()
        self.pending = self.arrays[leaf][index].write(value)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._wait()
            write_digests(self.step_dir)


class Reader:
    """Slices of the arrays of one step."""

    def __init__(self, step_dir: Path):
        self.folder = step_dir.absolute() / STATE
        self.ocdbt = (self.folder / "manifest.ocdbt").exists()
        self.context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE}})
        with _orbax() as reader:
            tree = reader.metadata(step_dir.absolute()).item_metadata[STATE].tree
        self.shapes: dict[Leaf, tuple[int, ...]] = {
            leaf: tuple(each.shape)
            for leaf, each in leaves(tree).items()
            if hasattr(each, "shape")
        }
        self.opened: dict[Leaf, Any] = {}

    def array(self, leaf: Leaf) -> Any:
        """The TensorStore of a leaf."""
        if leaf not in self.opened:
            store = {"driver": "file", "path": f"{self.folder}/"}
            if self.ocdbt:
                store = {"driver": "ocdbt", "base": f"file://{self.folder}/"}
            description = {"driver": "zarr", "kvstore": store, "path": _name(leaf)}
            opened = ts.open(description, read=True, context=self.context)
            self.opened[leaf] = opened.result()
        return self.opened[leaf]

    def read(self, leaf: Leaf, index: Index = ()) -> np.ndarray:
        """A slice of an array.

        Raises:
          ValueError: a part of it is missing or damaged.
        """
        value: np.ndarray = self.array(leaf)[index].read().result()
        return value
