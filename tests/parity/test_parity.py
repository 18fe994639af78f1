"""Released-format models against transformers and against the equations.

The fixtures are tiny models that transformers saved, with the logits that it gave them
(make_fixtures.py). PARITY=FOLDER takes another set of them, as `make parity` does.
"""

import filecmp
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.convert import config_json
from deepseek_jax.convert.hf_export import export_hf
from deepseek_jax.convert.hf_import import import_hf
from deepseek_jax.eval import logits as logits_of
from deepseek_jax.ops.routing import route
from tests.parity import plain

FIXTURES = Path(os.environ.get("PARITY", Path(__file__).parent / "fixtures"))
MODELS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
BOUND = 2e-5


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Every fixture, converted."""
    root = tmp_path_factory.mktemp("converted")
    for name in MODELS:
        import_hf(FIXTURES / name, root / name, say=lambda text: None)
    return root


@pytest.fixture(scope="module")
def load(workdirs):
    """(model, params, balance) of a fixture, loaded once."""

    @functools.cache
    def loaded(name):
        config, params, balance, _ = deepseek_jax.load(workdirs / name)
        return logits_of.build(config), params, balance

    return loaded


def expected(name):
    return np.load(FIXTURES / name / "expected.npz")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(load, name):
    want = expected(name)
    got, _ = logits_of.compute(*load(name), want["tokens"])
    assert np.abs(got - want["logits"]).max() <= BOUND
    assert want["logits"].std() > 0.3  # the bound means something


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_says_the_same(load, name):
    want = expected(name)["greedy"]
    model, params, balance = load(name)
    prompt = want.shape[1] - 32

    @jax.jit
    def step(tokens_BL, at):
        position_BL = jnp.broadcast_to(jnp.arange(want.shape[1]), want.shape)
        out = model.apply({"params": params}, tokens_BL, position_BL, balance)
        here_B1D = jax.lax.dynamic_slice_in_dim(out.hidden_BLD, at - 1, 1, 1)
        logits = model.apply({"params": params}, here_B1D, method="logits")
        return tokens_BL.at[:, at].set(logits[:, 0].argmax(-1))

    tokens = jnp.zeros_like(want).at[:, :prompt].set(want[:, :prompt])
    for at in range(prompt, want.shape[1]):
        tokens = step(tokens, at)
    np.testing.assert_array_equal(tokens, want)


@pytest.mark.parametrize("name", [n for n in MODELS if "mtp_logits" in expected(n)])
def test_mtp_logits_are_those_of_transformers(load, name):
    want = expected(name)
    _, got = logits_of.compute(*load(name), want["tokens"], mtp=True)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want["mtp_logits"]))
    assert np.nanmax(np.abs(got - want["mtp_logits"])) <= BOUND


@pytest.mark.parametrize("name", MODELS)
def test_all_logits_follow_from_the_equations(load, name):
    tokens = expected(name)["tokens"][:1]
    model, params, balance = load(name)
    depth = model.config.mtp.depth
    config, tensors = plain.read(FIXTURES / name)
    want = plain.forward(config, tensors, tokens[0], depth)
    main, mtp = logits_of.compute(model, params, balance, tokens, mtp=depth > 0)
    for k, (got, right) in enumerate(zip((main, *mtp), want, strict=True)):
        assert np.abs(got[0, : tokens.shape[1] - k] - right).max() <= BOUND


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("v3")])
def test_biases_decide_who_is_chosen(load, name):
    model, params, balance = load(name)
    assert float(balance.min()) < -0.5 and float(balance.max()) > 0.5
    want = expected(name)
    got, _ = logits_of.compute(model, params, 0 * balance, want["tokens"])
    assert np.abs(got - want["logits"]).max() > 0.1


def with_yarn(name, **changes):
    """The equations' logits of a model whose YaRN has other numbers."""
    config, tensors = plain.read(FIXTURES / name)
    config["rope_parameters"] |= changes
    return plain.forward(config, tensors, expected(name)["tokens"][0])[0]


@pytest.mark.parametrize("name", ["v3_yarn", "v2_lite"])
def test_the_models_tell_one_yarn_from_another(name):
    config, _ = plain.read(FIXTURES / name)
    rope = config["rope_parameters"]
    frequency, _, _ = plain.yarn(config)
    plain_ones = rope["rope_theta"] ** (-np.arange(0, 16, 2) / 16)
    share = (plain_ones / frequency - 1) / (rope["factor"] - 1)  # of what is slowed
    assert ((share > 1e-3) & (share < 0.2)).sum() >= 2  # blends
    right = with_yarn(name)
    assert np.abs(right - expected(name)["logits"][0]).max() <= BOUND
    for changes in (
        {"beta_fast": 8, "beta_slow": 8},  # a ramp of 0 and 1 only
        {"beta_fast": rope["beta_slow"] * 4},
        {"beta_slow": rope["beta_fast"] / 4},
        {"original_max_position_embeddings": 4096},
        {"mscale": rope["mscale_all_dim"]},
        {"mscale_all_dim": rope["mscale"]},
        {"mscale": rope["mscale_all_dim"], "mscale_all_dim": rope["mscale"]},
    ):
        wrong = with_yarn(name, **changes)
        assert np.abs(wrong - right).max() > 50 * BOUND, changes


@pytest.mark.parametrize(("name", "others"), [("v3", (1, 4)), ("v2", (2, 4))])
def test_the_models_tell_one_group_score_from_another(monkeypatch, name, others):
    config, tensors = plain.read(FIXTURES / name)
    want = expected(name)
    assert config["n_routed_experts"] // config["n_group"] == 4
    choose = plain.choose
    for best in others:
        monkeypatch.setattr(plain, "choose", functools.partial(choose, best=best))
        wrong = plain.forward(config, tensors, want["tokens"][0])[0]
        assert np.abs(wrong - want["logits"][0]).max() > 0.01, best


def test_masking_groups_with_zero_would_choose_other_experts():
    config, _ = plain.read(FIXTURES / "v3")
    rng = np.random.default_rng(0)
    experts = config["n_routed_experts"]
    logits, bias = rng.normal(size=(200, experts)), rng.uniform(-2, -1, experts)
    right, wrong = (
        [plain.choose(config, s, bias, dropped) for s in plain.sigmoid(logits)]
        for dropped in (-np.inf, 0.0)
    )
    moe = config_json.read(config).model.moe
    ours = route(jnp.asarray(logits), jnp.asarray(bias), lambda s, b, /: s + b, moe)
    np.testing.assert_array_equal(ours.experts_TK, right)
    # Every choice is negative, so each masked expert comes before all that were kept.
    lost = [len(set(a) - set(b)) for a, b in zip(right, wrong)]
    assert min(lost) > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_gives_the_same_files(workdirs, tmp_path, name):
    dtype = "bf16" if name.endswith("bf16") else "f32"
    export_hf(workdirs / name, tmp_path / "hf", dtype=dtype)
    files = {file.name for file in (FIXTURES / name).iterdir()} - {"expected.npz"}
    assert {file.name for file in (tmp_path / "hf").iterdir()} == files
    same, *_ = filecmp.cmpfiles(FIXTURES / name, tmp_path / "hf", files, shallow=False)
    assert set(same) == files


def test_fixtures_stay_small():
    files = [f for f in (Path(__file__).parent / "fixtures").rglob("*") if f.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4_000_000
