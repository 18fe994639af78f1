"""Compiled for 64 H100s: each direction's exchanges under the other one's products.

Skipped without NVIDIA's compiler, as `tests.parallel.test_aot`; minutes with it.
"""

import pytest

from benchmarks import aot_h100, aot_pipeline

ROUTES = {
    f"{way} {route}" for way in aot_pipeline.WAYS for route in ("dispatch", "combine")
}


def found(schedule: str) -> aot_pipeline.Found:
    return aot_pipeline.measure(aot_pipeline.config(schedule, 16, 1024))


@pytest.fixture(scope="module")
def dualpipe(h100s):
    return found("dualpipe")


def test_of_the_exchanges_of_tokens_three_quarters_run_under_the_other_way(dualpipe):
    routed = [row for row in dualpipe.steady if row.what in ROUTES]
    assert {row.what for row in routed} == ROUTES
    assert sum(row.other > 0 for row in routed) >= 3 / 4 * len(routed)


def test_every_send_runs_under_the_other_way(dualpipe):
    sends = [row for row in dualpipe.steady if row.what in aot_pipeline.SENDS]
    assert sends and all(row.other > 0 for row in sends)


def test_no_ring_is_copied_and_memory_leaves_room_for_overlap(dualpipe):
    assert not dualpipe.copies
    assert dualpipe.gib["total"] < 0.6 * aot_h100.DEVICE_GIB


def test_a_schedule_without_pairs_is_reported_exposed(h100s):
    rows = found("1f1b").steady
    assert any(row.what in aot_pipeline.SENDS for row in rows)
    assert not any(row.other for row in rows)
