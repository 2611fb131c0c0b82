"""
Leases: how they end, and what happens if they do not.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from driver import ThreadDriver

from whispercache.core.resolver import Target
from whispercache.core.waiters import Wanted
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.planning.policies import POLICIES
from whispercache.testing import check, settle, wait_until

if TYPE_CHECKING:
    from conftest import MakeCache

    from whispercache import Lease, ModelCache
    from whispercache.core.effects import Effect
    from whispercache.events import Event
    from whispercache.planning.policies import Resident
    from whispercache.testing import FakeClock, FakeLoader, FakeMachine

AUDIO = cast("Any", "audio")


def test_a_dropped_lease_is_warned_of_and_comes_back(make_cache: MakeCache) -> None:
    """
    Its memory is free again, once it was collected.
    """
    cache = make_cache(keep_alive=0)
    leases = [cache.lease("base", "cuda:0")]
    with pytest.warns(ResourceWarning, match="base/cuda:0/float16 was never released"):
        leases.clear()
    settle(cache)
    assert not cache.models()


def test_a_timer_keeps_no_lease(make_cache: MakeCache, clock: FakeClock) -> None:
    """
    A lease that was asked for with a timeout is collected before that time.
    """
    cache = make_cache()
    leases = [cache.lease("base", "cuda:0", timeout_s=3600)]
    assert len(clock._calls) == 1
    with pytest.warns(ResourceWarning, match="never released"):
        leases.clear()
    settle(cache)
    assert cache.stats().leases == 0


def test_dropped_segments_come_back_without_a_warning(make_cache: MakeCache) -> None:
    """
    Not iterating to the end is no fault.
    """
    cache = make_cache()
    model = cache.get_model("base", "cuda:0", timeout_s=3600)
    segments, _ = model.transcribe(AUDIO)
    next(segments)
    assert cache.stats().leases == 1
    del segments
    gc.collect()
    settle(cache)
    assert cache.stats().leases == 0


def dropped(cache: ModelCache) -> None:
    """
    Leave a lease to the garbage collector alone: it is part of a cycle.
    """
    cycle: list[object] = [cache.lease("base", "cuda:0")]
    cycle.append(cycle)


@pytest.mark.filterwarnings("ignore:a lease on:ResourceWarning")
@pytest.mark.parametrize("place", ["now", "policy", "call_at"])
def test_the_collector_may_run_inside_the_lock(
    make_cache: MakeCache,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """
    Whatever the cache calls while it holds its lock may set off a collection.
    """
    collecting = threading.Event()

    def collect() -> None:
        if collecting.is_set():
            collecting.clear()
            assert gc.collect()

    def policy(resident: Resident, now_s: float) -> float:
        if place == "policy":
            collect()
        return POLICIES["lru"](resident, now_s)

    if place != "policy":
        original = getattr(clock, place)

        def wrapped(*args: Any) -> Any:
            collect()
            return original(*args)

        monkeypatch.setattr(clock, place, wrapped)
    gc.disable()
    try:
        cache = make_cache(vram="3GiB", policy=policy)
        cache.preload("small", "cuda:0")
        dropped(cache)
        collecting.set()
        driver = ThreadDriver()
        driver.lease(cache, "tiny", "cuda:0", keep_alive=1).release()
        driver.call(cache, "evict", "tiny")
    finally:
        gc.enable()
    assert not collecting.is_set()
    settle(cache)
    assert cache.stats().leases == 0
    check(cache)


@pytest.mark.filterwarnings("ignore:a lease on:ResourceWarning")
def test_the_collector_calls_no_listener(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    It may run while this thread holds a lock that the listener wants.
    """
    cache = make_cache(vram="2GiB")
    counting = threading.Lock()
    heard: list[Event] = []

    def listener(event: Event) -> None:
        assert counting.acquire(timeout=5), "a listener ran within the collector"
        heard.append(event)
        counting.release()

    gc.disable()
    try:
        dropped(cache)
        cache.subscribe(listener)
        driver = ThreadDriver()
        waiting = driver.waiting(cache, "small", "cuda:0")
        with counting:
            gc.collect()
        waiting.result(10).release()
    finally:
        gc.enable()
    settle(cache)
    assert loader.loads == {"base": 1, "small": 1}
    assert len(heard) == 4


def test_a_lease_tells_what_it_is(make_cache: MakeCache) -> None:
    """
    For a debugger.
    """
    cache = make_cache()
    lease = cache.lease("base", "cuda:0")
    assert repr(lease) == "<Lease base/cuda:0/float16 held>"
    assert "base/cuda:0/float16 resident ×1" in repr(cache)
    lease.release()
    assert repr(lease) == "<Lease base/cuda:0/float16 released>"


def test_a_block_that_fails_ends_its_lease(make_cache: MakeCache) -> None:
    """
    The error goes on.
    """
    cache = make_cache()
    with pytest.raises(KeyError), cache.lease("base", "cuda:0"):
        raise KeyError
    assert cache.stats().leases == 0


def test_an_interrupted_wait_leaves_the_queue(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Ctrl-C while a model loads: the request is forgotten, the load is not.
    """
    cache = make_cache()
    core = cache._core
    with loader.holding_loads("base") as gate:
        cache.resize()
        target = cache._resolver.resolve(("base", "cuda:0", "default"))
        waiter = request(cache, target.entry)
        gate.wait_reached()
        core.abandon(waiter)
        assert waiter.future.cancelled()
        assert cache.stats().waiting == 0
        check(cache)
    settle(cache)
    granted = request(cache, target.entry)
    assert granted.future.result(10)
    core.abandon(granted)
    assert cache.stats().leases == 0
    loader.fail_loads["tiny"] = [RuntimeError("broken")]
    with loader.holding_loads("tiny"):
        failing = request(
            cache, cache._resolver.resolve(("tiny", "cuda:0", "default")).entry
        )
    settle(cache)
    core.abandon(failing)
    assert failing.future.exception(10)


def request(cache: ModelCache, entry: Any) -> Any:
    """
    A request as `ModelCache.lease` makes it, without the wait.
    """
    cache._resolver.locate(Target(entry, {}), DEFAULT_WORKLOAD)
    parts = [Wanted(entry, DEFAULT_WORKLOAD)]
    return cache._core.request(parts, None, None, owner=None)


def test_a_grant_under_way_is_given_back(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The caller gives up between the decision and its lease.
    """
    cache = make_cache()
    cache.preload("base", "cuda:0")
    entry = next(iter(cache._core.entries.values()))
    perform = cache._core.lock.perform
    held: list[list[Effect]] = []
    monkeypatch.setattr(cache._core.lock, "perform", held.append)
    waiter = request(cache, entry)
    monkeypatch.setattr(cache._core.lock, "perform", perform)
    assert cache.stats().leases == 1
    cache._core.abandon(waiter)
    for work in held:
        perform(work)
    assert cache.stats().leases == 0


def test_the_lease_of_a_default_model_ends_with_its_block(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    A cached model leases itself the same way.
    """
    cache = make_cache(keep_alive=0)
    model = cache.get_model("base", "cuda:0")
    lease: Lease = model.lease()
    with lease as whisper:
        assert whisper.transcribe(AUDIO)
    wait_until(lambda: not machine.held_bytes["cuda:0"])
