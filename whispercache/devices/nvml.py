"""
NVML through nvidia-ml-py: the free memory of a card, among all processes.

NVML needs no CUDA context and sees all processes. Nothing is imported or initialised
before the first question. Where NVML cannot tell, the answer is None.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from .cuda import CudaError

if TYPE_CHECKING:
    from collections.abc import Collection

    from .cuda import Driver


class Card(NamedTuple):
    """
    A GPU as NVML knows it, and whether it is surely the one that CUDA means.
    """

    nvml: ModuleType
    handle: object
    is_exact: bool


def find_card(driver: Driver, ordinal: int) -> Card | None:
    """
    Returns NVML's handle of the GPU that CUDA calls *ordinal*, or None.

    The two count GPUs differently, so they are matched by UUID. Its prefix tells a card
    from a slice of one, and NVML wants it exact. Where UUIDs fail (WSL2) the PCI slot
    is used.
    """
    nvml = _nvml()
    if not isinstance(nvml, ModuleType):
        return None
    by_uuid = nvml.nvmlDeviceGetHandleByUUID
    by_slot = nvml.nvmlDeviceGetHandleByPciBusId
    # A whole card goes by the first of these names, a slice by the second.
    for lookup, prefix, name_of in (
        (by_uuid, "GPU-", driver.uuid),
        (by_uuid, "MIG-", driver.uuid),
        (by_slot, "", driver.pci_bus_id),
    ):
        with contextlib.suppress(CudaError, nvml.NVMLError):
            handle = lookup(prefix + name_of(ordinal))
            return Card(nvml, handle, is_exact=lookup is by_uuid)
    return None


def card_memory(card: Card) -> tuple[int, int] | None:
    """
    Returns total and free bytes, or None where NVML does not support the question.

    Raises:
        CudaError: The card is gone, so that no other source could be trusted.
    """
    nvml = card.nvml
    try:
        # The first version of the structure: of the second it is unclear whether bytes
        # that the driver reserves for itself count as used.
        memory = nvml.nvmlDeviceGetMemoryInfo(card.handle)
    except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_ResetRequired) as error:
        raise CudaError(
            f"NVML says {error}; reset the card or restart the machine"
        ) from error
    except nvml.NVMLError:
        return None
    return int(memory.total), int(memory.free)


def process_bytes(card: Card, pids: Collection[int]) -> int:
    """
    Returns the bytes of a card that some processes hold, their contexts included; as
    far as NVML tells, which knows process ids of the host alone.
    """
    nvml = card.nvml
    held: dict[int, int] = {}
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        with contextlib.suppress(nvml.NVMLError):
            for each in ask(card.handle):
                # One that does both is in both lists, with the same bytes.
                held[each.pid] = each.usedGpuMemory or 0
    return sum(n_bytes for pid, n_bytes in held.items() if pid in pids)


def driver_version() -> str | None:
    """
    Returns the NVIDIA driver's version, such as ``"580.95.05"``; None if unknown.
    """
    nvml = _nvml()
    if not isinstance(nvml, ModuleType):
        return None
    try:
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return None


def common_name() -> str | None:
    """
    Returns the name of the GPUs of this machine if all have the same; None if they do
    not, or NVML cannot tell. CUDA, which counts them otherwise, is not started.
    """
    nvml = _nvml()
    if not isinstance(nvml, ModuleType):
        return None
    try:
        ordinals = range(nvml.nvmlDeviceGetCount())
        handles = map(nvml.nvmlDeviceGetHandleByIndex, ordinals)
        names = {str(nvml.nvmlDeviceGetName(handle)) for handle in handles}
    except nvml.NVMLError:
        return None
    return names.pop() if len(names) == 1 else None


def nvml_problem() -> str | None:
    """
    Returns why NVML cannot be used here, in one line; None if it can.
    """
    nvml = _nvml()
    return nvml if isinstance(nvml, str) else None


_starting = threading.Lock()


def _nvml() -> ModuleType | str:
    """
    Returns the binding with NVML initialised, or why it cannot be used.

    NVML stays initialised for the rest of the process: starting it takes milliseconds,
    a reading some 10 µs.
    """
    # The cache of a function does not keep two threads from running it at once.
    with _starting:
        return _start()


@functools.cache
def _start() -> ModuleType | str:
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return "nvidia-ml-py is missing: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML cannot be used: {error}"
    # An untyped module is Any to mypy.
    module: ModuleType = pynvml
    return module
