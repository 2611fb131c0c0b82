"""
Gauges: what devices show of their free memory, and what other processes tell of it.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from whispercache.errors import DeviceUnavailable, WhisperCacheError

from . import view
from .refusals import one_line

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from whispercache.devices.memory import MemoryProbe, MemoryReading
    from whispercache.engine.api import Loader

    from .device import Device
    from .evictions import Evictions
    from .lock import StateLock
    from .reports import Reports
    from .scheduler import Scheduler
    from .state import CacheState

_log = logging.getLogger("whispercache")


class Peers(Protocol):
    """
    Other processes that keep models on the same devices, and what is known of them.

    May be asked from any thread; never under the lock. By default nothing is known
    of any.
    """

    def promised_bytes(self, device: str) -> int:
        """
        Returns what they will take of *device* that its gauge does not show yet.
        """
        del device
        return 0

    def held_bytes(self, device: str) -> int:
        """
        Returns what their models take of *device*, which they may be asked for.
        """
        del device
        return 0

    def publish(self, device: str, numbers: dict[str, int]) -> object:
        """
        Tells them what of *device* is taken here; the fields of `ledger.Account`.
        """

    def close(self) -> None:
        """
        Tells them that nothing is taken any more.
        """

    def turn(self, device: str) -> AbstractContextManager[None]:
        """
        Keeps other processes from loading to *device*. Blocks for a limited time.
        """
        del device
        return nullcontext()


class NoPeers(Peers):
    """
    The peers of a cache that does not coordinate.
    """

    def publish(self, device: str, numbers: dict[str, int]) -> None:
        """
        Does nothing.
        """

    def close(self) -> None:
        """
        Does nothing.
        """


@dataclass(frozen=True, slots=True)
class Base:
    """
    The parts below those that work on the thread of a device.
    """

    lock: StateLock
    state: CacheState
    scheduler: Scheduler
    evictions: Evictions
    reports: Reports
    loader: Loader
    gauges: Gauges


class Gauges:
    """
    Reads the gauges of devices, and reports to the scheduler.
    """

    def __init__(
        self,
        lock: StateLock,
        state: CacheState,
        reports: Reports,
        probe: MemoryProbe,
        peers: Peers,
    ) -> None:
        self._lock = lock
        self._state = state
        self._reports = reports
        self._probe = probe
        self.peers: Peers = peers

    def read(
        self, device: Device, level: int = logging.WARNING
    ) -> MemoryReading | None:
        """
        Returns a reading; None, with a message, if the gauge cannot be read.
        """
        try:
            return self._probe.read(device.name)
        except Exception as error:
            _log.log(level, "free memory of %s is unknown: %s", device.name, error)
            return None

    def observe(self, device: Device) -> bool:
        """
        Takes a new reading in, and returns True if that worked. Blocks for a system
        call or two.

        Raises:
            DeviceUnavailable: there is no reading, and no limit to go by either.
        """
        try:
            reading = self._probe.read(device.name)
        except Exception as error:
            # A gauge that fails for a moment must not stop a cache with a limit.
            if device.budget.capacity_bytes:
                _log.warning("free memory of %s is unknown: %s", device.name, error)
                return False
            if isinstance(error, WhisperCacheError):
                raise
            raise DeviceUnavailable(device.name, one_line(error)) from error
        self.take_in(device, reading)
        return True

    def take_in(
        self, device: Device, reading: MemoryReading, *, is_still: bool = False
    ) -> None:
        """
        Takes a reading in, and what other processes told.

        Without *is_still* it does not count while something moves.
        """
        # Asked before the lock is taken: peers read files.
        promised_bytes = self.peers.promised_bytes(device.name)
        peers_bytes = self.peers.held_bytes(device.name)
        with self._lock.changing():
            if is_still or not device.moving or not device.budget.total_bytes:
                device.is_stale = False
                before = device.budget.bounds
                device.budget.observe(
                    reading, device.kept_bytes, promised_bytes, peers_bytes
                )
                if device.budget.bounds != before:
                    device.outlook.forget()

    def look_again(self, device: Device) -> None:
        """
        Reads a gauge for those who wait, after something of ours has ended.
        """
        try:
            is_known = self.observe(device)
        except DeviceUnavailable as error:
            _log.warning("%s", error)
            is_known = False
        with self._lock.changing():
            self._reports.looked(device, is_known=is_known)

    def shortage(self, device: Device) -> MemoryReading | None:
        """
        Returns a reading by which not all that is charged and not in memory yet fits;
        None if it does, or if the gauge cannot be read.
        """
        # `observe` told of a gauge that cannot be read; the limit has to do.
        reading = self.read(device, logging.DEBUG)
        if reading is None:
            return None
        promised_bytes = self.peers.promised_bytes(device.name)
        with self._lock.changing():
            budget = device.budget
            usable_bytes = budget.usable_bytes(reading) - promised_bytes
            return reading if budget.to_come_bytes > usable_bytes else None

    def tell_peers(self, device: Device) -> None:
        """
        Tells other processes what is taken here, before it is and after.
        """
        # After the end there is nothing to tell: the account was removed.
        if isinstance(self.peers, NoPeers) or self._state.is_over:
            return
        with self._lock.changing():
            numbers = view.account(self._state, device)
        self.peers.publish(device.name, numbers)
