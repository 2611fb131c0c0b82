"""
The state of one cache (its models, devices and queue) and the one lock that guards it.

Whatever changes state does so within `Books.changing` and appends the slow work that
follows to ``_work``, which is done once the lock is free. No loader, probe, listener or
log handler runs while the lock is held.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from whispercache.errors import (
    CacheClosed,
    DeviceUnavailable,
    LoadFailed,
    WhisperCacheError,
)
from whispercache.events import Outbox

from .entries import Device, Entry
from .threads import MonotonicClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from whispercache.devices.memory import MemoryProbe, MemoryReading
    from whispercache.engine.api import Loader
    from whispercache.keys import ModelKey
    from whispercache.units import Limit

    from .entries import Waiter
    from .threads import Clock

__all__ = ["Books", "Peers", "one_line"]

_log = logging.getLogger("whispercache")


FIRST_COOL_DOWN_S = 1.0
LAST_COOL_DOWN_S = 60.0
"""
Seconds without a try after a second load in a row failed; doubled from first to last.

The first failure costs nothing: many are over at the next try. A model that never loads
is tried 7 times in its first minute, and once a minute from then on.
"""

LOOK_AGAIN_S = 1.0
"""
Seconds after which a gauge that could not be read is read again for those who wait.
"""


class Peers(Protocol):
    """
    Other processes that keep models on the same devices, and what is known of them.

    May be asked from any thread; never under the lock.
    """

    def promised_bytes(self, device: str) -> int:
        """
        What they will take of *device* that its gauge does not show yet.
        """

    def held_bytes(self, device: str) -> int:
        """
        What their models take of *device*, which they may be asked for.
        """

    def publish(self, device: str, numbers: dict[str, int]) -> object:
        """
        Tell them what of *device* is taken here; the fields of `ledger.Account`.
        """

    def close(self) -> None:
        """
        Tell them that nothing is taken any more.
        """

    def turn(self, device: str) -> AbstractContextManager[None]:
        """
        Load while no other process loads to *device*. Blocks for a limited time.
        """


class Books:
    """
    What a cache knows. `core.Core` decides, `moves.Moves` carries models in and out.
    """

    def __init__(
        self,
        *,
        loader: Loader,
        probe: MemoryProbe,
        clock: Clock,
        limit_of: Callable[[str], Limit],
        max_models: int | None,
    ) -> None:
        self.loader = loader
        self.probe = probe
        self.clock: Clock = clock
        self.peers: Peers | None = None
        self.outbox: Outbox = Outbox()
        self._lock = threading.Lock()
        # All that follows is guarded by _lock.
        self.limit_of: Callable[[str], Limit] = limit_of
        self.max_models: int | None = max_models
        self.entries: dict[ModelKey, Entry] = {}
        self.devices: dict[str, Device] = {}
        self.queue: list[Waiter] = []
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.leases: int = 0
        self._work: list[Callable[[], None]] = []
        self._closed: CacheClosed | None = None
        # Leases that the garbage collector ended, perhaps inside a critical section.
        self._dropped: deque[tuple[Entry, int, float | None]] = deque()

    @property
    def _is_over(self) -> bool:
        """
        Whether it is closed and holds nothing any more.
        """
        return self._closed is not None and not any(
            device.entries for device in self.devices.values()
        )

    @property
    def is_closed(self) -> bool:
        """
        Whether new requests are refused.
        """
        return self._closed is not None

    # The lock ------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """
        Hold the lock, then do the slow work that follows from what was changed.
        """
        work: list[Callable[[], None]] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    work = self._take_work_locked()
        finally:
            self._perform(work)

    def _take_work_locked(self) -> list[Callable[[], None]]:
        work, self._work = self._work, []
        if self.outbox:
            work.append(self.outbox.deliver)
        return work

    def _perform(self, work: list[Callable[[], None]]) -> None:
        for place, call in enumerate(work):
            try:
                call()
            except BaseException:  # Ctrl-C, say: the rest is for others, and is done
                self._perform(work[place + 1 :])
                raise
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self._release_locked(*self._dropped.popleft())
                self._admit_locked()
                more = self._take_work_locked()
            finally:
                self._lock.release()
            self._perform(more)

    def _admit_locked(self) -> None:
        """
        Match waiters to memory. Every change that may help somebody ends in it.
        """
        raise NotImplementedError

    def _release_locked(
        self, entry: Entry, serial: int, keep_alive_s: float | None
    ) -> None:
        """
        End a lease.
        """
        raise NotImplementedError

    def _renew(self) -> None:
        """
        Forget all that other threads held or waited for, in a child without them.
        """
        self._lock = threading.Lock()
        self.clock = MonotonicClock()
        self.outbox = self.outbox.copy()
        self.queue.clear()
        self._work = []
        self._dropped.clear()
        for entry in self.entries.values():
            entry.leases.clear()
            entry.owners.clear()
        self.leases = 0

    # Models and devices --------------------------------------------------------------

    def entry(self, key: ModelKey) -> Entry:
        """
        The books of a model, opened at its first use.

        Raises:
            CacheClosed: the cache was closed.
        """
        with self.changing():
            self._check_open_locked()
            entry = self.entries.get(key)
            if entry is None:
                device = self._device_locked(key.device)
                host = self._device_locked("cpu")
                entry = self.entries[key] = Entry(key, device, host)
            return entry

    def device(self, name: str) -> Device:
        """
        The books of a device, opened at its first use.

        Raises:
            CacheClosed: the cache was closed.
        """
        with self.changing():
            self._check_open_locked()
            return self._device_locked(name)

    def _device_locked(self, name: str) -> Device:
        device = self.devices.get(name)
        if device is None:
            device = Device(name, self.limit_of(name), self.max_models)
            self.devices[name] = device
        return device

    def _check_open_locked(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(*self._closed.args)

    def refusal(self, key: ModelKey) -> WhisperCacheError | None:
        """
        Why a request for *key* would fail at once.
        """
        with self.changing():
            entry = self.entries.get(key)
            return None if entry is None else self.refusal_locked(entry)

    def refusal_locked(self, entry: Entry) -> WhisperCacheError | None:
        """
        Why a request for *entry* would fail at once: its device was lost, or its loads
        failed again and again and it is not time to try yet.
        """
        if entry.device.sick is not None:
            return lost(entry.device)
        retry_in_s = entry.retry_at_s - self.clock.now()
        # More than there ever is: the clock was set back.
        is_cooling = 0 < retry_in_s <= LAST_COOL_DOWN_S
        if entry.failures and is_cooling and not entry.is_present:
            reason = f"{entry.failures} loads in a row failed: {entry.failure}"
            return LoadFailed(str(entry.key), reason, retry_in_s)
        return None

    # Gauges --------------------------------------------------------------------------

    def observe(self, device: Device) -> bool:
        """
        Read a device's gauge; whether that worked. Blocks for a system call or two.

        Raises:
            DeviceUnavailable: there is no reading, and no limit to go by either.
        """
        try:
            reading = self.probe.read(device.name)
        except Exception as error:
            # A gauge that fails for a moment must not stop who knows its limit.
            if device.budget.capacity_bytes:
                _log.warning("free memory of %s is unknown: %s", device.name, error)
                return False
            if isinstance(error, WhisperCacheError):
                raise
            raise DeviceUnavailable(device.name, one_line(error)) from error
        self.take_reading(device, reading)
        return True

    def take_reading(
        self, device: Device, reading: MemoryReading, *, is_still: bool = False
    ) -> None:
        """
        Take a reading into account, and what other processes told.

        Without *is_still* it does not count while something moves.
        """
        promised_bytes = held_bytes = 0
        if self.peers is not None:
            promised_bytes = self.peers.promised_bytes(device.name)
            held_bytes = self.peers.held_bytes(device.name)
        with self.changing():
            if is_still or not device.is_moving or not device.budget.total_bytes:
                device.is_stale = False
                kept_bytes = device.shell_bytes
                device.budget.observe(reading, kept_bytes, promised_bytes, held_bytes)

    def _look_again(self, device: Device) -> None:
        """
        Read the gauge for those who wait, after something of ours has ended.
        """
        try:
            is_known = self.observe(device)
        except DeviceUnavailable as error:
            _log.warning("%s", error)
            is_known = False
        with self.changing():
            if not is_known and self.queue:
                again = partial(self._look_again, device)
                self.clock.call_at(self.clock.now() + LOOK_AGAIN_S, again)
            self._admit_locked()

    def _on_thread_locked(self, entry: Entry, call: Callable[[], None]) -> None:
        self._work.append(partial(entry.device.thread.submit, call))


def lost(device: Device) -> DeviceUnavailable:
    """
    Why nothing can be had on a device that an error left unusable.
    """
    mend = "restart the process"
    if device.sick is not None and "illegal memory access" in device.sick:
        # Source: SYSTRAN/faster-whisper#946.
        mend += "; if it uses several GPUs, give each a process of its own"
    return DeviceUnavailable(
        device.name, f"an earlier error left it unusable ({device.sick}); {mend}"
    )


def one_line(error: BaseException) -> str:
    """
    The text of an error, without line breaks.
    """
    text = " ".join(str(error).split())
    return text or type(error).__name__
