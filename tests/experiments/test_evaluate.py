"""The command as a user types it: the files it writes, and what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import manager, metadata
from deepseek_jax.eval import logits
from deepseek_jax.tokenizer.bytes import Bytes
from deepseek_jax.train.state import assemble, init_state
from experiments import common, evaluate
from tests.factory import small

ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 7), dtype=np.int32)


def checkpoint(workdir, depth):
    """A run that has been saved at step 3, as training saves it."""
    config = small(depth=depth)
    about = metadata.describe(config, "corpus", ("text",), Bytes().hash)
    metadata.write(workdir, about)
    Bytes().save(workdir / "tokenizer")
    with manager.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(3, init_state(assemble(config), 0), {}, about)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("runs") / "run", depth=2)


@pytest.fixture
def given(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    return tmp_path / "tokens.npy"


def arguments(run, given, *more, **changes):
    named = {"checkpoint": run, "tokens": given, "out": given.parent / "logits.npy"}
    pairs = [(f"--{name}", str(value)) for name, value in (named | changes).items()]
    return ["logits", *(word for pair in pairs for word in pair), *more]


def refused(capsys, words):
    with pytest.raises(SystemExit) as stop:
        common.guarded(evaluate.main, words)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return stop.value.code, message


def test_the_command(run, given):
    words = arguments(run, given, "--mtp", out=given.parent / "new" / "logits.npy")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "logits.npy: float32 [3, 7, 61]" in done.stdout
    assert "mtp_logits.npy: float32 [2, 3, 7, 61]" in done.stdout
    config, params, balance, _ = deepseek_jax.load(run)
    main, mtp = logits.compute(logits.build(config), params, balance, TOKENS, mtp=True)
    out = given.parent / "new"
    assert sorted(p.name for p in out.iterdir()) == ["logits.npy", "mtp_logits.npy"]
    for name, wanted in (("logits.npy", main), ("mtp_logits.npy", mtp)):
        written = np.load(out / name)
        assert written.dtype == np.float32 and written.flags.c_contiguous
        np.testing.assert_allclose(written, wanted, atol=2e-5)


def test_checkpoints_by_any_of_their_paths(run, given, monkeypatch):
    monkeypatch.setattr(logits, "NUMBERS", 61 * 5)
    written = []
    for place in (run, run / "checkpoints", run / "checkpoints" / "3"):
        evaluate.main(arguments(place, given))
        written.append(np.load(given.parent / "logits.npy"))
    assert written[0].shape == (3, 7, 61)
    np.testing.assert_array_equal(written[0], written[1])
    np.testing.assert_array_equal(written[0], written[2])
    assert not (given.parent / "mtp_logits.npy").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["logit"], "invalid choice: 'logit'"),
        (["logits", "--tokens", "x"], "--checkpoint, --out"),
        (["logits", "--top"], "--help"),
    ],
)
def test_a_wrong_command_line(words, message, capsys):
    code, text = refused(capsys, words)
    assert code == common.BAD_INPUT and message in text and "--help" in text


BAD_TOKENS = {
    "wide": (
        TOKENS.astype(np.int64),
        "tokens are int64 of shape [3, 7]: must be int32",
    ),
    "flat": (TOKENS[0], "int32 of shape [7]: must be int32 [B, L]"),
    "empty": (TOKENS[:0], "shape [0, 7]"),
    "too large": (TOKENS + np.int32(61), "vocab_size is 61"),
    "negative": (TOKENS - np.int32(61), "must be 0 to 60"),
    "objects": (np.array([[None]]), "is damaged or no .npy file"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens(case, run, given, capsys):
    tokens, message = BAD_TOKENS[case]
    np.save(given, tokens, allow_pickle=True)
    code, text = refused(capsys, arguments(run, given))
    assert code == common.BAD_INPUT and message in text
    assert [p.name for p in given.parent.iterdir()] == ["tokens.npy"]


def test_files_that_hold_no_tokens(run, given, capsys):
    whole = given.read_bytes()
    np.savez(given.with_suffix(".npz"), tokens=TOKENS)
    zipped = given.with_suffix(".npz").read_bytes()
    for content in (b"", b"1 2 3\n", whole[:20], whole[:-5], zipped):
        given.write_bytes(content)
        code, text = refused(capsys, arguments(run, given))
        assert code == common.BAD_INPUT and "is damaged or no .npy file" in text
    given.unlink()
    assert "there is no such file" in refused(capsys, arguments(run, given))[1]


def test_a_checkpoint_that_is_not_there(given, capsys):
    nowhere = given.parent / "nowhere"
    code, text = refused(capsys, arguments(nowhere, given))
    assert code == common.BAD_INPUT and f"{nowhere} is not there" in text


def test_mtp_of_a_model_that_has_none(given, tmp_path_factory, capsys):
    run = checkpoint(tmp_path_factory.mktemp("runs") / "run", depth=0)
    code, text = refused(capsys, arguments(run, given, "--mtp"))
    assert code == common.BAD_INPUT and "no MTP modules (model.mtp.depth = 0)" in text
    evaluate.main(arguments(run, given))


def test_outputs_that_would_cost_something_else(run, given, capsys):
    for out in (given.parent, given):
        code, text = refused(capsys, arguments(run, given, out=out))
        assert code == common.BAD_INPUT and f"--out: {out}" in text
    other = given.rename(given.with_name("mtp_logits.npy"))
    code, _ = refused(capsys, arguments(run, other, "--mtp"))
    assert code == common.BAD_INPUT
    np.testing.assert_array_equal(np.load(other), TOKENS)


def test_no_half_written_file(run, given, capsys, monkeypatch):
    def stops(*arguments, **options):
        yield logits.Block(0, 0, np.zeros((1, 61), np.float32))
        raise OSError("No space left on device")

    monkeypatch.setattr(logits, "blocks", stops)
    (given.parent / "logits.npy").write_bytes(b"old")
    code, text = refused(capsys, arguments(run, given, "--mtp"))
    assert code == common.STOPPED and "No space left" in text
    names = sorted(p.name for p in given.parent.iterdir())
    assert names == ["logits.npy", "tokens.npy"]
    assert (given.parent / "logits.npy").read_bytes() == b"old"


def test_a_disk_that_is_too_small_is_seen_before(run, given, capsys, monkeypatch):
    usage = shutil.disk_usage(given.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(logits, "blocks", None)
    code, text = refused(capsys, arguments(run, given))
    assert code == common.STOPPED and "give fewer tokens or another --out" in text


def test_help_suffices(capsys):
    for words, wanted in (
        (["--help"], ("logits", "python -m experiments.evaluate")),
        (
            ["logits", "--help"],
            ("--checkpoint", "int32 [B, L]", "float32 [J, B, L, V]", "NaN", "workdir"),
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(words)
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(word in text for word in wanted)
