"""
Leases while they are held: what is said of them between their grant and their end.

All of it needs the lock, and calls nothing that could wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whispercache.planning.deadlock import Owner

    from .agenda import Agenda
    from .entries import Entry
    from .scheduler import Scheduler


class HeldLeases:
    """
    What holders tell of their leases: that they can be given back, that a result is in
    use, that another owner will end them.

    Args:
        agenda: The state.
        scheduler: Admits those that wait.
    """

    def __init__(self, agenda: Agenda, scheduler: Scheduler) -> None:
        self._state = agenda.state
        self._scheduler = scheduler

    def offer(self, entry: Entry, serial: int, level: float) -> None:
        """
        Notes that a lease is given back early if a request above *level* asks.
        """
        state = self._state
        if serial not in entry.leases:
            return
        entry.yielding[serial] = level
        state.yielding.add(entry)
        if state.queue:
            # One that waits may ask for it, which no bound of memory tells.
            entry.device.outlook.forget()
            self._scheduler.admit()

    def is_asked(self, entry: Entry, serial: int, level: float) -> bool:
        """
        Returns True if a request above *level* waits for the end of a lease, and its
        owner can wait for another one without holding any.
        """
        if serial not in entry.leases or entry.asked_by <= level:
            return False
        owner = entry.leases[serial]
        # The others of its owner on this model are asked as well.
        own = sum(entry.leases[each] == owner for each in entry.yielding)
        return owner is None or self._state.queue.held.get(owner, 0) <= own

    def spare(self, entry: Entry, serial: int) -> None:
        """
        Notes that the result of a leased call is in use, and needs the model again.
        """
        entry.spares += 1
        entry.spared_for = entry.leases.get(serial)
        self._state.spared.add(entry)

    def unspare(self, entry: Entry) -> None:
        """
        Notes that such a result is no longer in use.
        """
        state = self._state
        if entry not in state.spared:
            return
        entry.spares -= 1
        if not entry.spares:
            state.end_spare(entry)
            if state.queue:
                self._scheduler.admit()

    def hand_over(self, entry: Entry, serial: int, owner: Owner) -> None:
        """
        Notes that another owner will end a lease.
        """
        line = self._state.queue
        if serial in entry.leases:
            line.holds(entry.leases[serial], -1)
            line.holds(owner, 1)
            entry.leases[serial] = owner
            # A request of its new owner may have the model too, or wait in vain.
            if owner in line.owners or entry.waiting:
                self._scheduler.admit()
