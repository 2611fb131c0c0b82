"""
The probe of the machine that the process runs on.

It asks NVML about GPUs, the CUDA driver where NVML does not know, and psutil with the
control groups' limits about the host. Without an NVIDIA driver nothing fails and
nothing warns until somebody asks for a GPU.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.errors import DeviceUnavailable

from .cuda import CudaError, Driver, open_driver
from .host import anonymous_bytes, cpu_name, host_room
from .memory import TOTAL_ONLY, MemoryReading
from .nvml import Card, card_memory, find_card, process_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


class SystemProbe:
    """
    The `MemoryProbe` of the machine that the process runs on.

    Questions about ``"cpu"`` touch no GPU library. The first question about GPUs, that
    for `cuda_devices` too, opens the driver: it settles ``CUDA_VISIBLE_DEVICES`` and
    makes CUDA unusable in children forked afterwards, but takes no memory of the card.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root  # where ``proc`` and ``sys`` lie
        self._cards: dict[int, Card] = {}

    def cuda_devices(self) -> tuple[str, ...]:
        try:
            return _names(open_driver())
        except CudaError:  # a machine without GPUs is no error here
            return ()

    def read(self, device: str) -> MemoryReading:
        """
        Reads the memory of *device* now.

        A GPU that shares the host's memory is read as the host, with the file cache
        counted as free. For others NVML is asked first, then CUDA, if it runs in this
        process already. If neither can tell, all memory counts as free.
        """
        if device == "cpu":
            return MemoryReading(*host_room(self._root))
        with _unavailable(device):
            return self._read_cuda(*_find(device))

    def device_name(self, device: str) -> str:
        if device == "cpu":
            return cpu_name(self._root)
        with _unavailable(device):
            driver, ordinal = _find(device)
            return driver.name(ordinal)

    def device_id(self, device: str) -> str:
        """
        Returns the UUID of the GPU (of the slice, for a MIG device), or ``"cpu"``.
        """
        if device == "cpu":
            return "cpu"
        with _unavailable(device):
            driver, ordinal = _find(device)
            return driver.uuid(ordinal)

    def process_bytes(self, device: str, pids: Collection[int]) -> int:
        """
        Returns the bytes of *device* that some processes hold, as far as that is known:
        where a container has process ids of its own, nothing is known of GPUs.
        """
        if device == "cpu":
            return sum(anonymous_bytes(pid) or 0 for pid in pids)
        with _unavailable(device):
            card = self._card(*_find(device))
        return 0 if card is None else process_bytes(card, pids)

    def _card(self, driver: Driver, ordinal: int) -> Card | None:
        # Two threads may both look the card up, and find the same one.
        card = self._cards.get(ordinal) or find_card(driver, ordinal)
        if card is not None:
            self._cards[ordinal] = card
        return card

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
        # NVML first: it sees all processes, and needs no context.
        reading = self._read_nvml(driver, ordinal, total_bytes)
        if reading is not None:
            return reading
        free_bytes = driver.free_bytes(ordinal)
        if free_bytes is not None:
            return MemoryReading(total_bytes, free_bytes, "cuda driver")
        # Too much, but nothing better is known.
        return MemoryReading(total_bytes, total_bytes, TOTAL_ONLY)

    def _read_nvml(
        self, driver: Driver, ordinal: int, cuda_total_bytes: int
    ) -> MemoryReading | None:
        card = self._card(driver, ordinal)
        if card is None:
            return None
        memory = card_memory(card)
        if memory is None:
            return None
        total_bytes, free_bytes = memory
        if not card.is_exact:
            # Found by its slot: the whole card, even where we see only a slice of it.
            total_bytes = min(total_bytes, cuda_total_bytes)
        return MemoryReading(total_bytes, min(free_bytes, total_bytes), "nvml")


@contextmanager
def _unavailable(device: str) -> Iterator[None]:
    try:
        yield
    except CudaError as error:
        raise DeviceUnavailable(device, str(error)) from error


def _names(driver: Driver) -> tuple[str, ...]:
    return tuple(f"cuda:{ordinal}" for ordinal in range(driver.device_count))


def _find(device: str) -> tuple[Driver, int]:
    # At most nine digits, so that the number fits what the driver takes.
    match = re.fullmatch(r"cuda:([0-9]{1,9})", device)
    if match is None:
        raise DeviceUnavailable(
            device, "there is no such kind of device; use 'cpu' or for example 'cuda:0'"
        )
    driver = open_driver()
    if int(match[1]) >= driver.device_count:
        raise DeviceUnavailable(
            device,
            f"there is no such GPU; CUDA sees {', '.join(_names(driver)) or 'none'} "
            "(it counts only those that CUDA_VISIBLE_DEVICES lets through)",
        )
    return driver, int(match[1])
