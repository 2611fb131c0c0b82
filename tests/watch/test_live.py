"""
Live: snapshots of a cache, and their JSON.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from driver import ThreadDriver

from whispercache import EvictionCause, LoadFailed, ModelKey, events
from whispercache.core.lock import Outbox
from whispercache.testing import settle
from whispercache.watch.live import EVENTS, Snapshot, Watch

if TYPE_CHECKING:
    from conftest import MakeCache

    from whispercache.testing import FakeClock, FakeLoader

GIB = 1024**3
KEY = ModelKey("/models/mine", "cuda:0", "float16")

TOLD: tuple[tuple[events.Event, str, str], ...] = (
    (events.ModelLoading(KEY, GIB), "loading", "loads into 1.0 GiB"),
    (
        events.ModelLoaded(KEY, 1.25, GIB, None, reloaded=False),
        "loaded",
        "loaded in 1.25 s: 1.0 GiB",
    ),
    (
        events.ModelLoaded(KEY, 0.5, GIB, None, reloaded=True),
        "loaded",
        "loaded again in 0.50 s: 1.0 GiB",
    ),
    (
        events.ModelLoaded(KEY, 0.3, GIB, None, reloaded=True, restored=True),
        "loaded",
        "loaded from the host in 0.30 s: 1.0 GiB",
    ),
    (
        events.ModelLoadFailed(KEY, "no such file"),
        "failed",
        "could not be loaded: no such file",
    ),
    (events.ModelGranted(KEY, 2), "granted", "granted after 2.00 s"),
    (events.BatchStopped(KEY), "stopped", "given to others by a batch"),
    (
        events.ReleaseUnconfirmed(KEY, GIB, 0.1, "1 batch is active"),
        "warning",
        "has not left yet, 1.0 GiB stay charged: 1 batch is active",
    ),
    (events.ModelStillReferenced(KEY, 1), "warning", "left, but somebody still"),
    (events.FellBack(KEY, "large-v3", "too large"), "warning", "in place of large-v3"),
    (
        events.ModelEvicted(
            KEY, EvictionCause.EXPIRED, GIB, GIB, 0.1, GIB // 2, parked=True
        ),
        "evicted",
        "1.0 GiB free, a copy stays on the host, 512.0 MiB not seen to return",
    ),
    *(
        (events.ModelEvicted(KEY, cause, GIB, None, 0.1), "evicted", "1.0 GiB free")
        for cause in EvictionCause
    ),
)


class Told:
    """
    A cache that only tells.
    """

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.subscribe = self.outbox.subscribe

    def stats(self) -> events.Stats:
        """
        No counters.
        """
        return events.Stats()

    def models(self) -> tuple[events.ModelInfo, ...]:
        """
        None.
        """
        return ()

    def devices(self) -> tuple[events.DeviceInfo, ...]:
        """
        None.
        """
        return ()

    def waiting(self) -> tuple[events.WaitingInfo, ...]:
        """
        Nobody.
        """
        return ()

    def tell(self, event: events.Event) -> None:
        """
        Let *event* have happened.
        """
        self.outbox.append(event)
        self.outbox.deliver()


@pytest.mark.parametrize(("event", "kind", "text"), TOLD)
def test_an_event_is_told_in_words(event: events.Event, kind: str, text: str) -> None:
    """
    With the model's short name, the time, and the numbers with their units.
    """
    cache = Told()
    with Watch(cache, clock=lambda: 1000.5) as watch:
        cache.tell(event)
        (seen,) = watch.snapshot().events
    assert (seen.number, seen.at_s, seen.kind) == (1, 1000.5, kind)
    assert seen.model == "mine:float16"
    assert text in seen.text


def test_causes_are_told_apart() -> None:
    """
    Each cause of an eviction has words of its own.
    """
    cache = Told()
    with Watch(cache) as watch:
        for cause in EvictionCause:
            cache.tell(events.ModelEvicted(KEY, cause, GIB, None, 0.1))
        texts = {event.text for event in watch.snapshot().events}
    assert len(texts) == len(EvictionCause)


def test_who_asked_for_a_load_is_not_told_apart_from_it() -> None:
    """
    Others who waited for the model are.
    """
    cache = Told()
    with Watch(cache) as watch:
        cache.tell(events.ModelLoaded(KEY, 1, GIB, None, reloaded=False))
        cache.tell(events.ModelGranted(KEY, 1))
        assert [event.kind for event in watch.snapshot().events] == ["loaded"]
        cache.tell(events.ModelGranted(ModelKey("b", "cpu", "float32"), 1))
        cache.tell(events.ModelGranted(KEY, 2))
        kinds = [event.kind for event in watch.snapshot().events]
    assert kinds == ["loaded", "granted", "granted"]


def test_what_happens_to_a_device_is_told_of_the_device() -> None:
    """
    It warms up, or is lost; not the model that noticed.
    """
    cache = Told()
    with Watch(cache) as watch:
        cache.tell(events.DeviceWarmingUp(KEY, "cuda:0", "CUDA compiles"))
        cache.tell(events.DeviceWarmedUp(KEY, "cuda:0", 28.4, GIB))
        cache.tell(events.DeviceLost(KEY, "cuda:0", "illegal memory access"))
        told = watch.snapshot().events
    assert {seen.model for seen in told} == {"cuda:0"}
    assert [seen.kind for seen in told] == ["loading", "loaded", "warning"]
    assert [seen.text for seen in told] == [
        "warms up: CUDA compiles",
        "warmed up in 28.40 s",
        "is lost for this process: illegal memory access",
    ]


def test_only_the_last_events_are_remembered_and_none_after_the_end() -> None:
    """
    Their numbers count on, so that a reader knows which are new.
    """
    cache = Told()
    with Watch(cache) as watch:
        for _ in range(EVENTS + 10):
            cache.tell(events.ModelGranted(KEY, 1))
        numbers = [event.number for event in watch.snapshot().events]
        assert numbers == list(range(11, EVENTS + 11))
    cache.tell(events.ModelGranted(KEY, 1))
    assert [event.number for event in watch.snapshot().events] == numbers


def test_a_snapshot_is_what_the_cache_does_now(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    Devices, models by the names given, and who waits; and it survives JSON.
    """
    cache = make_cache(vram="4GiB", keep_alive=60)
    loader.fail_loads["tiny"] = [RuntimeError("broken")]
    names = {"base": "b", "large-v3": "big"}
    driver = ThreadDriver()
    with Watch(cache, lambda key: names.get(key.model, key.model)) as watch:
        lease = cache.lease("medium", "cuda:0")
        with loader.holding_loads("base") as gate:
            waiter = driver.waiting(cache, "base", "cuda:0")
            clock.tick(3)
            seen = watch.snapshot()
            gate.open()
        waiter.result(10).release()
        lease.release()
        with pytest.raises(LoadFailed):
            cache.preload("tiny", "cpu")
        settle(cache)
        clock.tick(20)
        after = watch.snapshot()
    base, medium = seen.models
    assert (base.key.model, base.state, base.leases) == ("b", "loading", 0)
    assert (medium.key.model, medium.state, medium.leases) == ("medium", "resident", 1)
    assert medium.bytes == medium.weights_bytes + medium.workspace_bytes == 3 * GIB
    (request,) = seen.waiting
    assert ([key.model for key in request.keys], request.waited_s) == (["b"], 3.0)
    assert seen.stats == cache_stats_then(seen)
    assert [(m.key.model, m.idle_s, m.expires_in_s) for m in after.models] == [
        ("b", 20.0, 40.0),
        ("medium", 20.0, 40.0),
    ]
    assert "failed" in [event.kind for event in after.events]
    for snapshot in (seen, after):
        text = json.dumps(snapshot.as_json())
        assert Snapshot.from_json(json.loads(text)).as_json() == snapshot.as_json()


def test_a_cache_shows_itself(
    make_cache: MakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Once, where there is no terminal; it is no longer watched then.
    """
    cache = make_cache(vram="4GiB")
    cache.preload("medium", "cuda:0")
    cache.top()
    shown = capsys.readouterr().out
    assert "medium" in shown
    assert "3.0 GiB" in shown
    assert not cache._core.outbox._listeners


def cache_stats_then(seen: Snapshot) -> events.Stats:
    """
    What the counters must have been: two requests, of which one waits.
    """
    assert seen.stats.load_s >= 0
    return events.Stats(
        requests=2,
        misses=2,
        loads=1,
        leases=1,
        waiting=1,
        load_s=seen.stats.load_s,
        wait_s=seen.stats.wait_s,
    )


def test_fields_of_a_newer_version_are_passed_over() -> None:
    """
    A terminal may be older than the server that it watches.
    """
    document: dict[str, Any] = Watch(Told()).snapshot().as_json()
    document["mood"] = "sunny"
    document["stats"]["naps"] = 3
    assert Snapshot.from_json(document).stats == events.Stats()


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        None,
        {"at_s": 1, "devices": 3, "models": [], "waiting": [], "events": []},
        dict.fromkeys(("at_s", "devices", "waiting", "events", "stats"), ())
        | {"models": [{}]},
    ],
)
def test_what_is_no_snapshot_is_refused(document: Any) -> None:
    """
    With one kind of error, whatever it is.
    """
    with pytest.raises(ValueError, match="no snapshot"):
        Snapshot.from_json(document)
