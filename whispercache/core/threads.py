"""
Time and threads: a clock with one timer thread, and a permanent thread per device.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("whispercache")

T = TypeVar("T")

_TURNS = 100
"""
How often `take_turn` lets others go first: about 100 µs.
"""


class _Life:
    """
    An object that lives as long as its thread. Unlike a thread's number, it is never
    used again.
    """

    __slots__ = ("__weakref__",)


class _Here(threading.local):
    def __init__(self) -> None:
        self.life: _Life = _Life()
        self.owner: weakref.ref[_Life] = token_of(self.life)


def token_of(life: T) -> weakref.ref[T]:
    """
    Returns a reference that does not keep *life* alive, and differs from all others
    even after its end.
    """
    token = weakref.ref(life)
    # Computed while there is a referent, and remembered from then on.
    hash(token)
    return token


here: _Here = _Here()


def caller() -> str:
    """
    Returns file and line outside this package from which it was called.
    """
    from pathlib import Path

    package = str(Path(__file__).parents[1])
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def current_owner() -> object:
    """
    Returns a token of the calling thread, as the owner of leases.
    """
    return here.owner


def current_owners() -> tuple[object, ...]:
    """
    Returns tokens of the calling thread, and of the asyncio task that it runs, if any.
    """
    # Where there are tasks it was imported; other programs should not pay for that.
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return (current_owner(),)
    # A task may hold leases of its own while others run on the same thread.
    task = asyncio.current_task()
    return (current_owner(),) if task is None else (current_owner(), token_of(task))


def has_ended(owner: object) -> bool:
    """
    Returns True if the thread or task of a token is over, so that it ends no lease any
    more.
    """
    if not isinstance(owner, weakref.ref):
        return False  # handed over, so its owner is not known
    life = owner()
    return life is None or (not isinstance(life, _Life) and life.done())


def take_turn(lock: threading.Lock) -> None:
    """
    Yields the interpreter until a lock that is held for microseconds is free.

    Its holder most likely waits for the interpreter, which this thread has. Blocking on
    the lock releases the interpreter too, but then every later acquisition would switch
    threads as well. So it is yielded first, and the caller blocks only if the lock
    stays held. It is not acquired here: what a signal handler raises between that and a
    ``with`` would leave it taken for ever.

    Source: benchmarks/hit_path.py; 16 threads: 20 µs a hit without, 4 to 6 with this.
    """
    for _ in range(_TURNS):
        time.sleep(0)
        if not lock.locked():
            return


class Clock(Protocol):
    """
    A source of monotonic seconds, and of calls at a later time.
    """

    def now(self) -> float:
        """
        Returns seconds since an arbitrary start.
        """

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        """
        Runs *call* once, on any thread, when `now` has reached *when_s*.

        There is no way to cancel: a call finds out for itself if it still matters.
        """

    def close(self) -> None:
        """
        Forgets all calls that are due later, and stops.
        """


class MonotonicClock:
    """
    The real clock. Its timer thread starts with the first `call_at`.
    """

    def __init__(self) -> None:
        self.now: Callable[[], float] = time.monotonic
        self._changed = threading.Condition()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        """
        Runs *call* on the timer thread at *when_s*.
        """
        with self._changed:
            # The cache has ended; what is due later has nothing left to do.
            if self._closed:
                return
            heapq.heappush(self._calls, (when_s, next(self._order), call))
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, name="whispercache-timer", daemon=True
                )
                thread.start()
                self._thread = thread  # after it: the next call tries again
            self._changed.notify()

    def close(self) -> None:
        """
        Forgets all calls, and ends the timer thread.
        """
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            # Even what sys.exit() raises in a listener: other calls need this thread.
            except BaseException:
                _log.exception("a timed call failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                if not self._calls:
                    self._changed.wait()
                elif (due_in_s := self._calls[0][0] - self.now()) > 0:
                    self._changed.wait(min(due_in_s, threading.TIMEOUT_MAX))
                else:
                    return heapq.heappop(self._calls)[2]
        return None


class DeviceThread:
    """
    The one thread that builds, loads and unloads models on a device.

    CTranslate2 keeps allocators, streams and thread counts per thread, so a model must
    be freed by the thread that made it, and that thread must outlive it.
    """

    def __init__(self, device: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon, so that a cache that was not closed cannot keep the process alive.
        self._thread = threading.Thread(
            target=self._run, name=f"whispercache-{device}", daemon=True
        )
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """
        Runs *call* after all earlier ones.
        """
        self._calls.put(call)

    def is_current(self) -> bool:
        """
        Returns True if this is called by that very thread.
        """
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """
        Ends the thread after all earlier calls.
        """
        self._calls.put(None)

    def join(self, timeout_s: float | None) -> None:
        """
        Waits for the end of the thread; returns at once if this is that thread.
        """
        if not self.is_current():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException:  # as above
                _log.exception("work on %s failed", self._thread.name)
            # Or it would be held until the next call, and with it the model it handled.
            del call
