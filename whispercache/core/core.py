"""
The path of a request: admit → load → grant → release → unload. One lock.

Invariants, asserted by `Core.check`:

1. Per device, reserved + resident bytes never exceed capacity, loads in flight
   included. (A limit lowered later is met as soon as leases and loads allow.)
2. A leased model is resident; it is never unloaded.
3. At most one load per key is in flight; its waiters share it, its failure reaches all.
4. Finding a model and pinning it are one critical section.
5. Each request ends once: granted, failed, timed out, cancelled or closed; a grant
   offered to one who left comes back.
6. No loader, probe, listener or log handler runs while the lock is held.
7. Memory is credited only after the unload is confirmed; an unload that did not happen
   keeps its bytes charged.
8. A request for several models gets their memory in one step, and holds none before.

`Core._admit_locked` is the only place that matches waiters to memory, and every
arrival, departure, load and unload ends in it: there is no other notification. The
state and the lock are in books.py, loads and unloads in moves.py, what models leave on
the host in parking.py.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.errors import (
    CacheClosed,
    CacheForked,
    LeaseDeadlock,
    LeaseTimeout,
    ModelTooLarge,
    TooManyWaiters,
    format_bytes,
)
from whispercache.events import EvictionCause, ModelGranted
from whispercache.lease import Lease
from whispercache.planning import planner
from whispercache.planning.placement import Candidate
from whispercache.planning.planner import Need, Outcome, Pending

from . import circles
from .books import LOOK_AGAIN_S
from .budget import Use
from .entries import Device, Entry, Part, State, Waiter, reservations
from .moves import Moves
from .threads import has_ended, take_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from whispercache.devices.memory import MemoryProbe
    from whispercache.engine.api import Loader
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import ModelKey
    from whispercache.lease import Holder
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.planner import Decision, Demand, Policy, Resident, Room
    from whispercache.units import Limit

    from .moves import Leaving
    from .threads import Clock

__all__ = ["Core", "Own"]

_log = logging.getLogger("whispercache")

DEADLOCK_S = 0.04
"""
Seconds from the suspicion of a circle to the check. A request must have waited for half
of that: a lease may be on its way to another thread, which will end it. So whoever
closes a circle gets the error 20 to 60 ms later.
"""

SIGNAL_S = 1.0
"""
Seconds after which `Core.close` takes the lock for one that its own thread holds, under
the signal handler that calls it. Critical sections take microseconds.
"""


@dataclass(frozen=True, slots=True)
class Own:
    """
    Leases of those who close a cache, who hence would wait for themselves.

    Attributes:
        held: Models on which they hold leases, which only they could end.
        stuck: Models at work for a step that a signal handler interrupted, in which the
            cache is closed: it goes on, and ends, after that.
    """

    held: tuple[str, ...]
    stuck: frozenset[Entry]


class Core(Moves):
    """
    The state of one cache, shared by its blocking and its awaited face.
    """

    leases: int  # set in Books; pyright wants to hear it again

    def __init__(
        self,
        *,
        loader: Loader,
        probe: MemoryProbe,
        clock: Clock,
        policy: Policy,
        limit_of: Callable[[str], Limit],
        max_models: int | None,
        keep_alive_s: float,
        patience_s: float,
        max_waiting: int | None,
    ) -> None:
        super().__init__(
            loader=loader,
            probe=probe,
            clock=clock,
            limit_of=limit_of,
            max_models=max_models,
        )
        self._policy = policy
        self._patience_s = patience_s
        self._max_waiting = max_waiting
        self._keep_alive_s = keep_alive_s
        # By serial number. Whoever holds segments keeps them, not the cache.
        self._holders: weakref.WeakValueDictionary[int, Holder] = (
            weakref.WeakValueDictionary()
        )
        # All that follows is guarded by the lock.
        self._serials = itertools.count()
        self._sweep_at_s = math.inf
        self._is_suspicious = False

    # Admit ---------------------------------------------------------------------------

    def hit(
        self,
        entry: Entry,
        workload: Workload,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease | None:
        """
        A lease on a model that is in memory, if nobody waits; else None.
        """
        if self._lock.locked():
            take_turn(self._lock)
        try:
            with self._lock:
                if (
                    self.queue
                    or self._closed is not None
                    or not entry.is_open_to(None)
                    or entry.device.sick is not None
                ):
                    return None
                workspace_bytes = entry.workspace_of(workload)
                if workspace_bytes is None or not entry.fits(workspace_bytes):
                    return None
                self.counts["hits"] += 1
                return self._grant_locked(entry, workspace_bytes, keep_alive_s, owner)
        finally:
            if self._dropped:
                self._perform([])

    def request(
        self,
        parts: Sequence[Part],
        keep_alive_s: float | None,
        timeout_s: float | None,
        owner: Owner,
    ) -> Waiter:
        """
        Queue for leases on all *parts*. The waiter's future tells how it ends.

        The models must have been located for their workloads, and their devices
        observed.

        Raises:
            CacheClosed: the cache was closed.
            DeviceUnavailable: a device was lost.
            LoadFailed: a model failed so often that it is not tried just now.
            TooManyWaiters: ``max_waiting`` requests wait already.
            LeaseTimeout: *timeout_s* is 0, and the models are not to be had at once.
        """
        waiter = Waiter(tuple(parts), keep_alive_s, self.clock.now(), owner)
        with self.changing():
            self._check_open_locked()
            for part in parts:
                if (refusal := self.refusal_locked(part.entry)) is not None:
                    raise refusal
            waiting = len(self.queue)
            for part in parts:
                is_hit = part.entry.state is State.RESIDENT
                self.counts["hits" if is_hit else "misses"] += 1
            is_full = self._max_waiting is not None and waiting >= self._max_waiting
            never_waits = timeout_s is not None and timeout_s <= 0
            ends_now = (is_full or never_waits) and self._ends_now_locked(waiter)
            if never_waits and not ends_now:
                self.counts["timeouts"] += 1
                raise LeaseTimeout(str(waiter), 0.0, waiting + 1)
            if is_full and not ends_now:
                self.counts["refused"] += 1
                raise TooManyWaiters(str(waiter), waiting)
            self.queue.append(waiter)
            try:
                self._admit_locked()
                waiter.waits = waiter in self.queue
            except BaseException:  # Ctrl-C, or a policy's: nobody will take the lease
                if waiter in self.queue:
                    self._leave_locked(waiter)
                    self._let_go_locked(waiter)
                raise
        if waiter.waits:
            self._read_ahead(waiter)
        if timeout_s is not None and not waiter.future.done():
            # The timer outlives the wait, and must not keep a lease from collection.
            expire = partial(self._expire, weakref.ref(waiter.future))
            self.clock.call_at(waiter.since_s + timeout_s, expire)
        return waiter

    def _read_ahead(self, waiter: Waiter) -> None:
        """
        Have what is wanted read from the disk while others leave memory for it.
        """
        try:
            for entry in set(waiter.entries):
                if entry.files is not None and entry.state is State.ABSENT:
                    self.loader.read_ahead(entry.files)
        except BaseException:  # Ctrl-C again
            self.abandon(waiter)
            raise

    def _ends_now_locked(self, waiter: Waiter) -> bool:
        """
        Whether a new request would not wait: its model is there, or can never be.
        """
        decision = self.plan_locked([*self.queue, waiter])[-1]
        return decision.outcome in (Outcome.GRANT, Outcome.NEVER)

    def abandon(self, waiter: Waiter) -> None:
        """
        Forget a request whose caller left; a grant that it was given comes back.
        """
        with self.changing():
            if waiter in self.queue:
                self._leave_locked(waiter)
                self._let_go_locked(waiter)
                self._admit_locked()
        if not waiter.future.cancel():
            waiter.future.add_done_callback(_give_back)

    def _expire(self, future: weakref.ref[Future[tuple[Lease, ...]]]) -> None:
        with self.changing():
            waiter = next((w for w in self.queue if w.future is future()), None)
            if waiter is None:
                return
            place = self.queue.index(waiter) + 1
            waited_s = self.clock.now() - waiter.since_s
            self.counts["timeouts"] += 1
            self._fail_locked(waiter, LeaseTimeout(str(waiter), waited_s, place))
            self._admit_locked()

    def _admit_locked(self) -> None:
        """
        Match waiters to memory, until nothing changes.
        """
        self._shrink_locked()
        before = None
        while self.queue and len(self.queue) != before and self._closed is None:
            before = len(self.queue)
            queue = list(self.queue)
            for waiter, decision in zip(queue, self.plan_locked(queue), strict=True):
                for victim in decision.victims:
                    entry = self.entries[victim.key]
                    entry.drops_copy |= victim.device != entry.device.name
                    if entry.state is State.RESIDENT:  # not a victim twice
                        self._unload_locked(entry, EvictionCause.CAPACITY)
                for key in decision.drain:
                    self._drain_locked(self.entries[key], waiter)
                for place in decision.overtakes:
                    queue[place].overtaken += 1
                self._carry_out_locked(waiter, decision)
        if self.queue:
            self._look_out_locked()

    def _drop_copies_locked(self, n_bytes: int) -> None:
        """
        Unload idle models of cards until *n_bytes* of copies are gone, or on their way.
        CTranslate2 cannot drop a copy and keep the weights.
        """
        with_copies = self._copied_locked("cpu")
        n_bytes -= sum(e.copy_bytes for e in with_copies if e.drops_copy)
        idle = [e for e in with_copies if e.is_idle and not e.stays]
        for entry in sorted(idle, key=lambda each: each.last_used_s or 0.0):
            if n_bytes <= 0:
                return
            n_bytes -= entry.copy_bytes
            entry.drops_copy = True
            self._unload_locked(entry, EvictionCause.PRESSURE)

    def _look_out_locked(self) -> None:
        """
        See that nobody waits in vain: for what a new reading would show, or in a
        circle.
        """
        for device in {e.device for waiter in self.queue for e in waiter.entries}:
            # What ended may have left more than the last reading knew of.
            if device.is_stale and not device.is_moving:
                device.is_stale = False
                self._work.append(partial(self._look_again, device))
            elif device.budget.sum_of(Use.UNRETURNED) and not device.is_watched:
                device.is_watched = True  # nothing of ours will tell that it came back
                look = partial(self._look_for_unreturned, device)
                self.clock.call_at(self.clock.now() + LOOK_AGAIN_S, look)
        if not self._is_suspicious and circles.suspects(self):
            self._is_suspicious = True
            self.clock.call_at(self.clock.now() + DEADLOCK_S, self._break_circles)

    def _look_for_unreturned(self, device: Device) -> None:
        device.is_watched = False
        self._look_again(device)

    def _break_circles(self) -> None:
        """
        Fail the request that closed a circle, and let nobody wait for his own victims.
        """
        with self.changing():
            self._is_suspicious = False
            if self._closed is not None:
                return
            ripe_s = self.clock.now() - DEADLOCK_S / 2
            waiter = circles.closing(self)
            if waiter is not None and waiter.since_s <= ripe_s:
                held = sorted(
                    {
                        str(entry.key)
                        for entry in self.entries.values()
                        if waiter.owner in entry.owners.values()
                    }
                )
                self.counts["deadlocks"] += 1
                self._fail_locked(waiter, LeaseDeadlock(str(waiter), tuple(held)))
            for passing in circles.held_up(self):
                passing.passes |= passing.since_s <= ripe_s
            # Whatever else may close a circle is an event, which looks out again.
            suspects = circles.suspects(self)
            is_done = waiter is None and all(s.since_s <= ripe_s for s in suspects)
            self._is_suspicious = is_done
            self._admit_locked()
            self._is_suspicious = self._is_suspicious and not is_done

    def _shrink_locked(self) -> None:
        """
        Unload what is idle where a limit was lowered below what is held.
        """
        for device in self.devices.values():
            if device.shell_bytes:
                self._shed_locked(device)
            if device.is_over_limit:
                idle = self._idle_locked(device.name)
                for victim in planner.shrink(self._room_locked(device), idle):
                    entry = self.entries[victim.key]
                    entry.drops_copy |= victim.device != entry.device.name
                    self._unload_locked(entry, EvictionCause.CAPACITY)

    def candidate(
        self, key: ModelKey, needed_bytes: int, beside: Collection[Entry]
    ) -> Candidate:
        """
        The device of *key*, as a place for that model *beside* others of the same
        request.
        """
        with self.changing():
            device = self._device_locked(key.device)
            entry = self.entries.get(key)
            is_there = entry is not None and (
                entry in beside
                or (
                    entry.state in (State.LOADING, State.RESIDENT)
                    and entry.cause is None
                )
            )
            own = [other for other in beside if other.device is device]
            coming = [other for other in own if other.state is State.ABSENT]
            coming_bytes = sum(
                other.footprints[DEFAULT_WORKLOAD].total_bytes for other in coming
            )
            staying = [e for e in own if e.is_present and not e.stays]
            staying_bytes = sum(other.weights_bytes for other in staying)
            idle = [e for e in device.shelf if not e.stays and e not in beside]
            room = device.room()
            own_models = len(coming) + len(staying)
            can_come = room.reachable_models() > own_models
            reachable_bytes = room.reachable_bytes() - coming_bytes - staying_bytes
            return Candidate(
                key.device,
                needed_bytes,
                free_bytes=device.budget.left_bytes - coming_bytes,
                idle_bytes=sum(other.weights_bytes for other in idle),
                ceiling_bytes=reachable_bytes if can_come else 0,
                free_models=room.free_models - len(coming),
                idle_models=len(idle),
                is_there=is_there,
                leases=0 if entry is None else len(entry.leases),
                has_copy=entry is not None and entry.parked_bytes > 0,
            )

    def plan_locked(self, queue: Sequence[Waiter]) -> list[Decision]:
        """
        What should happen to each waiter; nothing is changed.
        """
        now_s = self.clock.now()
        first: dict[ModelKey, int] = {}
        pending: list[Pending] = []
        for place, waiter in enumerate(queue):
            one = waiter.pending(impatient=now_s - waiter.since_s >= self._patience_s)
            if one.need is Need.LOAD and not waiter.is_group:
                # Only the first asks for its load; the others share it.
                asks = first.setdefault(one.keys[0], place)
                if asks != place:
                    if one.passes:
                        pending[asks] = replace(pending[asks], passes=True)
                    one = Pending(one.keys, Need.NOTHING)
            pending.append(one)
        rooms = {name: self._room_locked(each) for name, each in self.devices.items()}
        return planner.plan(pending, rooms, self._idle_locked, self._busy_locked)

    def _room_locked(self, device: Device) -> Room:
        """
        What `admission` sees of *device*, copies of models of other devices included.
        """
        room = device.room()
        for entry in self._copied_locked(device.name):
            if entry.stays:
                room.pinned_bytes += entry.copy_bytes
            if entry.state is State.UNLOADING:
                # It ends as a shell or is dropped; in either case it is charged to
                # nobody.
                room.coming_bytes += entry.copy_bytes
        return room

    def _idle_locked(self, device: str) -> list[Resident]:
        """
        The models that may leave *device*, the first to leave first.
        """
        idle = self._ordered(self.devices[device].shelf)
        return idle + self._copies_locked(device, is_idle=True)

    def _copies_locked(self, device: str, *, is_idle: bool) -> list[Resident]:
        """
        The models of cards that have copies on *device* and may leave, each as what its
        copy frees.
        """
        copied = self._copied_locked(device)
        found = [e for e in copied if (e.is_idle if is_idle else e.leases)]
        return [
            replace(one, device=device, weights_bytes=self.entries[one.key].copy_bytes)
            for one in self._ordered(found)
        ]

    def _busy_locked(self, device: str) -> list[Resident]:
        """
        The leased models of *device* that may leave once they are idle.
        """
        held = self.devices[device].entries.values()
        busy = self._ordered(entry for entry in held if entry.leases)
        return busy + self._copies_locked(device, is_idle=False)

    def _ordered(self, entries: Iterable[Entry]) -> list[Resident]:
        now_s = self.clock.now()
        residents = [entry.resident() for entry in entries if not entry.stays]
        return sorted(residents, key=lambda resident: self._policy(resident, now_s))

    def _carry_out_locked(self, waiter: Waiter, decision: Decision) -> None:
        if decision.outcome is Outcome.LOAD:
            reserved = reservations(waiter.parts)
            if waiter.is_group:
                self._hold_locked(waiter)
            for entry, (n_bytes, host_bytes) in reserved.items():
                self._start_load_locked(entry, n_bytes, host_bytes)
        elif decision.outcome is Outcome.GRANT and waiter.is_group:
            self._hold_locked(waiter)
        elif decision.outcome is Outcome.GRANT:
            self._serve_locked(waiter.parts[0].entry, waiter)
        elif decision.lacking is not None:
            demand, reachable_bytes = decision.lacking
            error = self.too_large(str(waiter), demand, reachable_bytes)
            self._fail_locked(waiter, error)

    def too_large(
        self, wanted: str, demand: Demand, reachable_bytes: int
    ) -> ModelTooLarge:
        """
        Why *demand* can never be met.
        """
        device = self.devices[demand.device]
        room = device.room()
        models = demand.models + demand.own_models
        if demand.models and room.reachable_models() < models:
            reason = f"max_models is {room.max_models}"
            if models == 1:
                reason += ", and all of them are pinned"
            else:
                reason += f", of which {room.pinned_models} are pinned, and {models} "
                reason += "are wanted at once"
        elif demand.n_bytes + demand.own_bytes <= room.ceiling_bytes:
            reason = f"{format_bytes(room.pinned_bytes)} are pinned; unpin a model"
        elif device.budget.limit_bytes is not None and (
            demand.n_bytes + demand.own_bytes > device.budget.limit_bytes
        ):
            reason = "that is the limit; raise it, or choose a smaller model or type"
        else:
            reason = "other programs hold the rest; choose a smaller model or type"
        return ModelTooLarge(
            wanted,
            device.name,
            demand.n_bytes + demand.own_bytes,
            reachable_bytes + demand.own_bytes,
            reason,
        )

    def _drain_locked(self, entry: Entry, waiter: Waiter) -> None:
        """
        Keep new leases on *entry* back until *waiter* is served.
        """
        if entry.drained_for is None:
            entry.drained_for = waiter
            waiter.draining.append(entry)

    def _leave_locked(self, waiter: Waiter) -> None:
        self.queue.remove(waiter)
        for entry in waiter.draining:
            entry.drained_for = None
        waiter.draining.clear()
        # It kept its models from expiring.
        for entry in waiter.entries:
            if entry.is_idle:
                self._sweep_by_locked(entry.expires_at_s)
        self.seconds["wait_s"] += self.clock.now() - waiter.since_s

    def _fail_locked(self, waiter: Waiter, error: BaseException) -> None:
        self._leave_locked(waiter)
        self._let_go_locked(waiter)
        if waiter.future.set_running_or_notify_cancel():
            self._work.append(partial(waiter.future.set_exception, error))

    def _let_go_locked(self, waiter: Waiter) -> None:
        """
        End the leases that a request for several models holds so far.
        """
        held, waiter.held = waiter.held, None
        for lease in (held or {}).values():
            self._release_locked(lease._entry, lease._serial, waiter.keep_alive_s)

    # Grant ---------------------------------------------------------------------------

    def _serve_locked(self, entry: Entry, first: Waiter | None = None) -> None:
        """
        Grant a resident model to who waits for it: *first* or else the oldest, and all
        who cost no more memory.

        Requests for several models whose memory was granted come before them.
        """
        waiting = [waiter for waiter in self.queue if waiter.wants(entry)]
        for waiter in waiting:
            if waiter.held is not None:
                self._hold_locked(waiter)
        singles = [waiter for waiter in waiting if not waiter.is_group]
        if first is not None:
            singles.remove(first)
            singles.insert(0, first)
        granted = False
        for waiter in singles:
            workspace_bytes = waiter.parts[0].footprint.workspace_bytes
            if not entry.is_open_to(waiter) or not entry.fits(workspace_bytes):
                continue
            more_bytes = entry.workspace_with(workspace_bytes) - entry.workspace_bytes
            if granted and more_bytes > 0:
                continue
            granted = True
            self._leave_locked(waiter)
            if waiter.future.set_running_or_notify_cancel():
                lease = self._grant_locked(
                    entry, workspace_bytes, waiter.keep_alive_s, waiter.owner
                )
                self._serve_with_locked(waiter, (lease,))

    def _hold_locked(self, waiter: Waiter) -> None:
        """
        Take those leases of a request for several models whose models are there; all of
        its memory is granted. With the last one, it is served.
        """
        held = waiter.held = waiter.held or {}
        for place, part in enumerate(waiter.parts):
            if place not in held and part.entry.state is State.RESIDENT:
                held[place] = self._grant_locked(
                    part.entry,
                    part.footprint.workspace_bytes,
                    waiter.keep_alive_s,
                    waiter.owner,
                )
        if len(held) < len(waiter.parts):
            return
        self._leave_locked(waiter)
        if waiter.future.set_running_or_notify_cancel():
            leases = tuple(held[place] for place in range(len(waiter.parts)))
            waiter.held = None
            self._serve_with_locked(waiter, leases)
        else:
            self._let_go_locked(waiter)

    def _serve_with_locked(self, waiter: Waiter, leases: tuple[Lease, ...]) -> None:
        """
        Let a request that has left the queue have its leases.
        """
        if waiter.waits:
            wait_s = self.clock.now() - waiter.since_s
            for lease in leases:
                self.outbox.append(ModelGranted(lease.key, wait_s))
        self._work.append(partial(waiter.future.set_result, leases))

    def _grant_locked(
        self,
        entry: Entry,
        workspace_bytes: int,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease:
        serial = next(self._serials)
        # It is made first: what a signal handler raises in here then gives it back.
        lease = Lease(self, entry, serial, keep_alive_s)
        entry.take(serial, owner, workspace_bytes, self.clock.now())
        self.leases += 1
        self._grants += 1
        if entry.device.shell_bytes:
            self._shed_locked(entry.device)
        return lease

    # Release -------------------------------------------------------------------------

    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease. Nothing happens if it has ended.
        """
        work: list[Callable[[], None]] | None = None
        if self._lock.locked():
            take_turn(self._lock)
        try:
            with self._lock:
                self._release_locked(entry, serial, keep_alive_s)
                if self.queue or entry.device.is_over_limit:
                    self._admit_locked()
                if self._work:
                    work = self._take_work_locked()
        finally:
            if work or self._dropped:
                self._perform(work or [])

    def hand_over(self, entry: Entry, serial: int, owner: Owner) -> None:
        """
        Note that somebody else will end a lease.
        """
        with self.changing():
            if serial in entry.leases:
                entry.owners[serial] = owner
                self._admit_locked()

    def entrust(self, serial: int, holder: Holder) -> None:
        """
        Note what holds a lease for a caller.
        """
        with self.changing():
            self._holders[serial] = holder

    def drop(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease from the garbage collector.

        That may run inside a critical section of this very thread, of the cache or of a
        listener, so nothing is done here: the device's thread sees to it, or whoever
        lets go of the lock before.
        """
        self._dropped.append((entry, serial, keep_alive_s))
        entry.device.thread.submit(partial(self._perform, []))

    def _release_locked(
        self, entry: Entry, serial: int, keep_alive_s: float | None
    ) -> None:
        if not entry.give_back(serial):
            return
        self.leases -= 1
        if not entry.leases:
            self._shelve_locked(entry, keep_alive_s)

    def _shelve_locked(self, entry: Entry, keep_alive_s: float | None) -> None:
        """
        Put an idle model on the shelf; the clock of its keep-alive starts.
        """
        if keep_alive_s is None:
            keep_alive_s = self._keep_alive_s
        device, now_s = entry.device, self.clock.now()
        device.is_stale = True
        device.shelf[entry] = None
        entry.last_used_s = now_s
        entry.expires_at_s = now_s + keep_alive_s
        if entry.cause is not None:
            self._unload_locked(entry, entry.cause)
        elif keep_alive_s <= 0 and self._may_expire_locked(entry):
            self._unload_locked(entry, EvictionCause.EXPIRED)
        else:
            self._sweep_by_locked(entry.expires_at_s)

    def _may_expire_locked(self, entry: Entry) -> bool:
        wanted = any(waiter.wants(entry) for waiter in self.queue)
        return not entry.pinned and not wanted

    def _sweep_by_locked(self, at_s: float) -> None:
        """
        Sweep at *at_s*, or earlier.
        """
        if at_s < self._sweep_at_s:
            self._sweep_at_s = at_s
            self.clock.call_at(at_s, partial(self._sweep, at_s))

    def _sweep(self, at_s: float) -> None:
        """
        Unload what has been idle for longer than its keep-alive.
        """
        with self.changing():
            if at_s != self._sweep_at_s:
                return  # an earlier sweep took its place
            now_s = self.clock.now()
            next_s = self._sweep_at_s = math.inf
            for device in self.devices.values():
                for entry in list(device.shelf):
                    if entry.expires_at_s > now_s:
                        next_s = min(next_s, entry.expires_at_s)
                    elif self._may_expire_locked(entry):
                        self._unload_locked(entry, EvictionCause.EXPIRED)
            self._sweep_by_locked(next_s)

    # Leaving ------------------------------------------------------------------------

    def evict(
        self, matches: Callable[[ModelKey], bool], waits_for: Owner = None
    ) -> list[Leaving]:
        """
        Unload models as soon as they are idle, pinned or not.

        Each with a future that is done when its leaving was confirmed.

        Raises:
            LeaseDeadlock: *waits_for*, who will wait for them, holds leases on some.
        """
        self._perform([])  # what was dropped on the way here is held no more
        with self.changing():
            leaving = [
                entry
                for entry in self.entries.values()
                if entry.state is not State.ABSENT and matches(entry.key)
            ]
            self._forget_locked(matches)
            if waits_for is not None:
                own = [e for e in leaving if waits_for in e.owners.values()]
                if own:
                    self.counts["deadlocks"] += 1
                    names = tuple(str(entry.key) for entry in own)
                    what = f"the eviction of {names[0]}"
                    raise LeaseDeadlock(what, names, own=True)
            return [
                (entry, self._doom_locked(entry, EvictionCause.EXPLICIT))
                for entry in leaving
            ]

    def _doom_locked(self, entry: Entry, cause: EvictionCause) -> Future[None]:
        """
        Unload *entry* now if it is idle, else as soon as it is.
        """
        gone: Future[None] = Future()
        gone.add_done_callback(_wake_if_cancelled)
        entry.gone.append(gone)
        if entry.state is State.UNLOADING:
            entry.drops_copy = True
        else:
            entry.cause = cause
            if entry.is_idle:
                self._unload_locked(entry, cause)
        return gone

    def withdraw(self, entry: Entry, gone: Future[None]) -> None:
        """
        Take an eviction back whose caller no longer waits; one under way goes on.
        """
        with self.changing():
            if gone in entry.gone:
                entry.gone.remove(gone)
            # What is left when a cache closes leaves in any case.
            is_wanted = not entry.gone and self._closed is None
            if is_wanted and entry.state is not State.UNLOADING:
                entry.cause = None
            self._admit_locked()

    def pin(self, entry: Entry) -> None:
        """
        Let a model that is held stay when idle.
        """
        with self.changing():
            entry.pinned = True

    def unpin(self, matches: Callable[[ModelKey], bool]) -> int:
        """
        Let models leave when idle, as before `pin`; how many were pinned.
        """
        with self.changing():
            pinned = [e for e in self.entries.values() if e.pinned and matches(e.key)]
            for entry in pinned:
                entry.pinned = False
                if entry.is_idle:
                    self._shelve_locked(entry, None)
            self._admit_locked()
        return len(pinned)

    # Limits, closing -----------------------------------------------------------------

    def all_devices(self) -> list[Device]:
        """
        The devices that were used so far.
        """
        with self.changing():
            return list(self.devices.values())

    def uses(self, device: Device) -> bool:
        """
        Whether anything is on *device*, or waited for.
        """
        with self.changing():
            held = (
                device.entries or device.shell_bytes or device.budget.sum_of(Use.COPY)
            )
            return bool(held) or any(
                device in (entry.device, entry.host)
                for waiter in self.queue
                for entry in waiter.entries
            )

    def account(self, device: Device) -> dict[str, int]:
        """
        What other processes should know of *device*; the fields of `ledger.Account`.
        """
        with self.changing():
            held = [
                entry
                for entry in device.entries.values()
                if entry.state in (State.RESIDENT, State.UNLOADING)
            ]
            held_bytes = sum(entry.weights_bytes for entry in held)
            pinned_bytes = sum(entry.weights_bytes for entry in held if entry.stays)
            idle_bytes = sum(e.weights_bytes for e in device.shelf if not e.stays)
            return {
                "promised_bytes": device.budget.to_come_bytes,
                # What may be given up.
                "held_bytes": held_bytes - pinned_bytes + device.shell_bytes,
                "idle_bytes": idle_bytes + device.shell_bytes,
                "wanted_bytes": self._wanted_locked(device, idle_bytes),
            }

    def _wanted_locked(self, device: Device, idle_bytes: int) -> int:
        """
        What the oldest waiter lacks on *device* that only other programs can give.
        """
        for waiter in self.queue:
            pending = waiter.pending(impatient=False)
            for demand in pending.demands:
                if demand.device != device.name:
                    continue
                after_bytes = device.budget.charged_bytes - idle_bytes + demand.n_bytes
                if (
                    device.budget.limit_bytes is None
                    or after_bytes <= device.budget.limit_bytes
                ):
                    return max(0, demand.n_bytes - idle_bytes)
        return 0

    def drop_copies(self, n_bytes: int) -> None:
        """
        Let copies of weights leave the host until *n_bytes* of them are gone: first
        those of models that have left.
        """
        with self.changing():
            host = self.devices.get("cpu")
            if host is None or n_bytes <= 0:
                return
            n_bytes = self._shed_shells_locked(host, n_bytes)
            self._drop_copies_locked(n_bytes)

    def make_room_for_others(self, device: Device, n_bytes: int) -> None:
        """
        Let idle models leave until *n_bytes* are free that were not, or nothing is
        idle; then see whether somebody here can be served.
        """
        with self.changing():
            n_bytes -= self._room_locked(device).coming_bytes
            n_bytes = self._shed_shells_locked(device, n_bytes)
            if n_bytes > 0:
                idle = self._idle_locked(device.name)
                victims = planner.choose_victims(idle, n_bytes)
                for victim in idle if victims is None else victims:
                    entry = self.entries[victim.key]
                    entry.drops_copy |= victim.device != entry.device.name
                    self._unload_locked(entry, EvictionCause.PRESSURE)
            self._admit_locked()

    def resize(self, limit_of: Callable[[str], Limit], max_models: int | None) -> None:
        """
        Set other limits. What is idle and too much leaves now, the rest when idle.
        """
        with self.changing():
            self.limit_of = limit_of
            self.max_models = max_models
            for device in self.devices.values():
                device.max_models = max_models
                device.budget.set_limit(limit_of(device.name))
            self._admit_locked()

    def close(self) -> list[Leaving] | None:
        """
        Refuse new requests, fail those that wait, unload what is or becomes idle.

        The models in memory, each with a future that is done when it has left.
        May be called in a signal handler, which may have interrupted this very thread
        in a critical section: then None is returned, and it is done soon after the
        handler has ended.
        """
        if self._closed is not None and isinstance(self._closed, CacheForked):
            return []
        if not self._lock.acquire(timeout=SIGNAL_S):
            threading.Thread(target=self.close, name="whispercache-close").start()
            return None
        self._lock.release()
        with self.changing():
            self._closed = self._closed or CacheClosed()
            for waiter in list(self.queue):
                self._fail_locked(waiter, CacheClosed("the cache was closed meanwhile"))
            leaving = [
                (entry, self._doom_locked(entry, EvictionCause.CLOSED))
                for entry in list(self.entries.values())
                if entry.state is not State.ABSENT
            ]
            self._stop_if_over_locked()
        return leaving

    def end_own(self, owners: Collection[Owner], why: str) -> Own:
        """
        End what *owners*, who will wait, would wait for in vain: iterators of theirs,
        and those that never had other owners than threads and tasks that are over. A
        step in flight on another thread is not interrupted.

        Returns:
            What they still hold.
        """
        with self.changing():
            found = [
                (entry, serial, owner, self._holders.get(serial))
                for entry in self.entries.values()
                for serial, owner in entry.owners.items()
                if owner in owners or has_ended(owner)
            ]
        stuck = {
            entry
            for entry, _, owner, holder in found
            if holder is not None
            and (owner in owners or not holder.has_moved)
            and not holder.end(why, owner)
        }
        # What the garbage collector ended meanwhile was given back with the lock.
        held = {
            str(entry.key)
            for entry, serial, owner, holder in found
            if holder is None and owner in owners and serial in entry.leases
        }
        return Own(tuple(sorted(held)), frozenset(stuck))

    def quiesce(self, timeout_s: float) -> None:
        """
        Let no calls begin any more on models that are leased, and wait for those in
        flight, at the interpreter's end.
        """
        with self.changing():
            busy = [entry.loaded for entry in self.entries.values() if entry.leases]
        for loaded in busy:
            if loaded is not None and not self.loader.quiesce(loaded, timeout_s):
                _log.warning("%s is still at work at the end", loaded.key)

    def join(self, timeout_s: float | None) -> None:
        """
        Wait for the devices' threads to end, after `close`.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for device in list(self.devices.values()):
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            device.thread.join(left_s)

    def _stop_if_over_locked(self) -> None:
        """
        Let all threads end once the cache is closed and empty.
        """
        if not self._is_over:
            return
        self._work.append(self.clock.close)
        host = self.devices.get("cpu")
        if host is not None and host.shell_bytes:
            shrink = partial(self._shrink_shells, host, 0)
            self._work.append(partial(host.thread.submit, shrink))
        if self.peers is not None:
            self._work.append(self.peers.close)
        self._work.extend(device.thread.stop for device in self.devices.values())

    def forked(self, *, gpu_in_use: bool) -> None:
        """
        Be of no more use, in a child that was forked: the threads are gone, and what
        they held is as they left it. Nothing of the parent is touched.

        A cache that had loaded nothing yet starts afresh, unless the parent has opened
        the GPU's driver, which does not work in a child.
        """
        states = {entry.state for entry in self.entries.values()}
        was_used = bool(states - {State.ABSENT}) or self.counts["loads"] > 0
        is_fresh = not was_used and not gpu_in_use
        self._renew()
        self._is_suspicious = False
        self._sweep_at_s = math.inf
        self.loader.forked([e.loaded for e in self.entries.values() if e.loaded])
        if is_fresh:
            self.entries.clear()
            self.devices.clear()
        else:
            self._closed = CacheForked()

    # Proof ---------------------------------------------------------------------------

    def check(self) -> None:
        """
        Assert the invariants that can be seen from outside a critical section.
        """
        with self.changing():
            for device in self.devices.values():
                self._check_device_locked(device)
            for entry in self.entries.values():
                entry.check()
            held = sum(len(entry.leases) for entry in self.entries.values())
            assert held == self.leases, f"{held} leases held, {self.leases} counted"
            for waiter in self.queue:
                ended = waiter.future.done() and not waiter.future.cancelled()
                assert not ended, f"{waiter} waits and is done"
                for lease in (waiter.held or {}).values():
                    assert not lease.is_released, f"{waiter} lost {lease}"

    def _check_device_locked(self, device: Device) -> None:
        device.budget.check()
        if device.is_over_limit:
            idle = self._idle_locked(device.name)
            excess = planner.shrink(self._room_locked(device), idle)
            assert not excess, f"{device.name} over its limit: {excess} should leave"


def _give_back(future: Future[tuple[Lease, ...]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for lease in future.result():
            lease.release()


def _wake_if_cancelled(future: Future[None]) -> None:
    """
    Wake those in `concurrent.futures.wait`, whom cancelling alone does not wake.
    """
    if future.cancelled():
        future.set_running_or_notify_cancel()
