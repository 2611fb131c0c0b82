"""
What a router remembers between two answers of its replicas, without a cluster.
"""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from whispercache.testing import FakeClock

if TYPE_CHECKING:
    from whispercache.ray.router import ModelRouter

pytestmark = pytest.mark.cluster

GIB = 2**30


class ReplicaName(NamedTuple):
    """
    As much of Ray's ReplicaID as a router needs.
    """

    unique_id: str


def replica(name: str, **told: object) -> Any:
    """
    A replica as Ray shows it.
    """
    fixed = {
        "capacity": {"cuda:0": 4 * GIB},
        "sizes": {"small": GIB, "large": 3 * GIB},
        "parallel": 1,
    }
    return SimpleNamespace(
        replica_id=ReplicaName(name), routing_stats=told, replica_metadata=fixed
    )


def request(model: str, request_id: str = "r") -> Any:
    """
    A request as Ray shows it.
    """
    return SimpleNamespace(
        metadata=SimpleNamespace(
            multiplexed_model_id=model, internal_request_id=request_id
        ),
        routing_context=SimpleNamespace(should_backoff=False),
        kwargs={},
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """
    The clock of the router.
    """
    pytest.importorskip("ray.serve", reason="this needs the extra [ray]")
    # Of a module of its own: where Ray has brought the class back from a pickle in this
    # process, its methods have other globals than the module that it is in.
    spec = find_spec("whispercache.ray.router")
    assert spec is not None
    assert spec.loader is not None
    router = module_from_spec(spec)
    spec.loader.exec_module(router)
    clock = FakeClock()
    monkeypatch.setattr(router, "time", SimpleNamespace(monotonic=clock.now))
    monkeypatch.setitem(sys.modules, spec.name, router)
    return clock


def made() -> ModelRouter:
    """
    A router in no handle.
    """
    from whispercache.ray.router import ModelRouter

    class Alone(ModelRouter):
        queues: dict[Any, int]

        def __init__(self) -> None:
            self.queues = {}
            self.initialize_state()

        @property
        def replica_queue_len_cache(self) -> Any:
            return self.queues

    return Alone()


def first(
    router: ModelRouter, model: str, *replicas: Any, request_id: str = "r"
) -> Any:
    """
    The replica that a request goes to.
    """
    asked = request(model, request_id)
    (best,), *_ = asyncio.run(router.choose_replicas(list(replicas), asked))
    assert asked.routing_context.should_backoff
    return best


@pytest.mark.parametrize("name", list("abcdefgh"))
def test_the_next_request_knows_of_the_one_before(clock: FakeClock, name: str) -> None:
    """
    Before the replica has accepted that, or told that its model is there.
    """
    router, one, two = made(), replica("one"), replica("two")
    for each in (one, two):
        each.replica_metadata["sizes"][name] = GIB
    chosen = first(router, name, one, two)
    other = two if chosen is one else one
    assert first(router, name, one, two) is chosen
    # There is more room.
    assert first(router, "small", one, two) is other
    # It never came, or has left.
    clock.tick(60)
    chosen.routing_stats["resident"] = {"large": ("cuda:0", 3 * GIB)}
    assert first(router, name, one, two) is other


def test_two_requests_at_once_go_to_two_replicas(clock: FakeClock) -> None:
    """
    Though neither was accepted yet. One that is sent again does not wait for itself,
    and those that never come count for a while only.
    """
    there = {"resident": {"small": ("cuda:0", GIB)}}
    router, one, two = made(), replica("one", **there), replica("two", **there)

    def sent(request_id: str) -> Any:
        return first(router, "small", one, two, request_id=request_id)

    chosen = sent("a")
    other = two if chosen is one else one
    assert sent("b") is other
    assert sent("b") is other
    router.on_request_routed(request("small", "a"), chosen.replica_id, None)
    router.on_request_completed(other.replica_id, "b")
    assert sent("c") is other
    router.on_request_completed(chosen.replica_id, "a")
    assert sent("d") is chosen
    clock.tick(60)
    assert sent("e") is chosen


def test_a_model_is_where_requests_for_it_are(clock: FakeClock) -> None:
    """
    However late the replica tells of it.
    """
    router, one, two = made(), replica("one"), replica("two")
    router.on_request_routed(request("small", "first"), one.replica_id, None)
    one.routing_stats["resident"] = {"large": ("cuda:0", 3 * GIB)}
    clock.tick(60)
    assert first(router, "small", one, two) is one
    router.on_request_completed(one.replica_id, "first")
    clock.tick(60)
    assert first(router, "small", one, two) is two


def test_requests_of_other_routers_are_counted_as_usual_ones(
    clock: FakeClock,
) -> None:
    """
    By Ray's own count; its own ones by the seconds of their models.
    """
    del clock
    there = {"resident": {"small": ("cuda:0", GIB)}, "calls_s": {"small": 0.1}}
    router = made()
    one, two = replica("one", call_s=2.0, **there), replica("two", **there)
    for i in range(5):
        router.on_request_routed(request("small", f"{i}"), two.replica_id, None)
    router.queues = {one.replica_id: 1, two.replica_id: 5}
    # One of two seconds is longer than five of a tenth.
    assert first(router, "small", one, two) is two
    router.queues = {two.replica_id: 5}
    assert first(router, "small", one, two) is one


def test_questions_that_any_can_answer_go_to_any() -> None:
    """
    And so does what comes without a request.
    """
    pytest.importorskip("ray.serve", reason="this needs the extra [ray]")
    router, replicas = made(), [replica("one"), replica("two")]
    for asked in (request(""), None):
        assert asyncio.run(router.choose_replicas(replicas, asked)) == [replicas]
