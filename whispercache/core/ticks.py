"""
Ticks: what is done when its time has come.

All of it needs the lock, and calls nothing that could wait.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.errors import LeaseDeadlock, LeaseTimeout

from . import deadlocks
from .effects import LookAgain, StartUnload
from .entries import Entry
from .lookout import DEADLOCK_S

if TYPE_CHECKING:
    from .agenda import Agenda
    from .evictions import Evictions
    from .scheduler import Scheduler


class Ticks:
    """
    The events that time makes.

    Args:
        agenda: The state, and the time.
        evictions: Decides on idle models.
        scheduler: Admits those that wait.
    """

    def __init__(
        self, agenda: Agenda, evictions: Evictions, scheduler: Scheduler
    ) -> None:
        self._agenda = agenda
        self._state = agenda.state
        self._now = agenda.now
        self._evictions = evictions
        self._scheduler = scheduler
        self._endings = scheduler.endings

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
            self._endings.fail(waiter, LeaseTimeout(str(waiter), waited_s, place))
        for each in due:
            if isinstance(each, Entry):
                self._look_after(each, now_s)
            elif not isinstance(each, int) and each.look_at_s <= now_s:
                each.look_at_s = math.inf
                each.looked_s = now_s
                self._agenda.note(LookAgain(each))
        if state.deadlocks_at_s <= now_s:
            state.deadlocks_at_s = math.inf
            may_be_more = self._break_deadlocks(now_s)
            state.check_s = self._now() - now_s
            self._scheduler.admit(suspects=may_be_more)
        else:
            self._scheduler.admit()

    def _look_after(self, entry: Entry, now_s: float) -> None:
        """
        Unloads a model that was idle for long enough, or tries its unload again.
        """
        self._evictions.expire(entry, now_s)
        self._evictions.end_spare(entry, now_s)
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
            self._endings.fail(victim, LeaseDeadlock(str(victim), tuple(sorted(held))))
        # Not a deadlock yet, but to wait their turn would make one.
        for passing in deadlocks.detained(state):
            if passing.since_s <= ripe_s and not passing.passes:
                state.queue.let_pass(passing)
        is_settled = all(each.since_s <= ripe_s for each in deadlocks.suspects(state))
        return victim is not None or not is_settled
