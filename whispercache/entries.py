"""
The books: what the cache knows of each model, device and waiting request.

Plain bookkeeping. All of it is guarded by the cache's one lock; nothing here waits,
loads or calls out.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from .admission import Demand, Need, Pending, Resident, Room, next_gap_s
from .footprint import DEFAULT_WORKLOAD
from .memory import headroom_bytes
from .threads import DeviceThread

if TYPE_CHECKING:
    from .events import EvictionCause
    from .footprint import Footprint, Workload
    from .keys import ModelKey
    from .lease import Lease
    from .loader import LoadedModel, ModelFiles
    from .memory import MemoryReading
    from .units import Limit

__all__ = ["Device", "Entry", "State", "Waiter"]


class State(str, Enum):
    """
    Where a model is on its way through memory.
    """

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    UNLOADING = "unloading"


class Device:
    """
    The memory of one device, as the cache may use it.
    """

    def __init__(self, name: str, limit: Limit, max_models: int | None) -> None:
        self.name: str = name
        self.limit: Limit = limit
        self.max_models: int | None = max_models
        self.entries: dict[ModelKey, Entry] = {}  # all that are not absent
        # Idle models, as a set in order. A lease takes its model off, the last release
        # puts it back at the end: this is the order of release.
        self.shelf: dict[Entry, None] = {}
        self.charged_bytes: int = 0
        self.peak_bytes: int = 0
        self.total_bytes: int | None = None
        self.limit_bytes: int | None = None
        self.capacity_bytes: int = 0  # what may be charged now
        self.ceiling_bytes: int = 0  # what might be, if all leases ended
        self.loads_begun: int = 0
        self.is_stale: bool = False  # whether the gauge would tell something new
        self.thread: DeviceThread = DeviceThread(name)
        self._gauge_capacity_bytes: int | None = None
        self._gauge_ceiling_bytes: int | None = None
        self.set_limit(limit)

    def set_limit(self, limit: Limit) -> None:
        """
        Set the most that may be charged; the gauge may allow less.
        """
        self.limit = limit
        known = self.total_bytes is not None or limit.fraction is None
        self.limit_bytes = limit.of(self.total_bytes or 0) if known else None
        self.capacity_bytes = self._least(self._gauge_capacity_bytes)
        self.ceiling_bytes = self._least(self._gauge_ceiling_bytes)

    def _least(self, gauge_bytes: int | None) -> int:
        known = [n for n in (self.limit_bytes, gauge_bytes) if n is not None]
        return min(known, default=0)

    @property
    def is_over_limit(self) -> bool:
        """
        Whether a limit was lowered below what is held.
        """
        too_many = self.max_models is not None and len(self.entries) > self.max_models
        return too_many or (
            self.limit_bytes is not None and self.charged_bytes > self.limit_bytes
        )

    def charge(self, n_bytes: int) -> None:
        """
        Count *n_bytes* more; fewer if negative.
        """
        self.charged_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.charged_bytes)

    @property
    def is_moving(self) -> bool:
        """
        Whether a load or an unload is in flight, so that the gauge shows neither state.
        """
        moving = (State.LOADING, State.UNLOADING)
        return any(entry.state in moving for entry in self.entries.values())

    def observe(self, reading: MemoryReading) -> None:
        """
        Take a reading of the gauge into account, unless something moves just now.

        What is free does not show the work that leased models have not begun, so for
        what may be charged only their weights are added to it.
        """
        if self.is_moving and self._gauge_capacity_bytes is not None:
            return
        self.is_stale = False
        self.total_bytes = reading.total_bytes
        usable_bytes = reading.free_bytes - headroom_bytes(
            self.name, reading.total_bytes
        )
        weights_bytes = sum(entry.weights_bytes for entry in self.entries.values())
        self._gauge_capacity_bytes = max(0, usable_bytes + weights_bytes)
        self._gauge_ceiling_bytes = max(0, usable_bytes + self.charged_bytes)
        self.set_limit(self.limit)

    def room(self) -> Room:
        """
        A scratch copy for `admission.plan`.
        """
        held = self.entries.values()
        coming = [entry for entry in held if entry.state is State.UNLOADING]
        pinned = [entry for entry in held if entry.stays]
        return Room(
            capacity_bytes=self.capacity_bytes,
            ceiling_bytes=self.ceiling_bytes,
            charged_bytes=self.charged_bytes,
            coming_bytes=sum(entry.weights_bytes for entry in coming),
            pinned_bytes=sum(entry.weights_bytes for entry in pinned),
            max_models=self.max_models,
            models=len(held),
            coming_models=len(coming),
            pinned_models=len(pinned),
        )


class Entry:
    """
    One model, whether it is in memory or not.
    """

    __slots__ = (
        "cause",
        "default_workspace_bytes",
        "device",
        "drained_for",
        "expires_at_s",
        "files",
        "footprints",
        "gap_s",
        "gone",
        "host",
        "host_bytes",
        "key",
        "last_used_s",
        "leases",
        "load_s",
        "loaded",
        "loads",
        "locating",
        "num_workers",
        "pinned",
        "refusals",
        "state",
        "unload_started_s",
        "weights_bytes",
        "workspace_bytes",
    )

    def __init__(self, key: ModelKey, device: Device, host: Device) -> None:
        self.key: ModelKey = key
        self.device: Device = device
        self.host: Device = host
        self.state: State = State.ABSENT
        self.files: ModelFiles | None = None
        self.footprints: dict[Workload, Footprint] = {}
        self.default_workspace_bytes: int | None = None
        self.locating: threading.Lock = (
            threading.Lock()
        )  # one look at the disk, one download at a time
        self.loaded: LoadedModel | None = None
        self.weights_bytes: int = 0
        self.workspace_bytes: int = 0
        self.host_bytes: int = 0
        self.leases: dict[int, int] = {}  # serial number: workspace bytes
        self.pinned: bool = False
        self.expires_at_s: float = math.inf
        self.last_used_s: float | None = None  # when its last lease ended
        self.gap_s: float | None = None
        self.loads: int = 0
        self.load_s: float = 0.0
        self.cause: EvictionCause | None = None  # why it leaves, or will when idle
        self.drained_for: Waiter | None = None
        self.refusals: int = 0
        self.unload_started_s: float = 0.0
        self.gone: list[Future[None]] = []
        self.num_workers: int = key.num_workers

    @property
    def stays(self) -> bool:
        """
        Whether it is pinned, and nobody is evicting it.
        """
        return self.pinned and self.cause is None

    @property
    def is_idle(self) -> bool:
        """
        Whether it is in memory and nobody holds it.
        """
        return self in self.device.shelf

    @property
    def is_present(self) -> bool:
        """
        Whether it is in memory, or on its way in or out.
        """
        return self.state is not State.ABSENT

    def located(self, files: ModelFiles, footprints: dict[Workload, Footprint]) -> None:
        """
        Remember where the files are and what they will take.
        """
        if self.state is State.ABSENT:
            self.files = files
            self.footprints = {**self.footprints, **footprints}
        else:
            # What is in memory, or on its way, stays counted as it was.
            self.footprints = {**footprints, **self.footprints}
        footprint = self.footprints[DEFAULT_WORKLOAD]
        self.default_workspace_bytes = footprint.workspace_bytes

    def workspace_of(self, workload: Workload) -> int | None:
        """
        Bytes of work of one call; None if the model was not located for it.
        """
        if workload is DEFAULT_WORKLOAD:  # spares hashing it on every hit
            return self.default_workspace_bytes
        footprint = self.footprints.get(workload)
        return None if footprint is None else footprint.workspace_bytes

    def workspace_with(self, n_bytes: int) -> int:
        """
        What all leases may use at once, with one more of *n_bytes*.

        A model runs ``num_workers`` calls at a time; the others queue inside it.
        """
        if not self.leases:
            return n_bytes
        running = min(len(self.leases) + 1, self.num_workers)
        return max(n_bytes, *self.leases.values()) * running

    def demand(self, workload: Workload) -> tuple[Demand, ...]:
        """
        What a lease adds to a resident model, or a load to an absent one.
        """
        footprint = self.footprints[workload]
        if self.state is State.RESIDENT:
            total_bytes = self.workspace_with(footprint.workspace_bytes)
            extra_bytes = max(0, total_bytes - self.workspace_bytes)
            return (Demand(self.device.name, extra_bytes),)
        demand = Demand(self.device.name, footprint.total_bytes, models=1)
        if self.host is self.device or not footprint.host_loading_bytes:
            return (demand,)
        return demand, Demand(self.host.name, footprint.host_loading_bytes)

    def fits(self, n_bytes: int) -> bool:
        """
        Whether one more lease with *n_bytes* of work can be granted at once.
        """
        extra_bytes = self.workspace_with(n_bytes) - self.workspace_bytes
        device = self.device
        return (
            extra_bytes <= 0
            or device.charged_bytes + extra_bytes <= device.capacity_bytes
        )

    def charge(self, weights_bytes: int, *, host_bytes: int = 0) -> None:
        """
        Set what is counted for the model itself, and on the host while it loads.
        """
        self.device.charge(weights_bytes - self.weights_bytes)
        self.host.charge(host_bytes - self.host_bytes)
        self.weights_bytes = weights_bytes
        self.host_bytes = host_bytes

    def take(self, serial: int, n_bytes: int, now_s: float) -> None:
        """
        Note one more lease with *n_bytes* of work.
        """
        if not self.leases:
            self.device.shelf.pop(self, None)
            if self.last_used_s is not None:
                self.gap_s = next_gap_s(self.gap_s, now_s - self.last_used_s)
        self._set_workspace(self.workspace_with(n_bytes))
        self.leases[serial] = n_bytes

    def give_back(self, serial: int) -> bool:
        """
        Note the end of a lease; whether it was one.
        """
        if self.leases.pop(serial, None) is None:
            return False
        if not self.leases:
            self._set_workspace(0)
            return True
        running = min(len(self.leases), self.num_workers)
        self._set_workspace(max(self.leases.values()) * running)
        return True

    def _set_workspace(self, n_bytes: int) -> None:
        if n_bytes != self.workspace_bytes:
            self.device.charge(n_bytes - self.workspace_bytes)
            self.workspace_bytes = n_bytes

    def is_open_to(self, waiter: Waiter | None) -> bool:
        """
        Whether a new lease may be granted: in memory, not to leave, not kept back.
        """
        return (
            self.state is State.RESIDENT
            and self.cause is None
            and self.drained_for in (None, waiter)
        )

    def resident(self) -> Resident:
        """
        The model as a policy sees it.
        """
        return Resident(
            key=self.key,
            device=self.device.name,
            weights_bytes=self.weights_bytes,
            last_used_s=self.last_used_s or 0.0,
            gap_s=self.gap_s or 0.0,
            cost_s=self.load_s,
        )

    def check(self) -> None:
        """
        Assert that the books of this model agree with its state.
        """
        key, state = self.key, self.state
        present = self.device.entries.get(key) is self
        assert present is (state is not State.ABSENT), f"{key} is {state}"
        assert not self.leases or state is State.RESIDENT, f"{key} leased, {state}"
        idle = state is State.RESIDENT and not self.leases
        assert self.is_idle is idle, f"{key} idle: {idle}"
        assert self.weights_bytes >= 0 and (present or not self.weights_bytes), key
        loaded = state in (State.RESIDENT, State.UNLOADING)
        assert (self.loaded is not None) is loaded, f"{key} is {state}"
        assert bool(self.leases) or not self.workspace_bytes, f"{key} works unleased"


@dataclass(eq=False, slots=True)
class Waiter:
    """
    A request in the queue. Its future is done once, with a lease or an error.
    """

    entry: Entry
    workload: Workload
    keep_alive_s: float | None
    since_s: float
    future: Future[Lease] = field(default_factory=Future)
    overtaken: int = 0
    draining: list[Entry] = field(default_factory=list)

    def pending(self, *, impatient: bool) -> Pending:
        """
        The request as `admission.plan` sees it.
        """
        entry = self.entry
        if entry.state is State.ABSENT:
            need, own_bytes = Need.LOAD, 0
        elif entry.is_open_to(self):
            need = Need.WORKSPACE
            own_bytes = 0 if entry.pinned else entry.weights_bytes
        else:
            return Pending(entry.key, Need.NOTHING)
        demands = entry.demand(self.workload)
        return Pending(entry.key, need, demands, own_bytes, self.overtaken, impatient)
