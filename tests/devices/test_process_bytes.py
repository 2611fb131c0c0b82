"""
What processes hold of a device, as far as somebody tells.
"""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from whispercache import DeviceUnavailable
from whispercache.devices.nvml import Card, process_bytes
from whispercache.devices.probe import SystemProbe

if TYPE_CHECKING:
    from collections.abc import Callable

# Larger than any process id.
NOBODY = 2**30


class NVMLError(Exception):
    """
    NVML's.
    """


def card(
    computing: list[tuple[int, int | None]] | None, drawing: list[tuple[int, int]]
) -> Card:
    """
    A card with processes on it; None where it does not tell.
    """
    nvml = ModuleType("nvml")

    def of(
        processes: list[tuple[int, int | None]] | None,
    ) -> Callable[[object], object]:
        def ask(handle: object) -> object:
            assert handle == "card"
            if processes is None:
                raise NVMLError
            return [SimpleNamespace(pid=p, usedGpuMemory=n) for p, n in processes]

        return ask

    vars(nvml).update(
        NVMLError=NVMLError,
        nvmlDeviceGetComputeRunningProcesses=of(computing),
        nvmlDeviceGetGraphicsRunningProcesses=of([*drawing]),
    )
    return Card(nvml, "card", is_exact=True)


def test_a_process_counts_once_whatever_it_does_there() -> None:
    """
    Others do not; who is not told of counts nothing.
    """
    assert process_bytes(card([(1, 10), (2, 20), (3, 30)], [(2, 20)]), {2, 3}) == 50
    assert process_bytes(card([(1, None)], [(2, 5)]), {1, 2}) == 5
    assert process_bytes(card(None, [(2, 5)]), {1, 2}) == 5
    assert process_bytes(card([], []), {1, 2}) == 0


def test_the_host_tells_of_every_process() -> None:
    """
    Of one that has ended, nothing is left.
    """
    probe = SystemProbe()
    own = probe.process_bytes("cpu", {os.getpid()})
    assert own > 1024**2
    assert probe.process_bytes("cpu", {os.getpid(), NOBODY}) >= own * 0.9
    assert probe.process_bytes("cpu", {NOBODY}) == 0


def test_there_is_nothing_to_tell_of_a_card_that_is_not_there() -> None:
    """
    That is an error, as of all questions about it.
    """
    with pytest.raises(DeviceUnavailable):
        SystemProbe().process_bytes("cuda:99", {1})
