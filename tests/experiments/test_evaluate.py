"""The command as a user types it: the files it writes, and what it refuses."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.analysis import runs
from deepseek_jax.checkpoint import manager, metadata
from deepseek_jax.config import DataConfig, MTPConfig
from deepseek_jax.data.sources import open_corpus
from deepseek_jax.eval import acceptance, logits
from deepseek_jax.tokenizer.bytes import Bytes
from deepseek_jax.train.state import assemble, init_state
from experiments import acceptance as command
from experiments import common, evaluate
from tests.factory import SMALL, small
from tests.train.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 7), dtype=np.int32)


def checkpoint(workdir, depth, corpus="corpus", **settings):
    """A run that has been saved at step 3, as training saves it."""
    config = small(depth=depth, **settings)
    about = metadata.describe(config, corpus, ("text",), Bytes().hash)
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
        (
            ["acceptance", "--help"],
            ("--prompt-tokens", "--depth", "tokens_per_step", "null", "held-out"),
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(words)
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert all(word in text for word in wanted)


def speaking(depth):
    """A model of bytes."""
    return dataclasses.replace(SMALL, vocab_size=264, mtp=MTPConfig(depth))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A run with two MTP modules on a corpus of two domains, not trained at all."""
    folder = tmp_path_factory.mktemp("speaker")
    source = str(write_corpus(folder / "texts"))
    data = DataConfig(source=source, tokenizer="bytes", val_fraction=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_JAX_CACHE", str(folder / "cache"))
        corpus = open_corpus(data)
        groups = {"data": data, "model": speaking(2)}
        run = checkpoint(folder / "run", 2, corpus.hash, **groups)
        yield run, corpus


def measuring(run, out, **changes):
    named = {"checkpoint": run, "out": out, "prompts": 3, "prompt-tokens": 10}
    named |= {"max-tokens": 12} | changes
    pairs = [(f"--{name}", str(value)) for name, value in named.items()]
    return ["acceptance", *(word for pair in pairs for word in pair)]


def test_acceptance_by_domain(speaker, tmp_path, capsys):
    out = tmp_path / "new" / "acceptance.json"
    evaluate.main(measuring(speaker[0], out, temperature=0.7))
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "domain" and "module 2 on text" in heading
    assert [row.split()[0] for row in rows] == ["code", "speech", "together", "over"]
    found = json.loads(out.read_text())
    assert found["settings"] == {
        "prompts": 3,
        "prompt-tokens": 10,
        "max-tokens": 12,
        "temperature": 0.7,
        "seed": 0,
        "depth": 2,
    }
    for domain in ("code", "speech"):
        made = found["domains"][domain]
        assert made["prompts"] == 3 and len(made["accepted"]) == 2
        value, steps = made["tokens_per_step"]["value"], made["tokens_per_step"]["of"]
        assert made["accepted"][0]["of"] == steps
        assert value * steps <= 3 * 12 and 1 <= value <= 3
        assert [one["of"] > 100 for one in found["text"][domain]] == [True, True]
    assert found["together"]["prompts"] == 6 and len(found["spread"]) == 2


@pytest.fixture
def sweep(speaker, tmp_path):
    """Two seeds of a setting with two modules; one of another is not done."""
    names = {"depth2-s0": 0, "depth2-s1": 1, "depth0-s0": 0, "depth1-s0": 0}
    items = []
    for name, seed in names.items():
        depth = int(name[5])
        items.append(
            {"name": name, "overrides": {"model.mtp.depth": depth, "seed": seed}}
        )
        folder = shutil.copytree(speaker[0], tmp_path / "sweep" / name)
        saved = json.loads((folder / "config.json").read_text())
        saved["config"]["model"]["mtp"]["depth"] = depth
        saved["config"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(saved))
    done = [{"name": n, "status": "failed" if "h1" in n else "done"} for n in names]
    root = tmp_path / "sweep"
    (root / "sweep.json").write_text(json.dumps({"title": "depths", "runs": items}))
    (root / "summary.json").write_text(json.dumps(done))
    return root


def test_acceptance_of_a_sweep_by_setting(sweep, speaker, tmp_path, capsys):
    out = tmp_path / "acceptance.json"
    evaluate.main(measuring(sweep, out))
    alone = tmp_path / "alone.json"
    evaluate.main(measuring(speaker[0], alone))
    shown = capsys.readouterr()
    assert "[2/2] depth2-s1" in shown.err
    assert "left out: 1 runs are not done, 1 have no MTP modules" in shown.err
    heading, row, *_ = shown.out.splitlines()
    assert heading.split("  ")[0] == "setting" and "draft 2" in heading
    found, one = json.loads(out.read_text()), json.loads(alone.read_text())
    assert list(found["runs"]) == ["depth2-s0", "depth2-s1"]
    assert found["settings"] == one.pop("settings") | {"depth": None}
    assert all(each == one for each in found["runs"].values())
    assert row.split()[:2] == ["depth=2", "2"]
    share = one["together"]["accepted"][0]["value"]
    assert row.split()[2:5] == [f"{share:.1%}", "±", "0.0%"]
    texts = [each[1]["value"] for each in one["text"].values()]
    assert row.split()[-3:] == [f"{np.mean(texts):.1%}", "±", "0.0%"]


def made(accepted, text, tokens=1.5):
    """What a run comes to, by numbers."""
    one = acceptance.Measured(
        4,
        tuple(acceptance.Ratio(value, 0.1, 8) for value in accepted),
        acceptance.Ratio(tokens, 0.1, 8),
    )
    report = acceptance.Report({"a": one}, one, accepted, accepted)
    shares = {
        domain: tuple(acceptance.Ratio(value, 0.1, 8) for value in values)
        for domain, values in text.items()
    }
    return report, shares


def test_settings_are_means_over_seeds():
    nan = float("nan")
    rows = [
        ("two", 0, made((0.5, 0.3), {"a": (0.2, 0.1), "b": (0.4, nan)}, 1.8)),
        ("two", 1, made((0.7, nan), {"a": (0.6, 0.3), "b": (0.8, nan)}, 2.0)),
        ("one", 0, made((0.9,), {"a": (nan,), "b": (nan,)})),
    ]
    found = [
        (runs.Run(f"{label}-s{seed}", Path(), {"seed": seed}, label=label), each)
        for label, seed, each in rows
    ]
    _, two, one = command.seeds_table(found).splitlines()
    assert re.split(r"  +", two) == [
        *("two", "2", "60.0% ± 14.1%", "30.0%", "1.90 ± 0.14"),
        *("50.0% ± 28.3%", "20.0% ± 14.1%"),
    ]
    assert re.split(r"  +", one) == ["one", "1", "90.0%", "1.50"]


@pytest.mark.parametrize(
    "kept, changes, message",
    [
        (["depth0-s0", "depth1-s0"], {}, "1 runs are not done, 1 have no MTP modules"),
        (["depth2-s0"], {"depth": 3}, "--depth 3: depth2-s0 has 2 MTP modules"),
    ],
)
def test_a_sweep_without_drafts(kept, changes, message, sweep, tmp_path, capsys):
    stored = json.loads((sweep / "sweep.json").read_text())
    stored["runs"] = [item for item in stored["runs"] if item["name"] in kept]
    (sweep / "sweep.json").write_text(json.dumps(stored))
    out = tmp_path / "a.json"
    code, text = refused(capsys, measuring(sweep, out, **changes))
    assert code == common.BAD_INPUT and message in text and not out.exists()


def test_what_is_not_known_is_not_printed_and_null():
    nan = float("nan")
    one = acceptance.Ratio(0.5, nan, 8)
    made = acceptance.Measured(1, (one,), acceptance.Ratio(1.5, nan, 8))
    report = acceptance.Report({"a": made}, made, (0.5,), (nan,))
    assert "±" not in command.table(report, {"a": (one,)})
    found = json.loads(json.dumps(command.plain(report)), parse_constant=pytest.fail)
    assert found["domains"]["a"]["accepted"] == [{"value": 0.5, "error": None, "of": 8}]
    assert found["spread"] == [None]


BAD_MEASURES = {
    "long": ({"prompt-tokens": 9000}, "no held-out document of domain 'code'"),
    "none": ({"prompts": 0}, "--prompts 0"),
    "depth": ({"depth": 3}, "depth = 3: must be from 0 to 2"),
    "no depth": ({"depth": 0}, "depth = 0: must be at least 1"),
    "tokens": ({"max-tokens": 5000}, "the model's context is 4096"),
    "hot": ({"temperature": -1}, "temperature = -1.0"),
}


@pytest.mark.parametrize("case", BAD_MEASURES)
def test_bad_settings_of_acceptance(case, speaker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(acceptance.engine, "generate", None)
    changes, message = BAD_MEASURES[case]
    words = measuring(speaker[0], tmp_path / "a.json", **changes)
    code, text = refused(capsys, words)
    assert code == common.BAD_INPUT and message in text
    assert list(tmp_path.iterdir()) == []


def test_acceptance_needs_the_corpus_of_the_run(speaker, tmp_path, capsys):
    source = speaker[0].parent / "texts" / "text.jsonl"
    whole = source.read_bytes()
    words = measuring(speaker[0], tmp_path / "a.json")
    try:
        source.write_bytes(whole + b'{"text": "one more", "domain": "code"}')
        code, text = refused(capsys, words)
        assert code == common.BAD_INPUT and "is another corpus" in text
        source.unlink()
        code, text = refused(capsys, words)
        assert code == common.BAD_INPUT and "no such file" in text
    finally:
        source.write_bytes(whole)
    code, text = refused(capsys, measuring(speaker[0], tmp_path))
    assert code == common.BAD_INPUT and "is a folder" in text


def test_acceptance_needs_modules_and_a_tokenizer(
    speaker, tmp_path, capsys, monkeypatch
):
    run, corpus = speaker
    config, *loaded, _ = deepseek_jax.load(run)
    words = measuring(run, tmp_path / "a.json")
    monkeypatch.setattr(deepseek_jax, "load", lambda path: (config, *loaded, None))
    code, text = refused(capsys, words)
    assert code == common.BAD_INPUT and "has no tokenizer" in text
    monkeypatch.undo()
    groups = {"data": config.data, "model": speaking(0)}
    plain = checkpoint(tmp_path / "run", 0, corpus.hash, **groups)
    monkeypatch.setenv("DEEPSEEK_JAX_CACHE", str(corpus.cache))
    code, text = refused(capsys, measuring(plain, tmp_path / "a.json"))
    assert code == common.BAD_INPUT and "has no MTP modules" in text
