"""What an export will write: decided from a step's headers, before the first byte.

The tensors are those of DeepSeek's files (README_WEIGHTS.md of its repository); where
the step was imported, dtypes, scales and layout are those that it came with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checkpoint.streaming import Leaf, Reader
from deepseek_jax.config import Config, ModelConfig, from_dict
from deepseek_jax.convert import common, config_json, fp8_blocks, names
from deepseek_jax.convert.folder import SINGLE, read_json
from deepseek_jax.convert.tensorfile import Plan, Stored

DTYPE_NAMES = {"bf16": "BF16", "fp8": "BF16", "f32": "F32"}
CONFIG_ITEM = "config/metadata"  # where Orbax puts the JSON of a step's config


class Export(NamedTuple):
    """Everything that is decided before the first byte is written."""

    step_dir: Path
    model: ModelConfig
    reader: Reader
    bias: Leaf  # () where the routers have none
    record: common.Record | None
    form: fp8_blocks.Format | None  # of FP8 tensors
    narrow: frozenset[str]  # the names of those
    scales: dict[str, Stored]  # the original ones, if they are of this form
    tensors: list[names.Tensor]
    plans: dict[str, Plan]  # of every tensor of the files, scales included

    @property
    def size(self) -> int:
        """Bytes to be written."""
        return sum(plan.size for plan in self.plans.values())


def inspect(
    step_dir: Path, dtype: str, ue8m0: bool = False, stacked: bool | None = None
) -> Export:
    """Opens a step that is whole and decides what its tensors will be.

    Raises:
      ValueError: as `export_hf`.
    """
    config = from_dict(Config, read_json(step_dir / CONFIG_ITEM)["config"])
    bias = common.BIASES[config.balance.strategy]
    if bias is None:
        raise ValueError(
            f"balance.strategy = {config.balance.strategy!r} has no Hugging Face form: "
            "there, a bias is added to the scores"
        )
    kind = config_json.family_of(config.model, bias != ())
    record = common.load_record(step_dir)
    if stacked is None:
        stacked = record.stacked if record else False
    if stacked and dtype == "fp8":
        raise ValueError(
            "dtype = 'fp8': experts in the stacked form have no FP8 form; "
            "stacked = False (--no-stacked) gives them one by one"
        )
    found = names.tensors(
        config.model, bias=config_json.FAMILIES[kind].bias, stacked=stacked
    )
    absent = record.absent if record else []
    plan = Export(
        step_dir,
        config.model,
        Reader(step_dir),
        bias,
        record,
        None,
        frozenset(),
        {},
        [tensor for tensor in found if tensor.name not in absent],
        {},
    )
    _check_arrays(plan)
    if dtype == "fp8":
        plan = _with_fp8(plan, ue8m0)
    return plan._replace(plans=_plans(plan, DTYPE_NAMES[dtype]))


def _with_fp8(plan: Export, ue8m0: bool) -> Export:
    """Original scales are of use only if they are in the form that is asked for."""
    there = fp8_blocks.read_format(plan.record.config) if plan.record else None
    scales = common.load_scales(plan.step_dir)
    form = there or fp8_blocks.Format()
    form = form._replace(power_of_two=form.power_of_two or ue8m0)
    fresh = [tensor.name for tensor in plan.tensors if tensor.fp8]
    return plan._replace(
        form=form,
        narrow=frozenset(scales or fresh),
        scales=scales if form == there else {},
    )


def _check_arrays(plan: Export) -> None:
    for leaf, shape in names.array_shapes(plan.tensors).items():
        actual = plan.bias if leaf == names.BIAS else leaf
        if not actual:
            continue
        there = plan.reader.shapes.get(actual)
        if there != shape:
            raise ValueError(
                f"{plan.step_dir}: {'.'.join(actual)} has the shape {there}; the "
                f"checkpoint's config asks for {shape}"
            )


def _plans(plan: Export, dtype: str) -> dict[str, Plan]:
    """Dtype and shape of every tensor of the files."""
    odd: Mapping[str, str] = {}
    if plan.record and plan.record.dtype == dtype:
        odd = plan.record.dtypes
    plans: dict[str, Plan] = {}
    for tensor in plan.tensors:
        own = odd.get(tensor.name, common.usual_dtype(tensor, dtype))
        if plan.form and tensor.name in plan.narrow:
            own, scale = "F8_E4M3", plan.scales.get(tensor.name)
            shape = fp8_blocks.scale_shape(tensor.shape, plan.form.block)
            name = tensor.name + fp8_blocks.SUFFIX
            plans[name] = Plan(scale.dtype if scale else "F32", shape)
        plans[tensor.name] = Plan(own, tensor.shape)
    return plans


def layout(plan: Export, shard: int) -> dict[str, dict[str, Plan]]:
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
