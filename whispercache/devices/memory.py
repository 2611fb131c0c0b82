"""
Memory of devices as the cache sees it: a reading, a probe that takes it, a headroom.

`MemoryProbe` is the seam between the cache and the hardware. `probe.SystemProbe` is the
real one, `whispercache.testing.FakeMachine` the one for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

_MIB = 1024**2

# Source of a reading that measured nothing but the size of the device. Sources are text
# for people; this one is compared with, too. Such a reading must not be compared with a
# later one: memory that others held all the time would look like memory that was taken
# in between.
TOTAL_ONLY = "cuda driver (total only)"

# Bytes of a GPU that are never planned with: this process's context, kernels and
# handles.
# Source: 200 to 312 MiB stay until the process ends (SYSTRAN/faster-whisper#680, #992);
# the rest is for fragments and for neighbours that grow a little.
CUDA_HEADROOM_BYTES = 512 * _MIB

# The least headroom of a GPU, once the context is there and has been measured.
# Source: a choice; a growing neighbour, and cuBLAS handles of 8 to 32 MiB for each
# model.
CUDA_HEADROOM_MIN_BYTES = 128 * _MIB

# Share of the host's memory that is never planned with, and its bounds.
# Source: a choice, not a measurement. Other programs need some memory however small the
# machine is, and a share that kept growing above 40 GiB would only be wasted.
HOST_HEADROOM_FRACTION = 0.05
HOST_HEADROOM_MIN_BYTES = 256 * _MIB
HOST_HEADROOM_MAX_BYTES = 2048 * _MIB


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """
    A device's memory at one moment. Other processes move ``free_bytes`` at any time.

    Attributes:
        total_bytes: All that programs could use, or the control group's limit.
        free_bytes: What could be taken now.
        source: ``"nvml"``, ``"cuda driver"``, ``"psutil"``, ``"cgroup"``, or
            `TOTAL_ONLY` where the memory that others hold is not known.
    """

    total_bytes: int
    free_bytes: int
    source: str


class MemoryProbe(Protocol):
    """
    The devices of a machine, and their memory. Called from any thread.

    All but `cuda_devices` raise `DeviceUnavailable` where there is no such device, or
    no driver for it.
    """

    def cuda_devices(self) -> tuple[str, ...]:
        """
        Returns the usable GPUs, ``"cuda:0"`` first; none without a working driver.
        """

    def read(self, device: str) -> MemoryReading:
        """
        Reads the memory of *device*, ``"cpu"`` or for example ``"cuda:0"``, now.
        """

    def device_name(self, device: str) -> str:
        """
        Returns the name of the hardware. Equal names have equal footprints.
        """

    def device_id(self, device: str) -> str:
        """
        Returns the same id in every process of this machine, however it counts GPUs.
        """


def headroom_bytes(device: str, total_bytes: int, floor_bytes: int = 0) -> int:
    """
    Returns the bytes of *device* that must stay free of models.

    Args:
        device: ``"cpu"`` or ``"cuda:N"``.
        total_bytes: All memory of the device.
        floor_bytes: What this process is known to hold of it for life. The gauge no
            longer shows that as free, so the headroom need not hold room for it.
    """
    # A GPU's is a fixed sum: contexts and handles do not grow with the card.
    if device != "cpu":
        return max(CUDA_HEADROOM_BYTES - floor_bytes, CUDA_HEADROOM_MIN_BYTES)
    # The host's is a share, for the programs beside this one.
    share_bytes = int(total_bytes * HOST_HEADROOM_FRACTION)
    return min(max(share_bytes, HOST_HEADROOM_MIN_BYTES), HOST_HEADROOM_MAX_BYTES)
