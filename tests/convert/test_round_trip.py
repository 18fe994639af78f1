"""Files to ours and back: bit-identical, whatever the dtype, the form or the pieces."""

import filecmp
import json

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import folders
from deepseek_jax.checkpoint.streaming import Reader
from deepseek_jax.convert import common
from deepseek_jax.convert.hf_export import export_hf
from deepseek_jax.convert.hf_import import import_hf
from tests.convert import released

BF16 = released.TYPES["BF16"]


def convert(folder, tmp_path, **options):
    """The folder, imported and exported again."""
    import_hf(folder, tmp_path / "ours", say=lambda text: None)
    export_hf(tmp_path / "ours", tmp_path / "back", **options)
    return tmp_path / "back"


def assert_same_files(got, want):
    names = {file.name for file in want.iterdir()}
    assert {file.name for file in got.iterdir()} == names
    same, *_ = filecmp.cmpfiles(got, want, names, shallow=False)
    assert set(same) == names


def bf16(tensors):
    """The tensors of a release: bfloat16, but for the biases."""
    return {n: v if n.endswith("bias") else v.astype(BF16) for n, v in tensors.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 128 rows, so that the larger tensors take several."""
    monkeypatch.setattr(common, "PIECE", 4096)


def large():
    """A V3 whose matrices have more than one piece, ragged at the end; a piece of the
    queries has 16 heads of 24 rows, so that blocks of FP8 are whole too.
    """
    config, tensors = released.fixture("v3_mtp")
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 300, "intermediate_size": 200, "v_head_dim": 48}
    sizes |= {"num_attention_heads": 40, "num_key_value_heads": 40}
    grown = {}
    for name, value in tensors.items():
        shape = list(value.shape)
        if "embed_tokens" in name or "head" in name.split(".")[-2]:
            shape[0] = 300
        elif name.startswith("model.layers.0.mlp"):
            shape = [200 if size == 48 else size for size in shape]
        elif "o_proj" in name:
            shape[1] = 40 * 48
        elif "kv_b_proj" in name:
            shape[0] = 40 * (8 + 48)
        elif "q_b_proj" in name:
            shape[0] = 40 * 24
        grown[name] = rng.normal(size=shape).astype(np.float32)
    for short, whole in [("embed_tokens", "model.embed_tokens"), ("head", "lm_head")]:
        for name in grown:
            if name.endswith(f"{short}.weight") and name.startswith("model.layers."):
                grown[name] = grown[f"{whole}.weight"]
    return config | sizes, grown


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["v3_mtp", "v2"])
def test_bf16_is_bit_identical(tmp_path, name, shards):
    config, tensors = released.fixture(name)
    config |= {"dtype": "bfloat16"}
    folder = released.write(tmp_path / "hf", config, bf16(tensors), shards)
    (folder / "generation_config.json").write_text("{}")
    assert_same_files(convert(folder, tmp_path), folder)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": '{"model": {}}', "tokenizer_config.json": "{}"},
        {"tokenizer.json": '{"added_tokens": ['},
        {"tokenizer_config.json": "{}"},
    ],
    ids=["another kind", "damaged", "no vocabulary"],
)
def test_a_tokenizer_that_cannot_be_read_stands_in_nobody_s_way(tmp_path, files):
    folder = released.copied("v3_mtp", tmp_path / "hf")
    for name, text in files.items():
        (folder / name).write_text(text)
    assert_same_files(convert(folder, tmp_path, dtype="f32"), folder)
    with pytest.warns(UserWarning, match="no tokenizer for .*ours: .*tokenizer"):
        _, params, _, tokenizer = deepseek_jax.load(tmp_path / "ours")
    assert tokenizer is None and params


def test_code_that_config_json_names_comes_along(tmp_path):
    config, tensors = released.fixture("v3_mtp")
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        "AutoTokenizer": "someone/else--tokenization.Tokenizer",
    }
    folder = released.write(tmp_path / "hf", config, tensors)
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text(f"# {name}")
    assert_same_files(convert(folder, tmp_path, dtype="f32"), folder)
    step_dir = tmp_path / "ours" / "checkpoints" / "0"
    (step_dir / "source" / "modeling_deepseek.py").write_text("# another")
    assert "modeling_deepseek.py has" in folders.find_damage(step_dir)


def test_pieces_change_nothing(tmp_path, small_pieces):
    config, tensors = large()
    folder = released.write(tmp_path / "hf", config, tensors)
    assert_same_files(convert(folder, tmp_path, dtype="f32"), folder)
    reader = Reader(tmp_path / "ours" / "checkpoints" / "0")
    head = reader.array(("params", "head")).chunk_layout.read_chunk.shape
    assert head == (32, 128)  # 300 rows in three pieces
    leaf = ("params", "moe", "attn", "q_b", "kernel")
    queries = reader.array(leaf).chunk_layout.read_chunk.shape
    assert queries == (1, 24, 384)  # 960 rows in three pieces
    np.testing.assert_array_equal(
        reader.read(("params", "head")), tensors["lm_head.weight"].T
    )


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_is_bit_identical_with_its_original_scales(
    tmp_path, monkeypatch, power_of_two, small
):
    if small:
        monkeypatch.setattr(common, "PIECE", 4096)
    config, tensors = large()
    config, tensors = released.to_fp8(config, tensors, power_of_two=power_of_two)
    folder = released.write(tmp_path / "hf", config, tensors, shards=4)
    assert_same_files(convert(folder, tmp_path, dtype="fp8"), folder)


def test_scales_of_one_byte_come_back(tmp_path):
    config, tensors = released.fixture("v3_mtp")
    config, tensors = released.to_fp8(
        config, tensors, power_of_two=True, scale_dtype="F8_E8M0"
    )
    folder = released.write(tmp_path / "hf", config, tensors)
    assert_same_files(convert(folder, tmp_path, dtype="fp8"), folder)


def test_fp8_becomes_the_bf16_of_deepseek_s_own_cast(tmp_path, small_pieces):
    config, tensors = released.to_fp8(*large())
    folder = released.write(tmp_path / "hf", config, tensors, shards=2)
    back = convert(folder, tmp_path)
    want = released.from_fp8(tensors, (16, 16))
    got = released.read(back)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert got[name].tobytes() == value.tobytes(), name
    about = json.loads((back / "config.json").read_text())
    assert "quantization_config" not in about and about["dtype"] == "bfloat16"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in want.values())


def forget_source(workdir):
    """Makes a converted checkpoint one that was trained here."""
    step_dir = workdir / "checkpoints" / "0"
    for file in (step_dir / folders.SOURCE).iterdir():
        file.unlink()
    folders.write_digests(step_dir)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_without_the_original_scales_fp8_holds_the_same_numbers(tmp_path, power_of_two):
    config, tensors = large()
    config, tensors = released.to_fp8(
        config, tensors, (128, 128), power_of_two=power_of_two
    )
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours")
    forget_source(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8", ue8m0=power_of_two)
    got = released.read(tmp_path / "back")
    assert got.keys() == tensors.keys()
    want, values = (released.from_fp8(t, (128, 128)) for t in (tensors, got))
    halved = 0
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            ratio = got[name] / value
            halved += (ratio == 0.5).sum()
            near = np.isin(ratio, (0.5, 1)) if power_of_two else abs(ratio - 1) < 2**-8
            assert near.all(), name
        elif value.dtype == released.TYPES["F8_E4M3"] and not power_of_two:
            assert got[name].tobytes() == value.tobytes(), name
    for name, value in want.items():
        if power_of_two:
            assert values[name].tobytes() == value.tobytes(), name
    about = json.loads((tmp_path / "back" / "config.json").read_text())
    assert about["quantization_config"].get("scale_fmt") == (
        "ue8m0" if power_of_two else None
    )
    assert power_of_two or not halved


def test_a_block_whose_largest_code_is_224_halves_its_power_of_two(tmp_path):
    config, tensors = released.fixture("v3")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    tensors[name] = np.full_like(tensors[name], 230.0)  # 230 rounds to 224
    config, tensors = released.to_fp8(config, tensors, power_of_two=True)
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours", say=lambda text: None)
    forget_source(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8", ue8m0=True)
    got = released.read(tmp_path / "back")
    assert (tensors[f"{name}_scale_inv"] == 1).all()
    assert (got[f"{name}_scale_inv"] == 0.5).all()
    assert (got[name].astype(np.float32) == 448).all()


def change(step_dir, leaf, add):
    """Adds to numbers of a converted bfloat16 array, by their places in a chunk."""
    [file] = (step_dir / "state" / leaf).glob("0.0*")
    values = np.frombuffer(file.read_bytes(), BF16).copy()
    for at, number in add.items():
        values[at] += BF16.type(number)
    file.write_bytes(values.tobytes())
    folders.write_digests(step_dir)


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def test_scales_are_judged_block_by_block(tmp_path):
    config, tensors = released.fixture("v3_mtp")
    tensors[O_PROJ][:16, :16] = 0
    config, tensors = released.to_fp8(config, tensors)
    scales = tensors[f"{O_PROJ}_scale_inv"]
    scales *= np.float32(1.7)  # no recipe gives them
    scales[0, 0] = 0
    assert scales.shape == (2, 3)
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "same", dtype="fp8")
    assert_same_files(tmp_path / "same", folder)
    step_dir = tmp_path / "ours" / "checkpoints" / "0"
    change(step_dir, "params.moe.attn.o.kernel", {-1: 1})  # of the last block
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8")
    got = released.read(tmp_path / "back")
    assert (got[f"{O_PROJ}_scale_inv"] == scales).tolist() == [
        [True, True, True],
        [True, True, False],
    ]
    moved = got[O_PROJ].view(np.uint8) != tensors[O_PROJ].view(np.uint8)
    assert moved[16:, 32:].any() and not moved[:16].any() and not moved[:, :32].any()
    want = released.from_fp8(tensors, (16, 16))
    assert released.from_fp8(got, (16, 16))[O_PROJ][:16].tobytes() == (
        want[O_PROJ][:16].tobytes()
    )


@pytest.mark.parametrize("power_of_two", [False, True])
def test_small_weights_come_back_without_their_scales(tmp_path, power_of_two):
    config, tensors = released.fixture("v3_mtp")
    tensors[O_PROJ] *= np.float32(1e-9)
    config, tensors = released.to_fp8(
        config, tensors, (128, 128), power_of_two=power_of_two
    )
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours")
    forget_source(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8", ue8m0=power_of_two)
    got = released.read(tmp_path / "back")
    want, values = (released.from_fp8(t, (128, 128))[O_PROJ] for t in (tensors, got))
    assert want.any()
    if power_of_two:
        assert values.tobytes() == want.tobytes()
    else:
        assert got[O_PROJ].tobytes() == tensors[O_PROJ].tobytes()
        ratio = got[f"{O_PROJ}_scale_inv"] / tensors[f"{O_PROJ}_scale_inv"]
        assert (abs(ratio - 1) < 2**-8).all()


@pytest.mark.parametrize("scale_dtype", ["BF16", "F8_E8M0"])
def test_codes_belong_to_the_scales_as_they_are_stored(tmp_path, scale_dtype):
    config, tensors = released.to_fp8(
        *released.fixture("v3_mtp"), power_of_two=True, scale_dtype=scale_dtype
    )
    config["quantization_config"].pop("scale_fmt")  # only the dtype tells
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours")
    step_dir = tmp_path / "ours" / "checkpoints" / "0"
    change(step_dir, "params.moe.attn.o.kernel", dict.fromkeys(range(0, 1536, 7), 0.37))
    export_hf(tmp_path / "ours", tmp_path / "bf16")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8")
    got = released.read(tmp_path / "back")
    scales = got[f"{O_PROJ}_scale_inv"]
    assert scales.dtype == released.TYPES[scale_dtype]
    assert not (scales == tensors[f"{O_PROJ}_scale_inv"]).any()
    x = released.read(tmp_path / "bf16")[O_PROJ].astype(np.float64)
    wide = np.kron(scales.astype(np.float64), np.ones((16, 16)))
    error = np.abs(got[O_PROJ].astype(np.float64) * wide - x)
    # Half a step of three mantissa bits, or of the smallest code; a rounded scale may
    # make the largest number a little too large.
    assert (error <= np.maximum(np.abs(x) * 2.0**-4, wide * 2.0**-10)).all()
    # Every number has the code that is nearest under its scale.
    nearest = np.clip(x / wide, -448, 448).astype(got[O_PROJ].dtype)
    assert got[O_PROJ].tobytes() == nearest.tobytes()


def test_another_format_of_scales_than_the_original_s(tmp_path):
    config, tensors = released.to_fp8(*released.fixture("v3_mtp"))
    folder = released.write(tmp_path / "hf", config, tensors, shards=2)
    import_hf(folder, tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8", ue8m0=True)
    got = released.read(tmp_path / "back")
    assert got.keys() == tensors.keys()
    for name, value in got.items():
        if name.endswith("_scale_inv"):
            assert (np.frexp(value)[0] == 0.5).all() and value.dtype == np.float32
        assert value.dtype == tensors[name].dtype and value.shape == tensors[name].shape
    about = json.loads((tmp_path / "back" / "config.json").read_text())
    assert about["quantization_config"] == config["quantization_config"] | {
        "scale_fmt": "ue8m0"
    }


def test_a_changed_tensor_gets_fresh_scales_and_the_others_keep_theirs(tmp_path):
    config, tensors = released.to_fp8(*released.fixture("v3_mtp"))
    # As if amax had been taken over more than the block: no recipe gives these scales.
    for name in tensors:
        if name.endswith("_scale_inv"):
            tensors[name] = tensors[name] * np.float32(1.7)
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours")
    step_dir = tmp_path / "ours" / "checkpoints" / "0"
    change(step_dir, "params.moe.attn.o.kernel", {0: 1})
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="fp8")
    got = released.read(tmp_path / "back")
    changed = {n for n, v in tensors.items() if got[n].tobytes() != v.tobytes()}
    assert changed == {O_PROJ, f"{O_PROJ}_scale_inv"}


@pytest.mark.parametrize("name", ["v3_mtp", "v2_lite"])
def test_stacked_experts_hold_the_same_numbers(tmp_path, name):
    config, tensors = released.fixture(name)
    folder = released.write(tmp_path / "hf", config, tensors)
    back = convert(folder, tmp_path, dtype="f32", stacked=True)
    stacked = released.read(back)
    at = "model.layers.1.mlp.experts"

    def expert(e, kind):
        return tensors[f"{at}.{e}.{kind}_proj.weight"]

    all_of = range(config["n_routed_experts"])
    both = [np.concatenate([expert(e, "gate"), expert(e, "up")]) for e in all_of]
    np.testing.assert_array_equal(stacked[f"{at}.gate_up_proj"], np.stack(both))
    down = np.stack([expert(e, "down") for e in all_of])
    np.testing.assert_array_equal(stacked[f"{at}.down_proj"], down)
    assert not [n for n in stacked if "experts.0." in n]
    # And from there on: the form is kept, or undone.
    import_hf(back, tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "kept", dtype="f32")
    assert_same_files(tmp_path / "kept", back)
    export_hf(tmp_path / "again", tmp_path / "undone", dtype="f32", stacked=False)
    assert_same_files(tmp_path / "undone", folder)


def test_tensors_that_a_release_keeps_wide_stay_wide(tmp_path):
    config, tensors = released.fixture("v3")
    config |= {"dtype": "bfloat16"}
    wide = "model.layers.1.mlp.gate.weight"
    mixed = bf16(tensors) | {wide: tensors[wide]}
    mixed["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    folder = released.write(tmp_path / "hf", config, mixed)
    assert_same_files(convert(folder, tmp_path), folder)
    export_hf(tmp_path / "ours", tmp_path / "f32", dtype="f32")
    assert {v.dtype for v in released.read(tmp_path / "f32").values()} == {
        np.dtype(np.float32)
    }


def test_a_checkpoint_without_the_mtp_tensors_that_it_promises(tmp_path):
    said = []
    config, tensors = released.fixture("v3")
    assert config["num_nextn_predict_layers"] == 1
    folder = released.write(tmp_path / "hf", config, tensors)
    loaded = import_hf(folder, tmp_path / "ours", say=said.append)
    assert loaded.model.mtp.depth == 0
    [text] = said
    assert "num_nextn_predict_layers = 1" in text and "without MTP" in text
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="f32")
    assert_same_files(tmp_path / "back", folder)


@pytest.mark.parametrize(
    "lacking",
    [
        ["embed_tokens.weight", "shared_head.head.weight"],
        ["embed_tokens.weight"],
        ["shared_head.head.weight"],
    ],
    ids=len,
)
def test_mtp_layers_need_not_repeat_the_embedding_or_the_head(tmp_path, lacking):
    config, tensors = released.fixture("v3_mtp")
    for name in lacking:
        del tensors[f"model.layers.3.{name}"]
    folder = released.write(tmp_path / "hf", config, tensors)
    assert_same_files(convert(folder, tmp_path, dtype="f32"), folder)


def test_old_rotary_buffers_are_left_out(tmp_path):
    config, tensors = released.fixture("v3")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = released.write(tmp_path / "hf", config, tensors)
    back = released.read(convert(folder, tmp_path, dtype="f32"))
    assert back.keys() == tensors.keys() - {
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    }


def test_shards_are_no_larger_than_asked_for(tmp_path):
    config, tensors = released.fixture("v3")
    folder = released.write(tmp_path / "hf", config, tensors)
    import_hf(folder, tmp_path / "ours", say=lambda text: None)
    forget_source(tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype="f32", shard=50_000)
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert [f.name for f in files][
        -1
    ] == f"model-{len(files):05}-of-{len(files):05}" + (".safetensors")
    for file in files:
        assert sum(v.nbytes for v in released.read_file(file).values()) <= 50_000
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    places = {n: f.name for f in files for n in released.read_file(f)}
    assert index["weight_map"] == places and places.keys() == tensors.keys()
    # Our own config.json says the same as the one that is forgotten.
    import_hf(tmp_path / "back", tmp_path / "again")
    assert deepseek_jax.load(tmp_path / "again")[0].model == (
        deepseek_jax.load(tmp_path / "ours")[0].model
    )
