"""
Reports: what the threads of devices tell of loads, unloads and gauges.

`Budget.clear` is called by `Reports.unloaded`, `Reports.load_failed` and
`Reports.taken_back`, and by nothing else: memory is credited once it is known to be
free. All of it needs the lock, and calls nothing that could wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from whispercache.events import (
    DeviceLost,
    ModelEvicted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelStillReferenced,
    ReleaseUnconfirmed,
)

from .effects import DropCopy, Gone, KeepLost, WriteOff
from .lookout import LOOK_AGAIN_S
from .refusals import cool_down_s, load_error, lost, one_line

if TYPE_CHECKING:
    from whispercache.engine.api import LoadedModel, Released

    from .agenda import Agenda
    from .device import Device
    from .entries import Entry
    from .evictions import Evictions
    from .scheduler import Scheduler
    from .state import Kept

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 30.0
"""
Seconds between tries of an unload that did nothing; doubled from first to last.
"""


class Reports:
    """
    The transitions of models that a device's thread has made.
    """

    def __init__(
        self, agenda: Agenda, evictions: Evictions, scheduler: Scheduler
    ) -> None:
        self._agenda = agenda
        self._state = agenda.state
        self._now = agenda.now
        self._evictions = evictions
        self._scheduler = scheduler

    # Loads and unloads ----------------------------------------------------------------

    def load_begins(self, entry: Entry) -> int | None:
        """
        Tells that a load begins, and returns the number of grants so far; None if there
        are leases, whose work would disturb what is measured.
        """
        self._agenda.tell(ModelLoading(entry.key, entry.weights_bytes))
        return None if self._state.leases else self._state.grants

    def loaded(
        self, entry: Entry, loaded: LoadedModel, load_s: float, kept: Kept
    ) -> None:
        """
        Takes in a model that was loaded, and serves those who wait for it.
        """
        # Peaks are measured between two changes of what is in memory.
        entry.device.budget.restart_work()
        entry.end_load(loaded, load_s)
        counts = self._state.counts
        counts["loads"] += 1
        counts["reloads"] += loaded.reloaded
        counts["restores"] += loaded.restored
        self._state.load_s += load_s
        self._agenda.tell(
            ModelLoaded(
                entry.key,
                load_s,
                entry.weights_bytes,
                loaded.measured_bytes,
                loaded.reloaded,
                from_variant=loaded.files.original is not None,
                restored=loaded.restored,
            )
        )
        # Those who waited for this load come first, even if it is to be evicted now.
        cause, entry.cause = entry.cause, None
        self._scheduler.endings.serve(entry)
        entry.cause = cause
        # Those who asked for it have left, or it was preloaded.
        if not entry.leases and not entry.is_idle:
            self._evictions.shelve(entry, None)
        self._state.note_kept(entry.host, kept)
        self._scheduler.moved(entry)

    def load_failed(
        self,
        entry: Entry,
        error: BaseException,
        kept: Kept,
        *,
        tried: str,
        is_lost: bool,
    ) -> None:
        """
        Credits a load that failed, and fails those who wait for it.

        Args:
            entry: The model.
            error: Why it failed.
            kept: What is kept on the host by now.
            tried: What was tried besides, in words.
            is_lost: The error left its device unusable.
        """
        reason = one_line(error) + tried
        for budget in entry.budgets:
            budget.clear(entry)
        self._absent(entry)
        self._state.note_kept(entry.host, kept)
        entry.fail(reason, cool_down_s(entry.failures + 1), self._now())
        self._state.counts["load_failures"] += 1
        self._agenda.tell(ModelLoadFailed(entry.key, reason))
        for waiter in list(entry.waiting):
            self._scheduler.endings.fail(waiter, load_error(entry.key, error, reason))
        if is_lost:
            self.lost(entry, one_line(error))
        self._scheduler.admit()

    def taken_back(self, entry: Entry) -> None:
        """
        Credits a load that has not begun. `admit` has those wait again who wait for it.
        """
        for budget in entry.budgets:
            budget.clear(entry)
        self._absent(entry)
        # A group holds all of its memory or none: it gives back what it holds so far.
        for waiter in entry.waiting:
            if waiter.held is not None:
                self._scheduler.endings.let_go(waiter)

    def load_follows(self, device: Device) -> bool:
        """
        Returns True if a request waits for room on *device* to load a model.
        """
        return self._state.queue.awaits_load(device)

    def unloaded(self, entry: Entry, released: Released, kept: Kept) -> None:
        """
        Credits a model whose unload was confirmed.
        """
        assert entry.cause is not None
        # The gauge cannot miss more than the model took.
        weights_bytes = entry.weights_bytes
        unreturned_bytes = min(released.unreturned_bytes, weights_bytes)
        self._state.counts["evictions"] += 1
        self._agenda.tell(
            ModelEvicted(
                entry.key,
                entry.cause,
                weights_bytes - unreturned_bytes,
                released.returned_bytes,
                self._now() - entry.unload_started_s,
                unreturned_bytes,
                parked=entry.key in kept.copies,
            )
        )
        if released.references:
            self._agenda.tell(ModelStillReferenced(entry.key, released.references))
        self._state.note_kept(entry.host, kept)
        if entry.drops_copy and entry.parked_bytes:  # asked for at the last moment
            entry.parked_bytes = 0
            entry.device.moved.add(entry)
            self._agenda.note(DropCopy(entry))
        for budget in entry.budgets:
            budget.clear(entry)
        self._absent(entry)
        if unreturned_bytes:
            entry.device.budget.keep(unreturned_bytes, released.used_bytes)
            entry.device.outlook.forget()  # less came than was promised
        self._scheduler.moved(entry)

    def refused(self, entry: Entry, reason: str) -> None:
        """
        Keeps the bytes of an unload charged that did nothing, and tries it again later.
        """
        if entry.device.lost_to is not None:
            self.write_off(entry)
            return
        # Counted once for each unload, however often it is tried.
        self._state.counts["unconfirmed"] += not entry.refusals
        retry_s = min(FIRST_RETRY_S * 2 ** min(entry.refusals, 32), LAST_RETRY_S)
        entry.refuse(self._now() + retry_s)
        self._agenda.tell(
            ReleaseUnconfirmed(entry.key, entry.weights_bytes, retry_s, reason)
        )
        self._agenda.remind(entry.unload_again_s, entry)

    def lost(self, entry: Entry, reason: str) -> None:
        """
        Gives a device up whose CUDA context is broken; nothing on it can be freed.
        """
        device = entry.device
        # All models of the device will report the same error.
        if device.lost_to is not None:
            return
        device.lost_to = reason
        self._agenda.note(KeepLost(device, entry.host))
        self._agenda.tell(DeviceLost(entry.key, device.name, reason))
        for waiter in list(self._state.queue):
            if any(wanted.device is device for wanted in waiter.entries):
                self._scheduler.endings.fail(waiter, lost(device))

    def write_off(self, entry: Entry) -> None:
        """
        Forgets a model on a lost device; its bytes stay charged for good.
        """
        loaded = entry.loaded
        self._agenda.note(WriteOff(entry, loaded, entry.write_off()))
        self._absent(entry)
        self._scheduler.admit()

    def _absent(self, entry: Entry) -> None:
        for gone in entry.leave():
            self._agenda.note(Gone(gone))
        self._agenda.stop_if_over()

    # Gauges ---------------------------------------------------------------------------

    def looked(self, device: Device, *, is_known: bool) -> None:
        """
        Admits those who wait after a gauge was read; one that could not be read is read
        again.
        """
        if not is_known and self._state.queue:
            at_s = self._now() + LOOK_AGAIN_S
            if at_s < device.look_at_s:
                device.look_at_s = at_s
                self._agenda.remind(at_s, device)
        self._scheduler.settle(device)

    def noted(self, host: Device, kept: Kept) -> None:
        """
        Takes a look at what is kept on the host in.
        """
        self._state.note_kept(host, kept)
        self._scheduler.admit()
