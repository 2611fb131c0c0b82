"""
Reminders: what is to be looked at, and when, the next one first.

A record is not withdrawn when its reason is gone. Whoever is reminded looks if there is
still something to do.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import Device
    from .entries import Entry

    # A request is told by its number, since one that was served must not be kept.
    Thing: TypeAlias = Device | Entry | int

MOST_NEEDLESS = 64
"""
Needless records that are always kept, since to sort them out is not worth it.
"""


class Reminders:
    """
    Requests that time out, models that expire, and gauges and unloads to try again.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Thing]] = []
        self._serials = itertools.count()
        self._needless = 0

    @property
    def next_s(self) -> float:
        """
        The time of the next one.
        """
        return self._heap[0][0] if self._heap else math.inf

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at_s: float, thing: Thing) -> None:
        """
        Notes that *thing* is to be looked at then.
        """
        heapq.heappush(self._heap, (at_s, next(self._serials), thing))

    def due(self, now_s: float) -> list[Thing]:
        """
        Returns what is to be looked at by now, and forgets it.
        """
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            found.append(heapq.heappop(self._heap)[2])
        return found

    def needless(self, is_needed: Callable[[Thing], bool]) -> None:
        """
        Notes that one record more has lost its reason; once most have, they are sorted
        out, or those of requests that were served would stay until these had timed out.
        """
        self._needless += 1
        if self._needless > max(MOST_NEEDLESS, len(self._heap) / 2):
            self._heap = [each for each in self._heap if is_needed(each[2])]
            heapq.heapify(self._heap)
            self._needless = 0
