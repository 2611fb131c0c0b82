"""
A model, as a cache knows it. Plain data.

Each transition of a model is a method of `Entry`, which alone assigns its state. All of
it is guarded by the cache's one lock. Nothing here waits, loads or calls out.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.planning.policies import Resident, next_gap_s

from .budget import Use

SPARED_S = 1.0
"""
Seconds after a raw call, such as ``encode``, for which its model is not evicted for
others while the result is in use: ``generate`` is to follow.
"""

if TYPE_CHECKING:
    from whispercache.engine.api import LoadedModel
    from whispercache.engine.files import ModelFiles
    from whispercache.engine.sizes.footprint import Footprint, Workload
    from whispercache.events import EvictionCause
    from whispercache.keys import ModelKey
    from whispercache.planning.deadlock import Owner

    from .budget import Budget
    from .device import Device, Tally
    from .waiters import Waiter


class State(str, Enum):
    """
    A model's place on its way through memory.
    """

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    UNLOADING = "unloading"


@dataclass(eq=False, repr=False, slots=True)
class Entry:
    """
    A model that was asked for, in memory or not.

    Attributes:
        key: Which it is.
        device: Where it is, or would be.
        host: The device of the host.
        state: Where it is on its way through memory.
        files: Its files; None before it was located.
        footprints: What it takes, by workload.
        default_workspace_bytes: Workspace of the default workload, once it was located.
        num_workers: How many calls it runs at a time; the others queue inside it.
        loaded: The model itself, while it is in memory.
        workspace_bytes: Bytes charged for its leases.
        parked_bytes: Bytes of its host copy while it is not in memory.
        restores: Its load was admitted as one from that copy.
        drops_copy: It is unloaded for the sake of the host, so no copy may stay.
        waiting: The requests in the queue that want it, the oldest first. The line of
            requests keeps it.
        leases: The owner of each lease, by its serial number.
        usual_bytes: Bytes of workspace of each lease, but for the
        unusual: ones, by serial number.
        yielding: The levels of the leases that their holders give back early if a
            request above that asks, by serial number.
        asked_by: The highest level of the requests that ask them to.
        pinned: It is not evicted when idle.
        rack: The idle models of its device among which it is, or would be.
        idle_bytes: What its eviction would free, were it idle: nothing if it is pinned
            or spared.
        expires_at_s: When its keep-alive ends, if it is idle then.
        reminder_s: When it is looked at next for that.
        last_used_s: When its last lease ended.
        gap_s: Smoothed seconds between uses; see `next_gap_s`.
        loads: How often it was loaded.
        load_s: Seconds of the last load.
        cause: Why it is evicted, or will be when idle.
        drained_for: The request for which new leases are held back.
        refusals: Tries of its unload that did nothing.
        unload_again_s: When its unload is tried again.
        unload_started_s: When its unload began.
        failures: Loads that failed since one succeeded.
        failure: The last of them, in one line.
        retry_at_s: Before that, no load is tried.
        gone: Futures of those who wait for its unload.
        spares: Results of calls on it that are still in use, and need its next call.
        spared_for: The owner of the last of those calls.
        is_spared: It is not evicted for others when idle, for a short while.
        spare_reminder_s: When it is looked at next for that.
    """

    key: ModelKey
    device: Device
    host: Device
    state: State = State.ABSENT
    files: ModelFiles | None = None
    footprints: dict[Workload, Footprint] = field(default_factory=dict)
    default_workspace_bytes: int = 0
    num_workers: int = field(init=False)
    loaded: LoadedModel | None = None
    workspace_bytes: int = 0
    parked_bytes: int = 0
    restores: bool = False
    drops_copy: bool = False
    waiting: dict[Waiter, None] = field(default_factory=dict)
    leases: dict[int, Owner] = field(default_factory=dict)
    usual_bytes: int = 0
    unusual: dict[int, int] = field(default_factory=dict)
    yielding: dict[int, float] = field(default_factory=dict)
    asked_by: float = -math.inf
    pinned: bool = False
    rack: dict[Entry, None] = field(init=False)
    idle_bytes: int = 0
    expires_at_s: float = math.inf
    reminder_s: float = math.inf
    last_used_s: float | None = None
    gap_s: float | None = None
    loads: int = 0
    load_s: float = 0.0
    cause: EvictionCause | None = None
    drained_for: Waiter | None = None
    refusals: int = 0
    unload_again_s: float = math.inf
    unload_started_s: float = 0.0
    failures: int = 0
    failure: str = ""
    retry_at_s: float = -math.inf
    gone: list[Future[None]] = field(default_factory=list)
    spares: int = 0
    spared_for: Owner = None
    is_spared: bool = False
    spare_reminder_s: float = math.inf
    # The sums of its device in which it is counted now, and with how many bytes.
    _tally: Tally | None = None
    _tallied_bytes: int = 0

    def __post_init__(self) -> None:
        # Each hit asks, and would have to search the key's options.
        self.num_workers = self.key.num_workers
        self.rack = self.device.shelf

    # Questions ------------------------------------------------------------------------

    @property
    def weights_bytes(self) -> int:
        """
        Bytes charged for the model itself on its device, or reserved for its load.
        """
        budget = self.device.budget
        return budget.of(self, Use.RESERVED) + budget.of(self, Use.WEIGHTS)

    @property
    def staging_bytes(self) -> int:
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
        The budgets in which it may be charged.
        """
        return {self.device.budget, self.host.budget}

    @property
    def footprint(self) -> Footprint:
        """
        The bytes that it takes for the default workload. It must have been located.
        """
        return self.footprints[DEFAULT_WORKLOAD]

    @property
    def stays(self) -> bool:
        """
        True if it is pinned and not being evicted.
        """
        return self.pinned and self.cause is None

    @property
    def spared_until_s(self) -> float:
        """
        When others may have it evicted: its last call may have been one of several.
        """
        return (self.last_used_s or 0.0) + SPARED_S

    @property
    def is_idle(self) -> bool:
        """
        True if it is in memory and not leased.
        """
        return self in self.rack

    @property
    def is_present(self) -> bool:
        """
        True if it is in memory, or on its way in or out.
        """
        return self.state is not State.ABSENT

    @property
    def is_moving(self) -> bool:
        """
        True while it is being loaded, or unloaded for the first time.
        """
        # Between two tries of an unload nothing moves.
        is_unloading = self.state is State.UNLOADING and not self.refusals
        return self.state is State.LOADING or is_unloading

    @property
    def claims_copy(self) -> bool:
        """
        True if its host copy is charged to a load that will use it.
        """
        return self.state is State.LOADING and self.restores

    def is_open_to(self, waiter: Waiter | None) -> bool:
        """
        Returns True if a new lease may be granted to *waiter*; None is a hit.

        It must be in memory, not be evicted, not be held back for another request, and
        not have as many leases as that request allows.
        Owners that hold it already are not made to wait for the end of their own lease.
        """
        if self.state is not State.RESIDENT:
            return False
        is_full = waiter is not None and self.is_full_for(waiter)
        if self.cause is None and self.drained_for in (None, waiter) and not is_full:
            return True
        return waiter is not None and (
            waiter.passes
            or (waiter.owner is not None and waiter.owner in self.leases.values())
        )

    def is_full_for(self, waiter: Waiter) -> bool:
        """
        Returns True if it has as many leases as a request allows besides its own.
        """
        return waiter.parallel is not None and len(self.leases) >= waiter.parallel

    def workspace_of(self, workload: Workload) -> int | None:
        """
        Returns the workspace of one call; None if it was not located for that.
        """
        footprint = self.footprints.get(workload)
        return None if footprint is None else footprint.workspace_bytes

    def workspace_of_lease(self, serial: int) -> int:
        """
        Returns the workspace of one lease.
        """
        return self.unusual.get(serial, self.usual_bytes)

    def workspace_with(self, n_bytes: int, count: int = 1) -> int:
        """
        Returns what all leases may use at once, with *count* more of *n_bytes* at most.
        """
        running = min(len(self.leases) + count, self.num_workers)
        return max(n_bytes, self._largest_bytes()) * running

    def _largest_bytes(self) -> int:
        # Mostly all are alike, and there is nothing to go through.
        if not self.unusual:
            return self.usual_bytes if self.leases else 0
        return max(map(self.workspace_of_lease, self.leases))

    def fits(self, n_bytes: int) -> bool:
        """
        Returns True if a lease with *n_bytes* of workspace can be granted at once.
        """
        extra_bytes = self.workspace_with(n_bytes) - self.workspace_bytes
        return extra_bytes <= 0 or extra_bytes <= self.device.budget.left_bytes

    @property
    def yields_to(self) -> float:
        """
        The level above which a request is given it soon: minus infinity if it is not
        leased, infinity if there is a lease that cannot be given back.
        """
        if len(self.yielding) < len(self.leases):
            return math.inf
        return max(self.yielding.values(), default=-math.inf)

    def resident(self) -> Resident:
        """
        Returns a model in memory as a policy sees it.
        """
        return Resident(
            key=self.key,
            device=self.device.name,
            weights_bytes=self._tallied_bytes,
            last_used_s=self.last_used_s or 0.0,
            gap_s=self.gap_s or 0.0,
            cost_s=self.load_s,
            yields_to=self.yields_to,
        )

    # Transitions ----------------------------------------------------------------------

    def locate(self, files: ModelFiles, footprints: dict[Workload, Footprint]) -> None:
        """
        Remembers where the files are and what they will take.
        """
        if self.state is State.ABSENT:
            is_known = self.footprints.items() >= footprints.items()
            if self.waiting and not is_known:
                self.device.moved.add(self)
                self.device.outlook.forget()  # what was decided may be wrong
            if files != self.files:
                self.failures = 0  # perhaps somebody has mended it
            self.files = files
            self.footprints = {**self.footprints, **footprints}
        else:
            # What is in memory, or on its way, stays counted as it was.
            self.footprints = {**footprints, **self.footprints}
        self.default_workspace_bytes = self.footprint.workspace_bytes

    def begin_load(self, n_bytes: int, host_bytes: int) -> None:
        """
        Reserves a load's memory: absent → loading.
        """
        host = self.host
        self._move_to(State.LOADING)
        self.restores = 0 < self.parked_bytes <= host_bytes
        # The copy is in memory already; from now on it gives way to nothing.
        if self.restores:
            host.kept_bytes -= self.parked_bytes
            host.budget.set(self, Use.COPY, self.parked_bytes)
            host_bytes -= self.parked_bytes
        self.device.loads_begun += 1
        self.device.entries[self.key] = self
        self.device.budget.set(self, Use.RESERVED, n_bytes)
        host.budget.set(self, Use.STAGING, host_bytes)

    def end_load(self, loaded: LoadedModel, load_s: float) -> None:
        """
        Charges what stays: loading → resident.
        """
        # Moved, not cleared: between the two it would count as free.
        budget = self.device.budget
        budget.move(self, Use.RESERVED, Use.WEIGHTS)
        # The prediction is charged while the model is here, and what was measured
        # corrects the next one: nothing that was admitted can turn out too large.
        budget.set(self, Use.WEIGHTS, self.footprint.weights_bytes)
        self.host.budget.set(self, Use.STAGING, 0)
        self.host.budget.set(self, Use.COPY, loaded.copy_bytes)
        self.loaded = loaded
        self._move_to(State.RESIDENT)
        self.loads += 1
        self.load_s = load_s
        self.failures = 0

    def take(self, serial: int, owner: Owner, n_bytes: int) -> None:
        """
        Notes one more lease with *n_bytes* of workspace.
        """
        all_bytes = self.workspace_with(n_bytes)
        if not self.leases:
            self.usual_bytes = n_bytes
            # After a load it is leased before it was ever idle.
            if self.rack.pop(self, self) is None:
                self.device.idle_bytes -= self.idle_bytes
        elif n_bytes != self.usual_bytes:
            self.unusual[serial] = n_bytes
        self.leases[serial] = owner
        self._work(all_bytes)

    def give_back(self, serial: int) -> bool:
        """
        Notes the end of a lease, and returns True if there was one.
        """
        if serial not in self.leases:
            return False
        del self.leases[serial]
        self.unusual.pop(serial, None)
        self.yielding.pop(serial, None)
        # As much as the largest calls that may run at once.
        self._work(self._largest_bytes() * min(len(self.leases), self.num_workers))
        return True

    def _work(self, all_bytes: int) -> None:
        more_bytes = all_bytes - self.workspace_bytes
        # Mostly nothing changes if it is leased already.
        if more_bytes:
            self.workspace_bytes = all_bytes
            self.device.budget.work(more_bytes)

    def end_drain(self) -> None:
        """
        Lets new leases be granted again that were held back, and asks for none.
        """
        self.drained_for = None
        self.asked_by = -math.inf

    def note_use(self, now_s: float) -> None:
        """
        Notes that it is used after it was idle, for policies that ask how often.
        """
        if self.last_used_s is not None:
            self.gap_s = next_gap_s(self.gap_s, now_s - self.last_used_s)

    def shelve(self, keep_alive_s: float, now_s: float) -> None:
        """
        Puts it on the shelf, idle; its keep-alive starts.
        """
        device = self.device
        # The workspace of its calls may have been returned.
        device.is_stale = True
        device.idle_bytes += self.idle_bytes
        self.rack[self] = None
        self.last_used_s = now_s
        self.expires_at_s = now_s + keep_alive_s

    def unshelve(self) -> None:
        """
        Takes it off the shelf, to be put there anew.
        """
        del self.rack[self]
        self.device.idle_bytes -= self.idle_bytes

    def begin_unload(self, cause: EvictionCause, now_s: float) -> None:
        """
        Takes it off the shelf: resident → unloading.
        """
        assert self.state is State.RESIDENT and not self.leases, self.key
        self.unshelve()
        self.cause = cause
        self.refusals = 0
        self._move_to(State.UNLOADING)
        self.unload_started_s = now_s

    def refuse(self, again_s: float) -> None:
        """
        Notes that an unload did nothing, and when it is tried again.
        """
        self.refusals += 1
        self.unload_again_s = again_s
        self.device.moving.discard(self)

    def doom(self, cause: EvictionCause | None) -> None:
        """
        Has it evicted once it is idle, even if it is pinned; None takes that back.
        """
        self.cause = cause
        self._count()
        # What is pinned is out of reach, so a request may not fit any more.
        if self.pinned:
            self.device.outlook.forget()

    def pin(self, *, is_pinned: bool) -> None:
        """
        Keeps it in memory when it is idle, or no longer does.
        """
        self._rack_as(is_pinned=is_pinned, is_spared=self.is_spared)

    def spare(self, *, is_spared: bool) -> None:
        """
        Has it be the last to leave when it is idle, or no longer.
        """
        if is_spared is not self.is_spared:
            self._rack_as(is_pinned=self.pinned, is_spared=is_spared)

    def _rack_as(self, *, is_pinned: bool, is_spared: bool) -> None:
        is_idle = self.is_idle
        if is_idle:
            self.unshelve()
        self.pinned, self.is_spared = is_pinned, is_spared
        self._choose_rack()
        self._count()
        for device in (self.device, self.host):  # perhaps it has a copy there
            device.outlook.forget()
        if is_idle:
            self.rack[self] = None
            self.device.idle_bytes += self.idle_bytes

    def _choose_rack(self) -> None:
        device = self.device
        spared = device.spared if self.is_spared else device.shelf
        self.rack = device.pinned if self.pinned else spared

    def _move_to(self, state: State) -> None:
        """
        Changes its state, and all that is counted by it.
        """
        self.state = state
        device = self.device
        if self.is_moving:
            device.moving.add(self)
        else:
            device.moving.discard(self)
        device.moved.add(self)
        self._count()

    def _count(self) -> None:
        """
        Counts it in the sums of its device, as what it is by now.
        """
        device = self.device
        if self._tally is not None:
            self._tally.add(-1, -self._tallied_bytes)
        self._tally, self._tallied_bytes = None, self.weights_bytes
        if self.state is State.UNLOADING:
            self._tally = device.coming
        elif self.stays and self.is_present:
            self._tally = device.staying
        if self._tally is not None:
            self._tally.add(1, self._tallied_bytes)
        is_kept = self.pinned or self.is_spared
        self.idle_bytes = 0 if is_kept else self._tallied_bytes

    def awaits_unload(self) -> Future[None]:
        """
        Returns a future that is done when its unload was confirmed.
        """
        gone: Future[None] = Future()
        gone.add_done_callback(_wake_if_cancelled)
        self.gone.append(gone)
        return gone

    def write_off(self) -> int:
        """
        Charges it for good, on a device that was lost, and returns the bytes there.
        """
        lost_bytes = self.weights_bytes
        self.device.budget.move(self, Use.WEIGHTS, Use.LOST)
        self.host.budget.move(self, Use.COPY, Use.LOST)  # it is part of the model
        self.host.budget.set(self, Use.STAGING, 0)
        return lost_bytes

    def leave(self) -> list[Future[None]]:
        """
        Forgets the model itself: anything → absent. Its bytes were seen to before.

        Returns:
            The futures of those who wait for that.
        """
        # A load that did not use its copy leaves it as it was.
        if self.claims_copy:
            self.host.kept_bytes += self.parked_bytes
        self.restores = self.drops_copy = False
        self.device.is_stale = True
        self.loaded = None
        self.cause = None
        self.pinned = False
        self._choose_rack()
        self._move_to(State.ABSENT)
        self.unload_again_s = math.inf
        if self.drained_for is not None:
            # Or an older request would load it, not get it, and see it evicted, for
            # ever.
            self.drained_for.draining.remove(self)
            self.end_drain()
        del self.device.entries[self.key]
        gone, self.gone = self.gone, []
        return gone

    def fail(self, reason: str, pause_s: float, now_s: float) -> None:
        """
        Notes that a load failed. From the second in a row on, the next waits *pause_s*.
        """
        self.failures += 1
        self.failure = reason
        if self.failures > 1:
            self.retry_at_s = now_s + pause_s

    def check(self) -> None:
        """
        Asserts that all that is known of this model agrees with its state.
        """
        key, state = self.key, self.state
        present = self.device.entries.get(key) is self
        assert present is (state is not State.ABSENT), f"{key} is {state}"
        assert not self.leases or state is State.RESIDENT, f"{key} leased, {state}"
        idle = state is State.RESIDENT and not self.leases
        assert self.is_idle is idle, f"{key} idle: {idle}"
        racks = (self.device.shelf, self.device.pinned, self.device.spared)
        assert sum(self in rack for rack in racks) == idle, f"{key} idle twice"
        moving = self in self.device.moving
        assert moving is self.is_moving, f"{key} moves: {moving}"
        assert present or not self.weights_bytes, key
        loaded = state in (State.RESIDENT, State.UNLOADING)
        assert (self.loaded is not None) is loaded, f"{key} is {state}"
        assert bool(self.leases) or not self.workspace_bytes, f"{key} works unleased"
        works = [self.workspace_of_lease(serial) for serial in self.leases]
        work_bytes = max(works, default=0) * min(len(works), self.num_workers)
        assert self.workspace_bytes == work_bytes, f"{key}: {work_bytes} B of work"
        assert self.unusual.keys() <= self.leases.keys(), f"{key}: unusual"
        assert self.yielding.keys() <= self.leases.keys(), f"{key}: yielding"
        is_wanted = self.drained_for is not None or bool(self.waiting)
        assert is_wanted or self.asked_by == -math.inf, f"{key}: asked in vain"
        assert not self.copy_bytes or loaded or self.restores, f"{key}: a copy, {state}"
        is_there = state is State.RESIDENT
        assert not self.parked_bytes or not is_there, f"{key}: parked, and {state}"


def _wake_if_cancelled(future: Future[None]) -> None:
    """
    Wakes those in `concurrent.futures.wait`, whom cancelling alone does not wake.
    """
    if future.cancelled():
        future.set_running_or_notify_cancel()
