"""What drafts gain: the arithmetic, and that like is compared with like."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.decode import engine, speed
from deepseek_jax.decode.sampling import sampling
from tests.decode import replica


def report(decode_s, *rows):
    """Of rows that are a number of tokens and of steps each."""
    rows = [
        engine.Generation([7] * tokens, [], False, steps, [], [])
        for tokens, steps in rows
    ]
    return engine.Report(rows, 1.0, 2.0, decode_s, 0)


def test_gain_is_the_time_that_plain_steps_would_have_taken():
    plain = report(4.0, (40, 40), (40, 40))  # 0.1 s a step
    # All rows are done after 60 steps; plainly it would have been 90, in 9 s.
    found = speed.gain(report(6.0, (90, 50), (80, 60)), plain)
    assert found == pytest.approx(speed.Gain(0.1, 0.1, 1.5))
    assert speed.gain(report(18.0, (90, 90)), plain).speed_up == pytest.approx(0.5)
    # Against itself plain decoding gains nothing.
    assert speed.gain(plain, plain).speed_up == 1


def test_middles_are_the_texts_before_the_middle_of_the_output():
    rows = [
        engine.Generation([*range(count)], [], False, 1, [], []) for count in (1, 9, 4)
    ]
    assert speed.middles([[50], [60, 61], [70]], rows, 4) == [
        [50],
        [60, 61, 0, 1],
        [70],
    ]


@pytest.mark.parametrize("most", [12, 200])
def test_plain_steps_make_the_same_text_again(most, monkeypatch):
    """Its middle, in float64, and watched as it was."""
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        prompts = [row[:5].tolist() for row in replica.chain(2, 5, 3)]
        how = {"rule": sampling(2), "dtype": jnp.float64, "page": 16}
        fast = engine.generate(model, weights, prompts, most, depth=1, **how)
        made, heard, generate = [], [], engine.generate

        def kept(*args, **options):
            made.append(generate(*args, **options))
            return made[-1]

        monkeypatch.setattr(engine, "generate", kept)
        how["callback"] = lambda row, tokens: heard.extend(tokens)
        found = speed.compare(model, weights, prompts, fast, **how)
    (plain,) = made
    size = min(most, speed.STEPS)
    start = (most - size) // 2
    for one, other in zip(plain.rows, fast.rows, strict=True):
        assert one.tokens == other.tokens[start : start + size] and not one.judged
    assert len(heard) == 2 * size
    assert found == speed.gain(fast, plain) and found.speed_up > 0
