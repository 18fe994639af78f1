"""What `config.json` says, and who may continue a run."""

import dataclasses

import pytest

from deepseek_jax.checkpoint import metadata
from deepseek_jax.config import Config, OptimConfig, TrainConfig, from_dict
from tests.factory import small


def describe(config, corpus="c0", tokenizer="t0"):
    return metadata.describe(config, corpus, ("code", "speech"), tokenizer)


def replace(config, group, **fields):
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **fields)}
    )


def test_config_json_gives_the_config_back(tmp_path):
    config = replace(small(), "optim", mtp_weight_changes=((5, 0.1),))
    metadata.write(tmp_path, describe(config))
    saved = metadata.read(tmp_path)
    assert saved == describe(config)
    assert from_dict(Config, saved["config"]) == config
    assert saved["corpus"] == {"hash": "c0", "domains": ["code", "speech"]}
    assert {"python", "jax", "orbax-checkpoint"} <= saved["versions"].keys()
    assert saved["runtime"]["platform"] == "cpu"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_an_empty_folder_holds_no_run(tmp_path):
    assert metadata.read(tmp_path) is None
    assert metadata.read(tmp_path / "new") is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", '{"kind": "grpo", "config": {}}', "another kind of run"),
        ("config.json", '{"learning_rate": 1}', "another kind of run"),
        ("config.json", '{"kind": ', "damaged"),
        ("sweep.json", "{}", "holds a sweep"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        metadata.read(tmp_path)


def test_a_file_as_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        metadata.read(tmp_path / "file")


def test_the_horizon_is_that_of_the_first_start():
    config = small(optim=OptimConfig(horizon=0), train=TrainConfig(steps=30))
    first = metadata.resolve_horizon(config, None)
    assert first.optim.horizon == 30
    longer = metadata.resolve_horizon(
        replace(config, "train", steps=50), describe(first)
    )
    assert longer.optim.horizon == 30
    given = replace(config, "optim", horizon=40)
    assert metadata.resolve_horizon(given, describe(first)) == given


@pytest.mark.parametrize(
    "group, field, value",
    [
        ("train", "steps", 99),
        ("train", "accumulation", 2),
        ("train", "eval_every", 3),
        ("runtime", "remat", "full"),
        ("mesh", "data", 2),
        ("data", "source", "/elsewhere"),
        ("data", "tokenizer", "/elsewhere/tokenizer"),
    ],
)
def test_how_and_where_may_change(tmp_path, group, field, value):
    other = replace(small(), group, **{field: value})
    metadata.check_same(describe(small()), describe(other), tmp_path)


def test_every_field_of_the_mathematics_must_stay(tmp_path):
    other = replace(small(seed=1), "optim", lr=0.5)
    other = replace(other, "balance", strategy="none")
    other = replace(other, "data", length=16)
    other = replace(other, "model", dim=32)
    with pytest.raises(ValueError) as error:
        metadata.check_same(describe(small()), describe(other, "c1", "t1"), tmp_path)
    for change in (
        "optim.lr = 0.01 there, 0.5 here",
        "balance.strategy = 'v3' there, 'none' here",
        "data.length = 12 there, 16 here",
        "model.dim = 16 there, 32 here",
        "seed = 0 there, 1 here",
        "corpus hash = 'c0' there, 'c1' here",
        "tokenizer hash = 't0' there, 't1' here",
    ):
        assert change in str(error.value)
    assert str(error.value).count(" there, ") == 7
    assert str(tmp_path) in str(error.value)


def test_a_field_that_another_version_lacked_has_its_default(tmp_path):
    saved = describe(small())
    del saved["config"]["model"]["norm_eps"]
    metadata.check_same(saved, describe(small()), tmp_path)
    other = replace(small(), "model", norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"model\.norm_eps = 1e-06 there, 1e-05 here"):
        metadata.check_same(saved, describe(other), tmp_path)
