"""
Metrics: the figures of a cache for Prometheus. Needs the extra ``[metrics]``.

::

    from prometheus_client import REGISTRY, start_http_server
    from whispercache.metrics import CacheCollector

    REGISTRY.register(CacheCollector(cache))
    start_http_server(9100)
"""

from __future__ import annotations

import itertools
import threading
import weakref
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
except ImportError as _missing:
    raise ImportError(
        "whispercache.metrics needs prometheus-client: "
        "run pip install 'whispercache[metrics]'"
    ) from _missing

from .cache import ModelCache
from .engine.naming import short_name
from .events import EvictionCause, ModelEvicted, ModelGranted, ModelLoaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client.core import Metric

    from .async_cache import AsyncModelCache
    from .events import Event

__all__ = ["BUCKETS_S", "CacheCollector"]

# fmt: off
BUCKETS_S = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0
)
# fmt: on
"""
Upper bounds in seconds of the buckets of loads and of waits, which are mostly for
loads: a tenth of a second for a small model in the page cache, a minute for the largest
from a slow disk.
"""

# From `Stats`: the name without ``_total``, the field of Stats, the help.
_COUNTERS = (
    ("requests", "requests", "Leases asked for: hits and misses."),
    ("hits", "hits", "Requests that found their model in memory."),
    ("misses", "misses", "Requests that did not find their model in memory."),
    ("loads", "loads", "Loads that succeeded, reloads included."),
    ("reloads", "reloads", "Loads of the weights alone."),
    ("restores", "restores", "Those of them that took a copy in host memory."),
    ("load_failures", "load_failures", "Loads that failed."),
    ("timeouts", "timeouts", "Requests that were not served in time."),
    ("refused", "refused", "Requests that found the queue full."),
    ("deadlocks", "deadlocks", "Requests that failed so that others were served."),
    ("fallbacks", "fallbacks", "Requests that got a model of their fallback ladder."),
    ("unconfirmed_unloads", "unconfirmed", "Unloads that had to be tried again."),
)
_GAUGES = (
    ("leases", "leases", "Leases held now."),
    ("waiting_requests", "waiting", "Requests that wait now: the length of the queue."),
)
# From `DeviceInfo`; by device.
_DEVICE_GAUGES = (
    ("capacity_bytes", "Bytes that the cache may use now, by its limit and the gauge."),
    ("charged_bytes", "Bytes counted for models, their work and loads under way."),
    ("peak_bytes", "Largest that the charged bytes have been."),
    ("shell_bytes", "Bytes that unloaded models keep to be reloaded faster."),
    ("copies_bytes", "Copies on the host of weights that are on a GPU as well."),
    ("unreturned_bytes", "Bytes that unloads did not visibly give back."),
    ("floor_bytes", "Bytes that the process keeps of a GPU; absent until measured."),
    ("limit_bytes", "The limit that was set; absent without one."),
)
_SINCE = "counted since the cache was added to the collector."


class CacheCollector:
    """
    A collector for a Prometheus registry, of one or several caches.

    Counters and gauges are the cache's own figures, as they are when they are asked
    for. Evictions by cause and the two histograms are counted from events, from `add`
    on. A cache is not kept alive: its metrics end when it is collected. A closed cache
    reports its last figures until then.

    A registry wants each name from one collector, so further caches are for `add`, each
    with its own ``cache`` label. With several worker processes, each has to be asked on
    a port of its own: prometheus-client's multiprocess mode knows no custom collectors.

    Safe to use from any thread. `collect` waits for no load and no lease.

    Args:
        cache: The first cache, if any.
        name: Its ``cache`` label.
    """

    def __init__(
        self,
        cache: ModelCache | AsyncModelCache | None = None,
        *,
        name: str = "default",
    ) -> None:
        self._adding = threading.Lock()
        # Replaced, never changed: to collect takes no lock, not even after a fork.
        self._watched: tuple[_Watched, ...] = ()
        if cache is not None:
            self.add(cache, name=name)

    def add(
        self, cache: ModelCache | AsyncModelCache, *, name: str
    ) -> Callable[[], None]:
        """
        Adds *cache*, with *name* as its ``cache`` label.

        Returns:
            A function that removes it.

        Raises:
            ValueError: another cache goes by that name.
        """
        with self._adding:
            # A name is free again once its cache was collected.
            present = [other for other in self._watched if other.cache() is not None]
            if any(other.name == name for other in present):
                raise ValueError(f"there is a cache named {name!r} already")
            watched = _Watched(name, cache)
            self._watched = (*present, watched)

        def remove() -> None:
            with self._adding:
                others = (other for other in self._watched if other is not watched)
                self._watched = tuple(others)
            watched.end()

        return remove

    def close(self) -> None:
        """
        Removes all caches. The caches themselves go on.
        """
        with self._adding:
            watched, self._watched = self._watched, ()
        # Without the lock: a subscription's end takes one of the cache's.
        for one in watched:
            one.end()

    def describe(self) -> list[Metric]:
        """
        Returns the metrics without samples, so that registering asks no cache.
        """
        return _Page().families()

    def collect(self) -> list[Metric]:
        """
        Returns the metrics as they are now.
        """
        page = _Page()
        for watched in self._watched:
            # A cache that has just gone has no figures.
            if (cache := watched.cache()) is not None:
                page.add(watched, cache)
        return page.families()


@dataclass(frozen=True, slots=True)
class _Histogram:
    """
    A count of seconds by bucket. A further value makes a new one.
    """

    counts: tuple[int, ...] = (0,) * (len(BUCKETS_S) + 1)  # the last: beyond them
    sum_s: float = 0.0

    def plus(self, value_s: float) -> _Histogram:
        counts = list(self.counts)
        counts[bisect_left(BUCKETS_S, value_s)] += 1
        return _Histogram(tuple(counts), self.sum_s + value_s)

    def buckets(self) -> list[tuple[str, float]]:
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))


class _Watched:
    """
    One cache of a collector, not kept alive by it, and what is counted from its events.

    An outbox delivers one event at a time, so there is one writer; readers see each
    field before an event or after it, never half of it.
    """

    def __init__(self, name: str, cache: ModelCache | AsyncModelCache) -> None:
        plain = cache if isinstance(cache, ModelCache) else cache.cache
        self.name = name
        self.cache = weakref.ref(plain)
        self.load_s = _Histogram()
        self.wait_s = _Histogram()
        self.evictions = dict.fromkeys(EvictionCause, 0)
        self.end = plain.subscribe(self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, ModelLoaded):
            self.load_s = self.load_s.plus(event.load_s)
        elif isinstance(event, ModelGranted):
            self.wait_s = self.wait_s.plus(event.wait_s)
        elif isinstance(event, ModelEvicted):
            before = self.evictions[event.cause]
            self.evictions = {**self.evictions, event.cause: before + 1}


class _Page:
    def __init__(self) -> None:
        self._counters = {
            field: CounterMetricFamily(f"whispercache_{name}", text, labels=["cache"])
            for name, field, text in _COUNTERS
        }
        self._evictions = CounterMetricFamily(
            "whispercache_evictions",
            f"Models that were unloaded, by cause; {_SINCE}",
            labels=["cache", "cause"],
        )
        self._load_s = _histogram(
            "load", f"Seconds of each load, without waits; {_SINCE}"
        )
        self._wait_s = _histogram(
            "wait",
            f"Seconds to a lease, of requests that were not served at once; {_SINCE}",
        )
        self._gauges = {field: _gauge(name, text) for name, field, text in _GAUGES}
        self._device_gauges = {
            field: _gauge(f"device_{field}", text, "device")
            for field, text in _DEVICE_GAUGES
        }
        self._resident = _gauge(
            "device_resident_bytes", "Weights of the models in memory.", "device"
        )
        model = ("model", "device", "compute_type")
        self._model_bytes = _gauge(
            "model_bytes", "Bytes counted for a model and its calls.", *model
        )
        self._model_leases = _gauge("model_leases", "Leases held on a model.", *model)

    def families(self) -> list[Metric]:
        return [
            *self._counters.values(),
            self._evictions,
            self._load_s,
            self._wait_s,
            *self._gauges.values(),
            *self._device_gauges.values(),
            self._resident,
            self._model_bytes,
            self._model_leases,
        ]

    def add(self, watched: _Watched, cache: ModelCache) -> None:
        # One snapshot for all of them, so that hits and misses add up to requests.
        stats, name = cache.stats(), watched.name
        for field, counter in self._counters.items():
            counter.add_metric([name], getattr(stats, field))
        for field, gauge in self._gauges.items():
            gauge.add_metric([name], getattr(stats, field))
        for cause, n_models in watched.evictions.items():
            self._evictions.add_metric([name, cause.value], n_models)
        load_s, wait_s = watched.load_s, watched.wait_s
        self._load_s.add_metric([name], load_s.buckets(), load_s.sum_s)
        self._wait_s.add_metric([name], wait_s.buckets(), wait_s.sum_s)
        self._add_models(name, cache)

    def _add_models(self, name: str, cache: ModelCache) -> None:
        # Summed: models that differ only in load options have the same labels.
        n_bytes: Counter[tuple[str, ...]] = Counter()
        leases: Counter[tuple[str, ...]] = Counter()
        resident_bytes: Counter[str] = Counter()
        for model in cache.models():
            key = model.key
            labels = (name, short_name(key.model), model.device, key.compute_type)
            n_bytes[labels] += model.bytes
            leases[labels] += model.leases
            # While it loads, its bytes are those of the load.
            if model.state != "loading":
                resident_bytes[model.device] += model.weights_bytes
        for series, total in n_bytes.items():
            self._model_bytes.add_metric(series, total)
            self._model_leases.add_metric(series, leases[series])
        # Devices without a model, too, so that their series do not end.
        for device in cache.devices():
            series = (name, device.device)
            self._resident.add_metric(series, resident_bytes[device.device])
            for field, gauge in self._device_gauges.items():
                # Unknown is absent: 0 would be a figure.
                if (value := getattr(device, field)) is not None:
                    gauge.add_metric(series, value)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"whispercache_{name}", text, labels=["cache", *labels])


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"whispercache_{name}_seconds", text, labels=["cache"])
