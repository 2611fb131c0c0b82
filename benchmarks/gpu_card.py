"""
A card through the driver's own calls, for what `whispercache.devices.cuda` has no need
of: copies, filling it up, the pool's threshold, and parking other processes.

Source for names, numbers and structures: cuda.h of CUDA 12.8.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from gpu_records import Crossing, Held

from whispercache.devices.cuda import CudaError, open_driver
from whispercache.devices.probe import SystemProbe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    _Way = tuple[str, Callable[[int, int, int], None]]

__all__ = ["STATES", "Card", "Parking"]

_ATTRIBUTE_THRESHOLD = 4
_CROSSING_ROUNDS = 3
_LOCK_MS = 10_000

STATES = ("running", "locked", "checkpointed", "failed", "checkpointing", "restoring")
"""
What the driver calls the states of a process, by number.
"""

_NO_ARGUMENTS = ctypes.c_void_p()


class Card:
    """
    One card.

    Args:
        device: ``"cuda:0"`` for example.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.ordinal = int(device.partition(":")[2])
        self.driver = open_driver()
        self.probe = SystemProbe()

    @contextmanager
    def context(self) -> Iterator[None]:
        """
        The card's context on this thread. It is created if there is none.
        """
        call, device = self.driver._call, ctypes.c_int()
        context = ctypes.c_void_p()
        call("cuDeviceGet", ctypes.byref(device), self.ordinal)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        finally:
            call("cuDevicePrimaryCtxRelease_v2", device)

    def cuda_version(self) -> str:
        """
        The newest CUDA that the driver knows.
        """
        version = ctypes.c_int()
        self.driver._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def held(self) -> Held:
        """
        What is held of it now, when all work is done.
        """
        self.driver.synchronize(self.ordinal)
        pool = self.driver.pool(self.ordinal)
        gauge_bytes = self.gauge_bytes()
        if pool is None:
            return Held(None, None, None, gauge_bytes)
        return Held(pool.used_bytes, pool.reserved_bytes, pool.peak_bytes, gauge_bytes)

    def gauge_bytes(self) -> int:
        """
        What all programs hold of it now.
        """
        reading = self.probe.read(self.device)
        return reading.total_bytes - reading.free_bytes

    def free_bytes(self) -> int:
        """
        What could be taken of it now, by CUDA in this process.
        """
        with self.context():
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            self.driver._call(
                "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)
            )
        return free.value

    def set_threshold(self, n_bytes: int) -> None:
        """
        Let the memory pool keep so much of what is freed, as other libraries do.
        """
        with self.driver._pool(self.ordinal) as pool:
            if pool is not None:
                value = ctypes.c_uint64(n_bytes)
                name = "cuMemPoolSetAttribute"
                self.driver._call(name, pool, _ATTRIBUTE_THRESHOLD, ctypes.byref(value))

    # Filling it ----------------------------------------------------------------------

    def take(self, n_bytes: int) -> int:
        """
        Allocate outside of the pool; the address. It lasts as long as the context.
        """
        address = ctypes.c_uint64()
        with self.context():
            self.driver._call(
                "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes)
            )
        return address.value

    def give_back(self, address: int) -> None:
        """
        Free what was taken.
        """
        with self.context():
            self.driver._call("cuMemFree_v2", ctypes.c_uint64(address))

    def fill(self, leave_bytes: int) -> list[int]:
        """
        Take all but about *leave_bytes*, in as few pieces as can be; the addresses.

        Another library's context must be there, and stay.
        """
        taken: list[int] = []
        least_bytes = leave_bytes // 8
        self.driver.trim(self.ordinal)  # what the pool has idle is no obstacle
        piece_bytes = self.free_bytes() - leave_bytes
        while piece_bytes >= least_bytes:
            try:
                taken.append(self.take(piece_bytes))
            except CudaError:  # no piece of that size is left
                piece_bytes //= 2
            else:
                piece_bytes = self.free_bytes() - leave_bytes
        return taken

    # Copies --------------------------------------------------------------------------

    def crossings(
        self, n_bytes: int, rounds: int = _CROSSING_ROUNDS, *, is_one_way: bool = False
    ) -> Iterator[Crossing]:
        """
        How long copies of *n_bytes* take, both ways, or to the card alone.
        """
        ways = self._ways()[: 1 if is_one_way else None]
        with self.context():  # what was taken goes when nobody holds it any more
            there = self.take(n_bytes)
            try:
                with _pageable(n_bytes) as here:
                    for way, copy in ways:
                        seconds = _each(partial(copy, there, here, n_bytes), rounds)
                        yield _median(way, "pageable", n_bytes, seconds)
                with self._pinned(n_bytes) as here:
                    for way, copy in ways:
                        seconds = _each(partial(copy, there, here, n_bytes), rounds)
                        yield _median(way, "pinned", n_bytes, seconds)
                if is_one_way:
                    return
                seconds = [
                    self._into_fresh_memory(there, n_bytes) for _ in range(rounds)
                ]
                yield _median("to the host", "fresh", n_bytes, seconds)
            finally:
                self.give_back(there)

    def _ways(self) -> tuple[_Way, ...]:
        return ("to the card", self._send), ("to the host", self._fetch)

    def _send(self, there: int, here: int, n_bytes: int) -> None:
        self.driver._call(
            "cuMemcpyHtoD_v2",
            *(ctypes.c_uint64(there), ctypes.c_void_p(here), ctypes.c_size_t(n_bytes)),
        )
        # From pageable memory the call ends before its last piece has arrived.
        self.driver._call("cuCtxSynchronize")

    def _fetch(self, there: int, here: int, n_bytes: int) -> None:
        self.driver._call(
            "cuMemcpyDtoH_v2",
            *(ctypes.c_void_p(here), ctypes.c_uint64(there), ctypes.c_size_t(n_bytes)),
        )
        self.driver._call("cuCtxSynchronize")

    def _into_fresh_memory(self, there: int, n_bytes: int) -> float:
        with _pageable(n_bytes, touched=False) as here:
            return _seconds(lambda: self._fetch(there, here, n_bytes))

    @contextmanager
    def _pinned(self, n_bytes: int) -> Iterator[int]:
        here = ctypes.c_void_p()
        self.driver._call(
            "cuMemHostAlloc", ctypes.byref(here), ctypes.c_size_t(n_bytes), 0
        )
        try:
            yield here.value or 0
        finally:
            self.driver._call("cuMemFreeHost", here)


@contextmanager
def _pageable(n_bytes: int, *, touched: bool = True) -> Iterator[int]:
    """
    The address of new memory of this process, its pages there if *touched*.
    """
    # Not shared, as what malloc gives is not: the kernel treats the two differently.
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, n_bytes, flags=kind) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        try:
            if touched:
                ctypes.memset(ctypes.addressof(first), 1, n_bytes)
            yield ctypes.addressof(first)
        finally:
            del first  # the mapping cannot be closed before


def _each(call: Callable[[], object], rounds: int) -> list[float]:
    call()  # the first may have to prepare something
    return [_seconds(call) for _ in range(rounds)]


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def _median(way: str, memory: str, n_bytes: int, seconds: Sequence[float]) -> Crossing:
    return Crossing(way, memory, n_bytes, statistics.median(seconds))


class _LockArguments(ctypes.Structure):
    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved", ctypes.c_uint),
        ("more_reserved", ctypes.c_uint64 * 7),
    )


class Parking:
    """
    Moves all that a process has on its cards to host memory, and back.

    Linux, driver 570 or later. Each method raises `CudaError` if the driver refuses.

    Args:
        pid: The process.
    """

    def __init__(self, pid: int) -> None:
        self._driver = open_driver()
        self._pid = ctypes.c_int(pid)

    def state(self) -> str:
        """
        One of `STATES`.
        """
        number = ctypes.c_int()
        self._driver._call(
            "cuCheckpointProcessGetState", self._pid, ctypes.byref(number)
        )
        known = 0 <= number.value < len(STATES)
        return STATES[number.value] if known else str(number.value)

    def lock(self) -> None:
        """
        Let the process begin nothing new on its cards, and wait for what runs.
        """
        arguments = _LockArguments(timeout_ms=_LOCK_MS)
        self._driver._call(
            "cuCheckpointProcessLock", self._pid, ctypes.byref(arguments)
        )

    def checkpoint(self) -> None:
        """
        Move everything to host memory, and leave the cards.
        """
        self._driver._call("cuCheckpointProcessCheckpoint", self._pid, _NO_ARGUMENTS)

    def restore(self) -> None:
        """
        Move everything back. The process stays locked.
        """
        self._driver._call("cuCheckpointProcessRestore", self._pid, _NO_ARGUMENTS)

    def unlock(self) -> None:
        """
        Let the process go on.
        """
        self._driver._call("cuCheckpointProcessUnlock", self._pid, _NO_ARGUMENTS)
