"""
The scheduler: which request gets memory, when, and which waits, fails or is served.

`Scheduler.admit` is the only place that matches requests to memory, and every arrival,
release, load and unload that may help a request ends in it. Those that can help none,
by what the last `admit` found, cost the same however many wait.

All of it needs the lock. It never takes it, never waits and never calls out: what is to
be done is noted as effects.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.errors import (
    CacheClosed,
    LeaseTimeout,
    TooManyWaiters,
)
from whispercache.events import EvictionCause, NoRoom
from whispercache.lease import Lease
from whispercache.planning import planner
from whispercache.planning.planner import Outcome
from whispercache.planning.policies import is_lru

from . import demands, view
from .effects import AskBack, StartLoad
from .endings import Endings
from .entries import Entry, State
from .lookout import LOOK_EVERY_S, Lookout
from .refusals import refusal, too_large
from .round import Round

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.engine.sizes.footprint import Workload
    from whispercache.lease import _Lessor as Lessor
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.planner import Decision
    from whispercache.units import Limit

    from .agenda import Agenda
    from .device import Device
    from .evictions import Evictions, Leaving
    from .round import Found
    from .waiters import Waiter


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
        # The order of release is all that the usual policy asks for.
        self._notes_uses = not is_lru(agenda.rules.policy)
        self._lookout = Lookout(agenda)
        self.endings: Endings = Endings(agenda, evictions, self._grant)

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
            or not entry.is_open_to(None)
            or entry.device.lost_to is not None
        ):
            return None
        workspace_bytes = entry.workspace_of(workload)
        if workspace_bytes is None or not entry.fits(workspace_bytes):
            return None
        if state.queue.waiters:
            more_bytes = entry.workspace_with(workspace_bytes) - entry.workspace_bytes
            # One that waits may need what this would take: the planner decides then.
            if not self.may_pass(entry, more_bytes):
                return None
        lease = self._grant(entry, workspace_bytes, keep_alive_s, owner)
        if owner in state.queue.suspects:
            self._lookout.look_out(())
        return lease

    def may_pass(self, entry: Entry, more_bytes: int) -> bool:
        """
        Returns True if a lease on *entry* with *more_bytes* of workspace changes
        nothing for those that wait, so that the planner would grant it.
        """
        state, device = self._state, entry.device
        outlook, budget = device.outlook, device.budget
        is_draining = outlook.is_draining or entry.host.outlook.is_draining
        if (
            entry.waiting
            or not outlook.free_bytes > -math.inf  # `is_known`, without its call
            or (is_draining and view.is_draining(entry) and not entry.stays)
            or self._now() >= state.impatient_at_s
            or (state.chosen and entry.key in state.chosen)
        ):
            return False
        left_bytes = budget.capacity_bytes - budget.charged_bytes
        return more_bytes <= 0 or more_bytes <= left_bytes - outlook.promised_bytes

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
            raise LeaseTimeout(str(waiter), 0.0, state.queue.place(waiter))
        # A call that has begun is not refused its second half.
        if is_full and not ends_now and not waiter.resumes:
            state.counts["refused"] += 1
            raise TooManyWaiters(str(waiter), waiting)
        # Even one that is served at once goes through the queue: there is one way in.
        if not waiting:
            self._form_line()
        try:
            state.queue.join(waiter)
            has_patience = self._rules.patience_s > 0
            if has_patience and view.waits_in_vain(state, waiter, self._now()):
                self._ask_for_turns()
                self._lookout.look_out(entry.device for entry in waiter.entries)
            else:
                self.admit()
            self._unspare_own(waiter)
        except BaseException:  # Ctrl-C, or a policy's: its caller is gone
            self.abandon(waiter)
            raise
        waiter.waits = waiter in state.queue
        if waiter.waits and timeout_s is not None:
            waiter.deadline_s = waiter.since_s + timeout_s
            self._agenda.remind(waiter.deadline_s, waiter.serial)

    def _unspare_own(self, waiter: Waiter) -> None:
        """
        Gives up what is spared for the caller of a request that is stuck, who may wait
        for nobody else.
        """
        spared = self._state.spared
        own = [e for e in spared if e.spared_for == waiter.owner]
        own = [entry for entry in own if not waiter.wants(entry)]
        if own and waiter in self._state.queue and not waiter.is_loading:
            for entry in own:
                self._state.end_spare(entry)
            self.admit()

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

    def abandon(self, waiter: Waiter) -> bool:
        """
        Takes a request out of the queue, and returns True if that may help others.
        """
        if waiter not in self._state.queue:
            return False
        may_help = not view.is_stuck(self._state, waiter)
        self.endings.leave(waiter)
        self.endings.let_go(waiter)
        return may_help

    # Admit ----------------------------------------------------------------------------

    def decide_on(self, waiter: Waiter) -> Decision:
        """
        Returns what would happen to a request that is not in the line; nothing is
        changed.
        """
        self._file_moved()
        return self._round(trusts=view.is_known(self._state)).decide_on(waiter)

    def _round(self, *, trusts: bool) -> Round:
        return Round(self._state, self._rules, self._now(), trusts=trusts)

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
        trusts = view.is_known(self._state)
        # Whatever ends this early, as Ctrl-C may, the next event looks at all anew.
        for device in state.devices.values():
            device.outlook.forget()
        # To serve a request may help another one: it no longer holds anything back.
        while state.queue and len(state.queue) != before and state.closed is None:
            before = len(state.queue)
            self._file_moved()
            last = self._round(trusts=trusts)
            for found in last.run():
                self._carry_out(found)
        if last is not None:
            self._take_stock(last)
        if state.queue:
            self._lookout.look_out(state.queue.devices, suspects=suspects)
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
            self._ask(entry, waiter)
        # (4) Those that it passes are passed 16 times at most (3).
        for other in passed:
            other.overtaken += 1
            if other.overtaken == planner.MAX_OVERTAKES:
                state.queue.wear(other)
        if decision.outcome is Outcome.LOAD:
            self._start_loads(waiter)
        elif decision.outcome is Outcome.GRANT and waiter.is_group:
            self.endings.hold(waiter)
        elif decision.outcome is Outcome.GRANT:
            self.endings.serve(waiter.wanted[0].entry, waiter)
        # (2) It can never fit.
        elif decision.lacking is not None:
            error = too_large(self._state, str(waiter), *decision.lacking)
            numbers = (error.needed_bytes, error.capacity_bytes, error.reason)
            key = waiter.wanted[0].entry.key
            self._agenda.tell(NoRoom(key, error.device, *numbers))
            self.endings.fail(waiter, error)

    def _ask(self, entry: Entry, waiter: Waiter) -> None:
        """
        Has the leases on a model that is held back given back where they can be.
        """
        level = waiter.priority
        if not waiter.is_group:
            level = max(level, self._state.queue.priority(waiter.entries[0]))
        if level > entry.asked_by:
            entry.asked_by = level
            asked = tuple(s for s, own in entry.yielding.items() if own < level)
            if asked:
                self._agenda.note(AskBack(asked))

    def _ask_for_turns(self) -> None:
        """
        Has batches give a model back that has no more leases for a request above them.
        """
        for entry in self._state.yielding:
            least = min(entry.yielding.values())
            first = next((w for w in entry.waiting if w.priority > least), None)
            if first is not None and entry.is_full_for(first):
                self._ask(entry, first)

    def _start_loads(self, waiter: Waiter) -> None:
        reserved = demands.reservations(waiter.wanted)
        # Models that are there already are pinned first, or they could be evicted while
        # the others load.
        if waiter.is_group:
            self.endings.hold(waiter)
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
        self._ask_for_turns()
        # Elsewhere only new requests matter to one that loses its patience, but here it
        # would ask for leases.
        if state.yielding and state.impatient_at_s < math.inf:
            self._agenda.wake_by(state.impatient_at_s)
        state.rounds += 1
        for cohort, turn in last.stopped.items():
            cohort.stopped_in, cohort.stopped_at = state.rounds, turn
        for device in state.devices.values():
            device.outlook = last.outlook(device)
            # What younger ones were given since is missing to those that drain: they
            # are looked at again with the next event.
            if last.moves_models and device.outlook.is_draining:
                device.outlook.forget()

    def settle(self, device: Device) -> None:
        """
        Admits those that wait if the memory of *device*, or its limit, calls for it.
        """
        state = self._state
        if device.is_over_limit:
            self.admit()
        elif state.queue.waiters:
            now_s = self._now()
            if now_s >= state.impatient_at_s or view.may_help(state, device):
                self.admit()
            else:
                self._lookout.look_out((device,), least_s=LOOK_EVERY_S)

    def moved(self, entry: Entry) -> None:
        """
        Admits those that wait if the end of a load or an unload may help one.
        """
        self._evictions.shrink()
        if not self._state.queue:
            return
        devices = {entry.device, entry.host}
        # What was loaded may have to be drained.
        if entry.waiting or any(device.outlook.is_draining for device in devices):
            self.admit()
            return
        for device in devices:
            self.settle(device)
        self._lookout.look_out(devices)

    # Grant ----------------------------------------------------------------------------

    def _grant(
        self,
        entry: Entry,
        workspace_bytes: int,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease:
        state = self._state
        serial = state.grants = state.grants + 1
        # It is made first: what a signal handler raises in here then gives it back.
        lease = Lease(self._lessor, entry, serial, keep_alive_s)
        if self._notes_uses and not entry.leases:
            entry.note_use(self._now())
        entry.take(serial, owner, workspace_bytes)
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
        state, owner = self._state, entry.leases.get(serial)
        if not entry.give_back(serial):
            return
        if not entry.yielding:
            state.yielding.discard(entry)
        if not entry.leases:
            self._evictions.shelve(entry, keep_alive_s)
        # Without either there is nothing to decide, and a hit pays for nothing.
        if state.queue.waiters:
            state.queue.holds(owner, -1)
            self.released(entry)
        elif entry.device.is_over_limit:
            self.admit()

    def released(self, entry: Entry) -> None:
        """
        Admits those that wait, if the end of a lease may help one.
        """
        host = entry.host
        is_draining = entry.device.outlook.is_draining or host.outlook.is_draining
        if (
            entry.waiting
            # What is idle now would be drained, or is chosen before others that are.
            or (
                is_draining
                and view.is_draining(entry)
                and entry.is_idle
                and not entry.stays
            )
            or (host.budget.copies_bytes and self._frees_copy(entry))
        ):
            self.admit()
        else:
            self.settle(entry.device)

    def _frees_copy(self, entry: Entry) -> bool:
        return entry.copy_bytes > 0 and view.may_help(self._state, entry.host)

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
            self.endings.fail(waiter, CacheClosed("the cache was closed meanwhile"))
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
