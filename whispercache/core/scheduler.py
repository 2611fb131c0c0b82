"""
The scheduler: which request gets memory, when, and which waits, fails or is served.

`Scheduler.admit` is the only place that matches requests to memory, and every arrival,
release, load and unload that may help a request ends in it. Those that can help none,
by what the last `admit` found, cost the same however many wait.

All of it needs the lock. It never takes it, never waits and never calls out: what is to
be done is noted as effects.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from whispercache.errors import (
    CacheClosed,
    LeaseDeadlock,
    LeaseTimeout,
    TooManyWaiters,
)
from whispercache.events import EvictionCause, ModelGranted
from whispercache.lease import Lease
from whispercache.planning import planner
from whispercache.planning.planner import Outcome

from . import deadlocks, demands, view
from .effects import LookAgain, Settle, StartLoad, StartUnload
from .entries import Entry, State
from .refusals import refusal, too_large
from .round import Round

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from whispercache.engine.sizes.footprint import Workload
    from whispercache.lease import _Lessor as Lessor
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.planner import Decision
    from whispercache.units import Limit

    from .agenda import Agenda
    from .device import Device
    from .entries import Waiter
    from .evictions import Evictions, Leaving
    from .reminders import Thing
    from .round import Found

DEADLOCK_S = 0.04
"""
Delay before a possible deadlock is checked.

Only a request that has waited half as long is failed, since a lease may just be moving
to a thread that will release it. The error therefore arrives 20 to 60 ms after the
deadlock.
"""

LOOK_AGAIN_S = 1.0
"""
Seconds after which a gauge that could not be read, or does not show yet what was freed,
is read again for those who wait.
"""

LOOK_EVERY_S = 0.02
"""
Least seconds between two looks at a gauge because something has ended. Each release
beside a queue asks for one.
"""


class Scheduler:
    """
    The decisions over a state.

    Args:
        agenda: What it decides over and by.
        evictions: Decides which idle models go.
        lessor: Ends the leases that are granted.
    """

    def __init__(
        self, agenda: Agenda, evictions: Evictions, lessor: Lessor[Entry]
    ) -> None:
        self._agenda = agenda
        self._state = agenda.state
        self._now = agenda.now
        self._rules = agenda.rules
        self._evictions = evictions
        self._lessor = lessor
        self._serials = itertools.count()

    # Requests -------------------------------------------------------------------------

    def hit(
        self,
        entry: Entry,
        workload: Workload,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease | None:
        """
        Returns a lease on a model that is in memory, if that takes nothing from a
        request that waits; else None.
        """
        state = self._state
        if (
            state.closed is not None
            # `is_open_to(None)`, spelled out: a call less for each hit.
            or entry.state is not State.RESIDENT
            or entry.cause is not None
            or entry.drained_for is not None
            or entry.device.lost_to is not None
        ):
            return None
        workspace_bytes = entry.workspace_of(workload)
        if workspace_bytes is None or not entry.fits(workspace_bytes):
            return None
        # A request that waits may need what this would take: the planner decides then.
        if state.queue and not self._may_pass(entry, workspace_bytes):
            return None
        state.counts["hits"] += 1
        lease = self._grant(entry, workspace_bytes, keep_alive_s, owner)
        if owner in state.queue.suspects:
            self._look_out(())
        return lease

    def _may_pass(self, entry: Entry, workspace_bytes: int) -> bool:
        """
        Returns True if a lease on *entry* changes nothing for those that wait, so that
        the planner would grant it.
        """
        state, device = self._state, entry.device
        outlook = device.outlook
        if (
            entry.waiting
            or entry.key in state.chosen
            or not outlook.is_known
            or (self._is_draining(entry) and not entry.stays)
            or self._now() >= state.impatient_at_s
        ):
            return False
        more_bytes = entry.workspace_with(workspace_bytes) - entry.workspace_bytes
        left_bytes = device.budget.left_bytes - outlook.promised_bytes
        return more_bytes <= 0 or more_bytes <= left_bytes

    def _is_draining(self, entry: Entry) -> bool:
        """
        Returns True if a request that lost its patience waits for memory where *entry*
        is, or its copy.
        """
        if entry.device.outlook.is_draining:
            return True
        return entry.host.outlook.is_draining and entry.copy_bytes > 0

    def enqueue(self, waiter: Waiter, timeout_s: float | None) -> None:
        """
        Queues a request, and serves it at once if that is possible.

        Raises:
            CacheClosed: the cache was closed.
            DeviceUnavailable: a device was lost.
            LoadFailed: a model failed so often that it is not tried just now.
            TooManyWaiters: ``max_waiting`` requests wait already.
            LeaseTimeout: *timeout_s* is 0, and the models are not to be had at once.
        """
        state, waiting = self._state, len(self._state.queue)
        state.check_open()
        for each in waiter.wanted:
            if (refused := refusal(each.entry, self._now())) is not None:
                raise refused
        for each in waiter.wanted:
            is_hit = each.entry.state is State.RESIDENT
            state.counts["hits" if is_hit else "misses"] += 1
        most = self._rules.max_waiting
        is_full = most is not None and waiting >= most
        never_waits = timeout_s is not None and timeout_s <= 0
        # A full queue refuses only requests that would have to join it.
        ends_now = (is_full or never_waits) and self._ends_now(waiter)
        if never_waits and not ends_now:
            state.counts["timeouts"] += 1
            raise LeaseTimeout(str(waiter), 0.0, waiting + 1)
        if is_full and not ends_now:
            state.counts["refused"] += 1
            raise TooManyWaiters(str(waiter), waiting)
        # Even one that is served at once goes through the queue: there is one way in.
        if not waiting:
            self._form_line()
        state.queue.join(waiter)
        try:
            if self._waits_in_vain(waiter):
                self._look_out(entry.device for entry in waiter.entries)
            else:
                self.admit()
        except BaseException:  # Ctrl-C, or a policy's: its caller is gone
            self.abandon(waiter)
            raise
        waiter.waits = waiter in state.queue
        if waiter.waits and timeout_s is not None:
            waiter.deadline_s = waiter.since_s + timeout_s
            self._agenda.remind(waiter.deadline_s, waiter.serial)

    def _form_line(self) -> None:
        """
        Finds out what is only kept while anybody waits.
        """
        state = self._state
        devices = state.devices.values()
        state.queue.count_held(e for each in devices for e in each.entries.values())
        for device in devices:
            device.outlook.forget()

    def _ends_now(self, waiter: Waiter) -> bool:
        """
        Returns True if a new request would not wait: it is a hit, or can never fit.
        """
        return self.decide_on(waiter).outcome in (Outcome.GRANT, Outcome.NEVER)

    def _waits_in_vain(self, waiter: Waiter) -> bool:
        """
        Returns True if it is known that the youngest request has to wait.
        """
        state, line = self._state, self._state.queue
        if waiter.is_group or self._rules.patience_s <= 0 or not self._is_settled():
            return False
        [entry] = waiter.entries
        if entry.state is State.RESIDENT:
            return not entry.is_open_to(waiter)
        if entry.state is not State.ABSENT or line.first(entry) is not waiter:
            return True
        cohort = line.cohort_of(entry)
        return cohort is not None and cohort.stopped_in == state.rounds

    def _is_settled(self) -> bool:
        """
        Returns True if what the last walk along the line found still holds.
        """
        devices = self._state.devices.values()
        is_known = all(device.outlook.is_known for device in devices)
        return is_known and self._now() < self._state.impatient_at_s

    def abandon(self, waiter: Waiter) -> bool:
        """
        Takes a request out of the queue, and returns True if that may help others.
        """
        if waiter not in self._state.queue:
            return False
        may_help = not self._is_stuck(waiter)
        self._leave_queue(waiter)
        self.let_go(waiter)
        return may_help

    def _is_stuck(self, waiter: Waiter) -> bool:
        """
        Returns True if it is known that a request takes nothing from others.
        """
        line = self._state.queue
        # It holds memory, or leases back, or has barred others.
        if (
            waiter.is_group
            or waiter.draining
            or waiter.overtaken >= planner.MAX_OVERTAKES
        ):
            return False
        [entry] = waiter.entries
        if entry.state is not State.ABSENT or line.first(entry) is not waiter:
            # Others wait for the same load.
            return not waiter.passes and entry.state is not State.RESIDENT
        cohort = line.cohort_of(entry)
        return (
            len(entry.waiting) == 1
            and cohort is not None
            and cohort.stopped_in == self._state.rounds
            and cohort.stopped_at <= waiter.serial
        )

    def _leave_queue(self, waiter: Waiter) -> None:
        state = self._state
        state.queue.leave(waiter)
        # What was held back for it is open again, for the next request in line.
        for entry in waiter.draining:
            entry.drained_for = None
        waiter.draining.clear()
        # It kept its models from expiring.
        for entry in waiter.entries:
            if entry.is_idle:
                self._evictions.remind_of(entry)
        if waiter.deadline_s < math.inf:
            state.reminders.needless(self._is_reminded)
        state.wait_s += self._now() - waiter.since_s

    def _is_reminded(self, thing: Thing) -> bool:
        return not isinstance(thing, int) or self._state.queue.get(thing) is not None

    def fail(self, waiter: Waiter, error: BaseException) -> None:
        """
        Ends a request with an error.
        """
        self._leave_queue(waiter)
        self.let_go(waiter)
        # False if its caller cancelled it meanwhile, and so needs no answer.
        if waiter.future.set_running_or_notify_cancel():
            self._agenda.note(Settle(waiter.future, error=error))

    def let_go(self, waiter: Waiter) -> None:
        """
        Ends the leases that a request for several models holds so far.
        """
        held, waiter.held = waiter.held, None
        for lease in (held or {}).values():
            if lease._entry.give_back(lease._serial):
                self._state.leases -= 1
                self._state.queue.holds(waiter.owner, -1)
                if not lease._entry.leases:
                    self._evictions.shelve(lease._entry, waiter.keep_alive_s)

    # Admit ----------------------------------------------------------------------------

    def decide_on(self, waiter: Waiter) -> Decision:
        """
        Returns what would happen to a request that is not in the line; nothing is
        changed.
        """
        self._file_moved()
        return self._round().decide_on(waiter)

    def _round(self) -> Round:
        return Round(self._state, self._rules, self._now())

    def _file_moved(self) -> None:
        """
        Tells the line of models that changed.
        """
        for device in self._state.devices.values():
            if device.moved:
                moved, device.moved = device.moved, set()
                for entry in moved:
                    if entry.waiting:
                        self._state.queue.file(entry)

    def admit(self, *, suspects: bool = True) -> None:
        """
        Matches requests to memory, the only place that does.

        The planner decides on each request, oldest first, in one of six cases:

        1. Its models are on their way, or were chosen for an older request: it waits.
        2. It can never fit: it fails, with the numbers.
        3. A stuck request was overtaken too often on its devices: it waits.
        4. It fits: it is granted, or its load starts and overtakes stuck ones.
        5. It fits once idle models are unloaded: they are, and it waits.
        6. It is stuck: it waits, and when impatient holds new leases back.
        """
        state = self._state
        self._evictions.shrink()
        before = None
        last = None
        # To serve a request may help another one: it no longer holds anything back.
        while state.queue and len(state.queue) != before and state.closed is None:
            before = len(state.queue)
            self._file_moved()
            last = self._round()
            for found in last.run():
                self._carry_out(found)
        if last is not None:
            self._take_stock(last)
        if state.queue:
            self._look_out(state.queue.devices, suspects=suspects)
        else:
            self._file_moved()

    def _carry_out(self, found: Found) -> None:
        state, (waiter, decision, passed) = self._state, found
        # (5) Unloads come before loads: both are done in this order.
        self._evictions.unload_all(decision.victims, EvictionCause.CAPACITY)
        # (6) New leases wait until this one is served.
        for key in decision.drain:
            entry = state.entries[key]
            if entry.drained_for is None:
                entry.drained_for = waiter
                waiter.draining.append(entry)
        # (4) Those that it passes are passed 16 times at most (3).
        for other in passed:
            other.overtaken += 1
            if other.overtaken == planner.MAX_OVERTAKES:
                state.queue.wear(other)
        if decision.outcome is Outcome.LOAD:
            self._start_loads(waiter)
        elif decision.outcome is Outcome.GRANT and waiter.is_group:
            self._hold(waiter)
        elif decision.outcome is Outcome.GRANT:
            self.serve(waiter.wanted[0].entry, waiter)
        # (2) It can never fit.
        elif decision.lacking is not None:
            self.fail(waiter, too_large(self._state, str(waiter), *decision.lacking))

    def _start_loads(self, waiter: Waiter) -> None:
        reserved = demands.reservations(waiter.wanted)
        # Models that are there already are pinned first, or they could be evicted while
        # the others load.
        if waiter.is_group:
            self._hold(waiter)
        for entry, (n_bytes, host_bytes) in reserved.items():
            entry.begin_load(n_bytes, host_bytes)
            self._agenda.note(StartLoad(entry))

    def _take_stock(self, last: Round) -> None:
        """
        Notes what would help those that still wait.
        """
        state = self._state
        self._file_moved()
        state.chosen = last.chosen
        state.impatient_at_s = last.impatient_since_s + self._rules.patience_s
        state.rounds += 1
        for cohort, serial in last.stopped.items():
            cohort.stopped_in, cohort.stopped_at = state.rounds, serial
        for device in state.devices.values():
            device.outlook = last.outlook(device)
            # What younger ones were given since is missing to those that drain: they
            # are looked at again with the next event.
            if last.has_moved and device.outlook.is_draining:
                device.outlook.forget()

    def settle(self, device: Device) -> None:
        """
        Admits those that wait if the memory of *device*, or its limit, calls for it.
        """
        state = self._state
        if device.is_over_limit:
            self.admit()
        elif state.queue:
            if self._now() >= state.impatient_at_s or view.may_help(state, device):
                self.admit()
            else:
                self._look_out((device,))

    def _look_out(self, devices: Iterable[Device], *, suspects: bool = True) -> None:
        """
        Sees to it that no request waits in vain: for what a new reading would show, or
        in a deadlock, unless that was just looked for.
        """
        state, now_s = self._state, self._now()
        for device in devices:
            self._look_at(device, now_s)
        is_looked_for = state.deadlocks_at_s < math.inf
        if suspects and not is_looked_for and deadlocks.suspects(state):
            state.deadlocks_at_s = now_s + DEADLOCK_S
            self._agenda.wake_by(state.deadlocks_at_s)

    def _look_at(self, device: Device, now_s: float) -> None:
        # What ended may have left more than the last reading knew of.
        if device.is_stale and not device.is_moving and device.budget.may_gain:
            next_s = device.looked_s + LOOK_EVERY_S
            if now_s >= next_s:
                device.is_stale = False
                device.looked_s = now_s
                self._agenda.note(LookAgain(device))
                return
            at_s = next_s
        elif device.unreturned_bytes:
            # No event of ours will tell that it was returned.
            at_s = now_s + LOOK_AGAIN_S
        else:
            return
        if device.look_at_s == math.inf:
            device.look_at_s = at_s
            self._agenda.remind(at_s, device)

    # Grant ----------------------------------------------------------------------------

    def serve(self, entry: Entry, first: Waiter | None = None) -> None:
        """
        Grants a resident model to the requests for it: *first* or else the oldest, and
        all that cost no more memory.

        Requests for several models whose memory was granted come before them.
        """
        self._serve(entry, list(entry.waiting), first)

    def _serve(
        self, entry: Entry, waiting: list[Waiter], first: Waiter | None = None
    ) -> None:
        for waiter in waiting:
            if waiter.held is not None:
                self._hold(waiter)
        singles = [waiter for waiter in waiting if not waiter.is_group]
        # The plan gave room to *first*; an older one may need more than there is.
        if first is not None:
            singles.remove(first)
            singles.insert(0, first)
        granted = False
        for waiter in singles:
            workspace_bytes = waiter.wanted[0].footprint.workspace_bytes
            if not entry.is_open_to(waiter) or not entry.fits(workspace_bytes):
                continue
            more_bytes = entry.workspace_with(workspace_bytes) - entry.workspace_bytes
            # More memory is for the planner to give, in the order of the queue.
            if granted and more_bytes > 0:
                continue
            granted = True
            self._leave_queue(waiter)
            if waiter.future.set_running_or_notify_cancel():
                lease = self._grant(
                    entry, workspace_bytes, waiter.keep_alive_s, waiter.owner
                )
                self._settle(waiter, (lease,))

    def _hold(self, waiter: Waiter) -> None:
        """
        Takes those leases of a request for several models whose models are there; all
        of its memory was granted. With the last one, it is served.
        """
        held = waiter.held = waiter.held or {}
        for place, each in enumerate(waiter.wanted):
            if place not in held and each.entry.state is State.RESIDENT:
                held[place] = self._grant(
                    each.entry,
                    each.footprint.workspace_bytes,
                    waiter.keep_alive_s,
                    waiter.owner,
                )
        # The rest comes with their loads; until then it keeps its place.
        if len(held) < len(waiter.wanted):
            return
        self._leave_queue(waiter)
        if waiter.future.set_running_or_notify_cancel():
            leases = tuple(held[place] for place in range(len(waiter.wanted)))
            waiter.held = None
            self._settle(waiter, leases)
        else:
            self.let_go(waiter)

    def _settle(self, waiter: Waiter, leases: tuple[Lease, ...]) -> None:
        # A request that was served at once is a hit or a miss, not a wait.
        if waiter.waits:
            wait_s = self._now() - waiter.since_s
            for lease in leases:
                self._agenda.tell(ModelGranted(lease.key, wait_s))
        self._agenda.note(Settle(waiter.future, leases))

    def _grant(
        self,
        entry: Entry,
        workspace_bytes: int,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease:
        state, serial = self._state, next(self._serials)
        # It is made first: what a signal handler raises in here then gives it back.
        lease = Lease(self._lessor, entry, serial, keep_alive_s)
        entry.take(serial, owner, workspace_bytes, self._now())
        state.leases += 1
        state.grants += 1
        if state.queue:
            state.queue.holds(owner, 1)
        # Its workspace may be what kept tokenizers took until now.
        if entry.device.kept_bytes:
            self._evictions.shed(entry.device)
        return lease

    # Release, expire ------------------------------------------------------------------

    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        Ends a lease. Nothing happens if it has ended.
        """
        state = self._state
        owner = entry.owners.get(serial) if state.queue else None
        if not entry.give_back(serial):
            return
        state.leases -= 1
        if not entry.leases:
            self._evictions.shelve(entry, keep_alive_s)
        # Without either there is nothing to decide, and a hit pays for nothing.
        if state.queue:
            state.queue.holds(owner, -1)
            self._released(entry)
        elif entry.device.is_over_limit:
            self.admit()

    def _released(self, entry: Entry) -> None:
        """
        Admits those that wait, if the end of a lease may help one.
        """
        # What is idle now would be drained, or is chosen before others that are.
        drains = entry.is_idle and self._is_draining(entry) and not entry.stays
        frees_copy = entry.copy_bytes and view.may_help(self._state, entry.host)
        if entry.waiting or drains or frees_copy:
            self.admit()
        else:
            self.settle(entry.device)

    def hand_over(self, entry: Entry, serial: int, owner: Owner) -> None:
        """
        Notes that another owner will end a lease.
        """
        line = self._state.queue
        if serial in entry.leases:
            line.holds(entry.owners[serial], -1)
            line.holds(owner, 1)
            entry.owners[serial] = owner
            # A request of its new owner may have the model too, or wait in vain.
            if owner in line.owners or entry.waiting:
                self.admit()

    # Time -----------------------------------------------------------------------------

    def tick(self, at_s: float) -> None:
        """
        Does all that is due by now, unless that was done since *at_s* was set.

        Times requests out, unloads what was idle for its keep-alive, tries unloads
        again, reads gauges again, and looks for deadlocks.
        """
        state, now_s = self._state, self._now()
        if at_s not in state.timers_s:
            return  # an earlier call did its work
        state.end_timers(max(at_s, now_s))
        try:
            self._do_due(now_s)
        finally:  # what a policy raises must not stop the time
            next_s = min(state.reminders.next_s, state.deadlocks_at_s)
            self._agenda.wake_by(next_s)

    def _do_due(self, now_s: float) -> None:
        state = self._state
        due = state.reminders.due(now_s)
        late = [state.queue.get(each) for each in due if isinstance(each, int)]
        # Places as they were before any of them left: the errors tell them.
        placed = [(w, state.queue.place(w)) for w in late if w is not None]
        for waiter, place in placed:
            state.counts["timeouts"] += 1
            waited_s = now_s - waiter.since_s
            self.fail(waiter, LeaseTimeout(str(waiter), waited_s, place))
        for each in due:
            if isinstance(each, Entry):
                self._look_after(each, now_s)
            elif not isinstance(each, int) and each.look_at_s <= now_s:
                each.look_at_s = math.inf
                each.looked_s = now_s
                self._agenda.note(LookAgain(each))
        if state.deadlocks_at_s <= now_s:
            state.deadlocks_at_s = math.inf
            self.admit(suspects=self._break_deadlocks(now_s))
        else:
            self.admit()

    def _look_after(self, entry: Entry, now_s: float) -> None:
        """
        Unloads a model that was idle for long enough, or tries its unload again.
        """
        self._evictions.expire(entry, now_s)
        if entry.unload_again_s <= now_s:
            entry.unload_again_s = math.inf
            self._agenda.note(StartUnload(entry))

    def _break_deadlocks(self, now_s: float) -> bool:
        """
        Fails the request that completed a deadlock, and lets requests pass an older one
        that waits for their own leases.

        Returns:
            True if there may be more to find without another event.
        """
        state, ripe_s = self._state, now_s - DEADLOCK_S / 2
        if state.closed is not None:
            return False
        victim = deadlocks.victim_of_deadlock(state)
        if victim is not None and victim.since_s <= ripe_s:
            held = {
                str(entry.key)
                for entry in state.entries.values()
                if victim.owner in entry.owners.values()
            }
            state.counts["deadlocks"] += 1
            self.fail(victim, LeaseDeadlock(str(victim), tuple(sorted(held))))
        # Not a deadlock yet, but to wait their turn would make one.
        for passing in deadlocks.detained(state):
            if passing.since_s <= ripe_s and not passing.passes:
                state.queue.let_pass(passing)
        is_settled = all(each.since_s <= ripe_s for each in deadlocks.suspects(state))
        return victim is not None or not is_settled

    # Limits, closing ------------------------------------------------------------------

    def resize(self, limit_of: Callable[[str], Limit], max_models: int | None) -> None:
        """
        Sets other limits. What is too much is unloaded now if idle, else later.
        """
        state = self._state
        state.limit_of = limit_of
        state.max_models = max_models
        for device in state.devices.values():
            device.max_models = max_models
            device.budget.set_limit(limit_of(device.name))
            device.outlook.forget()
        self.admit()

    def close(self) -> list[Leaving]:
        """
        Refuses new requests, fails those that wait, unloads what is or becomes idle.
        """
        state = self._state
        state.closed = state.closed or CacheClosed()
        for waiter in list(state.queue):
            self.fail(waiter, CacheClosed("the cache was closed meanwhile"))
        present = [entry for entry in state.entries.values() if entry.is_present]
        leaving = [
            self._evictions.doom(entry, EvictionCause.CLOSED) for entry in present
        ]
        self._agenda.stop_if_over()
        return leaving

    # Proof ----------------------------------------------------------------------------

    def check(self) -> None:
        """
        Asserts the invariants.
        """
        self._state.check()
        for device in self._state.devices.values():
            if device.is_over_limit:
                excess = self._evictions.excess(device)
                assert not excess, f"{device.name} over its limit: {excess} should go"
