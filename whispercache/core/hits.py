"""
Hits: the beginning and the end of a lease on a model in memory, where nothing has to be
decided.

The scheduler would do the same, in a dozen calls of functions, and these are most of
what a hit costs. So the usual case is spelled out here, in one critical section, and
every other is left to the scheduler. A test has random histories happen with and
without this, which leave the same leases and books, and another interrupts it.

What it changes it changes without a call: CPython runs signal handlers at calls and at
jumps back alone (from 3.11 on; 3.10 does so at other jumps, too), so that Ctrl-C finds
all of it done or nothing.

Source: benchmarks/hit_path.py.
"""

from __future__ import annotations

from tracemalloc import is_tracing
from typing import TYPE_CHECKING

from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.lease import Lease
from whispercache.planning.policies import is_lru

from .entries import Entry, State
from .threads import caller, take_turn

if TYPE_CHECKING:
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.lease import _Lessor as Lessor
    from whispercache.planning.deadlock import Owner

    from .agenda import Agenda
    from .lock import StateLock
    from .resolver import Request
    from .scheduler import Scheduler

# To look these up in their classes costs a hit 0.1 µs.
_new = object.__new__
_RESIDENT = State.RESIDENT


class Hits:
    """
    Leases on models in memory.

    Args:
        lock: The lock of the state.
        agenda: What is decided over and by.
        scheduler: Decides the unusual cases.
        lessor: Ends the leases that are granted.
        requests: The models of requests that were resolved before.
    """

    __slots__ = (
        *("_keep_alive_s", "_lessor", "_lock", "_notes_uses", "_now"),
        *("_requests", "_scheduler", "_state"),
    )

    def __init__(
        self,
        lock: StateLock,
        agenda: Agenda,
        scheduler: Scheduler,
        lessor: Lessor[Entry],
        requests: dict[Request, Entry],
    ) -> None:
        self._lock = lock
        self._state = agenda.state
        self._now = agenda.now
        self._keep_alive_s = agenda.rules.keep_alive_s
        self._notes_uses = not is_lru(agenda.rules.policy)
        self._scheduler = scheduler
        self._lessor = lessor
        self._requests = requests

    def hit(
        self,
        request: Request,
        workload: Workload,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease | None:
        """
        Returns a lease on a model that is in memory, if that takes nothing from a
        request that waits; None also if *request* was not resolved before.
        """
        try:
            entry = self._requests[request]
        # To resolve it may touch the disk, which a task must not do on its loop, and
        # says which option cannot be hashed.
        except (KeyError, TypeError):
            return None
        held, lock = False, self._lock
        if lock.is_busy:
            take_turn(lock.mutex)
        try:
            for held in lock.taking:  # noqa: B007 - see `finally`
                lock.is_busy = True
                lease = self._begin(entry, workload, owner)
                if lease is not None:
                    lease._keep_alive_s = keep_alive_s
                break
        finally:
            if held:
                lock.is_busy = False
                lock.mutex.release()
            if lock.put_off:
                lock.catch_up()
        if lease is None:
            with lock.changing():
                lease = self._scheduler.hit(entry, workload, keep_alive_s, owner)
        if is_tracing() and lease is not None:
            lease.taken_at = caller()
        return lease

    def _begin(self, entry: Entry, workload: Workload, owner: Owner) -> Lease | None:
        leases, state = entry.leases, self._state
        device, n_bytes = entry.device, entry.default_workspace_bytes
        if workload is not DEFAULT_WORKLOAD:
            known_bytes = entry.workspace_of(workload)
            if known_bytes is None:
                return None
            n_bytes = known_bytes
        # Calls beyond its workers wait inside it, and take no more.
        more_bytes = n_bytes if len(leases) < entry.num_workers else 0
        budget = device.budget
        charged_bytes = budget.charged_bytes + more_bytes
        if (
            entry.state is not _RESIDENT
            or entry.cause is not None
            or entry.drained_for is not None
            or device.lost_to is not None
            or state.closed is not None
            or charged_bytes + device.kept_bytes > budget.capacity_bytes
            or (leases and (entry.unusual or n_bytes != entry.usual_bytes))
            or ((line := state.queue).waiters and owner in line.owners)
            or (line.waiters and not self._scheduler.may_pass(entry, more_bytes))
        ):
            return None
        if self._notes_uses and not leases:
            entry.note_use(self._now())
        lease = _new(Lease)
        if line.waiters:
            line.holds(owner, 1)
        # No call from here on.
        lease._lessor, lease._entry, lease._view = self._lessor, entry, None
        lease._serial = state.grants = serial = state.grants + 1
        if not leases:
            entry.usual_bytes = n_bytes
            device.idle_bytes -= entry.idle_bytes
            del entry.rack[entry]
        leases[serial] = owner
        if more_bytes:
            entry.workspace_bytes += more_bytes
            budget.charged_bytes = charged_bytes
            if charged_bytes > budget.high_bytes:  # noqa: PLR1730 - a call
                budget.high_bytes = charged_bytes
        return lease

    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        Ends a lease. Nothing happens if it has ended.
        """
        if keep_alive_s is None:
            keep_alive_s = self._keep_alive_s
        held, lock, noted = False, self._lock, None
        if lock.is_busy:
            take_turn(lock.mutex)
        try:
            for held in lock.taking:  # noqa: B007 - see `finally`
                lock.is_busy = True
                self._end(entry, serial, keep_alive_s)
                if lock.noted:
                    noted = lock.take()
                break
        finally:
            if held:
                lock.is_busy = False
                lock.mutex.release()
            if noted is not None:
                lock.perform(noted)
            if lock.put_off:
                lock.catch_up()

    def _end(self, entry: Entry, serial: int, keep_alive_s: float) -> None:
        leases, state, device = entry.leases, self._state, entry.device
        budget, now = device.budget, self._now
        now_s = now()
        expires_at_s = now_s + keep_alive_s
        if (
            serial not in leases
            or entry.unusual
            or entry.cause is not None
            or entry.spares
            or entry.yielding
            or state.unset_s
            # Its reminder is due, or comes too late.
            or entry.reminder_s <= now_s
            or entry.reminder_s > expires_at_s
            or budget.charged_bytes > budget.capacity_bytes
            or device.max_models is not None
        ):
            self._scheduler.release(entry, serial, keep_alive_s)
            return
        n_leases, n_bytes = len(leases), entry.usual_bytes
        if waiters := state.queue.waiters:
            state.queue.holds(leases[serial], -1)
        # No call from here on.
        del leases[serial]
        if n_leases <= entry.num_workers:
            budget.charged_bytes -= n_bytes
            entry.workspace_bytes -= n_bytes
        if n_leases == 1:
            device.is_stale = True
            device.idle_bytes += entry.idle_bytes
            entry.rack[entry] = None
            entry.last_used_s, entry.expires_at_s = now_s, expires_at_s
        if waiters:
            self._scheduler.released(entry)
