"""A Hugging Face checkpoint becomes one of ours, a piece at a time.

bfloat16 stays bfloat16 and float32 float32 on disk; FP8 becomes the bfloat16 that
DeepSeek's own fp8_cast_bf16.py makes of it. Everything is checked against config.json
and the headers of the files before the first byte is written.
"""

import dataclasses
import difflib
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint import folders, metadata
from deepseek_jax.checkpoint.folders import Say
from deepseek_jax.checkpoint.manager import to_stderr
from deepseek_jax.checkpoint.streaming import Leaf, Spec, Writer, check_room
from deepseek_jax.config import (
    BalanceConfig,
    Config,
    ModelConfig,
    MTPConfig,
    OptimConfig,
)
from deepseek_jax.convert import common, config_json, fp8_blocks, names
from deepseek_jax.convert.folder import Folder, open_folder
from deepseek_jax.convert.tensorfile import DTYPES, Plan, Stored, TensorFile

WEIGHTS = ("BF16", "F32", "F16")
FP8 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
BIASED = "loss_free"  # what a router with biases is balanced by
CHECKSUMS = "checksums of what was written"
STEP = 0  # a converted checkpoint has no training step behind it


class Import(NamedTuple):
    """A checkpoint whose files agree with its config.json."""

    folder: Folder
    model: ModelConfig
    bias: bool
    stacked: bool
    form: fp8_blocks.Format | None
    tensors: list[names.Tensor]
    specs: dict[Leaf, Spec]

    def stored(self, tensor: names.Tensor) -> Stored:
        """Where a tensor lies."""
        return self.folder.tensors[tensor.name]

    def scale(self, tensor: names.Tensor) -> Stored | None:
        """Where the scales of an FP8 tensor lie."""
        return self.folder.tensors.get(tensor.name + fp8_blocks.SUFFIX)

    @property
    def size(self) -> int:
        """Bytes to be written."""
        scales = (self.scale(tensor) for tensor in self.tensors)
        arrays = sum(spec.size for spec in self.specs.values())
        return arrays + sum(scale.size for scale in scales if scale)


def import_hf(
    source: Path,
    target: Path,
    *,
    say: Say = to_stderr,
    progress: common.Progress = common.ignore_progress,
) -> Config:
    """Converts the checkpoint in `source` into the new workdir `target`.

    Raises:
      ValueError: `source` is incomplete, damaged or of an unsupported kind, or `target`
        exists; the message names field, tensor and file. Nothing is left behind.
      OSError: the disk is too small (`DiskFull`), or reading or writing failed.
    """
    source, target = Path(source), Path(target)
    common.check_new(target)
    plan = inspect(source, say)
    config = Config(
        model=plan.model,
        balance=BalanceConfig(strategy=BIASED if plan.bias else "none"),
        optim=OptimConfig(horizon=1),
    )
    with common.new_folder(target) as folder:
        check_room(folder, plan.size)
        step_dir = folder / folders.FOLDER / str(STEP)
        with Writer(step_dir, _state(plan), _describe(config)) as writer:
            _write_record(plan, step_dir)
            _write_arrays(plan, writer, progress)
            progress(0, plan.size, CHECKSUMS)
        progress(plan.size, plan.size, CHECKSUMS)
        _copy_tokenizer(source, folder)
    return config


def inspect(source: Path, say: Say = to_stderr) -> Import:
    """Opens a checkpoint and checks all that can be checked without reading weights.

    Raises:
      ValueError: as `import_hf`.
    """
    folder = open_folder(source)
    model, family = config_json.read(folder.config)
    form = fp8_blocks.read_format(folder.config)
    model = _with_mtp_found(folder, model, say)
    ends = tuple(row.hf for row in names.STACKED)
    stacked = any(name.endswith(ends) for name in folder.tensors)
    expected = names.tensors(model, bias=family.bias, stacked=stacked)
    found = [t for t in expected if t.name in folder.tensors or not t.copy]
    plan = Import(folder, model, family.bias, stacked, form, found, {})
    _check_names(plan)
    for tensor in found:
        _check_tensor(plan, tensor)
    return plan._replace(specs=_specs(plan))


def _with_mtp_found(folder: Folder, model: ModelConfig, say: Say) -> ModelConfig:
    depth = model.mtp.depth
    prefixes = tuple(names.mtp_prefix(model, k) for k in range(depth))
    if not depth or any(name.startswith(prefixes) for name in folder.tensors):
        return model
    say(
        f"config.json has num_nextn_predict_layers = {depth}, but the files hold no "
        f"tensor of {prefixes[0][:-1]}: converting without MTP modules"
    )
    return dataclasses.replace(model, mtp=MTPConfig(depth=0))


def _check_names(plan: Import) -> None:
    there = plan.folder.tensors
    known = {tensor.name: tensor for tensor in plan.tensors}
    missing = {n: tensor for n, tensor in known.items() if n not in there}
    unknown = [name for name in there if not _is_known(plan, name, known)]
    if unknown:
        name = unknown[0]
        near = difflib.get_close_matches(name, missing, 1)
        hint = f"; did you mean {near[0]}, which is missing?" if near else ""
        beyond = names.mtp_prefix(plan.model, 0)
        if name.startswith(beyond) and not plan.model.mtp.depth:
            depth = plan.folder.config.get(config_json.MTP)
            hint = f"; config.json has {config_json.MTP} = {depth}"
        if hint or not missing:
            raise ValueError(f"{there[name].file}: unknown tensor {name}{hint}")
    for name, tensor in missing.items():
        raise ValueError(
            f"{plan.folder.root}: {name} is missing; it should have the shape "
            f"{list(tensor.shape)}"
        )


def _is_known(plan: Import, name: str, known: Container[str]) -> bool:
    weight = name.removesuffix(fp8_blocks.SUFFIX)
    stored = plan.folder.tensors.get(weight)
    scale = weight in known and (stored is None or stored.dtype == FP8)
    return name in known or scale or name.endswith(names.IGNORED)


def _check_tensor(plan: Import, tensor: names.Tensor) -> None:
    stored, scale = plan.stored(tensor), plan.scale(tensor)
    at = f"{stored.file}: {tensor.name}"
    if stored.shape != tensor.shape:
        raise ValueError(
            f"{at} has the shape {list(stored.shape)}; config.json asks for "
            f"{list(tensor.shape)}"
        )
    if stored.dtype in WEIGHTS:
        return
    if stored.dtype != FP8 or len(tensor.shape) != 2:
        allowed = ", ".join((*WEIGHTS, FP8) if len(tensor.shape) == 2 else WEIGHTS)
        raise ValueError(f"{at} has dtype {stored.dtype}; it must be {allowed}")
    if plan.form is None:
        raise ValueError(f"{at} is FP8, but config.json has no quantization_config")
    if scale is None:
        raise ValueError(
            f"{at} is FP8, but {tensor.name}{fp8_blocks.SUFFIX} is missing"
        )
    shape = fp8_blocks.scale_shape(tensor.shape, plan.form.block)
    if scale.shape != shape or scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}; blocks "
            f"of {list(plan.form.block)} need {' or '.join(SCALE_DTYPES)} {list(shape)}"
        )


def _specs(plan: Import) -> dict[Leaf, Spec]:
    """Our arrays, each in the narrowest dtype that holds all its tensors exactly."""
    dtypes: dict[Leaf, np.dtype] = {}
    chunks: dict[Leaf, tuple[int, ...]] = {}
    for tensor in plan.tensors:
        narrow = plan.stored(tensor).dtype in ("BF16", FP8)
        dtype = DTYPES["BF16" if narrow else "F32"]
        for part in tensor.parts:
            dtype = DTYPES["F32"] if part.leaf == names.BIAS else dtype
            dtypes[part.leaf] = max(
                dtype, dtypes.get(part.leaf, dtype), key=lambda d: d.itemsize
            )
            chunks[part.leaf] = common.chunk(part, tensor.columns)
    shapes = names.array_shapes(plan.tensors)
    return {leaf: Spec(shapes[leaf], dtypes[leaf], chunks[leaf]) for leaf in shapes}


def _state(plan: Import) -> dict[str, Any]:
    """The state of a `train.state.TrainState`, but for the optimizer's."""
    params: dict[str, Any] = {}
    for leaf, spec in plan.specs.items():
        if leaf != names.BIAS:
            node = params
            for key in leaf[1:-1]:
                node = node.setdefault(key, {})
            node[leaf[-1]] = spec
    return {
        "step": np.asarray(STEP, np.int32),
        "params": params,
        "balance": plan.specs.get(names.BIAS, ()),
        "key": np.zeros(2, np.uint32),
    }


def _describe(config: Config) -> metadata.Description:
    return metadata.describe(config, "", (), "") | {"kind": "import"}


def _write_arrays(plan: Import, writer: Writer, progress: common.Progress) -> None:
    total, done = sum(plan.stored(t).size for t in plan.tensors), 0
    bias = common.BIASES[BIASED]
    assert bias
    mains = {tensor.parts[0].leaf: tensor for tensor in plan.tensors if not tensor.copy}
    for tensor in plan.tensors:
        for part, start, stop in common.pieces(tensor):
            rows = _rows(plan, tensor, part.start + start, part.start + stop)
            if tensor.copy:
                main = mains[part.leaf]
                _check_copy(plan, tensor, main, rows, (start, stop))
            else:
                leaf = bias if part.leaf == names.BIAS else part.leaf
                rows = rows.astype(plan.specs[part.leaf].dtype, copy=False)
                value = names.to_ours(rows, part.transform, plan.model)
                writer.write(leaf, common.place(part, start, stop), value)
        done += plan.stored(tensor).size
        progress(done, total, tensor.name)


def _rows(plan: Import, tensor: names.Tensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor, multiplied by their scales if it is FP8."""
    rows, scale = plan.stored(tensor).rows(start, stop), plan.scale(tensor)
    if scale is None or plan.form is None:
        return rows
    high = plan.form.block[0]
    assert start % high == 0
    scales = scale.rows(start // high, -(-stop // high)).astype(np.float32)
    return fp8_blocks.decode(rows, scales, plan.form.block)


def _check_copy(
    plan: Import,
    tensor: names.Tensor,
    main: names.Tensor,
    rows: np.ndarray,
    at: tuple[int, int],
) -> None:
    same = _rows(plan, main, *at)
    if not np.array_equal(rows.astype(np.float32), same.astype(np.float32)):
        raise ValueError(
            f"{plan.stored(tensor).file}: {tensor.name} differs from {main.name}: this "
            "model shares them"
        )


def _write_record(plan: Import, step_dir: Path) -> None:
    folder = step_dir / folders.SOURCE
    folder.mkdir()
    base = plan.folder.tensors["model.embed_tokens.weight"].dtype
    usual = {t.name: (common.usual_dtype(t, base), FP8) for t in plan.tensors}
    dtypes = {t.name: plan.stored(t).dtype for t in plan.tensors}
    there = plan.folder.tensors.keys()
    copies = [t.name for t in names.tensors(plan.model, bias=plan.bias) if t.copy]
    common.Record(
        config=plan.folder.config,
        index=plan.folder.shards,
        stacked=plan.stacked,
        absent=[name for name in copies if name not in there],
        dtype=base,
        dtypes={n: d for n, d in dtypes.items() if d not in usual[n]},
    ).save(step_dir)
    scales = [scale for t in plan.tensors if (scale := plan.scale(t))]
    if scales:
        plans = {scale.name: Plan(scale.dtype, scale.shape) for scale in scales}
        with TensorFile(folder / common.SCALES, plans) as file:
            for scale in scales:
                file.write(scale.name, 0, scale.rows(0, scale.shape[0]))
    for name in (common.GENERATION, *common.code_files(plan.folder.config)):
        if (plan.folder.root / name).is_file():
            shutil.copy(plan.folder.root / name, folder)


def _copy_tokenizer(source: Path, workdir: Path) -> None:
    if (source / common.OWN_TOKENIZER).is_dir():
        shutil.copytree(source / common.OWN_TOKENIZER, workdir / common.TOKENIZER)
        return
    files = [file for text in common.TOKENIZER_FILES for file in source.glob(text)]
    if files:
        (workdir / common.TOKENIZER).mkdir()
    for file in files:
        if file.is_file():
            shutil.copy(file, workdir / common.TOKENIZER)
