"""
The registry of requests: phases, seconds, bounds; on a clock that the test turns.
"""

from __future__ import annotations

import pytest

from whispercache.server.requests import listed
from whispercache.server.seen import LATELY, MOST_LISTED, RequestsSeen
from whispercache.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    """
    A clock that stands still until it is ticked.
    """
    return FakeClock()


@pytest.fixture
def seen(clock: FakeClock) -> RequestsSeen:
    """
    A registry whose day began at 1000 s.
    """
    return RequestsSeen(clock.now, lambda: 1000 + clock.now())


def test_seconds_are_those_of_each_phase(clock: FakeClock, seen: RequestsSeen) -> None:
    """
    Also of one that comes twice, and of the one that has not ended.
    """
    request = seen.begin("r1", "POST")
    request.admit("anna")
    for phase, spent_s in (
        ("decoding", 1.0),
        ("waiting", 2.0),
        ("loading", 3.0),
        ("waiting", 4.0),
        ("working", 5.0),
    ):
        request.enter(phase)  # type: ignore[arg-type]
        clock.tick(spent_s)
    (info,) = listed(seen).under_way
    assert (info.id, info.who, info.phase) == ("r1", "anna", "working")
    spent = info.seconds
    assert (spent.decoding, spent.waiting, spent.loading, spent.working) == (1, 6, 3, 5)
    assert spent.total == 15
    assert not listed(seen).lately


def test_a_load_concerns_those_who_wait(clock: FakeClock, seen: RequestsSeen) -> None:
    """
    And nobody who is at work, or over, whatever thread tells it, and when.
    """
    waits, works = seen.begin("a", "POST"), seen.begin("b", "POST")
    waits.enter("waiting")
    works.enter("working")
    for request in (waits, works):
        request.told("loading")
    clock.tick(2)
    waits.told("working")
    for request in (waits, works):
        # Late.
        request.told("waiting")
        request.end()
        request.told("loading")
        request.enter("working")
        assert request.is_over
    assert waits.seconds()["loading"] == 2
    assert "loading" not in works.seconds()


@pytest.mark.parametrize(
    ("status", "error", "outcome"),
    [
        (200, None, "answered"),
        (204, None, "answered"),
        # In mid-stream.
        (200, "model_busy", "failed"),
        (400, "invalid_value", "refused"),
        (429, "too_many_requests", "refused"),
        (499, None, "left"),
        (503, "model_busy", "failed"),
        (None, None, "left"),
    ],
)
def test_the_outcome_follows_from_the_status(
    seen: RequestsSeen, status: int | None, error: str | None, outcome: str
) -> None:
    """
    Unless somebody knows better.
    """
    request = seen.begin("r", "POST")
    request.status, request.error = status, error
    request.end()
    assert request.outcome == outcome
    other = seen.begin("o", "POST")
    other.status = status
    other.end("left")
    other.end("failed")
    assert other.outcome == "left"


def test_what_is_over_is_remembered_for_a_while(seen: RequestsSeen) -> None:
    """
    The newest first, and no more than a number; who was not let in is not among them.
    """
    for n in range(LATELY + 50):
        request = seen.begin(str(n), "POST")
        if n % 2:
            request.admit()
        request.end()
        # Too late to be listed.
        request.admit()
    names = [each.id for each in listed(seen).lately]
    assert names[:2] == [str(LATELY + 49), str(LATELY + 47)]
    assert not [name for name in names if int(name) % 2 == 0]
    for n in range(LATELY + 5):
        request = seen.begin(f"more {n}", "POST")
        request.admit()
        request.end()
    assert len(listed(seen).lately) == LATELY
    assert not listed(seen).under_way


def test_no_more_than_a_number_are_listed(seen: RequestsSeen) -> None:
    """
    The oldest, and how many there are besides.
    """
    for n in range(MOST_LISTED + 3):
        seen.begin(str(n), "POST").admit()
    found = listed(seen)
    assert len(found.under_way) == MOST_LISTED
    assert found.under_way[0].id == "0"
    assert found.left_out == 3
