"""
The replica for a request: where it begins soonest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whispercache.planning.routing import LOAD_S, Replica, order

GIB = 2**30
SIZES = {"large": 3 * GIB, "medium": 2 * GIB, "small": GIB}
LOADS_S = {"large": 3.0, "medium": 2.0, "small": 1.0}


def replica(name: str, *resident: str, **more: object) -> Replica:
    """
    A replica with a card of 4 GiB, where calls take a second.
    """
    made = Replica(
        name,
        {"cuda:0": 4 * GIB},
        resident=dict.fromkeys(resident, "cuda:0"),
        sizes=SIZES,
        load_s=LOADS_S,
        call_s=1.0,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def first(model: str, *replicas: Replica) -> str:
    """
    The name of the replica that gets a request.
    """
    return order(model, replicas)[0].name


def test_a_request_goes_where_its_model_is() -> None:
    """
    Not where there is more room.
    """
    assert first("small", replica("a"), replica("b", "small", "medium")) == "b"


def test_a_queue_that_is_longer_than_a_load_is_left() -> None:
    """
    A load of one second counts as three.
    """
    busy = replica("busy", "small", queue=3)
    # As long: then where there is more room.
    assert first("small", replica("free"), busy) == "free"
    assert first("small", replica("free"), replace(busy, queue=2)) == "busy"
    assert first("small", replica("free"), replace(busy, queue=4)) == "free"
    # Where two compute at once, twice as many are as long.
    assert first("small", replica("free"), replace(busy, queue=4, parallel=2)) == "busy"


def test_what_must_leave_is_counted() -> None:
    """
    It will be wanted again.
    """
    full = replica("full", "large", "small")
    assert first("medium", full, replica("free", "small")) == "free"
    # One request waits less than two models are loaded again.
    assert first("medium", full, replica("free", "small", queue=1)) == "free"
    assert full.wait_s("medium", 1) == LOADS_S["medium"] + LOADS_S["large"]


def test_only_what_must_leave_is_counted() -> None:
    """
    A small one that left for nothing stays after all.
    """
    odd = {"small": 0.1, "medium": 2.0, "large": 9.0}
    there = replica("a", "small", "large", load_s=odd)
    assert there.wait_s("medium", 1) == 2.0 + 9.0
    # Nothing leaves another card.
    two = replica(
        "two",
        capacity_bytes={"cuda:0": 4 * GIB, "cuda:1": 2 * GIB},
        resident={"large": "cuda:0", "small": "cuda:0"},
    )
    assert two.wait_s("medium", 1) == LOADS_S["medium"]
    assert two.room_bytes == 2 * GIB


def test_what_never_fits_comes_last() -> None:
    """
    Too small a card, and one that is full of pinned models.
    """
    pinned = replica("pinned", "medium", "small", pinned=frozenset({"medium"}))
    small = replica("small", capacity_bytes={"cuda:0": 2 * GIB})
    for never in (pinned, small):
        assert never.wait_s("large") == math.inf
        assert first("large", never, replica("full", "large", queue=99)) == "full"
        # It still gets the request if there is no other: its refusal says more.
        assert first("large", never) == never.name


def test_of_equal_ones_the_emptier_and_then_the_same_again() -> None:
    """
    Different models are spread over equal replicas.
    """
    assert first("small", replica("a", "medium"), replica("b")) == "b"
    equal = [replica(name) for name in "abc"]
    spread = {model: first(model, *equal) for model in map(str, range(40))}
    assert set(spread.values()) == {"a", "b", "c"}
    # When one leaves, only its models move.
    for model, was in spread.items():
        if was != "c":
            assert first(model, *equal[:2]) == was


def test_what_is_not_known_is_taken_as_usual() -> None:
    """
    A replica that has said nothing yet.
    """
    silent = Replica("silent", {"cpu": GIB})
    assert silent.wait_s("small", 2) == 2 * LOAD_S
    assert first("small", silent, replica("there", "small")) == "there"


names = st.sampled_from(["large", "medium", "small", "new"])
replicas = st.builds(
    replica,
    st.text(max_size=3),
    capacity_bytes=st.fixed_dictionaries(
        {"cuda:0": st.integers(0, 8 * GIB)},
        optional={"cuda:1": st.integers(0, 8 * GIB)},
    ),
    resident=st.dictionaries(names, st.sampled_from(["cuda:0", "cuda:1"])),
    pinned=st.frozensets(names),
    call_s=st.floats(0, 10),
    parallel=st.integers(1, 4),
    queue=st.integers(0, 20),
)


@given(names, st.lists(replicas, max_size=6, unique_by=lambda each: each.name))
def test_all_are_named_once_and_in_an_order_of_their_own(
    model: str, known: list[Replica]
) -> None:
    """
    Whatever order they came in; none passes another one because a third is there.
    """
    found = list(order(model, known))
    assert sorted(map(id, found)) == sorted(map(id, known))
    assert order(model, known[::-1]) == found
    for each in known:
        others = [other for other in known if other is not each]
        assert order(model, others) == [other for other in found if other is not each]


@pytest.mark.parametrize("reluctance", [1, 3])
@given(names, replicas)
def test_a_replica_that_has_the_model_is_before_its_like_without(
    reluctance: float, model: str, known: Replica
) -> None:
    """
    And no wait is less than that for the queue.
    """
    there = replace(known, resident={**known.resident, model: "cuda:0"})
    absent = {name: place for name, place in known.resident.items() if name != model}
    without = replace(known, resident=absent)
    wait_s = without.wait_s(model, reluctance)
    assert there.wait_s(model, reluctance) < wait_s
    assert wait_s >= known.queue * known.call_s / known.parallel
    longer = replace(without, queue=without.queue + 1)
    assert longer.wait_s(model, reluctance) >= wait_s
