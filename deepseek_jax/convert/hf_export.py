"""One of our checkpoints becomes a Hugging Face one, a piece at a time.

bfloat16 and FP8 as DeepSeek releases them, or float32. What was imported and not
trained since comes out as it went in: the record beside the checkpoint gives back the
layout of the files, and the scales of FP8 tensors wherever they still fit.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint import folders
from deepseek_jax.checkpoint.folders import Say
from deepseek_jax.checkpoint.manager import to_stderr
from deepseek_jax.checkpoint.streaming import check_room
from deepseek_jax.convert import common, config_json, export_plan, fp8_blocks, names
from deepseek_jax.convert.export_plan import DTYPE_NAMES, Export
from deepseek_jax.convert.folder import CONFIG, INDEX, SINGLE, read_json
from deepseek_jax.convert.tensorfile import DTYPES, Plan, TensorFile

TORCH_NAMES = {"bf16": "bfloat16", "fp8": "bfloat16", "f32": "float32"}
SHARD = 5_000_000_000  # bytes


def export_hf(
    source: Path,
    target: Path,
    *,
    dtype: str = "bf16",
    ue8m0: bool = False,
    stacked: bool | None = None,
    shard: int = SHARD,
    say: Say = to_stderr,
    progress: common.Progress = common.ignore_progress,
) -> None:
    """Converts a checkpoint into the new Hugging Face folder `target`.

    Args:
      source: a workdir (its newest good checkpoint), its checkpoints/, or one step.
      dtype: "bf16", "fp8" or "f32". Tensors that an imported bfloat16 or FP8 checkpoint
        had in another dtype keep it, unless "f32" is asked for.
      ue8m0: FP8 scales are powers of two; those of an imported checkpoint with such
        scales are in any case.
      stacked: experts as two tensors a layer; None: as they were imported, else one by
        one.
      shard: bytes of a file, where no imported layout fits.
      say: told about damaged steps that are passed over, and what is left out.

    Raises:
      ValueError: no good checkpoint at `source`, a model without a Hugging Face form,
        a weight that is not finite or too large for its dtype, options that exclude
        each other, or `target` exists. Nothing is left behind.
      OSError: the disk is too small (`DiskFull`), or reading or writing failed.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype = {dtype!r}: must be {', '.join(DTYPE_NAMES)}")
    if ue8m0 and dtype != "fp8":
        raise ValueError(
            f"dtype = {dtype!r}: must be 'fp8' for scales in ue8m0 (--ue8m0)"
        )
    source, target = Path(source), Path(target)
    common.check_new(target)
    step_dir = _good_step(source, say, progress)
    plan = export_plan.inspect(step_dir, dtype, ue8m0, stacked)
    files = export_plan.layout(plan, shard)
    with common.new_folder(target) as folder:
        check_room(folder, plan.size)
        with ExitStack() as stack:
            writers = {
                file: stack.enter_context(TensorFile(folder / file, inside))
                for file, inside in files.items()
            }
            homes = {name: writers[file] for file in files for name in files[file]}
            _write_tensors(plan, homes, progress)
        _write_index(plan, folder, files)
        config = _config(plan, dtype)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", "utf-8")
        _copy_files(plan, folder, config, say)


def _good_step(source: Path, say: Say, progress: common.Progress) -> Path:
    """The step to convert. Its every byte is read, once, to know that it is whole."""
    root, step = folders.resolve(source)
    newest = root / str(folders.steps(root)[-1] if step is None else step)
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    progress(0, size, f"checking {newest}")
    step_dir = root / str(folders.choose(root, step, say))
    progress(size, size, f"checked {step_dir}")
    return step_dir


def _write_tensors(
    plan: Export, homes: Mapping[str, TensorFile], progress: common.Progress
) -> None:
    done = 0
    for tensor in plan.tensors:
        home, own = homes[tensor.name], plan.plans[tensor.name]
        for part, start, stop in common.pieces(tensor):
            rows = _rows(plan, tensor, part, start, stop)
            at = part.start + start
            if tensor.name in plan.narrow:
                _cast(tensor.name, rows, "BF16")  # which FP8 stands for
                rows = _write_scales(plan, tensor, homes, rows, at)
            else:
                rows = _cast(tensor.name, rows, own.dtype)
            home.write(tensor.name, at, rows)
        scale = plan.plans.get(tensor.name + fp8_blocks.SUFFIX)
        done += own.size + (scale.size if scale else 0)
        progress(done, plan.size, tensor.name)


def _cast(name: str, rows: np.ndarray, dtype: str) -> np.ndarray:
    """Rows in a dtype of the files.

    Raises:
      ValueError: a number is not finite, or not in that dtype.
    """
    with np.errstate(over="ignore"):
        found = rows.astype(DTYPES[dtype], copy=False)
    if not np.isfinite(found).all():
        why = "not finite" if not np.isfinite(rows).all() else f"too large for {dtype}"
        raise ValueError(f"{name} holds values that are {why}")
    return found


def _rows(
    plan: Export, tensor: names.Tensor, part: names.Part, start: int, stop: int
) -> np.ndarray:
    """Rows of a part in the order of the file, in the dtype of our array."""
    if part.leaf == names.BIAS:
        if not plan.bias:
            return np.zeros(part.rows, np.float32)  # moves no selection
        return plan.reader.read(plan.bias, part.outer)
    value = plan.reader.read(part.leaf, common.place(part, start, stop))
    return names.to_file(value, part.transform, plan.model)


def _write_scales(
    plan: Export,
    tensor: names.Tensor,
    homes: Mapping[str, TensorFile],
    rows: np.ndarray,
    start: int,
) -> np.ndarray:
    """Writes the scales of FP8 rows and returns their codes."""
    assert plan.form is not None
    high, stored = plan.form.block[0], plan.scales.get(tensor.name)
    assert start % high == 0
    first, last = start // high, -(-(start + len(rows)) // high)
    original = stored.rows(first, last) if stored else None
    name = tensor.name + fp8_blocks.SUFFIX
    dtype = DTYPES[plan.plans[name].dtype]
    codes, scale = fp8_blocks.encode(rows, plan.form, dtype, original)
    homes[name].write(name, first, scale)
    return codes


def _write_index(
    plan: Export, folder: Path, files: Mapping[str, Mapping[str, Plan]]
) -> None:
    if list(files) == [SINGLE]:
        return
    imported = plan.record.index if plan.record else None
    places = {name: file for file in files for name in files[file]}
    about = dict(imported.get("metadata") or {}) if imported else {}
    about["total_size"] = plan.size
    index = {"metadata": about, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, "utf-8")


def _config(plan: Export, dtype: str) -> dict[str, Any]:
    """The imported config.json, if it still describes the model, or one of our own."""
    kind = config_json.family_of(plan.model, plan.bias != ())
    config = config_json.write(plan.model, kind)
    if plan.record:
        there = config_json.read(plan.record.config).model
        # A file without the MTP modules that it promises is given back as it was.
        if replace(there, mtp=plan.model.mtp) == plan.model:
            config = dict(plan.record.config)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = TORCH_NAMES[dtype]
    known = config.pop(fp8_blocks.QUANTIZED, None)
    if plan.form is not None:
        same = known if plan.scales else None
        config[fp8_blocks.QUANTIZED] = same or fp8_blocks.write_format(plan.form)
    return config


def _copy_files(plan: Export, folder: Path, config: dict[str, Any], say: Say) -> None:
    """Generation settings, code that config.json names, and the tokenizer."""
    source = plan.step_dir / folders.SOURCE
    for name in (common.GENERATION, *common.code_files(config)):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    tokenizer = plan.step_dir.parent.parent / common.TOKENIZER
    if not tokenizer.is_dir():
        return
    if _is_ours(tokenizer):
        say(
            "the tokenizer is not in Hugging Face's form: it goes along for imports "
            f"here, as {common.OWN_TOKENIZER}/"
        )
        shutil.copytree(tokenizer, folder / common.OWN_TOKENIZER)
        return
    for file in tokenizer.iterdir():
        if file.is_file():
            shutil.copy(file, folder)


def _is_ours(tokenizer: Path) -> bool:
    """Whether it is of bytes or SentencePiece, in files that other libraries lack."""
    try:
        return "kind" in read_json(tokenizer / "tokenizer.json")
    except ValueError:  # goes back as it came
        return False
