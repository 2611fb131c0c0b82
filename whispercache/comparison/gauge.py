"""
A gauge of the growth of memory while a model is loaded and at work.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

from whispercache.devices import host
from whispercache.errors import DeviceUnavailable

if TYPE_CHECKING:
    from typing_extensions import Self

    from whispercache.devices.memory import MemoryProbe

LOOK_S = 0.01
"""
Seconds between two looks.

Source: a look at the host takes 0.03 ms, 0.3 % of that; the working memory of a window
of 30 s lives for tens of milliseconds even in the smallest model.
"""


class Gauge:
    """
    A gauge that reads the memory of a device every `LOOK_S`, on a thread of its own.

    A context manager; counts from what was in use when it was entered. On the host that
    is this process's own memory, on a card that of all programs.
    """

    def __init__(self, probe: MemoryProbe, device: str) -> None:
        self._probe = probe
        self._device = device
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._before_bytes: int | None = None
        self._peak_bytes: int | None = None
        self._thread = threading.Thread(target=self._watch, name="gauge", daemon=True)

    def __enter__(self) -> Self:
        if self._device == "cpu":
            # A model that moves into the heap's holes would seem to take nothing.
            gc.collect()
            host.return_free_memory()
        # Other programs' memory on a card counts as before, too.
        self._before_bytes = self._held_bytes()
        if self._before_bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def take_peak(self) -> int | None:
        """
        Returns the largest growth since the last call, in bytes, if it was measured.
        """
        self._look()
        with self._lock:
            # Each call has a peak of its own.
            peak_bytes, self._peak_bytes = self._peak_bytes, None
        return peak_bytes

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        held_bytes = self._held_bytes()
        if held_bytes is None or self._before_bytes is None:
            return
        grown_bytes = max(0, held_bytes - self._before_bytes)
        with self._lock:
            self._peak_bytes = max(grown_bytes, self._peak_bytes or 0)

    def _held_bytes(self) -> int | None:
        if self._device == "cpu":
            return host.anonymous_bytes()
        try:
            reading = self._probe.read(self._device)
        except DeviceUnavailable:
            return None
        return reading.total_bytes - reading.free_bytes
