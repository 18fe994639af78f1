"""Speculation is lossless: greedy output is the same, samples have the distribution."""

import collections
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.convert.hf_import import import_hf
from deepseek_jax.decode import engine, forward, speculative
from deepseek_jax.decode import sampling as rules
from deepseek_jax.decode.sampling import sampling
from deepseek_jax.eval import logits
from tests.decode import replica
from tests.factory import as_f64

FIXTURES = Path(__file__).resolve().parents[1] / "parity" / "fixtures"


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
        report = engine.generate(model, weights, prompts(200), 24, dtype=jnp.float64)
        return tokens(report)


@pytest.mark.parametrize(
    ("depth", "page"),
    [
        pytest.param(1, 0, marks=pytest.mark.slow),
        (2, 8),
        pytest.param(3, 0, marks=pytest.mark.slow),
    ],
)
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
    for row in report.rows:  # a step gives what it accepted and, below the limit, one
        assert len(row.tokens) == 24 <= row.steps + sum(row.accepted) <= 25


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


@pytest.mark.parametrize("input_norm", [True, False])
def test_drafts_are_what_the_modules_predict(input_norm):
    """After any number of acceptances, from the shortest prompts on, in float64."""
    with jax.enable_x64(True):
        model, weights, (params, balance) = replica.built(f64=True)
        mtp = dataclasses.replace(model.config.mtp, input_norm=input_norm)
        model = model.clone(config=dataclasses.replace(model.config, mtp=mtp))
        rows = [
            row[:n] for row, n in zip(replica.chain(6, 40, 3), (2, 3, 4, 7, 20, 40))
        ]
        rows = [row.tolist() for row in rows]
        rule = sampling(6, temperature=1.0)
        state = engine.prefill(
            model, weights, rows, 30, depth=3, dtype=jnp.float64, chunk=16
        )
        limit = state.length_B + 30
        draft = jax.jit(speculative.draft, static_argnums=0)
        step = jax.jit(speculative.step, static_argnums=0)
        whole = jax.jit(lambda *args: model.apply({"params": params}, *args).mtp_JBLD)
        positions = jnp.arange(64)[None]  # one shape; what follows a token is not seen
        advances = set()
        for _ in range(5):
            _, drafts = draft(model, weights, state, rule)
            for row, n in enumerate(np.asarray(state.length_B)):
                known = np.asarray(state.tokens_BS[row, :n])
                every = np.append(known, drafts.tokens_BJ[row])
                every = np.pad(every, (0, 64 + 3 - len(every)))[None]
                hidden = whole(jnp.asarray(every), positions, balance)
                for k in range(3):
                    want = jax.nn.log_softmax(hidden[k][0, n - 2] @ params["head"])
                    got = jax.nn.log_softmax(drafts.logits_BJV[row, k])
                    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
            after = step(model, weights, state, rule, limit, jnp.asarray([-1]))
            advances |= set(np.asarray(after.length_B - state.length_B).tolist())
            state = after
        assert len(advances) >= 3


def test_the_repetition_penalty_knows_the_drafts():
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        rule, options = sampling(40, repetition=1.7), {"dtype": jnp.float64}
        asked = prompts(40)
        plain = engine.generate(model, weights, asked, 24, rule=rule, **options)
        fast = engine.generate(model, weights, asked, 24, rule=rule, depth=2, **options)
        free = engine.generate(model, weights, asked, 24, depth=2, **options)
    assert tokens(fast) == tokens(plain) != tokens(free)


def test_a_converted_checkpoint_drafts(tmp_path):
    """DeepSeek's files with an MTP layer after the last one, as V3's layer 61."""
    import_hf(FIXTURES / "v3_mtp", tmp_path / "run")
    config, params, balance, _ = deepseek_jax.load(tmp_path / "run")
    with jax.enable_x64(True):
        model = logits.build(config)
        params, balance = as_f64((params, balance))
        weights = forward.split(model, params, balance)
        asked = [[1, 5, 9], [2] * 7]
        greedy = [
            engine.generate(model, weights, asked, 12, depth=depth, dtype=jnp.float64)
            for depth in (0, 1)
        ]
    assert tokens(greedy[0]) == tokens(greedy[1])


def first_differences(a, b):
    for row, (one, other) in enumerate(zip(a, b, strict=True)):
        unequal = [i for i, pair in enumerate(zip(one, other)) if len(set(pair)) > 1]
        if unequal:
            yield row, unequal[0]


def test_in_float32_only_near_ties_may_differ():
    model, weights, (params, balance) = replica.built()
    asked = prompts(60)
    plain = tokens(engine.generate(model, weights, asked, 24))
    fast = tokens(engine.generate(model, weights, asked, 24, depth=2))
    found = list(first_differences(plain, fast))
    for row, at in found:
        sequence = jnp.asarray([asked[row] + plain[row][:at]], jnp.int32)
        position = jnp.arange(sequence.shape[1])[None]
        out = model.apply({"params": params}, sequence, position, balance)
        last = np.sort(np.asarray(out.hidden_BLD[0, -1] @ params["head"]))
        assert last[-1] - last[-2] <= 1e-4 * np.abs(last).max()
    print(f"{len(found)} of 60 prompts differ, at near ties")


def pairs(rule_seed, depth):
    """Counts of the second and third token of many samples of one prompt."""
    model, weights, _ = replica.built()
    found = collections.Counter()
    for first in range(0, 1000, 250):
        rule = sampling(250, temperature=0.9, top_k=8, seed=rule_seed + first)
        asked = [[5, 16]] * 250
        report = engine.generate(model, weights, asked, 3, rule=rule, depth=depth)
        found.update(tuple(row.tokens[1:]) for row in report.rows)
    return found


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


def test_drafts_past_the_output_count_nowhere():
    """Counters at a limit or a stop token, against those of single steps without."""
    depth, most = 3, 18
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        asked, options = prompts(30), {"depth": depth, "dtype": jnp.float64}
        state = engine.prefill(model, weights, asked, 40, **options)
        limit = state.length_B + 40
        given = (sampling(30), limit, jnp.full(4, -1), jnp.int32(1))
        taken = []  # where a step starts, how many tokens it has, of each row
        for _ in range(most):
            start = np.asarray(state.length_B)
            state = engine.advance(model, weights, state, *given)
            taken.append(np.stack([start, np.asarray(state.length_B) - start], 1))
        tokens = np.asarray(state.tokens_BS)
        for stop in ((), (int(np.bincount(tokens.ravel()).argmax()),)):
            made = engine.generate(model, weights, asked, most, stop=stop, **options)
            for row, (one, prompt) in enumerate(zip(made.rows, asked, strict=True)):
                end = len(prompt) + len(one.tokens)
                judged, accepted = [0] * depth, [0] * depth
                for start, count in (each[row] for each in taken):
                    for k in range(depth):
                        there = k < count and start + k < end
                        judged[k] += there
                        accepted[k] += there and k + 1 < count
                assert (one.judged, one.accepted) == (judged, accepted)
                assert one.judged[0] == one.steps


def test_acceptance_is_of_the_times_at_which_a_draft_was_judged():
    made = [
        engine.Generation([], [], False, 10, [10, 5], [5, 4]),
        engine.Generation([], [], False, 10, [10, 3], [3, 0]),
    ]
    assert speculative.acceptance(made) == [0.4, 0.5]
    assert speculative.acceptance([engine.Generation([], [], False, 9, [], [])]) == []
