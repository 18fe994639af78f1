"""What the benchmark of generation makes of its measurements, and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import decode_cpu

ROOT = Path(__file__).resolve().parents[2]


def answer(prefill_s, decode_s, **changes):
    one = {
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "decoded": 64,
        "steps": 32,
        "draft_s": 0.0,
        "tokens_per_step": 1.0,
        "cache_bytes": 1280,
        "peak_rss_mb": 100,
        "tokens": [[1, 2], [3, 4]],
    }
    return one | changes


@pytest.fixture
def answers():
    other = [[1, 2], [3, 5]]
    return {
        "plain": [answer(1.0, 0.64), answer(2.0, 1.28), answer(1.0, 0.64)],
        "grouped_mm": [answer(2.0, 6.4), answer(8.0, 6.4), answer(3.0, 6.4)],
        "eager": [answer(9.0, 1.92, tokens=other) for _ in range(3)],
    }


def test_a_row_is_medians_and_the_ratio_to_the_faster_peer(answers):
    row = decode_cpu.summary(answers, "plain", batch=2, context=10)
    assert row["prefill_tokens_per_s"] == 20.0
    assert row["decode_tokens_per_s"] == 100.0
    assert row["step_ms"] == 20.0
    assert row["prefill_ratio"] == 3.0  # of 2, 4 and 3; the other peer's is 9
    assert row["decode_ratio"] == 3.0  # of 3, 1.5 and 3
    alone = decode_cpu.summary({"plain": answers["plain"]}, "plain", 2, 10)
    assert alone["prefill_ratio"] is None and alone["decode_ratio"] is None


def test_who_generates_what_plain_decoding_does(answers):
    assert decode_cpu.agreement(answers, "grouped_mm") == {"same": 2, "of": 2}
    assert decode_cpu.agreement(answers, "eager") == {"same": 1, "of": 2}


def test_targets_are_judged_by_plain_decoding(capsys):
    cases = [
        {
            "batch": batch,
            "context": context,
            "rows": {"plain": {"decode_ratio": 4.9 + batch / 8, "prefill_ratio": 1.3}},
        }
        for batch in decode_cpu.BATCHES
        for context in decode_cpu.CONTEXTS
    ]
    found = decode_cpu.judge(cases)
    held = {
        (each["what"], each["batch"], each["context"]): each["holds"] for each in found
    }
    assert held["decode", 1, 2048] and held["decode", 8, 2048]
    assert all(held["prefill", *case] for case in ((1, 128), (8, 2048)))
    cases[1]["rows"]["plain"]["decode_ratio"] = 4.99
    assert not decode_cpu.judge(cases)[0]["holds"]
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=0"], "--rounds=0: must be at least 1"),
        (["--cores=0"], "--cores=0: must be from 1 to "),
        (["--json=nowhere/x.json"], "there is no folder nowhere"),
        (["--checkpoint=nowhere"], "there is no such folder"),
    ],
)
def test_bad_flags_are_refused_at_once(arguments, message):
    done = subprocess.run(
        [sys.executable, "benchmarks/decode_cpu.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr
