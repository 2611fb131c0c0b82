"""
Evictions: which model is unloaded, when, and where that is decided. All are in here.

- Room for a request: `unload_all`, with the victims that the planner chose.
- A lowered limit: `shrink`.
- The end of a keep-alive: `shelve` at the last release if it is 0, else `expire`.
- `evict` and `close`: `doom` at once, or `shelve` at the last release.
- Other programs: `make_room_for_others`, and `drop_copies` for host copies.
- Out of memory, in a load or a call: `evict_idle`.

Which goes first is the policy's word (`planning.policies`); how many go, the planner's
(`planning.planner.choose_victims`). All of it needs the lock, and calls
nothing that could wait.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.errors import LeaseDeadlock
from whispercache.events import EvictionCause
from whispercache.planning import planner

from . import view
from .effects import DropCopy, ShrinkKept, StartUnload
from .entries import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future
    from typing import TypeAlias

    from whispercache.keys import ModelKey
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.policies import Resident

    from .agenda import Agenda
    from .device import Device
    from .entries import Entry

    # A model that is evicted, and a future that is done when its unload was confirmed.
    Leaving: TypeAlias = tuple[Entry, Future[None]]


class Evictions:
    """
    The decisions about idle models, and those that will be idle.
    """

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._state = agenda.state
        self._now = agenda.now
        self._rules = agenda.rules

    # Idle models ----------------------------------------------------------------------

    def unload(self, entry: Entry, cause: EvictionCause) -> None:
        """
        Unloads an idle model.
        """
        entry.begin_unload(cause, self._now())
        self._agenda.note(StartUnload(entry))

    def unload_all(self, victims: Iterable[Resident], cause: EvictionCause) -> None:
        """
        Unloads idle models that the planner chose.
        """
        for victim in victims:
            entry = self._state.entries[victim.key]
            # Chosen for the room of its copy, it may leave none.
            entry.drops_copy |= victim.is_copy
            if entry.state is State.RESIDENT:  # not a victim twice
                self.unload(entry, cause)

    def shelve(self, entry: Entry, keep_alive_s: float | None) -> None:
        """
        Puts an idle model on the shelf, or unloads it if it is to go.
        """
        if keep_alive_s is None:
            keep_alive_s = self._rules.keep_alive_s
        entry.spare(is_spared=entry.spares > 0)
        entry.shelve(keep_alive_s, self._now())
        if entry.is_spared and entry.spare_reminder_s == math.inf:
            self._remind_of_spare(entry)
        # It was to be evicted while it was leased.
        if entry.cause is not None:
            self.unload(entry, entry.cause)
        elif keep_alive_s <= 0 and self._may_expire(entry):
            self.unload(entry, EvictionCause.EXPIRED)
        elif entry.expires_at_s < entry.reminder_s or self._state.unset_s:
            self.remind_of(entry)

    def end_spare(self, entry: Entry, now_s: float) -> None:
        """
        Lets a model go whose last call was long enough ago.
        """
        if entry.spare_reminder_s > now_s:
            return
        entry.spare_reminder_s = math.inf
        # Leased, it is spared again with the end of that.
        if entry.is_idle and entry.spared_until_s <= now_s:
            entry.spare(is_spared=False)
        elif entry.is_idle and entry.is_spared:
            self._remind_of_spare(entry)

    def _remind_of_spare(self, entry: Entry) -> None:
        entry.spare_reminder_s = entry.spared_until_s
        self._agenda.remind(entry.spared_until_s, entry)

    def _may_expire(self, entry: Entry) -> bool:
        # If it is waited for, it would have to be loaded again at once.
        return not entry.pinned and not entry.waiting

    def remind_of(self, entry: Entry) -> None:
        """
        Has an idle model looked at when its keep-alive ends.
        """
        at_s = entry.expires_at_s
        if at_s < entry.reminder_s:
            entry.reminder_s = at_s
            self._agenda.remind(at_s, entry)
        else:
            self._agenda.wake_by(at_s)

    def expire(self, entry: Entry, now_s: float) -> None:
        """
        Unloads a model that was idle for its keep-alive.
        """
        # It was used since, mostly. Its next release would remind of it anew.
        if entry.reminder_s <= now_s:
            entry.reminder_s = math.inf
        if not entry.is_idle:
            return
        if entry.expires_at_s > now_s:
            self.remind_of(entry)
        elif self._may_expire(entry):
            self.unload(entry, EvictionCause.EXPIRED)

    # Asked for ------------------------------------------------------------------------

    def evict(
        self, matches: Callable[[ModelKey], bool], waits_for: Owner = None
    ) -> list[Leaving]:
        """
        Unloads models as soon as they are idle, pinned or not.

        Raises:
            LeaseDeadlock: *waits_for*, who will wait for them, holds leases on some.
        """
        state = self._state
        present = [entry for entry in state.entries.values() if entry.is_present]
        chosen = [entry for entry in present if matches(entry.key)]
        for entry in state.copied:
            if entry.state is State.ABSENT and matches(entry.key):
                entry.parked_bytes = 0  # nor may a request use it from now on
                entry.device.moved.add(entry)
                self._agenda.note(DropCopy(entry))
        # The caller would wait for the end of its own leases.
        own = [entry for entry in chosen if waits_for in entry.leases.values()]
        if waits_for is not None and own:
            state.counts["deadlocks"] += 1
            names = tuple(str(entry.key) for entry in own)
            raise LeaseDeadlock(f"the eviction of {names[0]}", names, own=True)
        return [self.doom(entry, EvictionCause.EXPLICIT) for entry in chosen]

    def doom(self, entry: Entry, cause: EvictionCause) -> Leaving:
        """
        Unloads *entry* now if it is idle, else as soon as it is.
        """
        gone = entry.awaits_unload()
        # An eviction by name leaves nothing behind, even if it comes late.
        if entry.state is State.UNLOADING:
            entry.drops_copy = True
        else:
            entry.doom(cause)
            if entry.is_idle:
                self.unload(entry, cause)
        return entry, gone

    def withdraw(self, entry: Entry, gone: Future[None]) -> None:
        """
        Takes back an eviction whose caller left; an unload under way goes on.
        """
        # Others may still wait for the same unload.
        if gone in entry.gone:
            entry.gone.remove(gone)
        # What is left when a cache closes is unloaded in any case.
        is_wanted = not entry.gone and self._state.closed is None
        if is_wanted and entry.state is not State.UNLOADING:
            entry.doom(None)

    def unpin(self, matches: Callable[[ModelKey], bool]) -> int:
        """
        Lets pinned models be evicted, and returns how many those were.
        """
        entries = self._state.entries.values()
        pinned = [entry for entry in entries if entry.pinned and matches(entry.key)]
        for entry in pinned:
            entry.pin(is_pinned=False)
            # Its keep-alive begins only now.
            if entry.is_idle:
                entry.unshelve()
                self.shelve(entry, None)
        return len(pinned)

    def evict_idle(self, device: Device) -> list[Entry]:
        """
        Takes all idle models of a device that ran out of memory off its shelf, to be
        unloaded by the caller, who is on its thread.
        """
        idle = [*device.shelf, *device.spared]
        for entry in idle:
            entry.begin_unload(EvictionCause.OUT_OF_MEMORY, self._now())
        return idle

    def make_room_for_others(self, device: Device, n_bytes: int) -> None:
        """
        Unloads idle models until *n_bytes* are free that were not, or nothing is idle.
        """
        # What is being unloaded already need not be found again.
        n_bytes -= view.room(self._state, device).coming_bytes
        n_bytes = self._shed_for_others(device, n_bytes)
        if n_bytes > 0:
            victims = planner.choose_victims(self._idle(device), n_bytes)
            if victims is None:
                victims = tuple(self._idle(device))
            self.unload_all(victims, EvictionCause.PRESSURE)

    def drop_copies(self, host: Device, n_bytes: int) -> None:
        """
        Drops host copies until *n_bytes* of them are gone: first those of models that
        are not in memory, then those of idle models, which are unloaded for that.
        CTranslate2 cannot drop a copy and keep the weights.
        """
        if n_bytes <= 0:
            return
        n_bytes = self._shed_for_others(host, n_bytes)
        with_copies = self._state.copies_on(host)
        n_bytes -= sum(e.copy_bytes for e in with_copies if e.drops_copy)
        idle = [e for e in with_copies if e.is_idle and not e.stays]
        for entry in sorted(idle, key=lambda each: each.last_used_s or 0.0):
            if n_bytes <= 0:
                return
            n_bytes -= entry.copy_bytes
            # Or the unload would keep the very copy that is in the way.
            entry.drops_copy = True
            self.unload(entry, EvictionCause.PRESSURE)

    # Room -----------------------------------------------------------------------------

    def shrink(self) -> None:
        """
        Unloads what is idle where a limit was lowered below what is held.
        """
        for device in self._state.devices.values():
            if device.kept_bytes:
                self.shed(device)
            if device.is_over_limit:
                self.unload_all(self.excess(device), EvictionCause.CAPACITY)

    def excess(self, device: Device) -> tuple[Resident, ...]:
        """
        Returns the idle models that a lowered limit leaves no room for.
        """
        return planner.shrink(view.room(self._state, device), self._idle(device))

    def _idle(self, device: Device) -> Iterable[Resident]:
        shelves = view.Shelves(self._state, self._rules.policy, self._now())
        return shelves.idle(device.name)

    def shed(self, host: Device) -> None:
        """
        Drops kept tokenizers and copies that exceed the free host memory.

        Skipped while a load runs, which does this itself and keeps what it needs.
        """
        if host.is_shrinking or host.kept_bytes <= max(0, host.budget.left_bytes):
            return
        if self._state.is_over:  # all of it is dropped as the threads end
            return
        moving = (e for each in self._state.devices.values() for e in each.moving)
        if not any(entry.state is State.LOADING for entry in moving):
            host.is_shrinking = True
            self._agenda.note(ShrinkKept(host))

    def _shed_for_others(self, host: Device, n_bytes: int) -> int:
        """
        Drops *n_bytes* of what is kept, and returns what is left to find elsewhere.
        """
        if n_bytes > 0 and host.kept_bytes:
            self._agenda.note(ShrinkKept(host, max(0, host.kept_bytes - n_bytes)))
        return n_bytes - host.kept_bytes
