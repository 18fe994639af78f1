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
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint import folders, manager
from deepseek_jax.checkpoint.streaming import Leaf, Reader, check_room
from deepseek_jax.config import Config, ModelConfig, from_dict
from deepseek_jax.convert import common, config_json, fp8_blocks, names
from deepseek_jax.convert.folder import CONFIG, INDEX, SINGLE, read_json
from deepseek_jax.convert.tensorfile import DTYPES, Plan, Stored, TensorFile

DTYPE_NAMES = {"bf16": "BF16", "fp8": "BF16", "f32": "F32"}
TORCH_NAMES = {"bf16": "bfloat16", "fp8": "bfloat16", "f32": "float32"}
SHARD = 5_000_000_000  # bytes


class Export(NamedTuple):
    """Everything that is decided before the first byte is written."""

    step_dir: Path
    model: ModelConfig
    reader: Reader
    bias: Leaf | None
    record: common.Record | None
    form: fp8_blocks.Format | None  # of FP8 tensors
    scales: dict[str, Stored]  # the original ones
    tensors: list[names.Tensor]
    plans: dict[str, Plan]  # of every tensor of the files, scales included

    @property
    def size(self) -> int:
        """Bytes to be written."""
        return sum(plan.size for plan in self.plans.values())


def export_hf(
    source: Path,
    target: Path,
    *,
    dtype: str = "bf16",
    ue8m0: bool = False,
    stacked: bool | None = None,
    shard: int = SHARD,
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

    Raises:
      ValueError: no good checkpoint at `source`, a model without a Hugging Face form,
        weights that are not finite, or `target` exists. Nothing is left behind.
      OSError: the disk is too small (`DiskFull`), or reading or writing failed.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype = {dtype!r}: must be {', '.join(DTYPE_NAMES)}")
    source, target = Path(source), Path(target)
    common.check_new(target)
    plan = inspect(source, dtype, ue8m0, stacked)
    files = _layout(plan, shard)
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
        config = json.dumps(_config(plan, dtype), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(config + "\n", "utf-8")
        _copy_files(plan, folder)


def inspect(
    source: Path, dtype: str = "bf16", ue8m0: bool = False, stacked: bool | None = None
) -> Export:
    """Opens a checkpoint and decides what its tensors will be.

    Raises:
      ValueError: as `export_hf`.
    """
    root, step = folders.resolve(source)
    step = folders.newest_good(root) if step is None else step
    step_dir = root / str(step)
    if step is None or (damage := folders.find_damage(step_dir)):
        why = (
            f"step {step} is damaged: {damage}" if step is not None else "none is whole"
        )
        raise ValueError(f"no checkpoint in {root} can be converted: {why}")
    config = from_dict(Config, manager.read_config(root, step)["config"])
    strategy = config.balance.strategy
    if strategy not in common.BIASES:
        raise ValueError(
            f"balance.strategy = {strategy!r} has no Hugging Face form: there, a bias "
            "is added to the scores"
        )
    bias = common.BIASES[strategy]
    kind = config_json.family_of(config.model, bias is not None)
    record = common.load_record(step_dir)
    if stacked is None:
        stacked = record.stacked if record else False
    if stacked and dtype == "fp8":
        raise ValueError("dtype = 'fp8': experts in the stacked form have no FP8 form")
    found = names.tensors(
        config.model, bias=config_json.FAMILIES[kind].bias, stacked=stacked
    )
    if record and not record.copies:
        found = [tensor for tensor in found if not tensor.copy]
    plan = Export(
        step_dir,
        config.model,
        Reader(step_dir),
        bias,
        record,
        _format(record, ue8m0) if dtype == "fp8" else None,
        common.load_scales(step_dir) if dtype == "fp8" else {},
        found,
        {},
    )
    _check_arrays(plan)
    return plan._replace(plans=_plans(plan, DTYPE_NAMES[dtype]))


def _format(record: common.Record | None, ue8m0: bool) -> fp8_blocks.Format:
    form = fp8_blocks.read_format(record.config) if record else None
    form = form or fp8_blocks.Format()
    return form._replace(power_of_two=form.power_of_two or ue8m0)


def _check_arrays(plan: Export) -> None:
    for leaf, shape in names.array_shapes(plan.tensors).items():
        actual = plan.bias if leaf == names.BIAS else leaf
        if actual is None:
            continue
        there = plan.reader.shapes.get(actual)
        if there != shape:
            raise ValueError(
                f"{plan.step_dir}: {'.'.join(actual)} has the shape {there}; the "
                f"checkpoint's config asks for {shape}"
            )


def _is_fp8(plan: Export, tensor: names.Tensor) -> bool:
    if plan.form is None:
        return False
    return tensor.name in plan.scales if plan.scales else tensor.fp8


def _plans(plan: Export, dtype: str) -> dict[str, Plan]:
    """Dtype and shape of every tensor of the files."""
    odd: Mapping[str, str] = {}
    if plan.record and plan.record.dtype == dtype:
        odd = plan.record.dtypes
    plans: dict[str, Plan] = {}
    for tensor in plan.tensors:
        own = odd.get(tensor.name, common.usual_dtype(tensor, dtype))
        if _is_fp8(plan, tensor):
            assert plan.form is not None
            own, scale = "F8_E4M3", plan.scales.get(tensor.name)
            shape = fp8_blocks.scale_shape(tensor.shape, plan.form.block)
            name = tensor.name + fp8_blocks.SUFFIX
            plans[name] = Plan(scale.dtype if scale else "F32", shape)
        plans[tensor.name] = Plan(own, tensor.shape)
    return plans


def _layout(plan: Export, shard: int) -> dict[str, dict[str, Plan]]:
    """The tensors of each file: as imported where that covers them, else by size."""
    index = plan.record.index if plan.record else None
    if plan.record and not index:
        return {SINGLE: plan.plans}
    places = index["weight_map"] if index else {}
    files: dict[str, dict[str, Plan]] = {}
    if places.keys() >= plan.plans.keys():
        for name, each in plan.plans.items():
            files.setdefault(places[name], {})[name] = each
        return files
    groups: list[dict[str, Plan]] = [{}]
    room = shard
    for name, each in plan.plans.items():
        if each.size > room and groups[-1]:
            groups.append({})
            room = shard
        groups[-1][name] = each
        room -= each.size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{i:05}-of-{count:05}.safetensors": group
        for i, group in enumerate(groups, 1)
    }


def _write_tensors(
    plan: Export, homes: Mapping[str, TensorFile], progress: common.Progress
) -> None:
    done = 0
    for tensor in plan.tensors:
        home, own = homes[tensor.name], plan.plans[tensor.name]
        for part, start, stop in common.pieces(tensor):
            rows = _rows(plan, tensor, part, start, stop)
            at = part.start + start
            if _is_fp8(plan, tensor):
                rows = _write_scales(plan, tensor, homes, rows, at)
            home.write(tensor.name, at, rows.astype(DTYPES[own.dtype], copy=False))
        scale = plan.plans.get(tensor.name + fp8_blocks.SUFFIX)
        done += own.size + (scale.size if scale else 0)
        progress(done, plan.size, tensor.name)


def _rows(
    plan: Export, tensor: names.Tensor, part: names.Part, start: int, stop: int
) -> np.ndarray:
    """Rows of a part in the order of the file, in the dtype of our array."""
    if part.leaf == names.BIAS:
        if plan.bias is None:
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
    codes, scale = fp8_blocks.encode(
        rows, plan.form, None if original is None else original.astype(np.float32)
    )
    if not np.isfinite(scale).all():
        raise ValueError(f"{tensor.name} holds values that are not finite")
    name = tensor.name + fp8_blocks.SUFFIX
    homes[name].write(name, first, scale.astype(DTYPES[plan.plans[name].dtype]))
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
    kind = config_json.family_of(plan.model, plan.bias is not None)
    config = config_json.write(plan.model, kind)
    if plan.record:
        there = config_json.read(plan.record.config).model
        # A file without the MTP modules that it promises is given back as it was.
        if replace(there, mtp=plan.model.mtp) == plan.model:
            config = dict(plan.record.config)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = TORCH_NAMES[dtype]
    config.pop("quantization_config", None)
    if plan.form is not None:
        known = plan.record.config.get("quantization_config") if plan.record else None
        config["quantization_config"] = known or fp8_blocks.write_format(plan.form)
    return config


def _copy_files(plan: Export, folder: Path) -> None:
    """Generation settings and, if it has Hugging Face's form, the tokenizer."""
    settings = plan.step_dir / folders.SOURCE / common.GENERATION
    if settings.is_file():
        shutil.copy(settings, folder)
    tokenizer = plan.step_dir.parent.parent / common.TOKENIZER
    about = tokenizer / "tokenizer.json"
    if about.is_file() and "model" in read_json(about):
        for file in tokenizer.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
