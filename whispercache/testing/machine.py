"""
A machine whose devices have memory that is only counted.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from typing import TYPE_CHECKING

from whispercache.devices.memory import MemoryReading
from whispercache.errors import DeviceUnavailable
from whispercache.units import parse_limit

if TYPE_CHECKING:
    from collections.abc import Mapping


class FakeMachine:
    """
    Devices with memory, some of it used by other programs. A `MemoryProbe`.

    Args:
        devices: Memory by device: bytes, or text such as ``"10GiB"``.

    Attributes:
        total_bytes: The memory of each device.
        held_bytes: The part of it that loaders took.
        others_bytes: The part that other programs hold.
        peak_bytes: Largest that *held_bytes* has been.
        reading_fails: An error for all readings, if set.
    """

    def __init__(self, devices: Mapping[str, int | str]) -> None:
        self.total_bytes: dict[str, int] = {
            name: as_bytes(size) for name, size in devices.items()
        }
        self.held_bytes: Counter[str] = Counter()
        self.others_bytes: Counter[str] = Counter()
        self.peak_bytes: Counter[str] = Counter()
        # Set by tests of gauges that fail.
        self.reading_fails: Exception | None = None
        self._lock = threading.Lock()

    def others(self, device: str, n_bytes: int | str) -> None:
        """
        Sets how much of *device* other programs hold from now on.
        """
        self.others_bytes[device] = as_bytes(n_bytes) if n_bytes else 0

    def cuda_devices(self) -> tuple[str, ...]:
        return tuple(name for name in self.total_bytes if name != "cpu")

    def read(self, device: str) -> MemoryReading:
        """
        Returns what is free, truthfully.

        Raises:
            Exception: the one of `reading_fails`.
            DeviceUnavailable: there is no such device.
        """
        if self.reading_fails is not None:
            # A copy: an error that is kept would keep its callers' frames, and leases.
            raise copy.copy(self.reading_fails)
        if device not in self.total_bytes:
            raise DeviceUnavailable(device, f"there are {', '.join(self.total_bytes)}")
        return MemoryReading(self.total_bytes[device], self.free_bytes(device), "fake")

    def device_name(self, device: str) -> str:
        return f"fake {device}"

    def device_id(self, device: str) -> str:
        return f"fake-{device}"

    def free_bytes(self, device: str) -> int:
        held_bytes = self.held_bytes[device] + self.others_bytes[device]
        return self.total_bytes[device] - held_bytes

    def used_bytes(self, device: str) -> int:
        return self.total_bytes[device] - self.free_bytes(device)

    def take(self, device: str, n_bytes: int) -> None:
        """
        Allocates memory.

        Raises:
            RuntimeError: there is too little; CTranslate2's own message.
        """
        # Threads of several devices take host memory at the same time.
        with self._lock:
            if n_bytes > self.free_bytes(device):
                raise RuntimeError("CUDA failed with error out of memory")
            self.held_bytes[device] += n_bytes
            self.peak_bytes[device] = max(
                self.peak_bytes[device], self.held_bytes[device]
            )

    def give_back(self, device: str, n_bytes: int) -> None:
        """
        Frees memory that was allocated.
        """
        with self._lock:
            self.held_bytes[device] -= n_bytes
            assert self.held_bytes[device] >= 0, f"{device}: freed twice"


def as_bytes(size: int | str) -> int:
    """
    Returns bytes: *size* itself, or those that text such as ``"1GiB"`` means.
    """
    return size if isinstance(size, int) else parse_limit(size).n_bytes or 0
