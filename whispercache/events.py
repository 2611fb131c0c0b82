"""
Events and snapshots: what a cache reports of itself, as frozen values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from .keys import ModelKey

ModelState: TypeAlias = Literal["loading", "resident", "unloading"]
ExplainedOutcome: TypeAlias = Literal["hit", "load", "evict", "wait", "never"]


class EvictionCause(str, Enum):
    """
    The reason why a model was unloaded.
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
        True if the cache decided it, for memory, for idleness or for other programs;
        False if the caller did.
        """
        return self not in (EvictionCause.EXPLICIT, EvictionCause.CLOSED)


@dataclass(frozen=True, slots=True)
class Event:
    """
    An event in the life of a model.

    Attributes:
        key: The model.
    """

    key: ModelKey


@dataclass(frozen=True, slots=True)
class ModelLoading(Event):
    """
    A load began.

    Attributes:
        reserved_bytes: Bytes that are charged on the model's device while it loads.
    """

    reserved_bytes: int


@dataclass(frozen=True, slots=True)
class ModelLoaded(Event):
    """
    A model was loaded.

    Attributes:
        load_s: Seconds of the load itself, without any wait for memory, and without the
            warm-up of its device (`DeviceWarmedUp`).
        charged_bytes: Bytes that the cache counts for it from now on.
        measured_bytes: Growth of memory that was seen, or None where nothing is
            measured. On a GPU it is that of this process's own memory pool, which other
            programs do not change; other work in the process does.
        reloaded: Only the weights were reloaded; the rest had been kept.
        from_variant: They came from a variant, which was converted before.
        restored: They came from a host copy; nothing was read.
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
        wait_s: Seconds since the request, through evictions, loads and other callers.
    """

    wait_s: float


@dataclass(frozen=True, slots=True)
class ModelEvicted(Event):
    """
    A model was unloaded, which was confirmed.

    Attributes:
        cause: The reason.
        credited_bytes: Bytes that the cache stopped counting.
        returned_bytes: Fall of memory that was seen, or None where nothing is measured.
        unload_s: Seconds that it took, retries included.
        unreturned_bytes: Bytes that it still counts, since less memory was seen to
            return, until the gauge shows them. `DeviceInfo.unreturned_bytes` is their
            sum.
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
        The bytes that were counted for the model while it was in memory.
        """
        return self.credited_bytes + self.unreturned_bytes


@dataclass(frozen=True, slots=True)
class ReleaseUnconfirmed(Event):
    """
    An unload did not happen, or could not be confirmed. It will be tried again.

    Attributes:
        charged_bytes: Bytes that stay counted until then.
        retry_s: Seconds until the next try.
        reason: What was seen instead, in one line.
    """

    charged_bytes: int
    retry_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ModelStillReferenced(Event):
    """
    A model was unloaded, but CTranslate2's part of it is still referred to.

    ``whisper.model`` of a lease that was kept beyond it cannot be used any more, and to
    try is memory-unsafe; on a GPU it keeps some memory, too. The ``whisper`` itself may
    be kept, by frames of an error, say: it refers to the model no more.

    Attributes:
        references: Number of references that are left over.
    """

    references: int


@dataclass(frozen=True, slots=True)
class DeviceWarmingUp(Event):
    """
    A GPU began the work that it does once, before its first model in a compute type: it
    starts CUDA and cuBLAS, and compiles kernels that were not built for it.

    Attributes:
        device: The GPU.
        reason: The work that is needed here, and how long it may take, in one line.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceWarmedUp(Event):
    """
    A GPU is ready, and the load itself begins.

    Attributes:
        device: The GPU.
        warm_up_s: Seconds that it took. They count for no model's load.
        floor_bytes: Bytes that the process keeps of it for its life, whatever is
            unloaded: the CUDA context and kernels. None if it was not measured now.
    """

    device: str
    warm_up_s: float
    floor_bytes: int | None


@dataclass(frozen=True, slots=True)
class DeviceLost(Event):
    """
    An error made a device unusable for this process; requests for it fail from now on.

    Attributes:
        device: The device.
        reason: The error in one line.
    """

    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class NoRoom(Event):
    """
    A request failed, or took its ``fallback``, since its model cannot have the memory
    that it needs: other programs hold it, or a limit is too low. As soon as they let go
    of it, the next request has it.

    Attributes:
        device: The device.
        needed_bytes: Bytes that the request needed.
        reachable_bytes: Bytes that it could have had, if all that is idle were evicted.
        reason: The cause in one line.
    """

    device: str
    needed_bytes: int
    reachable_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class BatchStopped(Event):
    """
    A batch gave this model back between two segments, for requests of a higher
    priority. It goes on once it has it again.
    """


@dataclass(frozen=True, slots=True)
class FellBack(Event):
    """
    A request got this model from its ``fallback`` ladder, and not the one it asked for.

    Attributes:
        wanted: The model that it asked for.
        reason: The error that it would have got, in one line.
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
        reloads: Those of *loads* that loaded only weights.
        restores: Those of *reloads* that took them from a host copy.
        load_failures: Loads that failed.
        evictions: Models that were unloaded, whatever the cause.
        unconfirmed: Unloads that did not happen at the first try.
        timeouts: Requests that were not served in time.
        refused: Requests that found ``max_waiting`` others in the queue.
        deadlocks: Requests that failed so that others could be served.
        fallbacks: Requests that got a model of their ``fallback`` ladder.
        batch_stops: Times that a batch gave its model back for others, between two
            segments.
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
    batch_stops: int = 0
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
    A model that is in memory, or being loaded or unloaded.

    Attributes:
        key: The model.
        state: ``"loading"``, ``"resident"`` or ``"unloading"``.
        device: Its device.
        weights_bytes: Bytes counted for the model itself; while it loads, for the load.
        workspace_bytes: Bytes counted for the calls that its leases may make.
        leases: Number of leases on it.
        pinned: True if it stays when idle.
        idle_s: Seconds since its last lease ended; None while one is held.
        expires_in_s: Seconds until it is evicted for idleness; None while it is leased,
            pinned, or kept for ever.
        loads: Number of times that it was loaded.
        load_s: Seconds of its last load.
        measured_bytes: Growth of memory at its last load, to compare with the predicted
            *weights_bytes*; None where nothing was measured.
        copy_bytes: Host memory that a copy of its weights takes.
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
        All bytes that are counted for it.
        """
        return self.weights_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class WaitingInfo:
    """
    A request that waits for its models.

    Attributes:
        keys: The models that it wants, all or nothing.
        waited_s: Seconds since it was made.
        priority: Its level: the higher, the sooner is its turn; 0 is usual, -1 a batch.
    """

    keys: tuple[ModelKey, ...]
    waited_s: float
    priority: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """
    The memory of one device, as the cache uses it.

    Attributes:
        device: Its name.
        limit_bytes: The limit that was set, or None.
        capacity_bytes: Bytes that the cache may use now, by the limit and by the gauge.
        charged_bytes: Bytes that it counts for models and their work now.
        peak_bytes: Largest that *charged_bytes* has been.
        models: Number of models that are there, or being loaded or unloaded.
        shell_bytes: Bytes that unloaded models keep so that they are reloaded faster:
            their tokenizers, and on the host copies of weights
            (``ModelCache(park=…)``). Not in *charged_bytes*, since they give way to
            anything else.
        copies_bytes: On the host, copies of weights that are on a GPU as well. In
            *charged_bytes*.
        unreturned_bytes: Bytes that unloads did not visibly give back. In
            *charged_bytes*, until the gauge shows them.
        floor_bytes: Bytes that the process keeps of a GPU for its life; None as long as
            they were not measured. Not in *charged_bytes*.
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
    The outcome that a request would have now; nothing was changed to find out.

    Attributes:
        key: The model that would answer.
        outcome: ``"hit"``, ``"load"``, ``"evict"`` (then load), ``"wait"`` or
            ``"never"``.
        needed_bytes: Bytes that the request would add on its device; for a load, its
            peak.
        free_bytes: Bytes that the cache could still use there.
        capacity_bytes: All bytes that the cache can use there.
        evicts: The idle models that would be evicted, in that order.
        reason: The same in one sentence.
    """

    key: ModelKey
    outcome: ExplainedOutcome
    needed_bytes: int
    free_bytes: int
    capacity_bytes: int
    evicts: tuple[ModelKey, ...]
    reason: str
