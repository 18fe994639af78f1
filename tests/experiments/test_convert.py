"""The command as a user types it; on a checkpoint of some gigabytes, its memory."""

import dataclasses
import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import presets
from deepseek_jax.checkpoint import manager, metadata
from deepseek_jax.config import ModelConfig, MTPConfig
from deepseek_jax.convert import config_json, names
from deepseek_jax.convert.tensorfile import DTYPES, Plan, TensorFile
from deepseek_jax.train.state import assemble, init_state
from experiments import convert
from tests.convert import released
from tests.factory import small

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, code="from experiments import convert; convert.main()"):
    """Runs the command in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


def test_there_and_back(tmp_path, capsys):
    folder = released.copied("v3_bf16", tmp_path / "hf")
    convert.main(["--from-hf", str(folder), "--to", str(tmp_path / "ours")])
    said = capsys.readouterr()
    assert said.out == (
        f"{tmp_path / 'ours'}: 2 layers of width 32, 16 experts, 2 MTP modules\n"
    )
    assert "[##############################] 100% of 0.00 GB" in said.err
    convert.main(["--to-hf", str(tmp_path / "back"), "--from", str(tmp_path / "ours")])
    files = [file.name for file in folder.iterdir()]
    same, *_ = filecmp.cmpfiles(folder, tmp_path / "back", files, shallow=False)
    assert sorted(same) == sorted(files)


def test_options_of_an_export(tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    source = released.FIXTURES / "v3_bf16"
    convert.main(["--from-hf", str(source), "--to", str(ours)])
    to = ["--to-hf", str(back), "--from", str(ours)]
    convert.main([*to, "--dtype=fp8", "--ue8m0", "--shard-gb=0.0001"])
    tensors = released.read(back)
    scales = [v for n, v in tensors.items() if n.endswith("_scale_inv")]
    assert scales and all((np.log2(scale) % 1 == 0).all() for scale in scales)
    assert len(list(back.glob("*.safetensors"))) > 1
    to[1] = str(tmp_path / "stacked")
    convert.main([*to, "--stacked", "--dtype=f32"])
    tensors = released.read(tmp_path / "stacked")
    assert tensors["model.layers.1.mlp.experts.down_proj"].shape == (16, 32, 16)


@pytest.mark.parametrize("text", [None, '{"added_tokens": ['])
def test_a_tokenizer_that_cannot_be_read_is_said_to_be(tmp_path, capsys, text):
    folder = released.copied("v3_mtp", tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text("{}")
    if text:
        (folder / "tokenizer.json").write_text(text)
    convert.main(["--from-hf", str(folder), "--to", str(tmp_path / "ours")])
    assert "the tokenizer is kept for exports only: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --from-hf DIR with --to WORKDIR, or --to-hf"),
        (["--from-hf", "a"], "give --from-hf DIR with"),
        (["--from-hf", "a", "--to-hf", "b"], "give --from-hf DIR with"),
        (["--from-hf=a", "--to=b", "--from=c"], "give --from-hf DIR with"),
        (["--from-hf=a", "--to=b", "--dtype=bf16"], "--dtype, --ue8m0 and --stacked"),
        (["--to-hf=a", "--from=b", "--dtype=int8"], "invalid choice: 'int8'"),
        (["--to-hf=a", "--from=b", "--shard-gb=0"], "--shard-gb = 0.0: must be"),
        (["--to-hf=a", "--from=b", "--ue8m0"], "dtype = 'bf16': must be 'fp8' for"),
        (["--from-hf=/absent", "--to=b"], "/absent is no folder"),
        (["--to-hf=a", "--from=/absent"], "/absent is not there"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert.main(arguments)


def test_errors_end_the_process_with_one_line_and_a_code(tmp_path):
    (tmp_path / "config.json").write_text("{")
    run = command("--from-hf", tmp_path, "--to", tmp_path / "x", code=RUN)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"error: {tmp_path / 'config.json'} is missing or")
    assert run.stderr.count("\n") == 1


RUN = "from experiments import common, convert; common.guarded(convert.main)"


def test_help_says_what_is_needed():
    run = command("--help")
    assert run.returncode == 0
    for text in ("--from-hf DeepSeek-V2-Lite --to", "--to-hf out --from", "--dtype"):
        assert text in run.stdout
    assert "safetensors" in run.stdout and "FP8" in run.stdout


def test_a_bar_in_a_terminal_is_redrawn(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = convert.Bar(width=4)
    for done in (5, 6, 10):
        bar(done, 10, "x.weight")
    said = capsys.readouterr().err
    assert said.startswith("\r\033[K[##..]  50% of 0.00 GB")  # the second came too soon
    assert said.endswith("x.weight\n") and said.count("\n") == 1 and "60%" not in said


def synthetic(folder: Path, model: ModelConfig, shard: int) -> int:
    """Writes a random bfloat16 checkpoint piece by piece; the size of its largest
    tensor.
    """
    folder.mkdir()
    config = config_json.write(model, config_json.family_of(model, True))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    groups: list[dict[str, Plan]] = [{}]
    for tensor in names.tensors(model, bias=True):
        if sum(plan.size for plan in groups[-1].values()) > shard:
            groups.append({})
        kind = "F32" if len(tensor.shape) == 1 and "bias" in tensor.name else "BF16"
        groups[-1][tensor.name] = Plan(kind, tensor.shape)
    places = {}
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(DTYPES["BF16"])
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05}-of-{len(groups):05}.safetensors"
        with TensorFile(folder / name, group) as file:
            for tensor, plan in group.items():
                places[tensor] = name
                rows = int(np.prod(plan.shape[:-1])) if len(plan.shape) > 1 else 1
                for row in range(0, rows, 1024):
                    count = min(1024, rows - row) * plan.shape[-1]
                    values = np.resize(noise, count).astype(DTYPES[plan.dtype])
                    shape = (-1, plan.shape[-1]) if len(plan.shape) > 1 else (-1,)
                    file.write(tensor, row, values.reshape(shape))
    about = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    return max(plan.size for group in groups for plan in group.values())


PEAK = """
from experiments import convert
convert.main()
text = open("/proc/self/status").read()
print(int(text.split("VmHWM:")[1].split()[0]) * 1024)
"""


def wide(layers: int, depth: int) -> ModelConfig:
    """A V3 of width 1024 with the queries of the real one: its largest matrix."""
    moe = dataclasses.replace(
        presets.ablation_16b().moe, num_experts=64, ffn_dim=704, num_shared=1
    )
    return dataclasses.replace(
        presets.v3_671b(),
        vocab_size=32_768,
        dim=1024,
        num_layers=layers,
        num_dense=1,
        dense_dim=10_944,
        moe=moe,
        mtp=MTPConfig(depth),
    )


def trained(workdir: Path, model: ModelConfig) -> int:
    """A run of `model` as training saves it; the size of its largest tensor in f32."""
    config = small(model=model)
    state = jax.eval_shape(lambda: init_state(assemble(config), 0))
    noise = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    params, balance = jax.tree.map(
        lambda leaf: np.resize(noise, leaf.shape), (state.params, state.balance)
    )
    state = state._replace(
        step=np.int32(7),
        params=params,
        balance=balance,
        opt_state=(),
        key=np.zeros(2, np.uint32),
    )
    about = metadata.describe(config, "corpus", ("text",), "tokenizer")
    with manager.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, state, {}, about)
    return max(4 * math.prod(t.shape) for t in names.tensors(model, bias=True))


def peak(largest: int, *arguments: object) -> None:
    """Runs the command; its resident memory stays below what its help promises."""
    run = command(*arguments, code=PEAK)
    assert run.returncode == 0, run.stderr
    found, bound = int(run.stdout.split()[-1]), 2 * largest + (1 << 30)
    print(f"{arguments}: peak {found / 1e6:.0f} MB of {bound / 1e6:.0f}")
    print(run.stderr.strip()[-90:])
    assert found < bound


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc"
)


@pytest.mark.slow
@needs_proc
def test_memory_stays_bounded_on_three_gigabytes(tmp_path):
    largest = synthetic(tmp_path / "hf", wide(8, depth=1), shard=400_000_000)
    assert largest == 128 * 192 * 1536 * 2  # the queries
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 3e9 and len(files) > 5
    ours = ("--from", tmp_path / "ours")
    peak(largest, "--from-hf", tmp_path / "hf", "--to", tmp_path / "ours")
    peak(largest, "--to-hf", tmp_path / "bf16", *ours)
    peak(largest, "--to-hf", tmp_path / "fp8", *ours, "--dtype=fp8")
    peak(largest, "--from-hf", tmp_path / "fp8", "--to", tmp_path / "again")
    for file in files:
        assert filecmp.cmp(file, tmp_path / "bf16" / file.name, shallow=False)


@pytest.mark.slow
@needs_proc
def test_memory_stays_bounded_on_a_run_of_our_own(tmp_path):
    largest = trained(tmp_path / "run", wide(2, depth=0))
    for dtype, share in (("f32", 1), ("bf16", 2), ("fp8", 2)):
        target = tmp_path / dtype
        options = ("--to-hf", target, "--from", tmp_path / "run", "--dtype", dtype)
        peak(largest // share, *options)
        shutil.rmtree(target)
