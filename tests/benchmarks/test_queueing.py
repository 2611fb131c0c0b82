"""
The benchmark of a busy cache: those who wait do so until they should be served.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from queueing import EVENTS, Build, Cell, Scene


@pytest.mark.parametrize(
    ("mood", "skips"),
    [("patient", False), ("impatient", False), ("full", False), ("patient", True)],
)
def test_each_event_is_measured(mood: str, *, skips: bool) -> None:
    """
    Under its own conditions, which the benchmark asserts.
    """
    build = Build(0.001, skips=skips)
    found = build.measure(Cell(5, 20, alike=False, mood=mood))
    assert [*found] == ["hit", "release", "admission", "expiry", "check"]
    found |= build.measure(Cell(5, 20, alike=True, mood="drain"))
    assert {*found} == {*EVENTS}
    build.close()
    assert all(us > 0 and count >= 1 for us, count in found.values())


def test_a_drain_serves_all_who_wait() -> None:
    """
    Each by a load of its own in the room of the large model, if the budget lasts.
    """
    build = Build(60.0, skips=False)
    cell = Cell(5, 30, alike=False, mood="drain")
    _, served = build.measure(cell)["drain"]
    build.close()
    assert served == 30


def test_models_in_memory_stay_there_beside_those_who_wait() -> None:
    """
    Idle or not: to evict them all would not make room enough.
    """
    scene = Scene(5, "patient", max_waiting=None, skips=False)
    large = scene.lease("bench/large")
    waiters = scene.queue(10)
    assert len(scene.cache.models()) == 6
    large.release()
    assert scene.cache.models()
    scene.time_out()
    for waiter in waiters:
        # One may have had its model by then.
        if waiter.future.exception(timeout=60) is None:
            waiter.future.result()[0].release()
    scene.close()
