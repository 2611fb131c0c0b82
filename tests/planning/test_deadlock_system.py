"""
Deadlock detection for many: the same answers as the plain reduction gives, and how much
is looked at for them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import plain_deadlock as plain
import pytest
from effort import tries
from hypothesis import event, given, settings
from hypothesis import strategies as st

from whispercache.keys import ModelKey
from whispercache.planning.deadlock import Ceiling, Claim, Hold, Model, System
from whispercache.planning.rooms import Room, Wish

if TYPE_CHECKING:
    from collections.abc import Callable

World = tuple["list[Claim]", "list[Hold]", "dict[str, Ceiling]"]


def model(
    name: str, weights_bytes: int, device: str = "cpu", workers: int = 1
) -> Model:
    """
    A model of so many bytes.
    """
    return Model(ModelKey(name, "cpu", "int8"), device, weights_bytes, workers)


# The same answers ---------------------------------------------------------------------


def just_above(device: str, holds: list[Hold]) -> st.SearchStrategy[int]:
    """
    Bytes that are all held, but for a few.
    """
    held = {h.model: h.model.weights_bytes for h in holds if h.model.device == device}
    return st.integers(0, 6).map(lambda more_bytes: sum(held.values()) + more_bytes)


@st.composite
def roomy(draw: st.DrawFn) -> World:
    """
    Up to eight callers, each of whom holds a model and waits for another one, small
    enough for the room that is left, or so large that others have to release theirs:
    few deadlocks, many turns that are waited for.
    """
    wanted = st.sampled_from([1, 1, 1, 2, 8, 14])
    callers = draw(st.permutations(range(draw(st.integers(2, 8)))))
    holds = [Hold(n, model(f"held{n}", draw(st.integers(1, 4)))) for n in callers]
    claims = [
        Claim(n, float(since_s), ((model(f"wanted{n}", draw(wanted)), 0),))
        for since_s, n in enumerate(callers[: draw(st.integers(2, 8))])
    ]
    return claims, holds, {"cpu": Ceiling(draw(just_above("cpu", holds)))}


@st.composite
def any_worlds(draw: st.DrawFn) -> World:
    """
    Up to seven callers, some of whom wait twice or are not known, up to three devices,
    and models that have copies elsewhere. What a request knows of a model's bytes may
    differ from what a lease on it knows.
    """
    devices = ["cpu", "cuda:0", "cuda:1"][: draw(st.sampled_from([1, 1, 2, 3]))]
    device, work = st.sampled_from(devices), st.integers(0, 2)
    models = {
        (name, place): model(name, draw(st.integers(2, 4)), place, draw(workers))
        for name in "abcdef"
        for place, workers in (
            (draw(device), st.sampled_from([1, 1, 2])),
            (draw(device), st.just(1)),
        )
    }
    some = st.sampled_from(list(models.values()))
    owner = st.sampled_from([None, *range(draw(st.integers(1, 7)))])
    holds = [
        Hold(draw(owner), draw(some), draw(work))
        for _ in range(draw(st.integers(0, 10)))
    ]

    def part() -> tuple[Model, int]:
        it, more_bytes = draw(some), draw(st.sampled_from([0, 0, -1, 1]))
        weights_bytes = it.weights_bytes + more_bytes
        return Model(it.key, it.device, weights_bytes, it.workers), draw(work)

    claims = [
        Claim(
            draw(owner),
            float(draw(st.sampled_from([0, since_s]))),
            tuple(part() for _ in range(draw(st.integers(1, 3)))),
            {each: draw(work) for each in devices if not draw(st.integers(0, 4))},
            draw(st.sampled_from([None, None, 1, 2])),
        )
        for since_s in range(draw(st.integers(1, 9)))
    ]

    def ceiling(device: str) -> Ceiling:
        here = [each for (_, place), each in sorted(models.items()) if place == device]
        return Ceiling(
            draw(st.just(math.inf) | st.integers(2, 20) | just_above(device, holds)),
            draw(st.none() | st.none() | st.integers(1, 4)),
            tuple(here[: draw(st.integers(0, 2))]),
            draw(st.none() | st.none() | st.integers(1, 16)),
        )

    return claims, holds, {each: ceiling(each) for each in devices}


@settings(max_examples=tries(400))
@given(any_worlds() | roomy(), st.lists(st.sampled_from([None, *range(7)]), max_size=2))
def test_the_answers_are_those_of_the_plain_reduction(
    world: World, never: list[int | None]
) -> None:
    """
    Asked of one system one after the other, and again: no question leaves a trace.
    """
    system = System(*world)
    left = plain.unserved(*world, never)
    culprit, detained = plain.culprit(*world), plain.detained(*world)
    event(f"{min(len(left), 3)} unserved, {min(len(detained), 2)} detained")
    for _ in range(2):
        assert system.detained() == detained
        assert system.unserved(never) == left
        assert system.culprit() is culprit


def test_a_lease_may_take_nothing_and_yet_be_in_the_way() -> None:
    """
    While it may run beside the next, a model of two workers needs twice the work.
    """
    pinned = model("a", 2, workers=2)
    holds = [Hold("x", pinned, 0)]
    claims = [Claim("y", 0.0, ((pinned, 2),))]
    system = System(claims, holds, {"cpu": Ceiling(4, pinned=(pinned,))})
    assert system.unserved() == ()
    assert system.unserved(never=["x"]) == (claims[0],)


# What is looked at --------------------------------------------------------------------


def strangers(n_claims: int) -> World:
    """
    Callers that hold nothing wait for five models, of which one fits never.
    """
    holds = [Hold("holder", model(f"held{n}", 10), 1) for n in range(5)]
    claims = [
        Claim(object(), float(n), ((model(f"wanted{n % 5}", 53 + n % 5), 1),))
        for n in range(n_claims)
    ]
    return claims, holds, {"cpu": Ceiling(57)}


def circle(n_claims: int) -> World:
    """
    Each holds a model, wants another one, and there is room for none.
    """
    holds = [Hold(n, model(f"held{n}", 1 + n % 12)) for n in range(n_claims)]
    claims = [
        Claim(n, float(n), ((model(f"wanted{n}", 20 + n % 12), 0),))
        for n in range(n_claims)
    ]
    return claims, holds, {"cpu": Ceiling(sum(h.model.weights_bytes for h in holds))}


def chain(n_claims: int) -> World:
    """
    Each wants the card of the next, and the last one's is empty.
    """
    cards = [f"cuda:{n}" for n in range(n_claims + 1)]
    holds = [Hold(n, model(f"held{n}", 1, cards[n])) for n in range(n_claims)]
    claims = [
        Claim(n, float(n), ((model(f"wanted{n}", 1, cards[n + 1]), 0),))
        for n in range(n_claims)
    ]
    return claims, holds, {card: Ceiling(1) for card in cards}


def in_the_way(n_claims: int) -> World:
    """
    The oldest wants all the room, of which the others hold most and want more.
    """
    holds = [Hold(n, model(f"held{n}", 1)) for n in range(1, n_claims)]
    claims = [Claim(0, 0.0, ((model("all", 3 * n_claims), 0),))] + [
        Claim(n, float(n), ((model(f"wanted{n}", 1), 0),)) for n in range(1, n_claims)
    ]
    return claims, holds, {"cpu": Ceiling(3 * n_claims)}


WORLDS = [strangers, circle, chain, in_the_way]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    Each comparison of a request with the rooms, and each lease begun or ended there.
    """
    seen: list[str] = []

    def watch(where: object, name: str) -> None:
        real: Callable[..., object] = getattr(where, name)

        def look(*args: object, **options: object) -> object:
            seen.append(name)
            return real(*args, **options)

        monkeypatch.setattr(where, name, look)

    watch(Wish, "find_lack")
    watch(Room, "begin")
    watch(Room, "end")
    watch(plain, "fits")
    return seen


@pytest.mark.parametrize("make", WORLDS)
def test_a_check_grows_with_the_requests_and_not_with_their_square(
    make: Callable[[int], World], looks: list[str]
) -> None:
    """
    Each lease and request is looked at a few times, however many others there are.
    """
    for n_claims in (100, 1_000):
        world = make(n_claims)
        looks.clear()
        system = System(*world)
        system.unserved()
        system.culprit()
        assert len(looks) <= 10 * n_claims
        looks.clear()
        system.detained()
        # Half of them again for each half, and for each of its halves.
        assert len(looks) <= 5 * n_claims * math.log2(n_claims)


def test_requests_for_the_same_are_compared_once(looks: list[str]) -> None:
    """
    However many callers wait for each of five models.
    """
    for n_claims in (100, 1_000):
        system = System(*strangers(n_claims))
        looks.clear()
        left = system.unserved()
        assert len(left) == n_claims // 5
        assert looks.count("find_lack") <= 5


@pytest.mark.parametrize("make", [circle, chain])
def test_the_plain_reduction_looks_too_often(
    make: Callable[[int], World], looks: list[str]
) -> None:
    """
    The tests above can fail: it compares all with all.
    """
    world = make(100)
    plain.unserved(*world)
    plain.culprit(*world)
    assert len(looks) > 20 * 100
