"""
Report: what a cache tells of itself. Snapshots and events are frozen values.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from .keys import ModelKey

__all__ = [
    "DeviceInfo",
    "DeviceLost",
    "DeviceWarmedUp",
    "DeviceWarmingUp",
    "Event",
    "EvictionCause",
    "ExplainedOutcome",
    "Explanation",
    "FellBack",
    "ModelEvicted",
    "ModelGranted",
    "ModelInfo",
    "ModelLoadFailed",
    "ModelLoaded",
    "ModelLoading",
    "ModelState",
    "ModelStillReferenced",
    "Outbox",
    "ReleaseUnconfirmed",
    "Stats",
    "WaitingInfo",
]

_log = logging.getLogger("whispercache")

ModelState: TypeAlias = Literal["loading", "resident", "unloading"]
ExplainedOutcome: TypeAlias = Literal["hit", "load", "evict", "wait", "never"]


class EvictionCause(str, Enum):
    """
    Why a model left memory.
    """

    CAPACITY = "capacity"
    EXPIRED = "expired"
    EXPLICIT = "explicit"
    CLOSED = "closed"
    PRESSURE = "pressure"
    OUT_OF_MEMORY = "out_of_memory"

    @property
    def was_eviction(self) -> bool:
        """
        Whether the cache decided it, for room, for idleness or for the sake of other
        programs; not the caller.
        """
        return self not in (EvictionCause.EXPLICIT, EvictionCause.CLOSED)


@dataclass(frozen=True, slots=True)
class Event:
    """
    Something happened to a model.

    Attributes:
        key: The model.
    """

    key: ModelKey


@dataclass(frozen=True, slots=True)
class ModelLoading(Event):
    """
    A load begins.

    Attributes:
        reserved_bytes: Charged on the model's device while it loads.
    """

    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class ModelLoaded(Event):
    """
    The model is in memory.

    Attributes:
        load_s: Seconds of the load itself, without any wait for room, and without what
            its device did once (`DeviceWarmedUp`).
        charged_bytes: What the cache counts for it from now on.
        measured_bytes: Growth of memory that was seen, or None where nothing is
            measured. On a GPU that of this process's own memory pool, so that other
            programs do not move it; other work in the process does.
        reloaded: Only the weights were brought back; the rest had been kept.
        from_variant: They came from a copy that was converted before.
        restored: They came from a copy in host memory; nothing was read.
    """

    load_s: float
    charged_bytes: int
    measured_bytes: int | None
    reloaded: bool
    from_variant: bool = False
    restored: bool = False


@dataclass(frozen=True, slots=True)
class ModelLoadFailed(Event):
    """
    A load failed, and so did every request that waited for it.

    Attributes:
        reason: The loader's error in one line.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class ModelGranted(Event):
    """
    A request that was not served at once got its lease.

    A request for several models makes one event for each of them. Those that found
    their model in memory, and room for their work, make none.

    Attributes:
        wait_s: Seconds since the request, through room, loads and other callers.
    """

    wait_s: float


@dataclass(frozen=True, slots=True)
class ModelEvicted(Event):
    """
    The model left memory, and that it did was confirmed.

    Attributes:
        cause: Why.
        credited_bytes: What the cache stopped counting.
        returned_bytes: Fall of memory that was seen, or None where nothing is measured.
        unload_s: Seconds that it took, retries included.
        unreturned_bytes: What it still counts, since too little was seen to come back;
            until the gauge shows it. `DeviceInfo.unreturned_bytes` is their sum.
        parked: A copy of the weights stays in host memory.
    """

    cause: EvictionCause
    credited_bytes: int
    returned_bytes: int | None
    unload_s: float
    unreturned_bytes: int = 0
    parked: bool = False

    @property
    def predicted_bytes(self) -> int:
        """
        What was counted for the model while it was there.
        """
        return self.credited_bytes + self.unreturned_bytes


@dataclass(frozen=True, slots=True)
class ReleaseUnconfirmed(Event):
    """
    An unload did not happen, or could not be confirmed. It will be tried again.

    Attributes:
        charged_bytes: What stays counted until then.
        retry_s: Seconds until the next try.
        reason: What was seen, in one line.
    """

    charged_bytes: int
    retry_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ModelStillReferenced(Event):
    """
    The model was unloaded, but somebody still refers to the object.

    A `WhisperModel` that was kept beyond its lease cannot be used any more, and to try
    is memory-unsafe; on a GPU it keeps some memory, too.

    Attributes:
        references: How many references too many there are.
    """

    references: int


@dataclass(frozen=True, slots=True)
class DeviceWarmingUp(Event):
    """
    Before its first model in a compute type, a GPU does what it does once a process:
    it starts CUDA and cuBLAS, and compiles kernels that were not built for it.

    Attributes:
        device: Which.
        reason: What that is here, and how long it may take, in one line.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceWarmedUp(Event):
    """
    The device is ready; the load itself begins.

    Attributes:
        device: Which.
        warm_up_s: Seconds that it took. They count for no model's load.
        floor_bytes: What the process will keep of it for its life, whatever is
            unloaded: the CUDA context and kernels. None if it was not measured now.
    """

    device: str
    warm_up_s: float
    floor_bytes: int | None


@dataclass(frozen=True, slots=True)
class DeviceLost(Event):
    """
    An error left the device unusable for this process; requests for it fail from now
    on.

    Attributes:
        device: Which.
        reason: The error in one line.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """
    A request got this model from its ``fallback`` ladder, and not the one it asked for.

    Attributes:
        wanted: What it asked for.
        reason: Why that could not be had, in one line.
    """

    wanted: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stats:
    """
    Counters of a cache since it was made.

    Attributes:
        requests: Leases asked for; hits + misses.
        hits: Requests that found their model in memory.
        misses: Requests that did not.
        loads: Loads that succeeded, whether of the whole model or of its weights alone.
        reloads: Those of *loads* that brought only weights back.
        restores: Those of *reloads* that took them from a copy in host memory.
        load_failures: Loads that failed.
        evictions: Models that left memory, whatever the cause.
        unconfirmed: Unloads that did not happen at the first try.
        timeouts: Requests that were not served in time.
        refused: Requests that found ``max_waiting`` others in the queue.
        deadlocks: Requests that failed so that others could be served.
        fallbacks: Requests that got a model of their ``fallback`` ladder.
        load_s: Seconds spent in loads.
        wait_s: Seconds that requests waited, for room and for loads.
        waiting: Requests that wait now.
        leases: Leases held now.
    """

    requests: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    reloads: int = 0
    restores: int = 0
    load_failures: int = 0
    evictions: int = 0
    unconfirmed: int = 0
    timeouts: int = 0
    refused: int = 0
    deadlocks: int = 0
    fallbacks: int = 0
    load_s: float = 0.0
    wait_s: float = 0.0
    waiting: int = 0
    leases: int = 0

    @property
    def hit_ratio(self) -> float:
        """
        Hits as a share of requests, 0 to 1; 0 before the first.
        """
        return self.hits / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """
    One model that is in memory, or on its way in or out.

    Attributes:
        key: The model.
        state: ``"loading"``, ``"resident"`` or ``"unloading"``.
        device: Where.
        weights_bytes: Counted for the model itself; while it loads, for the load.
        workspace_bytes: Counted for the calls that its leases may make.
        leases: How many hold it.
        pinned: Whether it stays when idle.
        idle_s: Seconds since its last lease ended; None while one is held.
        expires_in_s: Seconds until it leaves for idleness; None while it is leased,
            pinned, or kept for ever.
        loads: How often it was loaded.
        load_s: Seconds of its last load.
        measured_bytes: By how much memory grew at its last load, beside *weights_bytes*
            that were predicted; None where nothing was measured.
        copy_bytes: What a copy of its weights takes of the host's memory.
    """

    key: ModelKey
    state: ModelState
    device: str
    weights_bytes: int
    workspace_bytes: int
    leases: int
    pinned: bool
    idle_s: float | None
    expires_in_s: float | None
    loads: int
    load_s: float
    measured_bytes: int | None = None
    copy_bytes: int = 0

    @property
    def bytes(self) -> int:
        """
        All that is counted for it.
        """
        return self.weights_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class WaitingInfo:
    """
    One request that waits for its models.

    Attributes:
        keys: The models that it wants, all or nothing.
        waited_s: Seconds since it was made.
    """

    keys: tuple[ModelKey, ...]
    waited_s: float


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """
    What the cache holds of one device's memory.

    Attributes:
        device: Its name.
        limit_bytes: The limit that was set, or None.
        capacity_bytes: What the cache may use now, by the limit and by the gauge.
        charged_bytes: What it counts for models and their work now.
        peak_bytes: Largest that *charged_bytes* has been.
        models: How many models are there, or on their way in or out.
        shell_bytes: What models that have left keep of it so that they return faster,
            such as their tokenizers, or on the host copies of weights
            (``ModelCache(park=…)``). Not in *charged_bytes*: it gives way to anything.
        copies_bytes: On the host, copies of weights that are on a GPU as well. In
            *charged_bytes*.
        unreturned_bytes: What models that have left did not visibly give back. In
            *charged_bytes*, until the gauge shows it.
        floor_bytes: What the process keeps of a GPU for its life; None as long as it
            was not measured. Not in *charged_bytes*.
    """

    device: str
    limit_bytes: int | None
    capacity_bytes: int
    charged_bytes: int
    peak_bytes: int
    models: int
    shell_bytes: int = 0
    copies_bytes: int = 0
    unreturned_bytes: int = 0
    floor_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """
    What a request would do now; nothing was changed to find out.

    Attributes:
        key: The model that would answer.
        outcome: ``"hit"``, ``"load"``, ``"evict"`` (then load), ``"wait"`` or
            ``"never"``.
        needed_bytes: What the request would add on its device; for a load, its peak.
        free_bytes: What the cache could still use there.
        capacity_bytes: All that the cache can use there.
        evicts: The idle models that would leave, in that order.
        reason: The same in one sentence.
    """

    key: ModelKey
    outcome: ExplainedOutcome
    needed_bytes: int
    free_bytes: int
    capacity_bytes: int
    evicts: tuple[ModelKey, ...]
    reason: str


class Outbox:
    """
    Delivers events in the order in which they happened, whichever thread delivers.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._delivering = threading.Lock()
        self._subscribing = threading.Lock()
        self._listeners: tuple[Callable[[Event], None], ...] = ()

    def append(self, event: Event) -> None:
        """
        Note an event. Nothing is called; a cache does this under its lock.
        """
        self._events.append(event)

    def __len__(self) -> int:
        return len(self._events)

    def copy(self) -> Outbox:
        """
        Another one with the same listeners, and no events.
        """
        other = Outbox()
        other._listeners = self._listeners
        return other

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """
        Add a listener; returns how to remove it.
        """
        with self._subscribing:
            self._listeners = (*self._listeners, listener)

        def unsubscribe() -> None:
            with self._subscribing:
                self._listeners = tuple(
                    other for other in self._listeners if other is not listener
                )

        return unsubscribe

    def deliver(self) -> None:
        """
        Call the listeners with all events so far.

        If another thread is at it, or a listener caused this very event, that one goes
        on with the new events and this call returns at once.
        """
        while self._events and self._delivering.acquire(blocking=False):
            try:
                while self._events:
                    self._tell(self._events.popleft())
            finally:
                self._delivering.release()

    def _tell(self, event: Event) -> None:
        _log.debug("%s", event)
        for listener in self._listeners:
            try:
                listener(event)
            except BaseException:  # also sys.exit(): whose thread it is, is chance
                _log.exception("a listener failed on %s", event)
