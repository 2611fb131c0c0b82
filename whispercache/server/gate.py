"""
The queue of requests for a turn with a model.

A model computes one call after the other, and a call cannot be stopped. Requests hence
wait here, where they can still be refused, and where waiting takes no memory and no
thread. The cache sees only those whose turn it is: it shares a model between any number
of leases, and has no bound for the calls on one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from whispercache.errors import CacheClosed, LeaseTimeout, TooManyWaiters
from whispercache.events import WaitingInfo
from whispercache.keys import ModelKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass(eq=False, slots=True)
class _Request:
    """
    A request for a turn; *settled* once its wait is over, with a turn or without.
    """

    name: str
    audio_s: float
    since_s: float = field(default_factory=time.monotonic)
    has_turn: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.since_s


class Gate:
    """
    A queue that admits a number of requests at a time to each model, in the order of
    their arrival, and a number of seconds of audio to all of them, which is in memory.
    One alone may bring more.

    For the tasks of one event loop.
    """

    def __init__(self, parallel: int, max_waiting: int, max_audio_s: float) -> None:
        self._parallel = parallel
        self._max_waiting = max_waiting
        self._max_audio_s = max_audio_s
        # What works: the number of requests by model, and the audio of all.
        self._working: Counter[str] = Counter()
        self._audio_s = 0.0
        self._queue: list[_Request] = []
        self.is_closed: bool = False

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        Returns the requests that wait, the oldest first.
        """
        return tuple(
            # The device and the type are settled after the gate.
            WaitingInfo((ModelKey(request.name, "", ""),), request.waited_s)
            for request in self._queue
        )

    def close(self) -> None:
        """
        Refuses the requests that wait, and all that come.
        """
        self.is_closed = True
        for request in self._queue:
            request.settled.set()

    def check(self, name: str) -> None:
        """
        Refuses a request for the model of that *name* if too many wait already, by a
        TooManyWaiters, or if the gate was closed.
        """
        self._check_open()
        is_taken = self._working[name] >= self._parallel
        if is_taken and len(self._queue) >= self._max_waiting:
            raise TooManyWaiters(name, len(self._queue))

    @asynccontextmanager
    async def turn(
        self, name: str, timeout_s: float, audio_s: float = 0.0
    ) -> AsyncIterator[float]:
        """
        Waits for a turn with the model of that *name* and *audio_s* seconds of audio,
        and holds it for the ``async with`` block; its value is the seconds left of
        *timeout_s*. Raises what `check` does, or a LeaseTimeout.
        """
        self.check(name)
        request = _Request(name, audio_s)
        self._queue.append(request)
        try:
            self._admit()
            if not request.has_turn and len(self._queue) > self._max_waiting:
                raise TooManyWaiters(name, len(self._queue) - 1)
            if not request.has_turn:
                with anyio.move_on_after(timeout_s):
                    await request.settled.wait()
            if not request.has_turn:
                self._check_open()
                same = [each for each in self._queue if each.name == name]
                raise LeaseTimeout(name, request.waited_s, same.index(request) + 1)
            yield max(0.0, timeout_s - request.waited_s)
        finally:
            if request.has_turn:
                self._working[name] -= 1
                self._audio_s -= audio_s
            else:
                self._queue.remove(request)
            if not self.is_closed:
                self._admit()

    def _check_open(self) -> None:
        if self.is_closed:
            raise CacheClosed("the server is shutting down")

    def _admit(self) -> None:
        """
        Gives turns to requests, in their order, as far as models and audio allow.
        """
        for request in tuple(self._queue):
            # Those for other models may pass.
            if self._working[request.name] >= self._parallel:
                continue
            # But none takes the audio for which this one waits, or a long recording
            # would wait for ever. One that is longer than the limit goes alone.
            audio_s = self._audio_s + request.audio_s
            if self._working.total() and audio_s > self._max_audio_s:
                break
            self._queue.remove(request)
            self._working[request.name] += 1
            self._audio_s = audio_s
            request.has_turn = True
            request.settled.set()
