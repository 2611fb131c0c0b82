"""
Loads: models on their way into memory, on the thread of their device.

A load that finds too little memory is taken back, or evicts what is idle and is tried
once more.
"""

from __future__ import annotations

import logging
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING

from whispercache.devices.faults import Fault
from whispercache.events import DeviceWarmedUp, DeviceWarmingUp

from .entries import State

if TYPE_CHECKING:
    from whispercache.devices.memory import MemoryReading
    from whispercache.engine.api import LoadedModel

    from .device import Device
    from .entries import Entry
    from .gauges import Base
    from .host_copies import HostCopies
    from .threads import Clock
    from .unloads import Unloads

_log = logging.getLogger("whispercache")

RETURN_AFTER_S = 1.0
"""
Seconds without another load after which a reload's buffers go back to the system.

Source: where models take turns, faulting those pages in again takes a quarter of a
reload (benchmarks/switch.py).
"""

SLOW_WARM_UP_S = 2.0
"""
Seconds after which those who wait for a device's first model are told why.

Source: a context and cuBLAS take less; compiling takes 20 to 30.
"""


class Loads:
    """
    Loads models on the thread of their device, and reports to the scheduler.
    """

    def __init__(
        self, base: Base, copies: HostCopies, unloads: Unloads, clock: Clock
    ) -> None:
        self._lock = base.lock
        self._state = base.state
        self._reports = base.reports
        self._scheduler = base.scheduler
        self._loader = base.loader
        self._gauges = base.gauges
        self._copies = copies
        self._unloads = unloads
        self._clock = clock

    def load(self, entry: Entry) -> None:
        """
        Loads a model whose memory is reserved.
        """
        if entry.state is not State.LOADING:  # begun twice
            return
        try:
            self._load(entry)
        except BaseException as error:  # or its waiters would wait for ever
            if entry.state is not State.LOADING:
                raise
            self._failed(entry, error, Fault.OTHER, "")
        self._gauges.tell_peers(entry.device)

    def _load(self, entry: Entry) -> None:
        device = entry.device
        if self._has_other_files(entry) or self._copies.was_lost(entry):
            return
        # Its reserved memory may be what kept tokenizers still take.
        self._copies.shrink(entry.host, but=entry.key)
        with self._gauges.peers.turn(device.name):
            # Told before it takes memory, so that no other process counts on that.
            self._gauges.tell_peers(device)
            if (reading := self._shortage(entry)) is not None:
                self._put_back(entry, reading)
                return
            with self._lock.changing():
                quiet_since = self._reports.load_begins(entry)
            done = self._try_twice(entry)
        if done is None:
            return
        loaded, load_s = done
        kept = self._copies.look()
        with self._lock.changing():
            # Work of others in the process moves what the loader measured.
            is_quiet = quiet_since == self._state.grants
            self._reports.loaded(entry, loaded, load_s, kept)
        if loaded.reloaded:
            self._return_later(device)
        if is_quiet and loaded.measured_bytes is not None:
            self._loader.remember(entry.key, loaded.files, loaded.measured_bytes)
        self._loader.follow_up(loaded)

    def _has_other_files(self, entry: Entry) -> bool:
        """
        Returns True if other files are to be read than its memory was reserved for: a
        variant was made, or removed, while the load waited. It is admitted anew.
        """
        assert entry.files is not None
        files = self._loader.choose(entry.key, entry.files)
        if files == entry.files:
            return False
        footprints = {
            workload: self._loader.footprint(entry.key, files, workload)
            for workload in entry.footprints
        }
        with self._lock.changing():
            self._reports.taken_back(entry)
            entry.locate(files, footprints)
            self._scheduler.admit()
        return True

    def _shortage(self, entry: Entry) -> MemoryReading | None:
        """
        Returns the reading if it no longer shows room for what is charged: other
        programs may have taken some. None if it does, or cannot be read.
        """
        device = entry.device
        if self._gauges.shortage(device) is None:
            return None
        if device is entry.host:  # on a card they are not in the way
            self._copies.shrink(device, 0)  # its own, too
        # What an unload left in the heap for this load.
        self._loader.return_memory(device.name)
        return self._gauges.shortage(device)

    def _put_back(self, entry: Entry, reading: MemoryReading) -> None:
        """
        Takes a load back that has not begun; those who wait for it wait again.
        """
        with self._lock.changing():
            self._reports.taken_back(entry)
        # On its thread, so nothing moves, whatever is on its way.
        self._gauges.take_in(entry.device, reading, is_still=True)
        with self._lock.changing():
            self._scheduler.admit()

    def _try_twice(self, entry: Entry) -> tuple[LoadedModel, float] | None:
        """
        Loads, and returns the model with the seconds of that; None if it failed. If
        memory runs out, what is idle is evicted and the load tried once more.
        """
        assert entry.files is not None
        tried = ""
        while True:
            try:
                self._warm_up(entry)
                started_s = self._clock.now()
                loaded = self._loader.load(entry.key, entry.files)
                return loaded, self._clock.now() - started_s
            except BaseException as error:  # or its waiters would wait for ever
                # The frames of the traceback hold the half-built model.
                traceback.clear_frames(error.__traceback__)
                device, n_bytes = entry.device, entry.weights_bytes
                fault = self._unloads.fault_of(device, error, n_bytes)
                if fault is Fault.OTHER and self._has_other_files(entry):
                    return None
                if fault is not Fault.OUT_OF_MEMORY or tried:
                    self._failed(entry, error, fault, tried)
                    return None
            # The prediction was wrong, or memory is in fragments: empty the device.
            evicted = self._unloads.make_room(entry.device)
            names = ", ".join(map(str, evicted)) or "nothing, as nothing was idle"
            tried = f"; tried twice, and evicted in between: {names}"

    def _warm_up(self, entry: Entry) -> None:
        """
        Has a device do once what would else count for its first model, and tells so.
        """
        device, reason = entry.device, self._loader.warm_up_needed(entry.key)
        if not reason:
            return
        with self._lock.changing():
            self._state.outbox.append(DeviceWarmingUp(entry.key, device.name, reason))
        is_over = threading.Event()

        def tell() -> None:
            if not is_over.is_set():
                _log.warning("%s is warming up: %s", device.name, reason)

        started_s = self._clock.now()
        self._clock.call_at(started_s + SLOW_WARM_UP_S, tell)
        try:
            floor_bytes = self._loader.warm_up(entry.key)
        finally:
            is_over.set()
        warm_up_s = self._clock.now() - started_s
        with self._lock.changing():
            if floor_bytes is not None:
                device.budget.floor_bytes = floor_bytes
            warmed_up = DeviceWarmedUp(entry.key, device.name, warm_up_s, floor_bytes)
            self._state.outbox.append(warmed_up)

    def _failed(
        self, entry: Entry, error: BaseException, fault: Fault, tried: str
    ) -> None:
        try:
            self._loader.return_memory(entry.device.name)
        except Exception:  # nor may this keep them waiting
            _log.exception("memory of %s was not returned", entry.key)
        kept = self._copies.look()
        is_lost = fault is Fault.STICKY
        with self._lock.changing():
            self._reports.load_failed(entry, error, kept, tried=tried, is_lost=is_lost)

    def _return_later(self, device: Device) -> None:
        """
        Has what a reload left in the heap returned, unless the next one needs it first.
        """
        begun = device.loads_begun

        def return_memory() -> None:
            if device.loads_begun == begun:
                self._loader.return_memory(device.name)

        again = partial(device.thread.submit, return_memory)
        self._clock.call_at(self._clock.now() + RETURN_AFTER_S, again)
