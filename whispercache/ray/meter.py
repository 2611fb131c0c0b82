"""
What a replica measures of its own calls, for the router and for scaling.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from math import exp
from typing import TYPE_CHECKING

from whispercache.planning.routing import CALL_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The share of a new call in the average.
_NEW = 0.1

WINDOW_S = 60.0
"""
Seconds after which what was measured for scaling has faded to a third.
"""


class Meter:
    """
    Measures the calls of a replica. For the tasks of one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.call_s: float = CALL_S
        self.calls_s: dict[str, float] = {}
        self._calls = 0
        self._since_s = clock()
        # Seconds of work of a call that has been there all the time: its share of them.
        self._share_s = 0.0
        self._faded_s = clock()
        self._waited_s = self._worked_s = 0.0

    @contextmanager
    def working(self, model: str) -> Iterator[None]:
        """
        Measures a call on *model*, the ``with`` block. `call_s` is the replica's
        seconds for each, and `calls_s` those by model: calls that work side by side
        share the seconds.
        """
        began_s, share_s = self._tick(), self._share_s
        self._calls += 1
        try:
            yield
        finally:
            ended_s = self._tick()
            self._calls -= 1
            took_s = self._share_s - share_s
            self.call_s += _NEW * (took_s - self.call_s)
            usual_s = self.calls_s.get(model, took_s)
            self.calls_s[model] = usual_s + _NEW * (took_s - usual_s)
            self._fade()
            self._worked_s += ended_s - began_s

    def waited(self, seconds: float) -> None:
        """
        Notes that a request waited for its turn and its model before it began.
        """
        self._fade()
        self._waited_s += seconds

    @property
    def lost_share(self) -> float:
        """
        The share of their time that requests of late have waited, loads included.
        """
        self._fade()
        total_s = self._waited_s + self._worked_s
        # A second in all is too little to tell.
        return self._waited_s / max(total_s, 1.0)

    @property
    def busy_share(self) -> float:
        """
        About how many calls at once there were of late.
        """
        self._fade()
        return self._worked_s / WINDOW_S

    def _tick(self) -> float:
        now_s = self._clock()
        if self._calls:
            self._share_s += (now_s - self._since_s) / self._calls
        self._since_s = now_s
        return now_s

    def _fade(self) -> None:
        now_s = self._clock()
        left = exp((self._faded_s - now_s) / WINDOW_S)
        self._waited_s *= left
        self._worked_s *= left
        self._faded_s = now_s
