"""
Unloads: models on their way out of memory, confirmed, tried again, or written off.

Also what an error of a device means, and the room that is made after it ran out of
memory.
"""

from __future__ import annotations

import traceback
from concurrent.futures import Future
from typing import TYPE_CHECKING

from whispercache.devices.faults import Fault, classify

from .budget import Use
from .entries import State
from .refusals import one_line

if TYPE_CHECKING:
    from whispercache.engine.api import Released
    from whispercache.keys import ModelKey

    from .device import Device
    from .entries import Entry
    from .gauges import Base
    from .host_copies import HostCopies


class Unloads:
    """
    Unloads models on the thread of their device, and reports to the scheduler.
    """

    def __init__(self, base: Base, copies: HostCopies) -> None:
        self._lock = base.lock
        self._state = base.state
        self._reports = base.reports
        self._scheduler = base.scheduler
        self._evictions = base.evictions
        self._loader = base.loader
        self._gauges = base.gauges
        self._copies = copies

    def unload(self, entry: Entry) -> None:
        """
        Unloads a model, and has it confirmed.
        """
        if entry.state is not State.UNLOADING:  # begun twice
            return
        assert entry.loaded is not None
        device = entry.device
        with self._lock.changing():
            # To free anything there would fail, or crash.
            if device.lost_to is not None:
                self._reports.write_off(entry)
                return
            load_follows = self._reports.load_follows(device)
        try:
            parks = self._copies.reserve(entry)
            released = self._loader.unload(
                entry.loaded, load_follows=load_follows, parks=parks
            )
        except Exception as error:
            # Its frames refer to the model, which then could not be freed next time.
            traceback.clear_frames(error.__traceback__)
            self.blame(entry, error)
            self._refused(entry, one_line(error))
            return
        if not released.confirmed:
            self._refused(entry, released.reason)
            return
        self._unloaded(entry, released)
        self._gauges.tell_peers(device)
        with self._lock.changing():
            is_moving = bool(device.moving)
        # A load would have used what is left in the heap, but none came.
        if load_follows and not is_moving:
            self._loader.return_memory(device.name)

    def _refused(self, entry: Entry, reason: str) -> None:
        with self._lock.changing():
            self._reports.refused(entry, reason)

    def _unloaded(self, entry: Entry, released: Released) -> None:
        if entry.drops_copy:  # asked for while it was being unloaded
            self._loader.forget(entry.key)
        device, kept = entry.device, self._copies.look()
        with self._lock.changing():
            work_bytes = device.budget.restart_work()
            weights_bytes = device.budget.sum_of(Use.RESERVED)
            weights_bytes += device.budget.sum_of(Use.WEIGHTS)
            self._reports.unloaded(entry, released, kept)
        if released.peak_bytes is not None and work_bytes:
            measured_bytes = released.peak_bytes - weights_bytes
            self._loader.remember_work(device.name, work_bytes, measured_bytes)

    # Out of memory, and worse ---------------------------------------------------------

    def make_room(self, device: Device) -> list[ModelKey]:
        """
        Unloads all that is idle, at once, and returns what is gone.
        """
        with self._lock.changing():
            idle = self._evictions.evict_idle(device)
        for entry in idle:
            self.unload(entry)
        if device.name == "cpu":
            self._copies.shrink(device, 0)
        self._loader.return_memory(device.name)
        return [entry.key for entry in idle if not entry.is_present]

    def fault_of(
        self, device: Device, error: BaseException, needed_bytes: int
    ) -> Fault:
        """
        Returns what an error means; the gauge settles what its wording leaves open.
        """
        fault = classify(error)
        if fault is Fault.STICKY and device.name == "cpu":
            return Fault.OTHER  # a card's, that passed by
        if fault is not Fault.PERHAPS_OUT_OF_MEMORY:
            return fault
        reading = self._gauges.read(device)
        if reading is None or reading.free_bytes >= needed_bytes:
            return Fault.OTHER
        return Fault.OUT_OF_MEMORY

    def blame(self, entry: Entry, error: BaseException) -> None:
        """
        Gives a device up if *error* left it unusable.
        """
        if self.fault_of(entry.device, error, 0) is Fault.STICKY:
            with self._lock.changing():
                self._reports.lost(entry, one_line(error))
                self._scheduler.admit()

    def recover(self, entry: Entry, error: BaseException) -> bool:
        """
        Makes room if the use of a leased model ran out of memory.

        Blocks: while idle models of its device are unloaded.

        Returns:
            True if something was unloaded, so that the call may succeed now.
        """
        device = entry.device
        fault = self.fault_of(device, error, entry.workspace_bytes)
        if fault is Fault.STICKY:
            self.blame(entry, error)
        # The device's thread cannot wait for itself.
        if fault is not Fault.OUT_OF_MEMORY or device.thread.is_current():
            return False
        evicted: Future[list[ModelKey]] = Future()

        def make_room() -> None:
            try:
                evicted.set_result(self.make_room(device))
            except BaseException as failure:
                evicted.set_exception(failure)
                raise

        with self._lock.changing():
            if self._state.closed is not None:  # its thread may have ended
                return False
            device.thread.submit(make_room)
        return bool(evicted.result())
