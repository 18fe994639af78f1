"""Summaries and spreads against independent sums, and scipy's t-test."""

import json

import numpy as np
import pytest
from scipy import stats

from deepseek_jax.analysis import runs, seeds
from tests.analysis import synthetic

CONTRACT = [
    "name",
    "overrides",
    "strategy",
    "seed",
    "steps",
    "eval_ce",
    "maxvio_global",
    "maxvio_batch",
    "dead_experts",
    "tokens_per_s",
    "status",
]


def lines(path):
    return [*map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]


def test_a_summary_holds_the_contract_and_the_final_numbers(tmp_path):
    path = synthetic.write_run(tmp_path / "a", synthetic.config("v3", seed=1, steps=40))
    row = seeds.summarize(runs.read_run(path))
    train = [r for r in lines(path) if "loss" in r]
    final = [r for r in lines(path) if "eval_ce" in r][-1]
    assert list(row) == CONTRACT
    assert row["eval_ce"] == final["eval_ce"]
    assert row["maxvio_global"] == final["eval_maxvio_global"]
    late = [r["maxvio_batch"] for r in train if r["step"] in (37, 38, 39, 40)]
    assert row["maxvio_batch"] == pytest.approx(sum(late) / 4)
    assert row["dead_experts"] == sum(final["eval_dead_experts"][:3])
    assert (row["strategy"], row["seed"], row["steps"]) == ("v3", 1, 40)
    assert row["tokens_per_s"] == np.median([r["tokens_per_s"] for r in train[1:]])


def test_dead_experts_are_counted_in_the_main_model_only(tmp_path):
    path = synthetic.write_run(tmp_path / "a", synthetic.config())
    records = lines(path)
    records[-1]["eval_dead_experts"] = [1, 0, 2, 9]
    text = "\n".join(map(json.dumps, records)) + "\n"
    (path / "metrics.jsonl").write_text(text)
    assert seeds.summarize(runs.read_run(path))["dead_experts"] == 3


def test_what_is_not_known_yet_is_null(tmp_path):
    path = synthetic.write_run(tmp_path / "a", synthetic.config(steps=40), steps=39)
    row = seeds.summarize(runs.read_run(path))
    assert row["steps"] == 39
    assert row["tokens_per_s"] > 0
    unknown = ("eval_ce", "maxvio_global", "maxvio_batch", "dead_experts")
    assert all(row[name] is None for name in unknown)
    nothing = seeds.summarize(runs.read_run(tmp_path / "b"))
    assert (nothing["steps"], nothing["tokens_per_s"]) == (None, None)
    json.dumps([row, nothing], allow_nan=False)


def test_spread():
    spread = seeds.spread([(0, 1.0), (1, None), (2, 4.0)])
    assert (spread.n, spread.mean) == (2, 2.5)
    assert spread.std == pytest.approx(np.std([1.0, 4.0], ddof=1))
    assert seeds.spread([(0, 1.0)]).std is None
    assert seeds.spread([(0, None)]) is None


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 11])
def test_differ_is_the_paired_t_test(n):
    rng = np.random.default_rng(n)
    decided = set()
    for shift in np.linspace(0, 4, 40):
        a, noise = rng.normal(size=n), rng.normal(size=n)
        b = a + shift + 0.5 * noise
        expected = stats.ttest_rel(a, b).pvalue < 0.05
        found = seeds.differ(
            seeds.Spread(dict(enumerate(a))), seeds.Spread(dict(enumerate(b)))
        )
        assert found == expected
        decided.add(found)
    assert decided == {True, False}


def test_one_seed_or_other_seeds_tell_nothing_apart():
    one, far = seeds.Spread({0: 1.0}), seeds.Spread({0: 9.0, 1: 9.1, 2: 9.2})
    assert not seeds.differ(one, far)
    assert not seeds.differ(seeds.Spread({5: 1.0, 6: 1.1, 7: 1.0}), far)


def test_average_is_numpys_where_runs_agree_on_steps():
    rng = np.random.default_rng(0)
    steps, values = np.arange(1, 8), rng.normal(size=(3, 7))
    x, mean, std = seeds.average([(steps, row) for row in values])
    np.testing.assert_array_equal(x, steps)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(std, values.std(0, ddof=1))


def test_average_in_windows():
    rng = np.random.default_rng(0)
    steps, values = np.arange(1, 101), rng.normal(size=(4, 100))
    x, mean, std = seeds.average([(steps, row) for row in values], points=10)
    windows = values.reshape(4, 10, 10).mean(-1)
    np.testing.assert_allclose(x, steps.reshape(10, 10).mean(-1))
    np.testing.assert_allclose(mean, windows.mean(0))
    np.testing.assert_allclose(std, windows.std(0, ddof=1))


def test_a_run_that_stopped_early_counts_as_far_as_it_came():
    long, short = np.arange(1, 5), np.arange(1, 3)
    curves = [(long, np.ones(4)), (short, np.full(2, 3.0)), (short[:0], short[:0])]
    _, mean, std = seeds.average(curves)
    np.testing.assert_array_equal(mean, [2, 2, 1, 1])
    np.testing.assert_allclose(std, [2**0.5, 2**0.5, np.nan, np.nan])


def test_average_of_nothing_is_empty():
    assert [len(part) for part in seeds.average([])] == [0, 0, 0]


def test_a_list_by_router_is_averaged_over_the_main_model(tmp_path):
    run = runs.read_run(synthetic.write_run(tmp_path / "a", synthetic.config()))
    steps, values = seeds.curve(run, "maxvio_layers")
    np.testing.assert_allclose(values, run.series("maxvio_batch")[1])
    assert len(steps) == 40


def test_difference_is_taken_at_shared_steps(tmp_path):
    long = runs.read_run(synthetic.write_run(tmp_path / "a", synthetic.config("none")))
    path = synthetic.write_run(tmp_path / "b", synthetic.config("v3"), steps=12)
    short = runs.read_run(path)
    steps, gap = seeds.difference(short, long, "ce")
    assert steps.tolist() == list(range(1, 13))
    np.testing.assert_allclose(gap, short.series("ce")[1] - long.series("ce")[1][:12])


def test_specialisation_index_at_its_ends():
    alike = {"code": [[3, 1], [2, 2]], "speech": [[6, 2], [1, 1]]}
    apart = {"code": [[4, 0], [0, 2]], "speech": [[0, 9], [5, 0]]}
    for loads, expected in ((alike, 0.0), (apart, 0.5)):
        record = {"eval_load_by_domain": loads}
        assert seeds.specialisation_index(record, 2) == pytest.approx(expected)
    record = {"eval_load_by_domain": {"code": [[4, 0], [0, 2]]}}
    assert seeds.specialisation_index(record, 2) is None
    assert seeds.specialisation_index({}, 2) is None


def test_specialisation_index_ignores_mtp_and_domains_without_tokens():
    loads = {"a": [[1, 1], [9, 0]], "b": [[2, 2], [0, 9]], "c": [[0, 0], [0, 0]]}
    assert seeds.specialisation_index({"eval_load_by_domain": loads}, 1) == 0.0
