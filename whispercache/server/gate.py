"""
Gate: whose turn it is with a model.

A model computes one call after the other, and a call cannot be stopped. Requests hence
wait here, where they can still be told to go, and where waiting takes no memory and no
thread; the cache sees those who are next.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from whispercache.errors import CacheClosed, LeaseTimeout, TooManyWaiters
from whispercache.live import LiveRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Gate"]


class Gate:
    """
    Lets so many requests at a time to each model, in the order in which they came.

    For the tasks of one event loop.

    Args:
        parallel: Requests at a time, for each model.
        max_waiting: So many wait, for all models together.
    """

    def __init__(self, parallel: int, max_waiting: int) -> None:
        self._parallel = parallel
        self._max_waiting = max_waiting
        self._models: dict[str, anyio.Semaphore] = {}
        self._since_s: dict[anyio.CancelScope, tuple[str, float]] = {}
        self._is_closed = False

    def waiting(self) -> tuple[LiveRequest, ...]:
        """
        Who waits, the oldest first.
        """
        now_s = time.monotonic()
        return tuple(
            LiveRequest((name,), now_s - since_s)
            for name, since_s in self._since_s.values()
        )

    def close(self) -> None:
        """
        Send those away who wait, and all who come.
        """
        self._is_closed = True
        for scope in self._since_s:
            scope.cancel()

    @asynccontextmanager
    async def turn(self, name: str, timeout_s: float) -> AsyncIterator[float]:
        """
        Have one's turn with the model of that *name* in an ``async with`` block, whose
        value are the seconds left of *timeout_s*.

        Raises:
            TooManyWaiters: ``max_waiting`` others wait.
            LeaseTimeout: it did not come in time.
            CacheClosed: the gate was closed.
        """
        self._check_open()
        semaphore = self._models.setdefault(name, anyio.Semaphore(self._parallel))
        since_s = time.monotonic()
        try:
            semaphore.acquire_nowait()
        except anyio.WouldBlock:
            await self._wait(semaphore, name, timeout_s)
        try:
            yield max(0.0, timeout_s - (time.monotonic() - since_s))
        finally:
            semaphore.release()

    async def _wait(
        self, semaphore: anyio.Semaphore, name: str, timeout_s: float
    ) -> None:
        waiting = len(self._since_s)
        if waiting >= self._max_waiting:
            raise TooManyWaiters(name, waiting)
        since_s = time.monotonic()
        with anyio.move_on_after(timeout_s) as scope:
            self._since_s[scope] = (name, since_s)
            try:
                await semaphore.acquire()
            finally:
                del self._since_s[scope]
        if scope.cancelled_caught:
            self._check_open()
            same = [asked for asked, _ in self._since_s.values() if asked == name]
            raise LeaseTimeout(name, time.monotonic() - since_s, len(same) + 1)

    def _check_open(self) -> None:
        if self._is_closed:
            raise CacheClosed("the server is shutting down")
