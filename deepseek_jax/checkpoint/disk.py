"""Whether there is room on the disk, before a save and when one has failed.

Ours; the report (arXiv:2412.19437) says nothing about checkpoints.
"""

import errno
import shutil
from pathlib import Path
from typing import Any

import jax


class DiskFull(OSError):
    """There is no room for a checkpoint; the message says what to do."""


def check_space(root: Path, state: Any, count: int) -> None:
    """Refuses to start where `count` checkpoints do not fit on the disk.

    Args:
      root: the checkpoints folder, or where it will be. What it holds will be freed.
      state: what a checkpoint will hold, or its shapes.
      count: how many are kept; one more is there while it is being written.

    Raises:
      DiskFull: names the need, the room and the folder.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    there = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
    parent = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if size * (count + 1) > free + there:
        raise DiskFull(
            f"{count + 1} checkpoints of {size / 1e6:.0f} MB need "
            f"{(size * (count + 1) - there) / 1e6:.0f} MB; {free / 1e6:.0f} MB are "
            f"free at {root}. Free space, keep fewer (train.keep_last, "
            "train.keep_best), or choose another --workdir"
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception or one that caused it says that the disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "ENOSPC" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
