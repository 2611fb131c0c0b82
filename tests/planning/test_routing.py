"""
The replica for a request: where it begins soonest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whispercache.planning.routing import LOAD_S, Replica, order, pooled

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
    A load of one second counts as eight, if nobody waits for the model.
    """
    busy = replica("busy", "small", queued={"large": 8})
    # As long: then where there is more room.
    assert first("small", replica("free"), busy) == "free"
    assert first("small", replica("free"), replace(busy, queued={"large": 7})) == "busy"
    longer = replace(busy, queued={"large": 15})
    assert first("small", replica("free"), longer) == "free"
    # Where two compute at once, twice as many are as long.
    assert first("small", replica("free"), replace(longer, parallel=2)) == "busy"


def test_a_load_counts_less_the_more_wait_for_the_model() -> None:
    """
    With one that waits 4.5 times, with two 3.3, with three 2.75.
    """
    two = replica("busy", "small", queued={"small": 2})
    assert first("small", replica("free"), two) == "busy"
    assert first("small", replica("free"), replace(two, queued={"small": 3})) == "free"
    assert first("small", replica("free"), replace(two, queued={"large": 3})) == "busy"
    # Wherever they wait.
    waiting = replica("elsewhere", "small", queued={"small": 9})
    five = replace(two, queued={"": 5})
    assert first("small", replica("free"), five) == "busy"
    assert first("small", replica("free"), five, waiting) == "free"


def test_the_seconds_of_a_queue_are_those_of_its_models() -> None:
    """
    Three short calls are over before a long one.
    """
    calls_s = {"small": 0.1, "large": 3.0}
    short = replica("short", "medium", calls_s=calls_s, queued={"small": 3})
    long = replica("long", "medium", calls_s=calls_s, queued={"large": 1})
    assert first("medium", long, short) == "short"
    # Those of models without a measure, or that are not known, take the usual time.
    odd = replace(short, queued={"small": 3, "medium": 2, "": 1})
    assert odd.queue_s == pytest.approx(3 * 0.1 + 3 * 1.0)


def test_one_takes_from_others_what_it_has_not_measured() -> None:
    """
    Its own measure counts more.
    """
    one = replica("one", load_s={"large": 3.0}, calls_s={"large": 2.0})
    two = replica("two", load_s={"large": 4.0, "small": 1.0})
    three = replica("three", load_s={})
    pooled_one, pooled_two, pooled_three = pooled([one, two, three])
    assert pooled_one == replace(one, load_s={"large": 3.0, "small": 1.0})
    assert pooled_two == replace(two, calls_s={"large": 2.0})
    assert pooled_three.load_s.keys() == {"large", "small"}
    assert pooled([]) == []


def test_what_must_leave_is_counted() -> None:
    """
    It will be wanted again.
    """
    full = replica("full", "large", "small")
    assert first("medium", full, replica("free", "small")) == "free"
    # One request waits less than two models are loaded again.
    assert first("medium", full, replica("free", "small", queued={"": 1})) == "free"
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
        assert never.wait_s("large", 1) == math.inf
        assert (
            first("large", never, replica("full", "large", queued={"": 99})) == "full"
        )
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
    calls_s=st.dictionaries(names, st.floats(0, 10)),
    parallel=st.integers(1, 4),
    queued=st.dictionaries(names | st.just(""), st.integers(0, 20)),
)


@given(names, st.lists(replicas, max_size=6, unique_by=lambda each: each.name))
def test_all_are_named_once_and_in_an_order_of_their_own(
    model: str, known: list[Replica]
) -> None:
    """
    Whatever order they came in; none passes another one because a third is there, if
    nobody waits there for the model.
    """
    found = list(order(model, known))
    assert sorted(map(id, found)) == sorted(map(id, known))
    assert order(model, known[::-1]) == found
    for each in known:
        if each.queued.get(model):
            continue
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
    assert wait_s >= known.queue_s
    longer = replace(without, queued={**known.queued, "other": 1})
    assert longer.wait_s(model, reluctance) >= wait_s
