"""
The one lock of a cache, and what happens when it is let go.

Whoever changes the state holds the lock, and notes effects. They are performed after it
was let go, by the thread that held it.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .effects import Effect

__all__ = ["StateLock"]


class StateLock:
    """
    The lock, the effects that were noted under it, and changes that could not wait.

    Args:
        perform: Performs effects, and tells the events so far. Called without the lock.
    """

    def __init__(self, perform: Callable[[list[Effect]], None]) -> None:
        self.perform: Callable[[list[Effect]], None] = perform
        # A hit takes it directly: a context manager in Python costs it 0.4 µs.
        self.mutex: threading.Lock = threading.Lock()
        self.noted: list[Effect] = []
        self.put_off: deque[Callable[[], None]] = deque()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """
        Holds the lock, then performs the effects that were noted.
        """
        effects: list[Effect] = []
        try:
            # What a signal handler raises between an acquire() and a try would leave
            # the lock taken for ever; a with statement lets it go.
            with self.mutex:
                try:
                    yield
                finally:
                    effects = self.take()
        finally:
            self.perform(effects)
            self.catch_up()

    def note(self, effect: Effect) -> None:
        """
        Notes an effect. Needs the lock.
        """
        self.noted.append(effect)

    def take(self) -> list[Effect]:
        """
        Returns the effects noted so far, to perform once the lock was let go.
        """
        effects, self.noted = self.noted, []
        return effects

    def later(self, change: Callable[[], None]) -> None:
        """
        Has *change* made by whoever lets go of the lock next, or by `catch_up`.

        For the garbage collector, which may run in a critical section of this thread.
        """
        self.put_off.append(change)

    def catch_up(self) -> None:
        """
        Makes the changes that were put off, unless somebody holds the lock, who will.
        """
        while self.put_off and self.mutex.acquire(blocking=False):
            try:
                while self.put_off:
                    self.put_off.popleft()()
                effects = self.take()
            finally:
                self.mutex.release()
            self.perform(effects)
