"""The command as a user types it: text that streams, JSON, and what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.checkpoint import manager, metadata
from deepseek_jax.decode import engine, forward, speed
from deepseek_jax.eval import logits
from deepseek_jax.tokenizer.bytes import Bytes
from deepseek_jax.train.state import assemble, init_state
from experiments import common, generate
from tests.factory import SMALL, small

PROMPT = "Größe: "


def checkpoint(workdir, depth, kind=metadata.KIND):
    """A run that has been saved at step 3; its vocabulary is larger than needed."""
    config = small(depth=depth, length=64)
    model = dataclasses.replace(config.model, vocab_size=Bytes.vocab_size + 10)
    config = dataclasses.replace(config, model=model)
    about = metadata.describe(config, "corpus", ("text",), Bytes().hash)
    about["kind"] = kind
    metadata.write(workdir, about)
    Bytes().save(workdir / "tokenizer")
    with manager.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(3, init_state(assemble(config), 0), {}, about)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("runs") / "run", depth=2)


def words(run, *more, **changes):
    named = {"checkpoint": run, "prompt": PROMPT, "max-tokens": 20} | changes
    named = {name: value for name, value in named.items() if value is not None}
    return [*(f"--{name}={value}" for name, value in named.items()), *more]


def printed(capsys, run, *more, **changes):
    generate.main(words(run, *more, **changes))
    return capsys.readouterr()


def expected(run, max_tokens=20):
    """The same greedy output through the library."""
    config, params, balance, tokenizer = deepseek_jax.load(run)
    model = logits.build(config)
    report = engine.generate(
        model,
        forward.split(model, params, balance),
        [[tokenizer.bos_id, *tokenizer.encode(PROMPT)]],
        max_tokens,
        stop=(tokenizer.eos_id,),
    )
    return report.rows[0]


def test_text_streams_and_the_figures_come_last(run, capsys):
    row = expected(run)
    out, errors = printed(capsys, run)
    text = Bytes().decode(row.tokens)
    assert out.rstrip("\n\N{REPLACEMENT CHARACTER}") == (PROMPT + text).rstrip(
        "\n\N{REPLACEMENT CHARACTER}"
    )
    assert f"{len(row.tokens)} tokens, " in errors and "bytes/token" in errors
    assert errors.count("\n") == 2 and errors.startswith("compiling\n")
    assert "accepted" not in errors and "speed-up" not in errors


def test_in_bfloat16_it_says_how_it_attends(run, capsys):
    """And rounds: a little, and in a cache of half as many bytes."""
    both = {"compute": "bf16", "cache-dtype": "bf16"}
    found = json.loads(printed(capsys, run, "--json", **both).out)
    assert found["attention"]["implementation"] == "xla"
    assert "Hopper" in found["attention"]["reason"]
    exact = json.loads(printed(capsys, run, "--json").out)
    assert 2 * found["cache_bytes_per_token"] == exact["cache_bytes_per_token"]
    logs = [made["samples"][0]["log_probs"] for made in (found, exact)]
    assert 1e-5 < abs(logs[0][0] - logs[1][0]) < 0.05
    errors = printed(capsys, run, **both).err
    assert errors.startswith("attention over the cache: xla (mosaic_gpu runs on NVIDIA")


def test_half_a_character_is_held_back(capsys):
    stream = generate.Stream(Bytes())
    parts = [list(b"a"), *([byte] for byte in "ö€".encode()), [300]]
    shown = []
    for tokens in parts:
        stream(0, tokens)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "ö", "", "", "€", ""]


def test_json_of_several_samples(run, capsys):
    changes = {"n": 3, "temperature": 0.9, "top-k": 50, "seed": 7}
    out, errors = printed(capsys, run, "--json", "--speculative", **changes)
    found = json.loads(out)
    assert errors == "" and out.count("\n") == 1
    assert found["prompt"] == PROMPT and len(found["samples"]) == 3
    for sample in found["samples"]:
        assert sample["text"] == Bytes().decode(sample["tokens"])
        assert len(sample["log_probs"]) == len(sample["tokens"]) <= 20
    assert len({tuple(sample["tokens"]) for sample in found["samples"]}) == 3
    assert len(found["acceptance"]) == 2 and 1 <= found["tokens_per_step"] <= 3
    assert min(found["speed"].values()) > 0
    at = SMALL.attention
    layers = SMALL.num_layers + 2
    assert found["cache_bytes_per_token"] == layers * (at.kv_rank + at.rope_dim) * 4
    again = json.loads(printed(capsys, run, "--json", "--speculative", **changes).out)
    assert [sample["tokens"] for sample in again["samples"]] == [
        sample["tokens"] for sample in found["samples"]
    ]


def test_speculation_and_the_kind_of_cache_change_no_greedy_output(run, capsys):
    want = expected(run).tokens
    for more, changes in (
        (("--speculative",), {}),
        (("--speculative",), {"depth": 1, "page": 8}),
        ((), {"page": 16}),
    ):
        more = ("--json", "--no-compare", *more)
        found = json.loads(printed(capsys, run, *more, **changes).out)
        assert found["samples"][0]["tokens"] == want and found["speed"] is None
        depth = changes.get("depth", 2) if "--speculative" in more else 0
        assert len(found["acceptance"]) == depth


def test_what_drafts_gain_is_told(run, capsys, monkeypatch):
    """After the text, from the request without drafts, watched as the drafts were."""
    asked = []

    def compare(model, weights, prompts, report, **how):
        asked.append((prompts, how))
        return speed.Gain(step_s=0.002, plain_step_s=0.00123, speed_up=0.927)

    monkeypatch.setattr(speed, "compare", compare)
    out, errors = printed(capsys, run, "--speculative", temperature=0.5)
    assert out.startswith(PROMPT)
    assert errors.endswith("speed-up 0.93x (2 ms a step, 1.23 ms without drafts)\n")
    ((prompts, how),) = asked
    assert prompts == [[Bytes.bos_id, *PROMPT.encode()]]
    assert how["rule"].temperature == 0.5 and how["callback"](0, [1]) is None
    _, errors = printed(capsys, run, "--speculative", "--no-compare")
    assert "draft 2 accepted" in errors and "speed-up" not in errors


class Enough(Exception):
    """Ends a command where generation would begin."""


def test_positions_that_training_never_had_are_pointed_out(
    run, tmp_path, capsys, monkeypatch
):
    def told(checkpoint, longest):
        with pytest.raises(Enough):
            room = longest - len(PROMPT.encode()) - 1
            generate.main(words(checkpoint, **{"max-tokens": room}))
        return capsys.readouterr().err

    monkeypatch.setattr(engine, "generate", lambda *args, **how: raised(Enough))
    assert told(run, 64) == "compiling\n"
    warning, compiling = told(run, 65).splitlines()
    assert warning.startswith("warning: the model was trained on rows of 64 tokens ")
    assert "--max-tokens come to 65" in warning and compiling == "compiling"
    # A conversion doesn't say what its rows were.
    assert told(checkpoint(tmp_path / "other", 0, "import"), 65) == "compiling\n"


def raised(error):
    raise error


def test_a_prompt_from_a_file(run, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, "utf-8")
    changes = {"prompt": None, "prompt-file": file}
    found = json.loads(printed(capsys, run, "--json", **changes).out)
    assert found["samples"][0]["tokens"] == expected(run).tokens


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ((), {"depth": 2}, "--depth 2: needs --speculative"),
        (("--speculative",), {"depth": 3}, "depth = 3: must be from 0 to 2"),
        (("--speculative",), {"depth": 0}, "--depth 0: must be at least 1"),
        ((), {"max-tokens": 0}, "max_tokens = 0: must be at least 1"),
        ((), {"max-tokens": 5000}, "context is 4096; ask for at most 4086"),
        ((), {"prompt": ""}, "the prompt is empty"),
        ((), {"page": -1}, "page = -1: must be at least 0"),
        ((), {"n": 0}, "--n 0: must be at least 1"),
        ((), {"temperature": -1}, "temperature = -1.0"),
        ((), {"prompt": None, "prompt-file": "nowhere.txt"}, "there is no such file"),
        ((), {"prompt": None, "prompt-file": "/"}, "there is no such file"),
        ((), {"checkpoint": "nowhere"}, "nowhere"),
        ((), {"prompt": None}, "--prompt"),
        ((), {"topk": 3}, "--topk"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(
    run, more, changes, message, capsys, monkeypatch
):
    monkeypatch.setattr(engine, "prefill", pytest.fail)
    with pytest.raises(SystemExit) as stop:
        common.guarded(generate.main, words(run, *more, **changes))
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in errors and errors.count("\n") == 1, errors


def test_a_model_without_modules_or_a_checkpoint_without_tokenizer(
    run, tmp_path, capsys
):
    plain = checkpoint(tmp_path / "plain", depth=0)
    with pytest.raises(ValueError, match="the model has none"):
        generate.main(words(plain, "--speculative"))
    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        generate.main(words(bare))


def test_log_probs_are_the_models_own(run, capsys):
    """Whatever the temperature is."""
    row = expected(run)
    found = json.loads(printed(capsys, run, "--json", temperature=1e-3).out)
    sample = found["samples"][0]
    assert sample["tokens"] == row.tokens
    np.testing.assert_allclose(sample["log_probs"], row.log_probs, atol=1e-5)
    assert max(sample["log_probs"]) < 0
