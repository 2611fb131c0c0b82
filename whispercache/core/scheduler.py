"""
The scheduler: which request gets memory, when, and which waits, fails or is served.

`Scheduler.admit` is the only place that matches requests to memory, and every arrival,
release, load and unload ends in it. Waiting requests are looked at nowhere else.

All of it needs the lock. It never takes it, never waits and never calls out: what is to
be done is noted as effects.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING

from whispercache.errors import (
    CacheClosed,
    LeaseDeadlock,
    LeaseTimeout,
    TooManyWaiters,
)
from whispercache.events import EvictionCause, ModelGranted
from whispercache.lease import Lease
from whispercache.planning.planner import Outcome

from . import view
from .effects import LookAgain, Settle, StartLoad, StartUnload
from .entries import State
from .refusals import refusal, too_large

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from whispercache.engine.sizes.footprint import Workload
    from whispercache.lease import _Lessor as Lessor
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.planner import Decision
    from whispercache.units import Limit

    from .agenda import Agenda
    from .entries import Entry, Waiter
    from .evictions import Evictions, Leaving

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
        Returns a lease on a model that is in memory, if no request waits; else None.
        """
        state = self._state
        # A request that waits may need what this would take: the planner decides then.
        if (
            state.queue
            or state.closed is not None
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
        state.counts["hits"] += 1
        return self._grant(entry, workspace_bytes, keep_alive_s, owner)

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
        state.queue.append(waiter)
        try:
            self.admit()
        except BaseException:  # Ctrl-C, or a policy's: its caller is gone
            self.abandon(waiter)
            raise
        waiter.waits = waiter in state.queue
        if waiter.waits and timeout_s is not None:
            waiter.deadline_s = waiter.since_s + timeout_s
            self._agenda.wake_by(waiter.deadline_s)

    def _ends_now(self, waiter: Waiter) -> bool:
        """
        Returns True if a new request would not wait: it is a hit, or can never fit.
        """
        decision = self.plan([*self._state.queue, waiter])[-1]
        return decision.outcome in (Outcome.GRANT, Outcome.NEVER)

    def abandon(self, waiter: Waiter) -> bool:
        """
        Takes a request out of the queue, and returns True if it was there.
        """
        if waiter not in self._state.queue:
            return False
        self._leave_queue(waiter)
        self.let_go(waiter)
        return True

    def _leave_queue(self, waiter: Waiter) -> None:
        self._state.queue.remove(waiter)
        # What was held back for it is open again, for the next request in line.
        for entry in waiter.draining:
            entry.drained_for = None
        waiter.draining.clear()
        # It kept its models from expiring.
        for entry in waiter.entries:
            if entry.is_idle:
                self._agenda.wake_by(entry.expires_at_s)
        self._state.wait_s += self._now() - waiter.since_s

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
                if not lease._entry.leases:
                    self._evictions.shelve(lease._entry, waiter.keep_alive_s)

    # Admit ----------------------------------------------------------------------------

    def plan(self, queue: Sequence[Waiter]) -> list[Decision]:
        """
        Returns what should happen to each request of *queue*; nothing is changed.
        """
        state, rules, now_s = self._state, self._rules, self._now()
        look = partial(view.residents, state, policy=rules.policy, now_s=now_s)
        pending = view.queue_of(queue, now_s - rules.patience_s)
        rooms = {name: view.room(state, each) for name, each in state.devices.items()}
        return rules.plan(
            pending, rooms, partial(look, idle=True), partial(look, idle=False)
        )

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
        # To serve a request may help another one: it no longer holds anything back.
        while state.queue and len(state.queue) != before and state.closed is None:
            before = len(state.queue)
            queue = list(state.queue)
            for waiter, decision in zip(queue, self.plan(queue), strict=True):
                # (5) Unloads come before loads: both are done in this order.
                self._evictions.unload_all(decision.victims, EvictionCause.CAPACITY)
                # (6) New leases wait until this one is served.
                for key in decision.drain:
                    entry = state.entries[key]
                    if entry.drained_for is None:
                        entry.drained_for = waiter
                        waiter.draining.append(entry)
                # (4) Those that it passes are passed 16 times at most (3).
                for place in decision.overtakes:
                    queue[place].overtaken += 1
                self._carry_out(waiter, decision)
        if state.queue:
            self._look_out(suspects=suspects)

    def _carry_out(self, waiter: Waiter, decision: Decision) -> None:
        # (4) It fits.
        if decision.outcome is Outcome.LOAD:
            reserved = view.reservations(waiter.wanted)
            # Models that are there already are pinned first, or they could be evicted
            # while the others load.
            if waiter.is_group:
                self._hold(waiter)
            for entry, (n_bytes, host_bytes) in reserved.items():
                entry.begin_load(n_bytes, host_bytes)
                self._agenda.note(StartLoad(entry))
        elif decision.outcome is Outcome.GRANT and waiter.is_group:
            self._hold(waiter)
        elif decision.outcome is Outcome.GRANT:
            self.serve(waiter.wanted[0].entry, waiter)
        # (2) It can never fit.
        elif decision.lacking is not None:
            self.fail(waiter, too_large(self._state, str(waiter), *decision.lacking))

    def _look_out(self, *, suspects: bool) -> None:
        """
        Sees to it that no request waits in vain: for what a new reading would show, or
        in a deadlock, unless that was just looked for.
        """
        state, now_s = self._state, self._now()
        for device in {e.device for waiter in state.queue for e in waiter.entries}:
            # What ended may have left more than the last reading knew of.
            if device.is_stale and not device.is_moving:
                device.is_stale = False
                self._agenda.note(LookAgain(device))
            elif device.unreturned_bytes and device.look_at_s == math.inf:
                # No event of ours will tell that it was returned.
                device.look_at_s = now_s + LOOK_AGAIN_S
                self._agenda.wake_by(device.look_at_s)
        is_looked_for = state.deadlocks_at_s < math.inf
        if suspects and not is_looked_for and view.suspects(state):
            state.deadlocks_at_s = now_s + DEADLOCK_S
            self._agenda.wake_by(state.deadlocks_at_s)

    # Grant ----------------------------------------------------------------------------

    def serve(self, entry: Entry, first: Waiter | None = None) -> None:
        """
        Grants a resident model to the requests for it: *first* or else the oldest, and
        all that cost no more memory.

        Requests for several models whose memory was granted come before them.
        """
        waiting = [waiter for waiter in self._state.queue if waiter.wants(entry)]
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
        # Its workspace may be what kept tokenizers took until now.
        if entry.device.kept_bytes:
            self._evictions.shed(entry.device)
        return lease

    # Release, expire ------------------------------------------------------------------

    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        Ends a lease. Nothing happens if it has ended.
        """
        if not entry.give_back(serial):
            return
        state = self._state
        state.leases -= 1
        if not entry.leases:
            self._evictions.shelve(entry, keep_alive_s)
        # Without either there is nothing to decide, and a hit pays for nothing.
        if state.queue or entry.device.is_over_limit:
            self.admit()

    def hand_over(self, entry: Entry, serial: int, owner: Owner) -> None:
        """
        Notes that another owner will end a lease.
        """
        if serial in entry.leases:
            entry.owners[serial] = owner
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
            self._agenda.wake_by(self._next_s(now_s))

    def _do_due(self, now_s: float) -> None:
        state = self._state
        # Places as they were before any of them left: the errors tell them.
        for place, waiter in enumerate(list(state.queue), start=1):
            if waiter.deadline_s <= now_s and waiter in state.queue:
                state.counts["timeouts"] += 1
                waited_s = now_s - waiter.since_s
                self.fail(waiter, LeaseTimeout(str(waiter), waited_s, place))
        self._evictions.expire(now_s)
        for device in state.devices.values():
            for entry in device.entries.values():
                if entry.unload_again_s <= now_s:
                    entry.unload_again_s = math.inf
                    self._agenda.note(StartUnload(entry))
            if device.look_at_s <= now_s:
                device.look_at_s = math.inf
                self._agenda.note(LookAgain(device))
        if state.deadlocks_at_s <= now_s:
            state.deadlocks_at_s = math.inf
            self.admit(suspects=self._break_deadlocks(now_s))
        else:
            self.admit()

    def _next_s(self, now_s: float) -> float:
        state = self._state
        times_s = [state.deadlocks_at_s, *(w.deadline_s for w in state.queue)]
        for device in state.devices.values():
            times_s.append(device.look_at_s)
            times_s += [entry.unload_again_s for entry in device.entries.values()]
            times_s += [entry.expires_at_s for entry in device.shelf]
        # What is due and was not done is kept by something that will end in an event.
        return min((at_s for at_s in times_s if at_s > now_s), default=math.inf)

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
        victim = view.victim_of_deadlock(state)
        if victim is not None and victim.since_s <= ripe_s:
            held = {
                str(entry.key)
                for entry in state.entries.values()
                if victim.owner in entry.owners.values()
            }
            state.counts["deadlocks"] += 1
            self.fail(victim, LeaseDeadlock(str(victim), tuple(sorted(held))))
        # Not a deadlock yet, but to wait their turn would make one.
        for passing in view.detained(state):
            passing.passes |= passing.since_s <= ripe_s
        is_settled = all(each.since_s <= ripe_s for each in view.suspects(state))
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
