"""
Room: what memory a device has, all of it and what is free now.

A `MemoryProbe` is the seam; `SystemProbe` is the real one: NVML for GPUs, the CUDA
driver where NVML does not know, and psutil with the control groups' limits for the
host. Without an NVIDIA driver nothing fails and nothing warns until a GPU is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from whispercache.errors import DeviceUnavailable

from .cublas import cublas_problem
from .cuda import CudaError, Driver, open_driver
from .host import anonymous_bytes, cpu_name, host_room, return_free_memory
from .nvml import Card, card_memory, driver_version, find_card, nvml_problem

__all__ = [
    "CUDA_HEADROOM_BYTES",
    "CUDA_HEADROOM_MIN_BYTES",
    "HOST_HEADROOM_FRACTION",
    "HOST_HEADROOM_MAX_BYTES",
    "HOST_HEADROOM_MIN_BYTES",
    "TOTAL_ONLY",
    "MemoryProbe",
    "MemoryReading",
    "SystemProbe",
    "anonymous_bytes",
    "cublas_problem",
    "driver_version",
    "headroom_bytes",
    "nvml_problem",
    "return_free_memory",
]

_MIB = 1024**2

TOTAL_ONLY = "cuda driver (total only)"
"""
Source of a reading that is no measurement: what others hold shows only later, and would
be taken for what came in between.
"""

CUDA_HEADROOM_BYTES = 512 * _MIB
"""
Bytes of a GPU that are never planned with: this process's context, kernels and handles.

Source: 200 to 312 MiB stay until the process ends (SYSTRAN/faster-whisper#680, #992);
the rest is for fragments and for neighbours that grow a little.
"""

CUDA_HEADROOM_MIN_BYTES = 128 * _MIB
"""
The least of it, once the context is there.

Source: a choice; a growing neighbour, and cuBLAS handles of 8 to 32 MiB for each model.
"""

HOST_HEADROOM_FRACTION = 0.05
HOST_HEADROOM_MIN_BYTES = 256 * _MIB
HOST_HEADROOM_MAX_BYTES = 2048 * _MIB
"""
Share of the host's memory that is never planned with, and its bounds.

Source: a choice, not a measurement. Other programs need some memory however small the
machine is, and a share that kept growing above 40 GiB would only be wasted.
"""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """
    A device's memory at one moment. Other processes move ``free_bytes`` at any time.

    Attributes:
        total_bytes: All that programs could use, or the control group's limit.
        free_bytes: What could be taken now.
        source: Who said so: ``"nvml"``, ``"cuda driver"``, ``"psutil"``, ``"cgroup"``,
            or `TOTAL_ONLY` where what others took is not known.
    """

    total_bytes: int
    free_bytes: int
    source: str


class MemoryProbe(Protocol):
    """
    Something that knows the devices and their memory. Called from any thread.
    """

    def cuda_devices(self) -> tuple[str, ...]:
        """
        The GPUs that can be used, ``"cuda:0"`` first; none without a working driver.
        """
        ...

    def read(self, device: str) -> MemoryReading:
        """
        The memory of *device*, ``"cpu"`` or for example ``"cuda:0"``, now.

        Raises:
            DeviceUnavailable: There is no such device, or no driver for it.
        """
        ...

    def device_name(self, device: str) -> str:
        """
        What the hardware is called: equal names have equal footprints.

        Raises:
            DeviceUnavailable: There is no such device, or no driver for it.
        """
        ...

    def device_id(self, device: str) -> str:
        """
        What every process of this machine calls the device, however it numbers them.

        Raises:
            DeviceUnavailable: There is no such device, or no driver for it.
        """
        ...


class SystemProbe:
    """
    The `MemoryProbe` of the machine it runs on.

    Asking for ``"cpu"`` touches no GPU library. The first question about GPUs, that for
    `cuda_devices` too, opens the driver: it settles ``CUDA_VISIBLE_DEVICES`` and makes
    CUDA unusable in children forked afterwards, but takes no memory of the card.

    Args:
        root: Where ``proc`` and ``sys`` lie.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._cards: dict[int, Card] = {}

    def cuda_devices(self) -> tuple[str, ...]:
        """
        The GPUs that CUDA sees, in its own order; none without a working driver.
        """
        try:
            return _names(open_driver())
        except CudaError:
            return ()

    def read(self, device: str) -> MemoryReading:
        """
        The memory of *device* now.

        A GPU that shares the host's memory is read as the host, file cache counted as
        free. Elsewhere NVML is asked first, then CUDA itself if it runs in this process
        already; if neither can tell, everything is taken for free.

        Raises:
            DeviceUnavailable: There is no such device, or no driver for it.
        """
        if device == "cpu":
            return MemoryReading(*host_room(self._root))
        try:
            return self._read_cuda(*_find(device))
        except CudaError as error:
            raise DeviceUnavailable(device, str(error)) from error

    def device_name(self, device: str) -> str:
        """
        The name of the GPU, or the model of the processor.

        Raises:
            DeviceUnavailable: There is no such device, or no driver for it.
        """
        if device == "cpu":
            return cpu_name(self._root)
        try:
            driver, ordinal = _find(device)
            return driver.name(ordinal)
        except CudaError as error:
            raise DeviceUnavailable(device, str(error)) from error

    def device_id(self, device: str) -> str:
        """
        The UUID of the GPU (of the slice, for a MIG device), or ``"cpu"``.

        Raises:
            DeviceUnavailable: There is no such device, or no driver for it.
        """
        if device == "cpu":
            return "cpu"
        try:
            driver, ordinal = _find(device)
            return driver.uuid(ordinal)
        except CudaError as error:
            raise DeviceUnavailable(device, str(error)) from error

    def _read_cuda(self, driver: Driver, ordinal: int) -> MemoryReading:
        total_bytes = driver.total_bytes(ordinal)
        if driver.is_integrated(ordinal):
            # Its driver allocates past the control groups, and cuMemGetInfo and NVML
            # either count the file cache as taken or know nothing.
            import psutil

            host = psutil.virtual_memory()
            total_bytes = min(total_bytes, host.total)
            return MemoryReading(
                total_bytes, min(total_bytes, host.available), "psutil"
            )
        reading = self._read_nvml(driver, ordinal, total_bytes)
        if reading is not None:
            return reading
        free_bytes = driver.free_bytes(ordinal)
        if free_bytes is not None:
            return MemoryReading(total_bytes, free_bytes, "cuda driver")
        return MemoryReading(total_bytes, total_bytes, TOTAL_ONLY)

    def _read_nvml(
        self, driver: Driver, ordinal: int, cuda_total_bytes: int
    ) -> MemoryReading | None:
        """
        What NVML says, or None where it cannot.
        """
        # A race finds the same card twice, which does no harm.
        card = self._cards.get(ordinal) or find_card(driver, ordinal)
        if card is None:
            return None
        self._cards[ordinal] = card
        memory = card_memory(card)
        if memory is None:
            return None
        total_bytes, free_bytes = memory
        if not card.is_exact:
            # Found by its slot: the whole card, even where we see only a slice of it.
            total_bytes = min(total_bytes, cuda_total_bytes)
        return MemoryReading(total_bytes, min(free_bytes, total_bytes), "nvml")


def headroom_bytes(device: str, total_bytes: int, floor_bytes: int = 0) -> int:
    """
    Bytes of *device*, which has *total_bytes*, that must stay free of models.

    What this process keeps for its life, *floor_bytes*, no longer counts as free once
    it has been measured, and is no longer to be kept free.
    """
    if device != "cpu":
        return max(CUDA_HEADROOM_BYTES - floor_bytes, CUDA_HEADROOM_MIN_BYTES)
    share_bytes = int(total_bytes * HOST_HEADROOM_FRACTION)
    return min(max(share_bytes, HOST_HEADROOM_MIN_BYTES), HOST_HEADROOM_MAX_BYTES)


def _names(driver: Driver) -> tuple[str, ...]:
    return tuple(f"cuda:{ordinal}" for ordinal in range(driver.device_count))


def _find(device: str) -> tuple[Driver, int]:
    """
    The driver, and CUDA's number of *device*.
    """
    match = re.fullmatch(r"cuda:([0-9]{1,9})", device)
    if match is None:
        reason = "there is no such kind of device; use 'cpu' or for example 'cuda:0'"
        raise DeviceUnavailable(device, reason)
    driver = open_driver()
    if int(match[1]) >= driver.device_count:
        reason = (
            f"there is no such GPU; CUDA sees {', '.join(_names(driver)) or 'none'} "
            "(it counts only those that CUDA_VISIBLE_DEVICES lets through)"
        )
        raise DeviceUnavailable(device, reason)
    return driver, int(match[1])
