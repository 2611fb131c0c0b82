"""
The driver's calls that the benchmark needs and `whispercache.devices.cuda` does not.

They copy, fill a card, and move other processes off it.
Source for names, numbers and structures: cuda.h of CUDA 12.8.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from contextlib import contextmanager
from ctypes import byref, c_size_t, c_uint64, c_void_p
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from whispercache.devices.cuda import CudaError, open_driver
from whispercache.devices.probe import SystemProbe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ATTRIBUTE_THRESHOLD = 4
_CROSSING_ROUNDS = 3
_LOCK_MS = 10_000

# The driver's names for the states of a process, by number.
STATES = ("running", "locked", "checkpointed", "failed", "checkpointing", "restoring")


class Held(NamedTuple):
    """
    The memory of a card that is held at one moment, by this process's pool and by all.

    None stands for a pool that there is not; the peak is that since `forget_peak`.
    """

    used_bytes: int | None
    reserved_bytes: int | None
    peak_bytes: int | None
    gauge_bytes: int


class Crossing(NamedTuple):
    """
    A copy between host and card: the median seconds of some.

    The host's memory is pageable, pinned, or fresh: pageable and never written to.
    """

    way: str
    memory: str
    seconds: float


class Card:
    def __init__(self, device: str) -> None:
        self.device = device
        self.ordinal = int(device.partition(":")[2])
        self.driver = open_driver()
        self.probe = SystemProbe()

    @contextmanager
    def context(self) -> Iterator[None]:
        """
        Makes the card's context current on this thread, and creates it if needed.
        """
        call, device, context = self.driver._call, ctypes.c_int(), c_void_p()
        call("cuDeviceGet", byref(device), self.ordinal)
        call("cuDevicePrimaryCtxRetain", byref(context), device)
        try:
            call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                call("cuCtxPopCurrent_v2", byref(c_void_p()))
        finally:
            call("cuDevicePrimaryCtxRelease_v2", device)

    def cuda_version(self) -> str:
        version = ctypes.c_int()
        self.driver._call("cuDriverGetVersion", byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def held(self) -> Held:
        """
        Returns what is held of the card once all work on it is done.
        """
        self.driver.synchronize(self.ordinal)
        pool = self.driver.pool(self.ordinal)
        gauge_bytes = self.gauge_bytes()
        if pool is None:
            return Held(None, None, None, gauge_bytes)
        return Held(pool.used_bytes, pool.reserved_bytes, pool.peak_bytes, gauge_bytes)

    def gauge_bytes(self) -> int:
        reading = self.probe.read(self.device)
        return reading.total_bytes - reading.free_bytes

    def free_bytes(self) -> int:
        with self.context():
            free, total = c_size_t(), c_size_t()
            self.driver._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def set_threshold(self, n_bytes: int) -> None:
        """
        Lets the pool keep so much of what is freed, as other libraries do.
        """
        with self.driver._pool(self.ordinal) as pool:
            if pool is not None:
                value = byref(c_uint64(n_bytes))
                name = "cuMemPoolSetAttribute"
                self.driver._call(name, pool, _ATTRIBUTE_THRESHOLD, value)

    # Filling it ----------------------------------------------------------------------

    def take(self, n_bytes: int) -> int:
        """
        Allocates outside of the pool, for the life of the context; the address.
        """
        address = c_uint64()
        with self.context():
            self.driver._call("cuMemAlloc_v2", byref(address), c_size_t(n_bytes))
        return address.value

    def give_back(self, address: int) -> None:
        with self.context():
            self.driver._call("cuMemFree_v2", c_uint64(address))

    def fill(self, leave_bytes: int) -> list[int]:
        """
        Takes all but about *leave_bytes* in as few pieces as it can; the addresses.

        The context must belong to another library, which keeps it.
        """
        taken: list[int] = []
        self.driver.trim(self.ordinal)  # idle memory of the pool is no obstacle
        piece_bytes = self.free_bytes() - leave_bytes
        while piece_bytes >= leave_bytes // 8:
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
        Times copies of *n_bytes*, both ways, or to the card alone.
        """
        ways = (("to the card", self._send), ("to the host", self._fetch))
        with self.context():  # allocations end with the last use of the context
            there = self.take(n_bytes)
            try:
                places = {"pageable": _pageable, "pinned": self._pinned}
                for memory, place in places.items():
                    with place(n_bytes) as here:
                        for way, copy in ways[: 1 if is_one_way else None]:
                            once = partial(copy, there, here, n_bytes)
                            call = partial(_seconds, once)
                            yield _crossing(way, memory, call, rounds)
                if not is_one_way:
                    call = partial(self._into_fresh_memory, there, n_bytes)
                    yield _crossing("to the host", "fresh", call, rounds)
            finally:
                self.give_back(there)

    def _send(self, there: int, here: int, n_bytes: int) -> None:
        sizes = c_uint64(there), c_void_p(here), c_size_t(n_bytes)
        self.driver._call("cuMemcpyHtoD_v2", *sizes)
        # From pageable memory the call ends before its last piece has arrived.
        self.driver._call("cuCtxSynchronize")

    def _fetch(self, there: int, here: int, n_bytes: int) -> None:
        sizes = c_void_p(here), c_uint64(there), c_size_t(n_bytes)
        self.driver._call("cuMemcpyDtoH_v2", *sizes)
        self.driver._call("cuCtxSynchronize")

    def _into_fresh_memory(self, there: int, n_bytes: int) -> float:
        with _pageable(n_bytes, touched=False) as here:
            return _seconds(partial(self._fetch, there, here, n_bytes))

    @contextmanager
    def _pinned(self, n_bytes: int) -> Iterator[int]:
        here = c_void_p()
        self.driver._call("cuMemHostAlloc", byref(here), c_size_t(n_bytes), 0)
        try:
            yield here.value or 0
        finally:
            self.driver._call("cuMemFreeHost", here)


@contextmanager
def _pageable(n_bytes: int, *, touched: bool = True) -> Iterator[int]:
    # Private, as what malloc gives: the kernel treats shared memory differently.
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, n_bytes, flags=kind) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        try:
            if touched:  # so that its pages are there
                ctypes.memset(ctypes.addressof(first), 1, n_bytes)
            yield ctypes.addressof(first)
        finally:
            del first  # the mapping cannot be closed before


def _crossing(
    way: str, memory: str, call: Callable[[], float], rounds: int
) -> Crossing:
    call()  # the first may have to prepare something
    seconds = statistics.median(call() for _ in range(rounds))
    return Crossing(way, memory, seconds)


def _seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


class _LockArguments(ctypes.Structure):
    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved", ctypes.c_uint),
        ("more_reserved", c_uint64 * 7),
    )


class Parking:
    """
    Moves all that another process has on its cards to host memory, and back.

    Linux, driver 570 or later. Each method raises `CudaError` if the driver refuses.
    """

    def __init__(self, pid: int) -> None:
        self._driver = open_driver()
        self._pid = ctypes.c_int(pid)

    def state(self) -> str:
        number = ctypes.c_int()
        self._call("GetState", byref(number))
        known = 0 <= number.value < len(STATES)
        return STATES[number.value] if known else str(number.value)

    def lock(self) -> None:
        """
        Keeps the process from new work on its cards, and waits for what runs.
        """
        self._call("Lock", byref(_LockArguments(timeout_ms=_LOCK_MS)))

    def checkpoint(self) -> None:
        self._call("Checkpoint", c_void_p())

    def restore(self) -> None:
        """
        Moves everything back. The process stays locked.
        """
        self._call("Restore", c_void_p())

    def unlock(self) -> None:
        self._call("Unlock", c_void_p())

    def _call(self, action: str, argument: object) -> None:
        self._driver._call(f"cuCheckpointProcess{action}", self._pid, argument)
