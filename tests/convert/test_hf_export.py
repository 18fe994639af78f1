"""Runs that were trained here as Hugging Face checkpoints, and what cannot be one."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import folders, manager, metadata
from deepseek_jax.checkpoint.disk import DiskFull
from deepseek_jax.config import STRATEGIES, BalanceConfig, MTPConfig
from deepseek_jax.convert import common
from deepseek_jax.convert.hf_export import export_hf
from deepseek_jax.convert.hf_import import import_hf
from deepseek_jax.ops import balancing
from deepseek_jax.train.state import assemble, init_state
from tests.convert import released
from tests.factory import SMALL, small


def trained(workdir, *, model=SMALL, strategy="v3"):
    """A run of `model` as training saves it, its biases not zero."""
    config = small(model=model, balance=BalanceConfig(strategy=strategy, freeze_step=1))
    state = init_state(assemble(config), 3)
    noise = np.random.default_rng(0)

    def moved(leaf):
        return leaf + jnp.asarray(noise.uniform(-1, 1, leaf.shape), leaf.dtype)

    state = state._replace(balance=jax.tree.map(moved, state.balance))
    about = metadata.describe(config, "corpus", ("text",), "tokenizer")
    with manager.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, state, {}, about)
    return config, state


def softmax_model():
    moe = dataclasses.replace(
        SMALL.moe, score="softmax", group_score="max", normalize=False
    )
    return dataclasses.replace(SMALL, moe=moe, mtp=MTPConfig(0))


def test_a_trained_run_comes_back_as_it_was(tmp_path):
    config, state = trained(tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="f32")
    import_hf(tmp_path / "hf", tmp_path / "again")
    again, params, balance, _ = deepseek_jax.load(tmp_path / "again")
    assert dataclasses.replace(again.model, init_std=0.0) == config.model
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(state.params)):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(balance, state.balance[0])


def test_bf16_is_the_default_and_rounds(tmp_path):
    _, state = trained(tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf")
    tensors = released.read(tmp_path / "hf")
    want = np.asarray(state.params["head"]).T.astype(released.TYPES["BF16"])
    assert tensors["lm_head.weight"].tobytes() == want.tobytes()
    kinds = {n: v.dtype for n, v in tensors.items()}
    wide = {n for n, kind in kinds.items() if kind == np.float32}
    assert wide == {n for n in kinds if n.endswith("e_score_correction_bias")}
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == (
        "bfloat16"
    )


def test_fp8_quantises_what_a_release_does(tmp_path):
    trained(tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "wide", dtype="f32")
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="fp8")
    wide, got = released.read(tmp_path / "wide"), released.read(tmp_path / "hf")
    config, want = released.to_fp8({}, wide, (128, 128))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].tobytes() == value.tobytes(), name
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["quantization_config"] == config["quantization_config"]


EXPORTED = sorted(name for name, leaf in common.BIASES.items() if leaf is not None)


@pytest.mark.parametrize("strategy", EXPORTED)
def test_the_biases_of_every_strategy_are_found(tmp_path, strategy):
    config, state = trained(tmp_path / "run", strategy=strategy)
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="f32")
    tensors = released.read(tmp_path / "hf")
    bias = [
        tensors[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] for i in (1, 2, 3)
    ]
    balancer = balancing.build(config.balance, config.model.moe)
    want = np.zeros((3, 8)) if balancer.bias is None else balancer.bias(state.balance)
    np.testing.assert_array_equal(bias, want)


def test_the_table_of_biases_names_every_strategy():
    assert common.BIASES.keys() == set(STRATEGIES)
    assert set(STRATEGIES) - set(EXPORTED) == {"multiplicative"}


def test_a_softmax_router_becomes_a_v2(tmp_path):
    trained(tmp_path / "run", model=softmax_model(), strategy="aux_seq")
    export_hf(tmp_path / "run", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
    assert config["topk_method"] == "group_limited_greedy"
    assert not [n for n in released.read(tmp_path / "hf") if n.endswith("bias")]


def other(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (SMALL, "multiplicative", r"balance.strategy = 'multiplicative' has no"),
        (
            other(attention=dataclasses.replace(SMALL.attention, kind="mha")),
            "v3",
            r"model.attention.kind = 'mha' has no Hugging Face form",
        ),
        (softmax_model(), "loss_free", r"model.moe.score = 'softmax' has no"),
    ],
)
def test_what_has_no_such_form_is_refused_by_name(tmp_path, model, strategy, message):
    trained(tmp_path / "run", model=model, strategy=strategy)
    with pytest.raises(ValueError, match=message):
        export_hf(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    trained(run)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/7"])
def test_a_workdir_its_checkpoints_or_a_step_will_do(run, tmp_path, part):
    export_hf(run / part, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("leaf", "dtype", "value", "why"),
    [
        ("attn/o/kernel", "bf16", np.nan, "not finite"),
        ("attn/o/kernel", "fp8", np.nan, "not finite"),
        ("attn/o/kernel", "fp8", -3.4e38, "too large for BF16"),
        ("attn_norm/scale", "f32", np.inf, "not finite"),
        ("moe/router", "fp8", np.nan, "not finite"),
        ("moe/router", "bf16", 3.4e38, "too large for BF16"),
    ],
)
def test_weights_that_are_not_finite_are_refused(tmp_path, leaf, dtype, value, why):
    config, state = trained(tmp_path / "run")
    *path, last = leaf.split("/")
    node = functools.reduce(dict.__getitem__, path, state.params["moe"])
    node[last] = node[last].at[-1, ..., -1].set(value)
    about = metadata.describe(config, "corpus", ("text",), "tokenizer")
    with manager.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(8, state, {}, about)
    name = rf"model.layers.2\.\S+ holds values that are {why}"
    with pytest.raises(ValueError, match=name):
        export_hf(tmp_path / "run", tmp_path / "hf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_number_that_only_f32_holds_may_stay_f32(tmp_path):
    config, state = trained(tmp_path / "run")
    state.params["head"] = state.params["head"].at[0, 0].set(3.4e38)
    about = metadata.describe(config, "corpus", ("text",), "tokenizer")
    with manager.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(8, state, {}, about)
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="f32")
    assert released.read(tmp_path / "hf")["lm_head.weight"][0, 0] == np.float32(3.4e38)


def test_bad_requests_are_refused(run, tmp_path, monkeypatch):
    target = tmp_path / "hf"
    with pytest.raises(ValueError, match="dtype = 'int4': must be bf16, fp8, f32"):
        export_hf(run, target, dtype="int4")
    with pytest.raises(ValueError, match=r"no FP8 form; .*--no-stacked"):
        export_hf(run, target, dtype="fp8", stacked=True)
    for dtype in ("bf16", "f32"):
        with pytest.raises(ValueError, match=f"dtype = '{dtype}': must be 'fp8' .*ue8"):
            export_hf(run, target, dtype=dtype, ue8m0=True)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_hf(tmp_path, target)
    with pytest.raises(ValueError, match="run exists already"):
        export_hf(run, run)
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DiskFull, match="are needed"):
        export_hf(run, target)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    file = next((run / "checkpoints/7/state").glob("**/d/*"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"step 7: state/\S+ has changed"):
        export_hf(run, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"/7 is damaged: state/\S+ has changed"):
        export_hf(run / "checkpoints/7", tmp_path / "hf")


def test_every_byte_is_checked_once_and_the_bar_says_so(run, tmp_path, monkeypatch):
    read, seen = [], []

    def digest(file):
        read.append(file)
        return real(file)

    real = folders._digest
    monkeypatch.setattr(folders, "_digest", digest)
    export_hf(run, tmp_path / "hf", progress=lambda *now: seen.append(now))
    assert read and len(set(read)) == len(read)
    size = sum(f.stat().st_size for f in (run / "checkpoints/7").rglob("*.*"))
    (begun, total, what), (done, again, _) = seen[:2]
    assert (begun, done, again) == (0, total, total) and total >= size
    assert "checking" in what and what.endswith("checkpoints/7")


def test_a_damaged_step_is_passed_over_aloud(run, tmp_path):
    shutil.copytree(run / "checkpoints/7", run / "checkpoints/8")
    (run / "checkpoints/8/config/metadata").unlink()
    said = []
    export_hf(run, tmp_path / "hf", say=said.append)
    [text] = said
    assert "checkpoints/8 is damaged: config/metadata is missing" in text


def test_a_config_that_does_not_fit_the_arrays_is_refused(tmp_path):
    config, state = trained(tmp_path / "run")
    about = metadata.describe(config, "corpus", ("text",), "tokenizer")
    about["config"]["model"]["dense_dim"] = 99
    with manager.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(8, state, {}, about)
    message = r"params.dense.ffn.gate.kernel has the shape \(1, 16, 24\)"
    with pytest.raises(ValueError, match=message):
        export_hf(tmp_path / "run", tmp_path / "hf")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"kind": "bytes"}', False),
        ('{"model": {"type": "BPE"}}', True),
        ("what nothing here can read", True),
        (None, True),
    ],
)
def test_a_tokenizer_goes_along_in_a_place_where_others_find_it_or_not(
    run, tmp_path, text, kept
):
    folder, said = run / "tokenizer", []
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    if text:
        (folder / "tokenizer.json").write_text(text)
    export_hf(run, tmp_path / "hf", say=said.append)
    files = {"tokenizer_config.json", *(["tokenizer.json"] if text else [])}
    there = {file.name for file in (tmp_path / "hf").glob("tokenizer*")}
    own = tmp_path / "hf" / "deepseek_jax_tokenizer"
    ours = {file.name for file in own.iterdir()} if own.exists() else set()
    assert (there, ours) == ((files, set()) if kept else (set(), files))
    assert len(said) == (0 if kept else 1)
    import_hf(tmp_path / "hf", tmp_path / "back")
    back = {file.name for file in (tmp_path / "back" / "tokenizer").iterdir()}
    assert back == files
