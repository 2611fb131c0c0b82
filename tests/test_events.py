"""
Events: in order, to all listeners, whatever those do.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from driver import ThreadDriver

from whispercache import (
    EvictionCause,
    LoadFailed,
    ModelEvicted,
    ModelGranted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ReleaseUnconfirmed,
    Stats,
)
from whispercache.core.lock import Outbox
from whispercache.events import Event
from whispercache.keys import ModelKey
from whispercache.testing import settle, wait_until

if TYPE_CHECKING:
    from conftest import MakeCache

    from whispercache.testing import FakeClock, FakeLoader

GIB = 1024**3
KEY = ModelKey("base", "cuda:0", "float16")


def test_a_life_is_told_in_order(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    Loading, loaded, a refused unload, and the end; with seconds and bytes.
    """
    loader.clock, loader.load_s, loader.loading_factor = clock, 2.5, 1.5
    cache = make_cache(keep_alive=10)
    told: list[Event] = []
    cancel = cache.subscribe(told.append)
    cache.preload("base", "cuda:0")
    loader.refuse_unloads = 1
    clock.tick(10)
    settle(cache)
    clock.tick(0.125)
    settle(cache)
    assert told == [
        ModelLoading(KEY, 3 * GIB // 2),
        ModelLoaded(KEY, 2.5, GIB, GIB, reloaded=False),
        ModelGranted(KEY, 2.5),
        ReleaseUnconfirmed(KEY, GIB, 0.1, "1 batch is still active"),
        ModelEvicted(KEY, EvictionCause.EXPIRED, GIB, GIB, 0.125),
    ]
    cancel()
    cancel()
    cache.preload("base", "cuda:0")
    assert len(told) == 5


def test_each_cause_is_told(make_cache: MakeCache, clock: FakeClock) -> None:
    """
    Capacity and idleness are the cache's own decisions, the others are not.
    """
    cache = make_cache(vram="1GiB", keep_alive=10)
    told: list[Event] = []
    cache.subscribe(told.append)
    cache.preload("tiny", "cuda:0")
    cache.preload("base", "cuda:0")
    clock.tick(10)
    settle(cache)
    cache.preload("tiny", "cuda:0")
    cache.evict("tiny")
    cache.preload("base", "cuda:0")
    cache.close()
    causes = [event.cause for event in told if isinstance(event, ModelEvicted)]
    assert causes == ["capacity", "expired", "explicit", "closed"]
    assert [cause.was_eviction for cause in causes] == [True, True, False, False]


def test_only_who_waited_is_told_to_be_granted(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    With the seconds since the request; a hit makes no event.
    """
    cache = make_cache()
    told: list[Event] = []
    cache.subscribe(told.append)
    driver = ThreadDriver()
    with loader.holding_loads("base") as gate:
        first = driver.waiting(cache, "base", "cuda:0")
        clock.tick(2)
        second = driver.waiting(cache, "base", "cuda:0")
        waiting = cache.waiting()
        assert [(info.keys, info.waited_s) for info in waiting] == [
            ((KEY,), 2.0),
            ((KEY,), 0.0),
        ]
        clock.tick(1)
        gate.open()
        leases = [first.result(10), second.result(10)]
    leases.append(cache.lease("base", "cuda:0"))
    settle(cache)
    waits = [event for event in told if isinstance(event, ModelGranted)]
    assert waits == [ModelGranted(KEY, 3.0), ModelGranted(KEY, 1.0)]
    assert not cache.waiting()
    for lease in leases:
        lease.release()


def test_a_failure_is_told(make_cache: MakeCache, loader: FakeLoader) -> None:
    """
    In one line.
    """
    cache = make_cache()
    told: list[Event] = []
    cache.subscribe(told.append)
    loader.fail_loads["base"] = [RuntimeError()]
    with pytest.raises(LoadFailed):
        cache.preload("base", "cuda:0")
    settle(cache)
    assert told == [ModelLoading(KEY, GIB), ModelLoadFailed(KEY, "RuntimeError")]


def test_a_listener_that_raises_disturbs_nobody(
    make_cache: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    """
    It is logged, and the others are told.
    """
    cache = make_cache()
    told: list[Event] = []

    def fail(_event: Event) -> None:
        raise RuntimeError("listener out of order")

    cache.subscribe(fail)
    cache.subscribe(told.append)
    cache.preload("base", "cuda:0")
    settle(cache)
    assert len(told) == 3
    assert "listener out of order" in caplog.text


def test_a_listener_may_call_the_cache(make_cache: MakeCache) -> None:
    """
    Even so that new events follow; they are told afterwards.
    """
    cache = make_cache()
    told: list[str] = []

    def listener(event: Event) -> None:
        told.append(f"{type(event).__name__} begins")
        assert cache.models() is not None
        assert "base" in repr(cache) or cache.stats().evictions
        if isinstance(event, ModelLoaded):
            cache._core.evict(lambda _key: True)
        told.append("ends")

    cache.subscribe(listener)
    cache.preload("base", "cuda:0")
    wait_until(lambda: len(told) == 8, "all events")
    assert told == [
        "ModelLoading begins",
        "ends",
        "ModelLoaded begins",
        "ends",
        "ModelGranted begins",
        "ends",
        "ModelEvicted begins",
        "ends",
    ]


def test_a_slow_listener_holds_up_nobody_else(make_cache: MakeCache) -> None:
    """
    While it is at it, others use the cache, and what happens is told in order.
    """
    cache = make_cache()
    reached, go = threading.Event(), threading.Event()
    told: list[Event] = []

    def listener(event: Event) -> None:
        told.append(event)
        reached.set()
        assert go.wait(10)

    cache.preload("tiny", "cpu")
    settle(cache)
    cache.subscribe(listener)
    driver = ThreadDriver()
    loading = driver.start(cache, "preload", "base", "cuda:0")
    assert reached.wait(10)
    cache.lease("tiny", "cpu").release()
    driver.call(cache, "evict", "tiny")
    assert [event.key.model for event in told] == ["base"]
    go.set()
    loading.result(10)
    wait_until(lambda: len(told) == 4, "all events")
    assert {event.key.model for event in told[1:]} == {"base", "tiny"}


def test_events_of_many_threads_keep_their_order() -> None:
    """
    One thread delivers at a time, and nothing is lost between two.
    """
    outbox = Outbox()
    heard: list[int] = []
    outbox.subscribe(lambda event: heard.append(int(event.key.model)))
    numbers = iter(range(4000))
    lock = threading.Lock()

    def post() -> None:
        for _ in range(1000):
            with lock:
                outbox.append(Event(ModelKey(str(next(numbers)), "cpu", "float32")))
            outbox.deliver()

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == list(range(4000))
    assert not outbox


def test_the_hit_ratio_of_nothing_is_nothing() -> None:
    """
    Rather than an error.
    """
    assert Stats().hit_ratio == 0


def test_what_a_model_takes_is_its_weights_and_its_work(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    The listing has both, and their sum.
    """
    loader.workspace_bytes = GIB
    cache = make_cache()
    with cache.lease("base", "cuda:0"):
        (info,) = cache.models()
        assert (info.weights_bytes, info.workspace_bytes) == (GIB, GIB)
        assert info.bytes == 2 * GIB
        assert info.idle_s is None
        assert info.expires_in_s is None
    (info,) = cache.models()
    assert info.bytes == GIB
    assert info.idle_s == 0
    assert info.expires_in_s == 300
