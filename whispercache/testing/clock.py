"""
A clock that a test ticks.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeClock:
    """
    A clock that stands still until `tick`.
    """

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s
        # Reentrant: the garbage collector may end a lease in here, which sets a timer.
        self._lock = threading.RLock()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """
        Returns the seconds that were ticked so far.
        """
        return self._now_s

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        """
        Runs *call* within the `tick` that reaches *when_s*, even if that is now.
        """
        with self._lock:
            heapq.heappush(self._calls, (when_s, next(self._order), call))

    def tick(self, seconds: float = 0.0) -> None:
        """
        Lets *seconds* pass, and runs the calls that fall due, in order, on this thread.
        """
        until_s = self._now_s + seconds
        while True:
            with self._lock:
                if not self._calls or self._calls[0][0] > until_s:
                    self._now_s = until_s
                    return
                when_s, _, call = heapq.heappop(self._calls)
                self._now_s = max(self._now_s, when_s)
            # Without the lock: a call may set the next one.
            call()

    def close(self) -> None:
        """
        Forgets all calls.
        """
        with self._lock:
            self._calls.clear()
