"""
Endings: how requests end, once it is decided: granted, failed, or given up.

All of it needs the lock, and calls nothing that could wait.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.events import ModelGranted
from whispercache.planning.priority import INTERACTIVE

from .effects import Settle
from .entries import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.lease import Lease
    from whispercache.planning.deadlock import Owner

    from .agenda import Agenda
    from .entries import Entry
    from .evictions import Evictions
    from .reminders import Thing
    from .waiters import Waiter


class Endings:
    """
    The ends of requests.

    Args:
        agenda: The state, and a list of what is to be done.
        evictions: Decides what becomes of idle models.
        grant: Grants a lease on a resident model, with so many bytes of workspace, for
            a keep-alive and an owner.
    """

    def __init__(
        self,
        agenda: Agenda,
        evictions: Evictions,
        grant: Callable[[Entry, int, float | None, Owner], Lease],
    ) -> None:
        self._agenda = agenda
        self._state = agenda.state
        self._now = agenda.now
        self._evictions = evictions
        self._grant = grant

    def leave(self, waiter: Waiter) -> None:
        """
        Takes a request out of the queue.
        """
        state = self._state
        state.queue.leave(waiter)
        # What was held back for it is open again, for the next request in line.
        for entry in waiter.draining:
            entry.end_drain()
            entry.device.outlook.forget()
        waiter.draining.clear()
        # It kept its models from expiring, and may have asked for a turn with one.
        for entry in waiter.entries:
            if entry.drained_for is None:
                entry.asked_by = -math.inf
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
        self.leave(waiter)
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
                self._state.queue.holds(waiter.owner, -1)
                if not lease._entry.leases:
                    self._evictions.shelve(lease._entry, waiter.keep_alive_s)

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
                self.hold(waiter)
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
            self.leave(waiter)
            if waiter.future.set_running_or_notify_cancel():
                self._state.queue_grants += 1
                lease = self._grant(
                    entry, workspace_bytes, waiter.keep_alive_s, waiter.owner
                )
                # Its patience was tried for long enough.
                is_late = self._now() >= waiter.turn[0]
                if waiter.priority < INTERACTIVE and is_late:
                    lease.is_firm = True
                self._settle(waiter, (lease,))

    def hold(self, waiter: Waiter) -> None:
        """
        Takes those leases of a request for several models whose models are there; all
        of its memory was granted. With the last one, it is served.
        """
        held = waiter.held = waiter.held or {}
        for place, each in enumerate(waiter.wanted):
            if place not in held and each.entry.state is State.RESIDENT:
                self._state.queue_grants += 1
                held[place] = self._grant(
                    each.entry,
                    each.footprint.workspace_bytes,
                    waiter.keep_alive_s,
                    waiter.owner,
                )
        # The rest comes with their loads; until then it keeps its place.
        if len(held) < len(waiter.wanted):
            return
        self.leave(waiter)
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
