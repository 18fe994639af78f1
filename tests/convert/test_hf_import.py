"""What an import refuses, and that a refusal leaves nothing behind."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import folders
from deepseek_jax.checkpoint.disk import DiskFull
from deepseek_jax.checkpoint.streaming import leaves
from deepseek_jax.convert import hf_import, names
from deepseek_jax.convert.hf_import import import_hf
from deepseek_jax.train.state import TrainState, assemble
from deepseek_jax.train.step import make_step
from tests.convert import released
from tests.factory import random_batch

Q_A = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SHARD = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def place(folder, name, shard):
    edit(folder / INDEX, lambda index: index["weight_map"].update({name: shard}))


DAMAGES = {
    "missing shard": (
        lambda f: (f / SHARD).unlink(),
        rf"{SHARD} is not there, though {INDEX} places model\.\S+ in it",
    ),
    "a shard outside the folder": (
        lambda f: place(f, Q_A, "../model.safetensors"),
        rf"is not there, though {INDEX} places {Q_A} in it",
    ),
    "truncated shard": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-7]),
        rf"{SHARD} has \d+ bytes instead of the \d+ .* is cut off",
    ),
    "not safetensors": (
        lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1"),
        rf"{SHARD} is cut off or no safetensors file",
    ),
    "index names a tensor that is elsewhere": (
        lambda f: place(f, Q_A, "model-00004-of-00004.safetensors"),
        rf"00001-of-00004.safetensors holds {Q_A}, which {INDEX} places in model-00004",
    ),
    "index omits a tensor": (
        lambda f: edit(f / INDEX, lambda index: index["weight_map"].pop(Q_A)),
        rf"holds {Q_A}, which {INDEX} omits",
    ),
    "index names a tensor that is nowhere": (
        lambda f: place(f, "model.extra", SHARD),
        rf"{SHARD} has no model.extra, though {INDEX} places it there",
    ),
    "damaged index": (
        lambda f: (f / INDEX).write_text("{"),
        rf"{INDEX} is missing or damaged",
    ),
    "empty index": (
        lambda f: (f / INDEX).write_text("{}"),
        rf"{INDEX} is damaged: it has no weight_map",
    ),
    "no index": (
        lambda f: (f / INDEX).unlink(),
        rf"has neither {INDEX} nor model.safetensors; there are model-00001",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json is missing or damaged",
    ),
    "no folder": (shutil.rmtree, "is no folder"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = released.copied("v3_yarn", tmp_path / "hf")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "out" / "ours")
    assert not (tmp_path / "out").exists()


def removed(name):
    return lambda config, tensors: tensors.pop(name)


def changed(name, change):
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


def configured(**fields):
    return lambda config, tensors: config.update(fields)


def as_type(name, dtype):
    return changed(name, lambda value: value.astype(released.TYPES[dtype]))


MISFITS = {
    "missing tensor": (
        removed(EXPERT),
        rf"{EXPERT} is missing; it should have the shape \[16, 32\]",
    ),
    "missing bias": (removed(BIAS), f"{BIAS} is missing"),
    "unknown tensor": (
        lambda config, tensors: tensors.update(
            {"model.layers.1.mlp.experts.16.up_proj.weight": tensors[EXPERT]}
        ),
        r"model.safetensors: unknown tensor model.layers.1.mlp.experts.16.up_proj",
    ),
    "misspelt tensor": (
        lambda config, tensors: tensors.update({EXPERT + "s": tensors.pop(EXPERT)}),
        f"unknown tensor {EXPERT}s; did you mean {EXPERT}, which is missing",
    ),
    "a tensor instead of another": (
        lambda config, tensors: tensors.update({"x": tensors.pop(EXPERT)}),
        f"{EXPERT} is missing",
    ),
    "a bias in the attention": (
        lambda config, tensors: tensors.update(
            {Q_A.replace("weight", "bias"): np.ones(24, np.float32)}
        ),
        r"unknown tensor model.layers.0.self_attn.q_a_proj.bias",
    ),
    "MTP that config.json does not have": (
        configured(num_nextn_predict_layers=0),
        r"unknown tensor model.layers.3.*num_nextn_predict_layers = 0",
    ),
    "half an MTP module": (
        removed("model.layers.3.eh_proj.weight"),
        r"model.layers.3.eh_proj.weight is missing; .* \[32, 64\]",
    ),
    "MTP with another embedding": (
        changed("model.layers.3.embed_tokens.weight", lambda v: v + 1),
        r"model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight",
    ),
    "wrong shape": (
        changed(EXPERT, np.transpose),
        rf"{EXPERT} has the shape \[32, 16\]; config.json asks for \[16, 32\]",
    ),
    "wrong size in config.json": (
        configured(moe_intermediate_size=24),
        r"has the shape \[16, 32\]; config.json asks for \[24, 32\]",
    ),
    "wrong dtype": (as_type(EXPERT, "I32"), rf"{EXPERT} has dtype I32; it must be"),
    "an FP8 norm": (
        as_type("model.norm.weight", "F8_E4M3"),
        "model.norm.weight has dtype F8_E4M3; it must be BF16, F32, F16",
    ),
    "FP8 that config.json does not mention": (
        as_type(EXPERT, "F8_E4M3"),
        rf"{EXPERT} is FP8, but config.json has no quantization_config",
    ),
    "unsupported feature": (configured(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "a misspelt feature": (configured(n_groups=4), "n_groups = 4 .* 'n_group'"),
    "a quantisation that says nothing": (
        configured(quantization_config="fp8"),
        "quantization_config = 'fp8'",
    ),
    "another quantisation": (
        configured(quantization_config={"quant_method": "gptq"}),
        "quantization_config.quant_method = 'gptq'",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, name):
    damage, message = MISFITS[name]
    config, tensors = released.fixture("v3_mtp")
    damage(config, tensors)
    folder = released.write(tmp_path / "hf", config, tensors)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "out" / "ours")
    assert not list((tmp_path / "out").glob("*"))


SCALE = EXPERT + "_scale_inv"
QUANTIZED = "quantization_config"
FP8_MISFITS = {
    "missing scale": (removed(SCALE), f"{EXPERT} is FP8, but {SCALE} is missing"),
    "a scale whose weight is missing": (removed(EXPERT), f"{EXPERT} is missing"),
    "scale of the wrong shape": (
        changed(SCALE, np.transpose),
        rf"{SCALE} is F32 \[2, 1\]; blocks of \[16, 16\] need .* \[1, 2\]",
    ),
    "scale of the wrong dtype": (as_type(SCALE, "I32"), f"{SCALE} is I32"),
    "a scale of what is not FP8": (as_type(EXPERT, "BF16"), f"unknown tensor {SCALE}"),
    "no block size": (
        lambda config, tensors: config[QUANTIZED].pop("weight_block_size"),
        "weight_block_size = None",
    ),
    "a block that a piece would cut": (
        lambda config, tensors: config[QUANTIZED].update(weight_block_size=[48, 16]),
        r"weight_block_size = \[48, 16\]",
    ),
    "another FP8": (
        lambda config, tensors: config[QUANTIZED].update(fmt="e5m2"),
        "quantization_config.fmt = 'e5m2'",
    ),
}


@pytest.mark.parametrize("name", FP8_MISFITS)
def test_fp8_that_does_not_fit_is_refused(tmp_path, name):
    damage, message = FP8_MISFITS[name]
    config, tensors = released.to_fp8(*released.fixture("v3_mtp"))
    damage(config, tensors)
    folder = released.write(tmp_path / "hf", config, tensors)
    with pytest.raises(ValueError, match=message):
        import_hf(folder, tmp_path / "out" / "ours")
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    folder = released.copied("v3", tmp_path / "hf")
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DiskFull, match=r"are needed, 0 MB are free at"):
        import_hf(folder, tmp_path / "ours", say=lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    folder = released.copied("v3", tmp_path / "hf")

    def fail(done, total, what):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        import_hf(folder, tmp_path / "ours", say=lambda text: None, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_a_disk_that_fills_up_is_said_to_be_full(tmp_path, kind):
    def fail(done, total, what):
        raise kind("write failed: No space left on device")

    with pytest.raises(DiskFull, match=r"the disk is full: .*ours could not"):
        import_hf(released.FIXTURES / "v3_mtp", tmp_path / "ours", progress=fail)
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_not_touched(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("x")
    folder = released.copied("v3_mtp", tmp_path / "hf")
    with pytest.raises(ValueError, match="ours exists already"):
        import_hf(folder, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine"]


def test_two_conversions_to_one_path_do_not_mix(tmp_path):
    folder = released.copied("v3_mtp", tmp_path / "hf")
    begun = []

    def begin_another(done, total, what):
        if not begun:
            begun.append(what)
            import_hf(folder, tmp_path / "ours")

    with pytest.raises(ValueError, match="ours exists already"):
        import_hf(folder, tmp_path / "ours", progress=begin_another)
    assert folders.find_damage(tmp_path / "ours" / "checkpoints" / "0") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_progress_counts_every_byte_once(tmp_path):
    seen = []
    folder = released.copied("v3_mtp", tmp_path / "hf")
    import_hf(folder, tmp_path / "ours", progress=lambda *now: seen.append(now))
    seen, checksums = seen[:-2], seen[-2:]
    written = checksums[1][1]
    assert [now[:2] for now in checksums] == [(0, written), (written, written)]
    assert written > 200_000 and "checksums" in checksums[0][2]
    size = sum(value.nbytes for value in released.read(folder).values())
    done = [bytes_done for bytes_done, *_ in seen]
    assert done == sorted(set(done)) and done[-1] == size
    assert {total for _, total, _ in seen} == {size}
    assert seen[0][2] == "model.embed_tokens.weight"


@pytest.mark.parametrize(("name", "width"), [("v3_bf16", 2), ("v3_mtp", 4)])
def test_parameters_keep_their_dtype_on_disk_and_load_as_f32(tmp_path, name, width):
    import_hf(released.FIXTURES / name, tmp_path / "ours")
    plan = hf_import.inspect(released.FIXTURES / name)
    kinds = {spec.dtype.itemsize for leaf, spec in plan.specs.items() if len(leaf) > 1}
    assert kinds == {width}
    config, params, balance, tokenizer = deepseek_jax.load(tmp_path / "ours")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert balance.dtype == jnp.float32 and tokenizer is None
    assert balance.shape == (config.model.num_routers, config.model.moe.num_experts)
    tensors = released.read(released.FIXTURES / name)
    np.testing.assert_array_equal(
        params["head"], tensors["lm_head.weight"].T.astype(np.float32)
    )
    bias = f"model.layers.{config.model.num_dense}.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(balance[0], tensors[bias].astype(np.float32))


def test_a_changed_byte_is_noticed_when_the_result_is_read(tmp_path):
    import_hf(released.FIXTURES / "v3_mtp", tmp_path / "ours")
    step_dir = tmp_path / "ours" / "checkpoints" / "0"
    file = step_dir / "source" / "source.json"
    file.write_text(file.read_text().replace("silu", "gelu"))
    assert "source.json" in folders.find_damage(step_dir)


@pytest.mark.parametrize("name", ["v3_mtp", "v2"])
def test_a_step_of_fine_tuning_changes_every_parameter_and_no_buffer(tmp_path, name):
    import_hf(released.FIXTURES / name, tmp_path / "ours")
    config, params, balance, _ = deepseek_jax.load(tmp_path / "ours")
    raw = deepseek_jax.config.to_dict(config)
    raw["data"] |= {"batch": 8, "length": 32}
    raw["optim"] |= {"warmup": 0, "schedule": "constant", "weight_decay": 0.0}
    config = deepseek_jax.config.from_dict(deepseek_jax.config.Config, raw)
    parts = assemble(config)
    # Without the large biases of the fixture, which keep some experts idle.
    balance = jax.tree.map(lambda bias: 0.01 * bias, balance)
    state = TrainState(
        jnp.zeros((), jnp.int32),
        params,
        parts.optimizer.init(params),
        balance,
        jax.random.PRNGKey(0),
        scales={},
    )
    before = jax.tree.map(np.array, state)
    after, _ = make_step(parts)(state, random_batch(config))
    stacks = {
        part.leaf: len(part.outer)
        for tensor in names.tensors(config.model, bias=True)
        for part in tensor.parts
    }
    changed = jax.tree.map(
        lambda new, old: np.asarray(new) != old,
        *(tree.params for tree in (after, before)),
    )
    for leaf, moved in leaves({"params": changed}).items():
        # Of stacked layers and experts, each one.
        outer = moved.shape[: stacks.pop(leaf)]
        assert moved.reshape(*outer, -1).any(-1).all(), leaf
    assert stacks.keys() == {names.BIAS}
    # The biases are no parameters; only the balancer moves them, all by the same speed.
    bias = [leaf.shape for leaf in jax.tree.leaves(balance)]
    assert len(bias) == (name == "v3_mtp")
    for tree in (before.params, before.opt_state):
        at = jax.tree_util.tree_flatten_with_path(tree)[0]
        assert not [path for path, _ in at if "bias" in jax.tree_util.keystr(path)]
    moments = optax.tree_utils.tree_get(before.opt_state, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(before.params)
    for old, new in zip(
        jax.tree.leaves(before.balance), jax.tree.leaves(after.balance), strict=True
    ):
        pushes = (np.asarray(new) - old) / config.balance.speed
        np.testing.assert_allclose(pushes, np.round(pushes), atol=1e-3)
        assert set(np.unique(np.round(pushes))) <= {-1, 0, 1} and pushes.any()
