"""
Replicas from which nothing comes any more, without a cluster: as when their machine has
lost its power or its network, of which Ray knows after a minute.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from served import TINY, offered

from whispercache.ray.pulse import pulsing
from whispercache.server.engine import Terms, nobody
from whispercache.server.errors import ApiError
from whispercache.server.offers import Offers
from whispercache.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytest.importorskip("ray.serve", reason="this needs the extra [ray]")

from whispercache.ray.hearing import Hearing
from whispercache.ray.router import ModelRouter

pytestmark = pytest.mark.cluster

(OFFER,) = Offers(offered(TINY), "cpu")


async def counting(pause_s: float, closed: list[bool]) -> AsyncGenerator[str, None]:
    """
    One item at once, and another one after a while.
    """
    try:
        yield "first"
        await asyncio.sleep(pause_s)
        yield "second"
    finally:
        closed.append(True)


def test_a_replica_with_nothing_to_say_says_that_it_is_alive() -> None:
    """
    As often as is needed, and not before.
    """

    async def main() -> list[str]:
        items = pulsing(counting(0.1, []), "alive", every_s=0.02)
        return [item async for item in items]

    first, *signs, second = asyncio.run(main())
    assert (first, set(signs), second) == ("first", {"alive"}, "second")


def test_who_leaves_between_two_signs_ends_the_work() -> None:
    """
    At once, although the next item is being computed.
    """
    closed: list[bool] = []

    async def main() -> None:
        items = pulsing(counting(3600, closed), "alive", every_s=0.01)
        assert [await anext(items), await anext(items)] == ["first", "alive"]
        await items.aclose()

    asyncio.run(main())
    assert closed == [True]


class Replica:
    """
    What comes of one request to a replica: some items, then nothing any more.
    """

    def __init__(self, *items: tuple[str, object]) -> None:
        self._items = list(items)
        self.is_cancelled = False

    async def __anext__(self) -> tuple[str, object]:
        if not self._items:
            await asyncio.Event().wait()
        return self._items.pop(0)

    def cancel(self) -> None:
        """
        Nobody listens any more.
        """
        self.is_cancelled = True


def heard_from(*replicas: Replica) -> tuple[list[str], list[str]]:
    """
    The text that comes of the replicas, asked one after the other, and who each was
    told to be lost. Silence is noticed soon.
    """
    told: list[str] = []

    def ask(lost: str) -> Any:
        told.append(lost)
        return replicas[len(told) - 1]

    async def main() -> list[str]:
        hearing = Hearing(OFFER, Terms(60), ask, nobody, silent_s=0.05)
        await hearing.begin()
        texts = [(await anext(hearing)).text for _ in SEGMENTS]
        await hearing.__aexit__()
        return texts

    return asyncio.run(main()), told


TEXTS = ["one", "two", "three"]
SEGMENTS = [
    ("segment", SimpleNamespace(text=text, end=float(i)))
    for i, text in enumerate(TEXTS)
]


def begun(name: str) -> list[tuple[str, object]]:
    """
    The beginning of a call in the replica of that name.
    """
    return [("here", name), ("info", None)]


def test_a_stream_goes_on_elsewhere_after_silence() -> None:
    """
    Where it was, and the router is told who is lost.
    """
    silent = Replica(*begun("a"), SEGMENTS[0], ("alive", None))
    found = heard_from(silent, Replica(*begun("b"), *SEGMENTS))
    assert found == (TEXTS, ["", "a"])
    assert silent.is_cancelled


def test_signs_of_life_keep_a_slow_replica() -> None:
    """
    However long it computes.
    """
    signs = [("alive", None)] * 5
    (here, info) = begun("a")
    found = heard_from(Replica(here, *signs, info, *signs, *SEGMENTS))
    assert found == (TEXTS, [""])


def test_silence_from_the_start_counts_for_no_try() -> None:
    """
    No replica has heard the request; maybe there was none yet.
    """
    last = Replica(*begun("b"), *SEGMENTS)
    found = heard_from(Replica(), Replica(), Replica(*begun("a")), last)
    assert found == (TEXTS, ["", "", "", "a"])


def test_two_that_fall_silent_are_enough() -> None:
    """
    It may be the request that stops them.
    """
    with pytest.raises(ApiError) as refused:
        heard_from(Replica(*begun("a")), Replica(*begun("b")))
    assert (refused.value.status, refused.value.detail.code) == (503, "replicas_died")


class Known:
    """
    A replica as a router knows it, or its id.
    """

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)


class Routing:
    """
    A router and two replicas, the first of which has the model.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.router: Any = ModelRouter.__new__(ModelRouter)
        self.router.initialize_state()
        # Ray's constructor wants a cluster.
        self.router._use_replica_queue_len_cache = False
        self.router._replica_queue_len_cache = Known(get=lambda _: None)
        fixed = {"capacity": {"cuda:0": 10}, "sizes": {TINY: 1}}
        self.replicas: list[Any] = [
            Known(
                replica_id=Known(unique_id=name),
                routing_stats={"resident": resident},
                replica_metadata=fixed,
            )
            for name, resident in (("a", {TINY: ("cuda:0", 1)}), ("b", {}))
        ]

    def request(self, model: str = TINY, **told: str) -> Any:
        """
        A request, to which the answer of a router is `names`.
        """
        number = f"{next(self._numbers)}"
        named = Known(multiplexed_model_id=model, internal_request_id=number)
        return Known(kwargs=told, metadata=named, routing_context=Known())

    def names(self, request: Any) -> list[list[str]]:
        """
        The ranks of the replicas for a request.
        """
        ranks = asyncio.run(self.router.choose_replicas(self.replicas, request))
        return [[each.replica_id.unique_id for each in rank] for rank in ranks]

    def accept(self, request: Any) -> None:
        """
        The first replica says that it has a request.
        """
        rid = self.replicas[0].replica_id
        self.router.on_request_routed(request, rid, None)
        self.router.on_request_completed(rid, request.metadata.internal_request_id)


HELD, LOST = [["a"], ["b"]], [["b"], ["a"]]


def test_a_replica_that_is_lost_comes_last() -> None:
    """
    For this request and for others, which need not find out by themselves.
    """
    routing = Routing()
    first = routing.request()
    assert routing.names(first) == HELD
    assert routing.names(routing.request(lost="a")) == LOST
    assert routing.names(routing.request()) == LOST
    # Questions that any can answer.
    assert routing.names(routing.request("")) == LOST
    routing.accept(first)
    assert routing.names(routing.request("")) == [["a", "b"]]


@pytest.mark.parametrize("leaves", [False, True])
def test_a_replica_that_takes_no_request_comes_last_for_a_minute(
    monkeypatch: pytest.MonkeyPatch, *, leaves: bool
) -> None:
    """
    Then Ray knows of its death, or it is tried again. A client that waits in vain, and
    leaves, changes nothing.
    """
    clock = FakeClock()
    monkeypatch.setattr(time, "monotonic", clock.now)
    routing = Routing()
    waits = routing.request()
    assert routing.names(waits) == HELD
    clock.tick(4)
    assert routing.names(routing.request()) == HELD
    clock.tick(2)
    if leaves:
        (rid, _) = (each.replica_id for each in routing.replicas)
        routing.router.on_request_completed(rid, waits.metadata.internal_request_id)
    assert routing.names(routing.request()) == LOST
    clock.tick(60)
    assert routing.names(routing.request()) == HELD


def test_a_client_that_leaves_at_once_says_nothing_of_a_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Nor does a question to all of them.
    """
    clock = FakeClock()
    monkeypatch.setattr(time, "monotonic", clock.now)
    routing = Routing()
    leaves = routing.request()
    assert routing.names(leaves) == HELD
    (rid, _) = (each.replica_id for each in routing.replicas)
    routing.router.on_request_completed(rid, leaves.metadata.internal_request_id)
    routing.router.on_send_request(rid)
    clock.tick(6)
    assert routing.names(routing.request()) == HELD
