"""Speculation is lossless: greedy output is the same, samples have the distribution."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.decode import engine, speculative
from deepseek_jax.decode import sampling as rules
from deepseek_jax.decode.sampling import sampling
from tests.decode import replica


def prompts(count, seed=7):
    lengths = np.random.default_rng(seed).integers(1, 20, count)
    rows = replica.chain(count, 20, seed)
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def tokens(report):
    return [row.tokens for row in report.rows]


@pytest.fixture(scope="module")
def greedy():
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        return tokens(engine.generate(model, weights, prompts(200), 24))


@pytest.mark.parametrize(("depth", "page"), [(1, 0), (2, 8), (3, 0)])
def test_speculative_greedy_is_greedy_on_200_prompts(greedy, depth, page):
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        report = engine.generate(
            model, weights, prompts(200), 24, depth=depth, page=page, dtype=jnp.float64
        )
    assert tokens(report) == greedy
    steps = sum(row.steps for row in report.rows)
    accepted = np.sum([row.accepted for row in report.rows], 0)
    assert steps < 0.9 * 200 * 24  # drafts are accepted
    assert (np.diff([steps, *accepted]) < 0).all() and accepted[-1] > 0
    for row in report.rows:  # each step gives one token and what was accepted
        made = row.steps + sum(row.accepted)
        assert len(row.tokens) == 24 <= made <= 24 + depth


def test_drafts_see_the_past(greedy):
    """An early window, later chunks and pages give the same drafts as one prefill."""
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        rows = [row.tolist() for row in replica.chain(3, 60, 5)]
        options = [{}, {"chunk": 16}, {"page": 16}]
        reports = [
            engine.generate(
                model, weights, rows, 20, depth=3, dtype=jnp.float64, **option
            )
            for option in options
        ]
    assert tokens(reports[0]) == tokens(reports[1]) == tokens(reports[2])
    counts = [[(row.steps, row.accepted) for row in each.rows] for each in reports]
    assert counts[0] == counts[1] == counts[2]


def first_differences(a, b):
    for row, (one, other) in enumerate(zip(a, b, strict=True)):
        unequal = [i for i, pair in enumerate(zip(one, other)) if len(set(pair)) > 1]
        if unequal:
            yield row, unequal[0]


def test_in_float32_only_near_ties_may_differ():
    model, weights, (params, balance) = replica.built()
    asked = prompts(200)
    plain = tokens(engine.generate(model, weights, asked, 24))
    fast = tokens(engine.generate(model, weights, asked, 24, depth=2))
    found = list(first_differences(plain, fast))
    for row, at in found:
        sequence = jnp.asarray([asked[row] + plain[row][:at]], jnp.int32)
        position = jnp.arange(sequence.shape[1])[None]
        out = model.apply({"params": params}, sequence, position, balance)
        last = np.sort(np.asarray(out.hidden_BLD[0, -1] @ params["head"]))
        assert last[-1] - last[-2] <= 1e-4 * np.abs(last).max()
    print(f"{len(found)} of 200 prompts differ, at near ties")


def pairs(rule_seed, depth):
    """Counts of the second and third token of many samples of one prompt."""
    model, weights, _ = replica.built()
    count = 4000
    rule = sampling(count, temperature=0.9, top_k=8, seed=rule_seed)
    report = engine.generate(
        model, weights, [[5, 16]] * count, 3, rule=rule, depth=depth
    )
    return collections.Counter(tuple(row.tokens[1:]) for row in report.rows)


def chi_square(a, b):
    """Two-sample statistic over the cells that are not rare, and its 1e-6 quantile."""
    cells = [key for key in a.keys() | b.keys() if a[key] + b[key] >= 20]
    one = np.array([a[key] for key in cells], float)
    other = np.array([b[key] for key in cells], float)
    value = ((one - other) ** 2 / (one + other)).sum()
    freedom = len(cells)
    # Wilson and Hilferty's approximation of the quantile, at 4.75 standard deviations.
    third = 2 / (9 * freedom)
    return value, freedom * (1 - third + 4.75 * third**0.5) ** 3


def test_speculative_samples_have_the_distribution(monkeypatch):
    plain = pairs(0, depth=0)
    value, bound = chi_square(plain, pairs(100_000, depth=2))
    assert value < bound
    jax.clear_caches()
    monkeypatch.setattr(rules, "accept", lambda p, q, draft, keys: draft >= 0)
    value, bound = chi_square(plain, pairs(100_000, depth=2))
    jax.clear_caches()
    assert value > bound


def test_a_row_does_not_depend_on_its_batch():
    """Its random numbers come from its seed and position, also when it speculates."""
    model, weights, _ = replica.built()
    rows = prompts(6)
    for depth in (0, 2):
        seeds = list(range(10, 16))
        rule = sampling(6, temperature=1.0, seed=seeds)
        together = engine.generate(model, weights, rows, 12, rule=rule, depth=depth)
        for row in (1, 4):
            rule = sampling(1, temperature=1.0, seed=seeds[row])
            alone = engine.generate(
                model, weights, [rows[row]], 12, rule=rule, depth=depth
            )
            assert alone.rows[0].tokens == together.rows[row].tokens


@pytest.mark.parametrize("depth", [0, 3])
def test_stop_tokens_limits_and_log_probs(depth):
    model, weights, (params, balance) = replica.built()
    rows = prompts(20)
    free = engine.generate(model, weights, rows, 16, depth=depth)
    stop = collections.Counter(t for row in free.rows for t in row.tokens)
    stop = [token for token, _ in stop.most_common(3)]
    cut = engine.generate(model, weights, rows, 16, depth=depth, stop=stop)
    assert {row.stopped for row in cut.rows} == {True, False}
    for before, after in zip(free.rows, cut.rows, strict=True):
        ends = [i for i, token in enumerate(before.tokens) if token in stop]
        end = ends[0] + 1 if ends else 16
        assert (after.tokens, after.stopped) == (before.tokens[:end], bool(ends))
        np.testing.assert_allclose(
            after.log_probs, before.log_probs[:end], rtol=0, atol=1e-5
        )
    sequence = jnp.asarray([rows[0] + free.rows[0].tokens], jnp.int32)
    out = model.apply(
        {"params": params}, sequence, jnp.arange(sequence.shape[1])[None], balance
    )
    log_p = jax.nn.log_softmax(out.hidden_BLD[0] @ params["head"])
    first = len(rows[0])
    wanted = [
        log_p[first + i - 1, token] for i, token in enumerate(free.rows[0].tokens)
    ]
    np.testing.assert_allclose(free.rows[0].log_probs, wanted, rtol=0, atol=1e-4)


def test_acceptance_is_of_the_steps_at_which_a_draft_was_looked_at():
    made = [
        engine.Generation([], [], False, 10, [5, 4]),
        engine.Generation([], [], False, 10, [3, 0]),
    ]
    assert speculative.acceptance(made) == [0.4, 0.5]
    assert speculative.acceptance([engine.Generation([], [], False, 9, [])]) == []
