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
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from whispercache.errors import CacheClosed, LeaseTimeout, TooManyWaiters
from whispercache.events import WaitingInfo
from whispercache.keys import ModelKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Gate"]


class Gate:
    """
    A queue that admits a number of requests at a time to each model, in the order of
    their arrival, and a number of seconds of audio to all of them.

    For the tasks of one event loop.

    Args:
        parallel: Requests at a time, for each model.
        max_waiting: Limit of the requests that wait, for all models together.
        max_audio_s: Seconds of audio of all requests at work, which is in memory. One
            alone may bring more.
    """

    def __init__(self, parallel: int, max_waiting: int, max_audio_s: float) -> None:
        self._parallel = parallel
        self._max_waiting = max_waiting
        self._audio = _Audio(max_audio_s)
        self._models: dict[str, anyio.Semaphore] = {}
        # Requests that wait, in the order of their arrival, by the scope that ends
        # their wait.
        self._since_s: dict[anyio.CancelScope, tuple[str, float]] = {}
        self._is_closed = False

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        Returns the requests that wait, the oldest first.
        """
        now_s = time.monotonic()
        return tuple(
            # The device and the type are settled after the gate.
            WaitingInfo((ModelKey(name, "", ""),), now_s - since_s)
            for name, since_s in self._since_s.values()
        )

    @property
    def is_closed(self) -> bool:
        """
        True once it was closed.
        """
        return self._is_closed

    def close(self) -> None:
        """
        Refuses the requests that wait, and all that come.
        """
        self._is_closed = True
        for scope in self._since_s:
            # Each then sees that the gate is closed, and says so.
            scope.cancel()

    def check(self, name: str) -> None:
        """
        Refuses a request for the model of that *name* if too many wait already.

        Raises:
            TooManyWaiters: it is taken, and ``max_waiting`` others wait.
            CacheClosed: the gate was closed.
        """
        self._check_open()
        waiting = len(self._since_s)
        if waiting >= self._max_waiting and not self._turns(name).value:
            raise TooManyWaiters(name, waiting)

    def _turns(self, name: str) -> anyio.Semaphore:
        return self._models.setdefault(name, anyio.Semaphore(self._parallel))

    @asynccontextmanager
    async def turn(
        self, name: str, timeout_s: float, audio_s: float = 0.0
    ) -> AsyncIterator[float]:
        """
        Waits for a turn with the model of that *name* and *audio_s* seconds of audio,
        and holds it for the ``async with`` block; its value is the seconds left of
        *timeout_s*.

        Raises:
            TooManyWaiters: ``max_waiting`` others wait.
            LeaseTimeout: it did not come in time.
            CacheClosed: the gate was closed.
        """
        self.check(name)
        semaphore = self._turns(name)
        since_s = time.monotonic()
        # A request that need not wait is never counted as waiting.
        if not _enter_at_once(semaphore, self._audio, audio_s):
            await self._wait(semaphore, name, timeout_s, audio_s)
        try:
            yield max(0.0, timeout_s - (time.monotonic() - since_s))
        finally:
            # Also when the block failed, or was cancelled.
            self._audio.release(audio_s)
            semaphore.release()

    async def _wait(
        self, semaphore: anyio.Semaphore, name: str, timeout_s: float, audio_s: float
    ) -> None:
        waiting = len(self._since_s)
        if waiting >= self._max_waiting:
            raise TooManyWaiters(name, waiting)
        since_s = time.monotonic()
        with anyio.move_on_after(timeout_s) as scope:
            self._since_s[scope] = (name, since_s)
            try:
                await _enter(semaphore, self._audio, audio_s)
            finally:
                del self._since_s[scope]
        # By the deadline, or by close().
        if scope.cancelled_caught:
            self._check_open()
            same = [asked for asked, _ in self._since_s.values() if asked == name]
            raise LeaseTimeout(name, time.monotonic() - since_s, len(same) + 1)

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheClosed("the server is shutting down")


class _Audio:
    """
    A semaphore of seconds, first come, first served.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._used_s = 0.0
        self._users = 0
        # Held by the first that waits, so that a small request cannot pass a large one
        # for ever.
        self._first = asyncio.Lock()
        self._freed = asyncio.Event()

    def acquire_nowait(self, audio_s: float) -> bool:
        """
        Takes *audio_s* seconds, if they are free and no request waits for others.
        """
        # No overtaking.
        if self._first.locked() or not self._fits(audio_s):
            return False
        self._take(audio_s)
        return True

    async def acquire(self, audio_s: float) -> None:
        """
        Takes *audio_s* seconds, as soon as there are as many.
        """
        async with self._first:
            while not self._fits(audio_s):
                # Before the wait; there is no other task between the look and this.
                self._freed.clear()
                await self._freed.wait()
            self._take(audio_s)

    def release(self, audio_s: float) -> None:
        """
        Gives *audio_s* seconds back.
        """
        self._used_s -= audio_s
        self._users -= 1
        self._freed.set()

    def _fits(self, audio_s: float) -> bool:
        # A recording that is longer than the limit has its turn alone.
        return not self._users or self._used_s + audio_s <= self._most_s

    def _take(self, audio_s: float) -> None:
        self._used_s += audio_s
        self._users += 1


def _enter_at_once(semaphore: anyio.Semaphore, audio: _Audio, audio_s: float) -> bool:
    try:
        semaphore.acquire_nowait()
    except anyio.WouldBlock:
        return False
    if audio.acquire_nowait(audio_s):
        return True
    semaphore.release()
    return False


async def _enter(semaphore: anyio.Semaphore, audio: _Audio, audio_s: float) -> None:
    # First the turn: audio that waits for its model must not keep others' away.
    await semaphore.acquire()
    try:
        await audio.acquire(audio_s)
    except BaseException:
        semaphore.release()
        raise
