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

from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.planning.planner import (
    Demand,
    Need,
    Pending,
    Resident,
    Room,
    next_gap_s,
)

from .budget import Budget, Use
from .threads import DeviceThread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whispercache.engine.api import LoadedModel
    from whispercache.engine.files import ModelFiles
    from whispercache.engine.sizes.footprint import Footprint, Workload
    from whispercache.events import EvictionCause
    from whispercache.keys import ModelKey
    from whispercache.lease import Lease
    from whispercache.planning.deadlock import Owner
    from whispercache.units import Limit

__all__ = ["Device", "Entry", "Part", "State", "Waiter", "demands", "reservations"]


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
        self.max_models: int | None = max_models
        self.entries: dict[ModelKey, Entry] = {}  # all that are not absent
        # Idle models, as a set in order. A lease takes its model off, the last release
        # puts it back at the end: this is the order of release.
        self.shelf: dict[Entry, None] = {}
        self.budget: Budget = Budget(name, limit)
        self.loads_begun: int = 0
        self.is_stale: bool = False  # whether the gauge would tell something new
        self.sick: str | None = None  # the error that made it unusable
        self.shell_bytes: int = 0  # of what models left behind; gives way to anything
        self.is_shedding: bool = False  # shells are about to go
        self.is_watched: bool = False  # its gauge will be read again
        self.thread: DeviceThread = DeviceThread(name)

    @property
    def is_over_limit(self) -> bool:
        """
        Whether a limit was lowered below what is held.
        """
        too_many = self.max_models is not None and len(self.entries) > self.max_models
        return too_many or self.budget.is_over_limit

    @property
    def has_too_many_shells(self) -> bool:
        """
        Whether they take more than what is left.
        """
        return self.shell_bytes > max(0, self.budget.left_bytes)

    @property
    def is_moving(self) -> bool:
        """
        Whether a load or an unload is in flight, so that the gauge shows neither state.
        """
        return any(
            entry.state is State.LOADING
            # Between two tries of an unload nothing moves.
            or (entry.state is State.UNLOADING and not entry.refusals)
            for entry in self.entries.values()
        )

    def room(self) -> Room:
        """
        A scratch copy for `admission.plan`.
        """
        held = self.entries.values()
        coming = [entry for entry in held if entry.state is State.UNLOADING]
        pinned = [entry for entry in held if entry.stays]
        return Room(
            capacity_bytes=self.budget.capacity_bytes,
            ceiling_bytes=self.budget.ceiling_bytes,
            charged_bytes=self.budget.charged_bytes,
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
        "drops_copy",
        "expires_at_s",
        "failure",
        "failures",
        "files",
        "footprints",
        "gap_s",
        "gone",
        "host",
        "key",
        "last_used_s",
        "leases",
        "load_s",
        "loaded",
        "loads",
        "locating",
        "num_workers",
        "owners",
        "parked_bytes",
        "pinned",
        "refusals",
        "restores",
        "retry_at_s",
        "state",
        "unload_started_s",
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
        self.workspace_bytes: int = 0  # the budget has it too; each hit asks
        self.parked_bytes: int = 0  # of weights that have left; in the host's shells
        self.restores: bool = False  # its load was admitted as one from that copy
        self.drops_copy: bool = False  # it leaves for the sake of the host
        self.leases: dict[int, int] = {}  # serial number: workspace bytes
        self.owners: dict[int, Owner] = {}  # serial number: who took it
        self.pinned: bool = False
        self.expires_at_s: float = math.inf
        self.last_used_s: float | None = None  # when its last lease ended
        self.gap_s: float | None = None
        self.loads: int = 0
        self.load_s: float = 0.0
        self.cause: EvictionCause | None = None  # why it leaves, or will when idle
        self.drained_for: Waiter | None = None
        self.refusals: int = 0
        self.failures: int = 0  # loads that failed since one succeeded
        self.failure: str = ""  # the last of them, in one line
        self.retry_at_s: float = -math.inf
        self.unload_started_s: float = 0.0
        self.gone: list[Future[None]] = []
        self.num_workers: int = key.num_workers

    @property
    def weights_bytes(self) -> int:
        """
        Bytes charged for the model itself on its device, or reserved for its load.
        """
        budget = self.device.budget
        return budget.of(self, Use.RESERVED) + budget.of(self, Use.WEIGHTS)

    @property
    def host_bytes(self) -> int:
        """
        Bytes charged on the host while its weights go to a card or come from it.
        """
        return self.host.budget.of(self, Use.STAGING)

    @property
    def copy_bytes(self) -> int:
        """
        Bytes charged on the host for a copy of weights that are on its card as well.
        """
        return self.host.budget.of(self, Use.COPY)

    @property
    def budgets(self) -> set[Budget]:
        """
        The budgets that it may be charged in.
        """
        return {self.device.budget, self.host.budget}

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
            if files != self.files:
                self.failures = 0  # perhaps somebody has mended it
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

    def workspace_with(self, n_bytes: int, count: int = 1) -> int:
        """
        What all leases may use at once, with *count* more of *n_bytes* at most.

        A model runs ``num_workers`` calls at a time; the others queue inside it.
        """
        if not self.leases and count == 1:
            return n_bytes
        running = min(len(self.leases) + count, self.num_workers)
        return max(n_bytes, *self.leases.values(), 0) * running

    def fits(self, n_bytes: int) -> bool:
        """
        Whether one more lease with *n_bytes* of work can be granted at once.
        """
        extra_bytes = self.workspace_with(n_bytes) - self.workspace_bytes
        budget = self.device.budget
        return (
            extra_bytes <= 0
            or budget.charged_bytes + extra_bytes <= budget.capacity_bytes
        )

    def take(self, serial: int, owner: Owner, n_bytes: int, now_s: float) -> None:
        """
        Note one more lease with *n_bytes* of work.
        """
        if not self.leases:
            self.device.shelf.pop(self, None)
            if self.last_used_s is not None:
                self.gap_s = next_gap_s(self.gap_s, now_s - self.last_used_s)
            self._set_workspace(n_bytes)
        else:
            self._set_workspace(self.workspace_with(n_bytes))
        self.leases[serial] = n_bytes
        self.owners[serial] = owner

    def give_back(self, serial: int) -> bool:
        """
        Note the end of a lease; whether it was one.
        """
        if self.leases.pop(serial, None) is None:
            return False
        del self.owners[serial]
        if not self.leases:
            self._set_workspace(0)
            return True
        running = min(len(self.leases), self.num_workers)
        self._set_workspace(max(self.leases.values()) * running)
        return True

    def _set_workspace(self, n_bytes: int) -> None:
        if n_bytes != self.workspace_bytes:
            self.device.budget.work(self, n_bytes)
            self.workspace_bytes = n_bytes

    def is_open_to(self, waiter: Waiter | None) -> bool:
        """
        Whether a new lease may be granted: in memory, not to leave, not kept back.

        Who holds the model already is not made to wait for the end of his own lease.
        """
        if self.state is not State.RESIDENT:
            return False
        if self.cause is None and self.drained_for in (None, waiter):
            return True
        return waiter is not None and (
            waiter.passes
            or (waiter.owner is not None and waiter.owner in self.owners.values())
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
        work_bytes = self.device.budget.of(self, Use.WORK)
        assert self.workspace_bytes == work_bytes, f"{key}: {work_bytes} B of work"
        assert self.owners.keys() == self.leases.keys(), f"{key}: owners"
        assert not self.copy_bytes or loaded or self.restores, f"{key}: a copy, {state}"
        is_there = state is State.RESIDENT
        assert not self.parked_bytes or not is_there, f"{key}: parked, and {state}"


@dataclass(frozen=True, slots=True)
class Part:
    """
    One model of a request, and what will be done with it.
    """

    entry: Entry
    workload: Workload

    @property
    def footprint(self) -> Footprint:
        """
        What that takes.
        """
        return self.entry.footprints[self.workload]


def reservations(parts: Sequence[Part]) -> dict[Entry, tuple[int, int]]:
    """
    What to charge for each absent model of *parts* until it is loaded: bytes on its
    device, and bytes on the host.

    Loads on one device come one after the other, in this order, so the last carries
    what the largest of them takes at its peak beyond what stays.
    """
    wanted: dict[Entry, list[Footprint]] = {}
    for part in parts:
        if part.entry.state is not State.RESIDENT:
            wanted.setdefault(part.entry, []).append(part.footprint)
    reserved: dict[Entry, tuple[int, int]] = {}
    last: dict[Device, Entry] = {}
    extra_bytes: dict[Device, int] = {}
    host_bytes: dict[Device, int] = {}
    copies_bytes = 0
    for entry, footprints in wanted.items():
        device = entry.device
        work_bytes = max(each.workspace_bytes for each in footprints)
        kept_bytes = footprints[0].weights_bytes + entry.workspace_with(
            work_bytes, len(footprints)
        )
        peak_bytes = max(each.total_bytes for each in footprints)
        on_host = max(each.host_loading_bytes for each in footprints)
        reserved[entry] = kept_bytes, 0
        last[device] = entry
        extra_bytes[device] = max(extra_bytes.get(device, 0), peak_bytes - kept_bytes)
        left_bytes = entry.host.budget.left_bytes - copies_bytes
        if 0 < entry.parked_bytes <= left_bytes:
            # It is there already, and stays there beside the weights.
            reserved[entry] = kept_bytes, entry.parked_bytes
            copies_bytes += entry.parked_bytes
        elif device is not entry.host:
            host_bytes[device] = max(host_bytes.get(device, 0), on_host)
    for device, entry in last.items():
        kept_bytes, copy_bytes = reserved[entry]
        reserved[entry] = (
            kept_bytes + extra_bytes[device],
            copy_bytes + host_bytes.get(device, 0),
        )
    return reserved


def demands(parts: Sequence[Part]) -> tuple[Demand, ...]:
    """
    What leases on all *parts* at once would add, by device.
    """
    found: dict[str, Demand] = {}
    for entry, (n_bytes, host_bytes) in reservations(parts).items():
        _add(found, Demand(entry.device.name, n_bytes, models=1))
        if host_bytes:
            _add(found, Demand(entry.host.name, host_bytes))
    for entry in dict.fromkeys(part.entry for part in parts):
        if entry.state is State.RESIDENT:
            sizes = [p.footprint.workspace_bytes for p in parts if p.entry is entry]
            total_bytes = entry.workspace_with(max(sizes), len(sizes))
            extra_bytes = max(0, total_bytes - entry.workspace_bytes)
            own_bytes = 0 if entry.pinned else entry.weights_bytes
            own_models = int(not entry.pinned)
            own = Demand(entry.device.name, extra_bytes, 0, own_bytes, own_models)
            _add(found, own)
    return tuple(found.values())


def _add(found: dict[str, Demand], more: Demand) -> None:
    one = found.get(more.device, Demand(more.device, 0))
    found[more.device] = Demand(
        more.device,
        one.n_bytes + more.n_bytes,
        one.models + more.models,
        one.own_bytes + more.own_bytes,
        one.own_models + more.own_models,
    )


@dataclass(eq=False, slots=True)
class Waiter:
    """
    A request in the queue. Its future is done once, with its leases or an error.

    Attributes:
        parts: The models that it wants, all or nothing.
        keep_alive_s: For each of them, once its lease ends.
        since_s: When it was made.
        owner: The thread or task that waits.
        future: How it ends.
        waits: It was not served at once.
        overtaken: Loads that passed it.
        passes: An older request waits for leases of its owner, so it waits for none.
        draining: Models that take no new leases for its sake.
        held: Once its memory was granted, its leases as far as their models are there;
            None before.
    """

    parts: tuple[Part, ...]
    keep_alive_s: float | None
    since_s: float
    owner: Owner
    future: Future[tuple[Lease, ...]] = field(default_factory=Future)
    waits: bool = False
    overtaken: int = 0
    passes: bool = False
    draining: list[Entry] = field(default_factory=list)
    held: dict[int, Lease] | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """
        The models that it wants, each once.
        """
        return tuple(dict.fromkeys(part.entry for part in self.parts))

    @property
    def is_group(self) -> bool:
        """
        Whether it wants several leases at once.
        """
        return len(self.parts) > 1

    def wants(self, entry: Entry) -> bool:
        """
        Whether *entry* is among the models that it wants.
        """
        return any(part.entry is entry for part in self.parts)

    def __str__(self) -> str:
        return " + ".join(str(part.entry.key) for part in self.parts)

    def pending(self, *, impatient: bool) -> Pending:
        """
        The request as `admission.plan` sees it.
        """
        keys = tuple(entry.key for entry in self.entries)
        need = Need.WORKSPACE
        for entry in self.entries:
            if entry.state is State.ABSENT:
                need = Need.LOAD
            elif not entry.is_open_to(self):
                return Pending(keys, Need.NOTHING)
        if self.held is not None:
            return Pending(keys, Need.NOTHING)
        return Pending(
            keys,
            need,
            demands(self.parts),
            overtaken=self.overtaken,
            impatient=impatient,
            passes=self.passes,
            shares=any(entry.num_workers > 1 for entry in self.entries),
        )
