"""
Host copies and kept tokenizers: what unloaded models keep on the host, so that they are
loaded again faster.

All of it gives way to whatever else wants the memory. Only a copy of weights that are
on a card as well is charged, since CTranslate2 cannot drop the one without the other.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from whispercache.events import EvictionCause

from .budget import Use
from .entries import State
from .state import Kept

if TYPE_CHECKING:
    from whispercache.keys import ModelKey
    from whispercache.units import Limit

    from .device import Device
    from .entries import Entry
    from .gauges import Base


class HostCopies:
    """
    Keeps what unloaded models keep within the memory that is left for it.

    Its methods block, and run on the thread of a device.

    Attributes:
        limit: Most bytes of host copies; None for no copies at all.
    """

    def __init__(self, base: Base, limit: Limit | None) -> None:
        self._lock = base.lock
        self._state = base.state
        self._reports = base.reports
        self._loader = base.loader
        self._gauges = base.gauges
        self.limit: Limit | None = limit
        self._looks = itertools.count()

    def look(self) -> Kept:
        """
        Returns what is kept now. Not to be called under the lock.
        """
        serial = next(self._looks)
        return Kept(serial, self._loader.kept_bytes(), self._loader.host_copies())

    def shrink(
        self, host: Device, most_bytes: int | None = None, but: ModelKey | None = None
    ) -> None:
        """
        Drops what is kept until it takes no more than *most_bytes*, or than is left.

        That of *but* stays: it is about to be used.
        """
        with self._lock.changing():
            host.is_shrinking = False
            left_bytes = host.budget.left_bytes if most_bytes is None else most_bytes
            spared = set() if but is None else {but}
            # Copies that loads will use are charged: no other model lacks that memory.
            spared |= {each.key for each in self._state.copied if each.claims_copy}
        self._loader.shrink_kept(max(0, left_bytes), spared)
        self._refresh(host)

    def drop(self, entry: Entry) -> None:
        """
        Drops the copy of a model that is not in memory.
        """
        with self._lock.changing():
            if entry.state is not State.ABSENT:  # it is about to be used
                return
        self._loader.forget(entry.key)
        self._refresh(entry.host)

    def _refresh(self, host: Device) -> None:
        kept = self.look()
        with self._lock.changing():
            self._reports.noted(host, kept)

    def was_lost(self, entry: Entry) -> bool:
        """
        Returns True if the copy is gone that the weights of *entry* were to come from.

        Then it is admitted anew: to read the files takes more of the host.
        """
        is_parked = entry.key in self._loader.host_copies()
        if not entry.restores and is_parked:  # the host had no room for it to stay
            self._loader.forget(entry.key)
        if not entry.restores or is_parked:
            return False
        kept = self.look()
        with self._lock.changing():
            self._reports.taken_back(entry)
            self._reports.noted(entry.host, kept)
        return True

    def keep_lost(self, device: Device, host: Device) -> None:
        """
        Charges the copies of a lost device for good; they give way no more.
        """
        # A broken CUDA context frees nothing, pinned host memory included.
        parked = self._loader.host_copies()
        kept_bytes = sum(n for key, n in parked.items() if key.device == device.name)
        self._loader.lost(device.name)
        kept = self.look()
        with self._lock.changing():
            host.budget.set(device, Use.LOST, kept_bytes)
            host.outlook.forget()
            self._state.note_kept(host, kept)

    def reserve(self, entry: Entry) -> bool:
        """
        Returns True if a copy of the weights of *entry*, which is being unloaded, is to
        stay on the host, where it is charged from now on. Older copies are dropped.
        """
        host, n_bytes = entry.host, entry.weights_bytes
        asked_for = entry.cause in (EvictionCause.EXPLICIT, EvictionCause.CLOSED)
        # CTranslate2 would copy them once for each worker.
        is_one = entry.num_workers == 1 and entry.device is not host
        if self.limit is None or not is_one or asked_for or entry.drops_copy:
            return False
        if entry.copy_bytes or entry.staging_bytes:  # it has one, or one was reserved
            return True
        with self._lock.changing():
            left_bytes = host.budget.left_bytes
            limit_bytes = self.limit.of(host.budget.total_bytes or 0)
            if limit_bytes is None:
                limit_bytes = left_bytes
        if n_bytes > min(left_bytes, limit_bytes):
            return False
        # Room is made before it is known that the gauge agrees: both may be needed.
        self._drop_oldest(host, limit_bytes - n_bytes)
        self.shrink(host, left_bytes - n_bytes)
        # A copy is a luxury: without a gauge there is none.
        if (reading := self._gauges.read(host)) is None:
            return False
        with self._lock.changing():
            # Another card's thread may have been faster.
            left_bytes = min(host.budget.left_bytes, host.budget.usable_bytes(reading))
            limit_bytes -= self._copies_bytes(host)
            if n_bytes > min(left_bytes, limit_bytes):
                return False
            # Charged while it is made, so that no load takes the same memory.
            host.budget.set(entry, Use.STAGING, n_bytes)
            host.outlook.forget()  # what was promised may not be there any more
        return True

    def _copies_bytes(self, host: Device) -> int:
        """
        Returns the bytes of all copies: beside those on cards, of models that are not
        in memory, and in the making. Needs the lock.
        """
        devices = self._state.devices.values()
        present = (entry for each in devices for entry in each.entries.values())
        making = (e.staging_bytes for e in present if e.state is State.UNLOADING)
        parked = (e.parked_bytes for e in self._state.copied if not e.copy_bytes)
        return host.budget.copies_bytes + sum(making) + sum(parked)

    def _drop_oldest(self, host: Device, most_bytes: int) -> None:
        """
        Drops copies of models that are not in memory, the oldest first, until all
        copies together take no more than *most_bytes*.
        """
        parked = self._loader.host_copies()
        with self._lock.changing():
            excess_bytes = self._copies_bytes(host) - most_bytes
            gone: list[ModelKey] = []
            # In the order in which they were made.
            for key, n_bytes in parked.items():
                if excess_bytes > 0 and not self._state.entries[key].is_present:
                    gone.append(key)
                    excess_bytes -= n_bytes
        for key in gone:
            self._loader.forget(key)
        if gone:
            kept = self.look()
            with self._lock.changing():
                self._state.note_kept(host, kept)
