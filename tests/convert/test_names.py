"""The name table: it covers the model exactly, and every transform undoes itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from deepseek_jax import presets
from deepseek_jax.config import AttentionConfig, MTPConfig
from deepseek_jax.convert import config_json, names
from deepseek_jax.model.count import shapes
from tests.convert import released
from tests.factory import SMALL


def variants():
    """Models that between them use every row of the table."""
    attention = dataclasses.replace(SMALL.attention, q_rank=0)
    moe = dataclasses.replace(SMALL.moe, num_shared=2)
    return {
        "small": SMALL,
        "no_q_rank": dataclasses.replace(SMALL, attention=attention, moe=moe),
        "no_dense": dataclasses.replace(SMALL, num_dense=0, mtp=MTPConfig(2)),
        "no_shared": dataclasses.replace(
            SMALL, moe=dataclasses.replace(SMALL.moe, num_shared=0), mtp=MTPConfig(0)
        ),
        "v3_671b": presets.v3_671b(),
        "v2_236b": presets.v2_236b(),
        "v2_lite_16b": presets.v2_lite_16b(),
    }


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", variants())
def test_the_table_gives_every_array_its_shape(name, stacked):
    model = variants()[name]
    found = names.tensors(model, bias=True, stacked=stacked)
    flat = jax.tree_util.tree_flatten_with_path({"params": shapes(model)})[0]
    want = {tuple(k.key for k in path): leaf.shape for path, leaf in flat}
    want[names.BIAS] = (model.num_routers, model.moe.num_experts)
    assert names.array_shapes(found) == want
    assert len({tensor.name for tensor in found}) == len(found)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["small", "no_q_rank", "no_dense", "no_shared"])
def test_every_number_has_one_place(name, stacked):
    model = variants()[name]
    found = [
        tensor
        for tensor in names.tensors(model, bias=True, stacked=stacked)
        if not tensor.copy
    ]
    arrays = {
        leaf: np.full(shape, -1) for leaf, shape in names.array_shapes(found).items()
    }
    start = 0
    for tensor in found:
        count = int(np.prod(tensor.shape))
        numbers = np.arange(start, start + count).reshape(-1, *tensor.columns)
        start += count
        assert sum(part.rows for part in tensor.parts) == len(numbers)
        for part in tensor.parts:
            rows = numbers[part.start : part.start + part.rows]
            ours = names.to_ours(rows, part.transform, model)
            arrays[part.leaf][part.outer] = ours
            back = names.to_file(ours, part.transform, model)
            np.testing.assert_array_equal(back, rows)
    everything = np.concatenate([array.reshape(-1) for array in arrays.values()])
    np.testing.assert_array_equal(np.sort(everything), np.arange(start))


def test_every_row_of_the_table_is_used():
    used = set()
    for model in variants().values():
        for stacked in (False, True):
            for tensor in names.tensors(model, bias=True, stacked=stacked):
                parts = tensor.name.removeprefix("model.layers.").split(".")
                short = ".".join(parts[1:]) if parts[0].isdigit() else tensor.name
                used.add(
                    ".".join("{e}" if p.isdigit() else p for p in short.split("."))
                )
    tables = (
        names.MODEL,
        names.LAYER,
        names.DENSE,
        names.MOE,
        names.EXPERTS,
        names.STACKED,
        names.MTP,
        names.MTP_COPIES,
    )
    rows = [row for table in tables for row in table]
    assert used == {row.hf for row in rows}
    assert {row.transform for row in rows} == set(names.TRANSFORMS)


@pytest.mark.parametrize("name", [p.name for p in sorted(released.FIXTURES.iterdir())])
def test_names_and_shapes_are_those_that_transformers_writes(name):
    config, there = released.fixture(name)
    model, family = config_json.read(config)
    if not any(n.startswith(names.mtp_prefix(model, 0)) for n in there):
        model = dataclasses.replace(model, mtp=MTPConfig(0))
    found = names.tensors(model, bias=family.bias)
    assert {t.name: t.shape for t in found} == {n: v.shape for n, v in there.items()}


def test_rotary_rows_go_from_pairs_to_halves():
    at = AttentionConfig(num_heads=2, kv_rank=3, nope_dim=2, rope_dim=4, value_dim=5)
    model = dataclasses.replace(SMALL, attention=at)
    assert names.rows_of_heads(model).tolist() == [
        *(0, 1, 2, 4, 3, 5),
        *(6, 7, 8, 10, 9, 11),
    ]
    assert names.rows_of_latent(model).tolist() == [0, 1, 2, 3, 5, 4, 6]


def test_the_mtp_projection_gets_its_hidden_half_first():
    columns = names.swapped_columns(SMALL)
    assert columns.tolist() == [*range(16, 32), *range(16)]


def test_fp8_tensors_are_those_of_the_release():
    model = presets.v3_671b()
    found = names.tensors(model, bias=True)
    narrow = {t.name for t in found if t.fp8}
    wide = {t.name for t in found if any(part in t.name for part in released.WIDE)}
    assert narrow | wide == {t.name for t in found} and not narrow & wide
    # Per layer: attention 5; dense 3, or experts and shared 257 x 3.
    assert len(narrow) == 62 * 5 + 3 * 3 + 59 * 257 * 3


def test_the_table_is_plain_data():
    text = json.dumps([names.MODEL, names.LAYER, names.MOE, names.EXPERTS])
    assert "e_score_correction_bias" in text
