"""
Drivers: one way to call a cache for tests, be it from threads or from tasks.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from whispercache import AsyncModelCache
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache import Lease, ModelCache

__all__ = ["DRIVERS", "Driver", "TaskDriver", "ThreadDriver", "wait_waiting"]

PATIENCE_S = 30.0


class Driver(Protocol):
    """
    Calls the methods of a cache by name; each on a thread or a task of its own.
    """

    def start(
        self, cache: ModelCache, word: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        Begin a call; the future tells how it ends.
        """

    def close(self) -> None:
        """
        End what carries the calls.
        """

    def call(
        self, cache: ModelCache, word: str, *args: object, **options: object
    ) -> Any:
        """
        Call, and wait for the end.
        """
        return self.start(cache, word, *args, **options).result(PATIENCE_S)

    def start_on(
        self, thing: object, method: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        Begin to call a method of a model, or of its segments.
        """

    def call_on(
        self, thing: object, method: str, *args: object, **options: object
    ) -> Any:
        """
        Call a method, and wait for the end.
        """
        return self.start_on(thing, method, *args, **options).result(PATIENCE_S)

    def lease(self, cache: ModelCache, *args: object, **options: object) -> Lease:
        """
        Call ``lease``, and wait for it.
        """
        lease: Lease = self.call(cache, "lease", *args, **options)
        return lease

    def waiting(self, cache: ModelCache, *args: object, **options: object) -> Any:
        """
        Begin to ask for a lease, and wait until that waits in the queue.
        """
        before = cache.stats().waiting
        future = self.start(cache, "lease", *args, **options)
        wait_until(lambda: cache.stats().waiting > before or future.done(), "a waiter")
        return future


class ThreadDriver(Driver):
    """
    Calls a `ModelCache`, each call on a thread of its own.
    """

    def start(
        self, cache: ModelCache, word: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        See `Driver`.
        """
        return self.start_on(cache, word, *args, **options)

    def start_on(
        self, thing: object, method: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        See `Driver`.
        """
        future: Future[Any] = Future()
        call = getattr(thing, method)

        def run() -> None:
            try:
                future.set_result(call(*args, **options))
            except BaseException as error:  # noqa: BLE001 - the future tells it
                future.set_exception(error)

        self._begin(run)
        return future

    def _begin(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        """
        See `Driver`.
        """


class TaskDriver(Driver):
    """
    Calls an `AsyncModelCache` over the same core, each call in a task of its own.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def start(
        self, cache: ModelCache, word: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        See `Driver`.
        """
        return self.start_on(AsyncModelCache(cache), word, *args, **options)

    def start_on(
        self, thing: object, method: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        See `Driver`.
        """
        call: Callable[..., Any] = getattr(thing, method)

        async def run() -> Any:
            result = call(*args, **options)
            return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop)

    def close(self) -> None:
        """
        See `Driver`.
        """
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()


DRIVERS: dict[str, type[ThreadDriver | TaskDriver]] = {
    "threads": ThreadDriver,
    "tasks": TaskDriver,
}


def wait_waiting(cache: ModelCache, count: int) -> None:
    """
    Block until *count* requests wait.
    """
    wait_until(lambda: cache.stats().waiting == count, f"{count} waiting")
