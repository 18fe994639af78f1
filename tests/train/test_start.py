"""Opening a run: what is refused, on the real corpus, tokenizer and model."""

import dataclasses

import pytest

from deepseek_jax import train
from deepseek_jax.checkpoint import metadata
from deepseek_jax.config import DataConfig, MeshConfig, RuntimeConfig, to_dict
from deepseek_jax.train import start
from tests.factory import SMALL, small
from tests.train.corpus import write_corpus


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_JAX_CACHE", str(tmp_path / "cache"))
    corpus = str(write_corpus(tmp_path / "corpus"))
    return small(
        model=dataclasses.replace(SMALL, vocab_size=264),
        data=DataConfig(source=corpus, tokenizer="bytes", batch=4, length=32),
    )


def test_a_mesh_that_does_not_fit_is_refused_before_any_work(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "open_corpus", pytest.fail)
    unfit = dataclasses.replace(config, mesh=MeshConfig(data=2))
    with pytest.raises(ValueError, match=r"make 2 devices"):
        train.run(unfit, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_strict_mode_refuses_what_has_no_kernel_before_any_work(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(start, "open_corpus", pytest.fail)
    runtime = RuntimeConfig(compute="bf16", strict=True)
    strict = dataclasses.replace(config, runtime=runtime)
    with pytest.raises(
        ValueError, match=r"runtime.strict = True: .* attention, .*'cpu'"
    ):
        train.run(strict, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_tells_its_kernels_and_may_go_on_with_others(config, tmp_path):
    told = start.open_run(config, tmp_path / "run").description
    assert told["runtime"]["kernels"] == {
        "all": {"implementation": "xla", "reason": "not a Hopper GPU"}
    }
    other = dataclasses.replace(config, runtime=RuntimeConfig(implementation="xla"))
    metadata.check_same(told, {"config": to_dict(other)}, tmp_path)


def test_another_precision_is_said():
    there, here = (
        to_dict(small(runtime=RuntimeConfig(compute=compute, block=8)))
        for compute in ("fp8_delayed", "bf16")
    )
    assert start.precision_change(there, here) == (
        "runtime.compute = 'fp8_delayed' before, 'bf16' now"
    )
    there["runtime"]["compute"] = "bf16"
    there["runtime"]["block"] = 16
    assert start.precision_change(there, here) == ""


def test_opening_a_run_leaves_its_folder_alone(config, tmp_path):
    opened = start.open_run(config, tmp_path / "run")
    start.check(opened, tmp_path / "run")
    assert opened.tokenizer.hash == opened.description["tokenizer"]["hash"]
    assert not (tmp_path / "run").exists()
