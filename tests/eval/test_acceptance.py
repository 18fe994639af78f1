"""Acceptance by depth and domain, against counts made by hand and by brute force."""

import math

import jax
import numpy as np
import pytest

from deepseek_jax.decode import engine, speculative
from deepseek_jax.decode.sampling import sampling
from deepseek_jax.eval import acceptance, logits
from deepseek_jax.eval.acceptance import Ratio, ratio
from tests.decode import replica


def documents(count=6):
    """A domain that the replica has learnt, and random tokens of unequal lengths."""
    chain = replica.chain(count, 30, 5).tolist()
    noise = np.random.default_rng(0).integers(0, replica.VOCAB, (count, 19)).tolist()
    return {"chain": chain, "noise": [row[: 19 - i] for i, row in enumerate(noise)]}


def test_a_ratio_and_its_error():
    # Residues 1 - 2 r and 3 - 4 r, of r = 2/3, are -1/3 and 1/3.
    assert ratio([1, 3], [2, 4]) == pytest.approx(Ratio(2 / 3, 1 / 9, 6))
    rng = np.random.default_rng(1)
    chance_N = rng.beta(8, 4, 4000)
    whole_N = rng.integers(5, 50, 4000)
    part_N = rng.binomial(whole_N, chance_N)
    many = ratio(part_N, whole_N)
    # Values of many small samples scatter as the errors of each say.
    small = [ratio(part_N[i::100], whole_N[i::100]) for i in range(100)]
    scatter = np.std([one.value for one in small])
    assert 0.8 < scatter / np.mean([one.error for one in small]) < 1.25
    assert abs(many.value - 8 / 12) < 4 * many.error
    # Equal shares do not err; what was never looked at says nothing.
    assert ratio([1, 2, 0], [2, 4, 0]) == Ratio(0.5, 0.0, 6)
    assert math.isnan(ratio([3], [6]).error) and ratio([3], [6]).value == 0.5
    nothing = ratio([0, 0], [0, 0])
    assert math.isnan(nothing.value) and nothing.of == 0


@pytest.mark.parametrize(("depth", "temperature"), [(1, 0.0), (None, 0.8)])
def test_it_is_what_generation_counts(depth, temperature):
    model, weights, _ = replica.built()
    given = documents()
    report = acceptance.measure(
        model,
        weights,
        given,
        prompt_tokens=12,
        max_tokens=16,
        depth=depth,
        temperature=temperature,
        seed=5,
    )
    assert list(report.domains) == ["chain", "noise"]
    rows, seed = [], 5
    for domain, each in given.items():
        made = engine.generate(
            model,
            weights,
            [one[:12] for one in each],
            16,
            rule=sampling(len(each), temperature=temperature, seed=seed),
            depth=replica.DEPTH if depth is None else depth,
        ).rows
        seed += len(each)
        rows.append(made)
        found = report.domains[domain]
        assert found.prompts == len(each)
        shares = [one.value for one in found.accepted]
        assert shares == pytest.approx(speculative.acceptance(made), nan_ok=True)
        steps = sum(row.steps for row in made)
        assert found.accepted[0].of == found.tokens_per_step.of == steps
        assert found.tokens_per_step.value == 16 * len(each) / steps
        assert found.accepted[0].error > 0
    both = report.together
    assert both.prompts == len(rows[0] + rows[1])
    assert [one.value for one in both.accepted] == pytest.approx(
        speculative.acceptance(rows[0] + rows[1])
    )
    first = [one.accepted[0].value for one in report.domains.values()]
    assert report.mean[0] == pytest.approx(np.mean(first))
    assert report.spread[0] == pytest.approx(abs(first[0] - first[1]) / math.sqrt(2))


def test_stop_tokens_end_a_row():
    model, weights, _ = replica.built()
    given = {"chain": documents()["chain"]}
    options = {"prompt_tokens": 8, "max_tokens": 16, "depth": 1}
    free = acceptance.measure(model, weights, given, **options)
    every = range(replica.VOCAB)
    cut = acceptance.measure(model, weights, given, **options, stop=every)
    assert cut.together.tokens_per_step == (1.0, 0.0, 6)
    assert free.together.tokens_per_step.of > 6
    assert math.isnan(free.spread[0])  # one domain


BAD = {
    "long": ({"prompt_tokens": 20}, "'noise' has as many, the longest has 19"),
    "none": ({"prompt_tokens": 0}, "prompt_tokens = 0"),
    "depth": ({"depth": 4}, "depth = 4: must be from 0 to 3"),
    "no drafts": ({"depth": 0}, "depth = 0: must be at least 1"),
    "tokens": ({"max_tokens": 0}, "max_tokens = 0"),
    "context": ({"context": 20}, "the model's context is 20"),
    "temperature": ({"temperature": -1.0}, "temperature = -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_work(case, monkeypatch):
    model, weights, _ = replica.built()
    monkeypatch.setattr(engine, "generate", None)
    changes, message = BAD[case]
    options = {"prompt_tokens": 12, "max_tokens": 16} | changes
    with pytest.raises(ValueError) as error:
        acceptance.measure(model, weights, documents(), **options)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="there are none"):
        acceptance.measure(model, weights, {}, prompt_tokens=1, max_tokens=1)
    with pytest.raises(ValueError, match=r"domain 'a' has as many$"):
        acceptance.beginnings({"a": []}, 5)


def test_agreement_is_that_of_each_position_by_itself():
    """Against one forward pass a document, which is not padded."""
    with jax.enable_x64(True):
        model, _, (params, balance) = replica.built(f64=True)
        given = documents(count=2)
        found = acceptance.agreement(model, params, balance, given, length=18)
        for domain, each in given.items():
            same, looked = np.zeros(3, int), np.zeros(3, int)
            for one in each:
                tokens_1L = np.array([one[:18]], np.int32)
                main, mtp = logits.compute(model, params, balance, tokens_1L, mtp=True)
                for k in (1, 2, 3):
                    for i in range(tokens_1L.size - k):
                        best = mtp[k - 1, 0, i].argmax(), main[0, i + k].argmax()
                        same[k - 1] += best[0] == best[1]
                        looked[k - 1] += 1
            assert [one.of for one in found[domain]] == looked.tolist()
            assert [one.value for one in found[domain]] == pytest.approx(same / looked)
    assert found["chain"][0].value > 0.3  # it has learnt something


def test_agreement_needs_modules_and_known_tokens():
    model, _, (params, balance) = replica.built()
    with pytest.raises(ValueError, match="vocab_size is 61"):
        acceptance.agreement(model, params, balance, {"a": [[1, 61]]})
    with pytest.raises(ValueError, match=r"shape \[0, 0\]"):
        acceptance.agreement(model, params, balance, {"a": []})
