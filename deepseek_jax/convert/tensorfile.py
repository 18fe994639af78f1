"""The safetensors format, read and written a few rows at a time.

A file is the length of its header (8 bytes), the header (JSON: a dtype, a shape and two
offsets for each tensor) and the data. The package of that name maps files into memory
and writes only what it is given whole; here memory stays bounded by what is asked for,
and every complaint names the file and the tensor.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self, TypeGuard

import jax.numpy as jnp
import numpy as np

# In the order in which the package lays them out, from the end of a file.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
RANKS = {name: rank for rank, name in enumerate(DTYPES)}
METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """Where a tensor lies in its file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file

    @property
    def size(self) -> int:
        """Bytes."""
        return _size(self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the tensor with all but its last axis flattened.

        Raises:
          ValueError: the file ends before.
        """
        columns = self.shape[-1:] if len(self.shape) > 1 else ()
        row = _size(self.dtype, columns)
        with self.file.open("rb") as file:
            file.seek(self.start + start * row)
            raw = file.read((stop - start) * row)
        if len(raw) != (stop - start) * row:
            raise ValueError(f"{self.file} ends in the middle of {self.name}")
        return np.frombuffer(raw, DTYPES[self.dtype]).reshape(stop - start, *columns)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of a file.

    Raises:
      ValueError: the file is cut off, or not in this format.
    """
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(MAX_HEADER, total - 8):
            raise ValueError(
                f"{file} is cut off or no safetensors file: its header would have "
                f"{length} bytes, the file has {total}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file} is no safetensors file: bad header")
    header.pop(METADATA, None)
    found = {
        name: _entry(file, name, entry, 8 + length) for name, entry in header.items()
    }
    end, last = 8 + length, None
    for stored in sorted(found.values(), key=lambda s: (s.start, s.size)):
        if stored.start != end:
            raise ValueError(
                f"{file}: {stored.name} begins at byte {stored.start} instead of "
                f"{end}: tensors must neither overlap nor leave gaps"
            )
        end, last = end + stored.size, stored.name
    if end != total:
        raise ValueError(
            f"{file} has {total} bytes instead of the {end} that its header promises"
            + (f": {last} is cut off" if last and end > total else "")
        )
    return found


def _integers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _entry(file: Path, name: str, entry: object, base: int) -> Stored:
    known = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (known.get(n) for n in ("dtype", "shape", "data_offsets"))
    if not (_integers(shape) and _integers(offsets) and len(offsets) == 2):
        raise ValueError(f"{file}: the header's entry of {name} is damaged")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{file}: {name} has dtype {dtype}; known are {', '.join(DTYPES)}"
        )
    (start, end), size = offsets, _size(dtype, tuple(shape))
    if min(shape, default=0) < 0 or start < 0 or end - start != size:
        raise ValueError(
            f"{file}: {name} has {end - start} bytes, its dtype {dtype} and shape "
            f"{shape} need {size}"
        )
    return Stored(file, name, dtype, tuple(shape), base + start)


class Plan(NamedTuple):
    """A tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return _size(self.dtype, self.shape)


class TensorFile:
    """A file being written; its tensors may be filled in any order, each by rows.

    Tensors are laid out as the safetensors package does: by dtype, then by name. A
    context manager: leaving it without an error checks that all was written.
    """

    def __init__(self, path: Path, plans: Mapping[str, Plan]):
        names = sorted(plans, key=lambda n: (-RANKS[plans[n].dtype], n.encode()))
        header: dict[str, object] = {METADATA: {"format": "pt"}}
        self.offsets: dict[str, int] = {}
        end = 0
        for name in names:
            plan, start, end = plans[name], end, end + plans[name].size
            header[name] = {
                "dtype": plan.dtype,
                "shape": list(plan.shape),
                "data_offsets": [start, end],
            }
            self.offsets[name] = start
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self.path, self.plans, self.left = path, plans, end
        self.base = 8 + len(raw)
        self.file = path.open("wb")
        self.file.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows [start, start + len(rows)) of a tensor."""
        plan = self.plans[name]
        assert rows.dtype == DTYPES[plan.dtype], (name, rows.dtype)
        columns = plan.shape[-1:] if len(plan.shape) > 1 else ()
        self.file.seek(
            self.base + self.offsets[name] + start * _size(plan.dtype, columns)
        )
        data = np.ascontiguousarray(rows)
        self.file.write(data.view(np.uint8).data)
        self.left -= data.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self.file:
            if kind is None:
                assert self.left == 0, f"{self.path}: {self.left} bytes not written"
                self.file.flush()
                os.fsync(self.file.fileno())
