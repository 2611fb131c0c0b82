"""
A number of leases on a model at a time: who waits for a turn, and who has the next one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from whispercache import LeaseDeadlock, LeaseTimeout, ModelCache
from whispercache.core.deadlocks import victim_of_deadlock
from whispercache.core.waiters import Wanted
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.testing import FakeClock, FakeLoader, FakeMachine, check, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache import Lease
    from whispercache.core.waiters import Waiter

CARD = "cuda:0"


@pytest.fixture
def clock() -> FakeClock:
    """
    A clock.
    """
    return FakeClock()


@pytest.fixture
def cache(clock: FakeClock) -> Iterator[ModelCache]:
    """
    A cache with room for all.
    """
    machine = FakeMachine({"cpu": "64GiB", CARD: "64GiB"})
    loader = FakeLoader(machine)
    with ModelCache(loader=loader, probe=machine, clock=clock) as made:
        yield made
        check(made)


def ask(
    cache: ModelCache,
    model: str,
    *,
    priority: float = 0.0,
    parallel: int | None = 1,
    owner: object = None,
) -> Waiter:
    """
    Returns a request, as another thread would make it.
    """
    target = cache._resolver.resolve((model, CARD, "default"))
    cache._resolver.locate(target, DEFAULT_WORKLOAD)
    return cache._core.request(
        [Wanted(target.entry, DEFAULT_WORKLOAD)],
        None,
        None,
        owner or object(),
        priority=priority,
        parallel=parallel,
    )


def lease_of(cache: ModelCache, waiter: Waiter) -> Lease:
    """
    Returns how a request ended, which has to have.
    """
    settle(cache)
    assert waiter.future.done()
    (lease,) = waiter.future.result()
    return lease


def test_a_model_has_so_many_leases_at_a_time(cache: ModelCache) -> None:
    """
    In the order of arrival; and other models are not waited for.
    """
    first = lease_of(cache, ask(cache, "tiny"))
    second, third = ask(cache, "tiny"), ask(cache, "tiny")
    lease_of(cache, ask(cache, "base")).release()
    assert not second.future.done()
    first.release()
    lease = lease_of(cache, second)
    assert not third.future.done()
    lease.release()
    lease_of(cache, third).release()
    assert cache.stats().loads == 2


def test_who_sets_no_limit_passes_none_that_waits_for_its_turn(
    cache: ModelCache,
) -> None:
    """
    Of two limits each request has its own.
    """
    first = lease_of(cache, ask(cache, "tiny", parallel=None))
    one = ask(cache, "tiny", parallel=1)
    two = ask(cache, "tiny", parallel=2)
    assert lease_of(cache, two)
    assert not one.future.done()
    for lease in (first, lease_of(cache, two)):
        lease.release()
    lease_of(cache, one).release()


def test_a_model_in_memory_is_had_at_once_up_to_the_limit(cache: ModelCache) -> None:
    """
    Without the queue, in which the next one waits; and it counts as any hit does.
    """
    asked = ("tiny", CARD, "default")
    hit_below = cache._core.hit_below
    assert hit_below(1, asked, DEFAULT_WORKLOAD, None, "a") is None
    cache.preload("tiny", CARD)
    first = hit_below(1, asked, DEFAULT_WORKLOAD, None, "a")
    assert hit_below(1, asked, DEFAULT_WORKLOAD, None, "b") is None
    second = hit_below(2, asked, DEFAULT_WORKLOAD, None, "b")
    assert first is not None
    assert second is not None
    with first, second, cache.lease("tiny", CARD, parallel=3):
        assert cache.stats().leases == 3
    assert cache.stats().hits == 3


def test_those_of_one_load_have_their_turns_too(cache: ModelCache) -> None:
    """
    People first.
    """
    with_gate = cache.loader.holding_loads("tiny")  # type: ignore[attr-defined]
    with with_gate as gate:
        film = ask(cache, "tiny", priority=-1.0)
        person = ask(cache, "tiny")
        gate.open()
        lease = lease_of(cache, person)
    assert not film.future.done()
    lease.release()
    lease_of(cache, film).release()


def test_a_batch_is_asked_for_its_turn(cache: ModelCache) -> None:
    """
    By a person who waits for it, and no longer when that one has left.
    """
    film = lease_of(cache, ask(cache, "tiny", priority=-1.0))
    film.offer(-1.0)
    other = ask(cache, "tiny", priority=-1.0)
    assert not film.is_asked(-1.0)
    person = ask(cache, "tiny")
    assert film.is_asked(-1.0)
    cache._core.abandon(person)
    assert not film.is_asked(-1.0)
    person = ask(cache, "tiny")
    film.release()
    lease = lease_of(cache, person)
    assert not other.future.done()
    lease.release()
    lease_of(cache, other).release()


def test_a_turn_that_nobody_can_ever_have_is_a_deadlock(cache: ModelCache) -> None:
    """
    Though there is memory for all. Who holds the model already waits for no turn.
    """
    held = [lease_of(cache, ask(cache, n, owner=n)) for n in ("tiny", "base")]
    again = ask(cache, "tiny", owner="tiny")
    lease_of(cache, again).release()
    first = ask(cache, "base", owner="tiny")
    with cache._core.changing():
        assert victim_of_deadlock(cache._core.state) is None
    second = ask(cache, "tiny", owner="base")
    with cache._core.changing():
        assert victim_of_deadlock(cache._core.state) in (first, second)
    for waiter in (first, second):
        cache._core.abandon(waiter)
    for lease in held:
        lease.release()


def test_a_deadlock_of_turns_ends(cache: ModelCache, clock: FakeClock) -> None:
    """
    For one of the two, with an error that says so.
    """
    held = [lease_of(cache, ask(cache, n, owner=n)) for n in ("tiny", "base")]
    waiters = [ask(cache, "base", owner="tiny"), ask(cache, "tiny", owner="base")]
    for _ in range(5):
        clock.tick(0.05)
    failed = [each for each in waiters if each.future.done()]
    assert len(failed) == 1
    with pytest.raises(LeaseDeadlock):
        failed[0].future.result()
    for waiter in waiters:
        cache._core.abandon(waiter)
    for lease in held:
        lease.release()


def test_the_limit_of_a_cache_is_for_all_who_set_none(clock: FakeClock) -> None:
    """
    Also in calls, and hits are counted as before.
    """
    machine = FakeMachine({"cpu": "64GiB"})
    loader = FakeLoader(machine)
    with (
        ModelCache(parallel=1, loader=loader, probe=machine, clock=clock) as cache,
        cache.lease("tiny", "cpu"),
    ):
        found: list[object] = []

        def late() -> None:
            with pytest.raises(LeaseTimeout) as timeout:
                cache.lease("tiny", "cpu", timeout_s=0)
            found.append(timeout.value.position)
            with cache.lease("tiny", "cpu", parallel=2) as whisper:
                found.append(whisper)

        thread = threading.Thread(target=late)
        thread.start()
        thread.join(30)
        assert found[0] == 1
        assert len(found) == 2
        assert cache.stats().hits == 2


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_limit_is_a_number_of_leases(cache: ModelCache, value: object) -> None:
    """
    Of 1 at least.
    """
    with pytest.raises((TypeError, ValueError), match="parallel"):
        cache.get_model("tiny", parallel=value)  # type: ignore[arg-type]
