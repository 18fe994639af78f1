"""What both directions of a conversion share: pieces, biases, record, new folder."""

import dataclasses
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.disk import DiskFull, is_disk_full
from deepseek_jax.checkpoint.folders import SOURCE
from deepseek_jax.checkpoint.streaming import Index, Leaf
from deepseek_jax.convert import fp8_blocks, names
from deepseek_jax.convert.tensorfile import Stored, read_header

# Bytes done, bytes in all, what is at work on them; 0 begins a pass over them.
Progress = Callable[[int, int, str], None]

PIECE = 32 << 20  # bytes of a piece in f32: what is read, turned and written at once

# Where each balancing strategy keeps the biases that move its selection by s + b: (),
# if it has none; None, if its selection has no Hugging Face form.
BIASES: dict[str, Leaf | None] = {
    "none": (),
    "loss_free": ("balance",),
    "loss_free_proportional": ("balance",),
    "multiplicative": None,
    "loss_free_frozen": ("balance",),
    "aux_batch": (),
    "aux_seq": (),
    "aux_global": (),
    "quantile": ("balance",),
    "z_loss": (),
    "v3": ("balance", "0"),
}

RECORD, SCALES = "source.json", "scales.safetensors"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer"  # a folder of the workdir
OWN_TOKENIZER = (
    "deepseek_jax_tokenizer"  # its copy in an export, if others can't read it
)
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)


def ignore_progress(done: int, total: int, what: str) -> None:
    """The default: nobody watches."""


def usual_dtype(tensor: names.Tensor, dtype: str) -> str:
    """A tensor's dtype in a checkpoint of `dtype` that is not quantised."""
    return "F32" if tensor.parts[0].leaf == names.BIAS else dtype


def piece_rows(part: names.Part, columns: tuple[int, ...]) -> int:
    """Rows of a piece: whole units, and whole blocks of FP8."""
    count = -(-part.rows * math.prod(columns) * 4 // PIECE)
    step = math.lcm(fp8_blocks.ALIGN, part.unit)
    return min(part.rows, -(-part.rows // (count * step)) * step)


def pieces(tensor: names.Tensor) -> Iterator[tuple[names.Part, int, int]]:
    """(part, first row, last row + 1) of a tensor, in order, rows within the part."""
    for part in tensor.parts:
        step = piece_rows(part, tensor.columns)
        for start in range(0, part.rows, step):
            yield part, start, min(start + step, part.rows)


def chunk(part: names.Part, columns: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a piece has in our array."""
    inner = (piece_rows(part, columns), *columns)
    inner = inner[::-1] if part.transform.transpose else inner
    return (1,) * len(part.outer) + inner


def place(part: names.Part, start: int, stop: int) -> Index:
    """Where the rows of a piece lie in our array."""
    rows = slice(start, stop)
    inner = (slice(None), rows) if part.transform.transpose else (rows,)
    return (*part.outer, *inner)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a converted checkpoint remembers of the files it came from.

    With it the way back gives the same files: their layout, the dtypes of odd tensors,
    the settings we have no field for and, in `SCALES`, the scales of FP8 tensors.
    """

    config: dict[str, Any]  # config.json
    index: dict[str, Any] | None  # of a sharded checkpoint
    stacked: bool
    absent: list[str]  # copies of the embedding and the head that MTP layers lack
    dtype: str  # of the embedding
    dtypes: dict[str, str]  # of tensors that `usual_dtype` does not give theirs

    def save(self, step_dir: Path) -> None:
        """Writes it beside the items of a step."""
        text = json.dumps(dataclasses.asdict(self))
        (step_dir / SOURCE / RECORD).write_text(text, "utf-8")


def load_record(step_dir: Path) -> Record | None:
    """The record of a converted step; None of one that was trained here."""
    path = step_dir / SOURCE / RECORD
    if not path.exists():
        return None
    return Record(**json.loads(path.read_text("utf-8")))


def load_scales(step_dir: Path) -> dict[str, Stored]:
    """The original scales of a converted step, by the names of their weights."""
    path = step_dir / SOURCE / SCALES
    found = read_header(path) if path.exists() else {}
    return {name.removesuffix(fp8_blocks.SUFFIX): s for name, s in found.items()}


def code_files(config: dict[str, Any]) -> list[str]:
    """The files beside a config.json that its `auto_map` takes classes from."""
    named = config.get("auto_map")
    classes = named.values() if isinstance(named, dict) else ()
    modules = (str(each).rpartition(".")[0] for each in classes)
    # Another name is of another repository.
    return sorted({f"{module}.py" for module in modules if module.isidentifier()})


def check_new(path: Path) -> None:
    """Refuses to write where something is.

    Raises:
      ValueError: `path` exists already, and is no empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: choose another name or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it when all went well.

    Temporary names are unique: of two conversions to one path, the first to end wins.

    Raises:
      ValueError: `path` has come to be in the meantime.
      DiskFull: the disk was full before that.
    """
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir()
    try:
        yield temporary
        check_new(path)
        temporary.replace(path)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(f"the disk is full: {path} could not be written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
