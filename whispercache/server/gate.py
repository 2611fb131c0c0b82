"""
The gate: how many requests are let in, and how those end that have not begun.

Who has the next turn with a model, and its memory, is for the cache to say. It refuses
nobody whose upload has been read; here a full queue is told before that is decoded.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from whispercache.errors import CacheClosed, TooManyWaiters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .engine import Phase


@dataclass(eq=False, slots=True)
class Visit:
    """
    A request that was let in.

    Attributes:
        has_begun: It is at work, and goes on whatever happens.
    """

    gate: Gate
    has_begun: bool = False
    _scope: anyio.CancelScope | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """
        Waits for a model in the ``with`` block, which ends by a CacheClosed if the gate
        is closed before `teller` was told that the work begins.
        """
        self.gate.check_open()
        with anyio.CancelScope() as self._scope:
            yield
        if self._scope.cancelled_caught:
            self.gate.check_open()

    def teller(self, tell: Callable[[Phase], None]) -> Callable[[Phase], None]:
        """
        Returns what passes the phases of its call on to *tell*.
        """

        def told(phase: Phase) -> None:
            # Other threads tell of others at the same time.
            if phase == "working":
                self.has_begun = True
            tell(phase)

        return told

    def refuse(self) -> None:
        """
        Ends its wait, unless that is over.
        """
        if self._scope is not None and not self.has_begun:
            self._scope.cancel()


class Gate:
    """
    A bound on the requests that are under way: so many for each model, which may be at
    work, and so many more for any of them. For the tasks of one event loop.
    """

    def __init__(self, parallel: int, max_waiting: int) -> None:
        self._parallel = parallel
        self._max_waiting = max_waiting
        # By model, from the end of their uploads to that of their answers.
        self._under_way: Counter[str] = Counter()
        self._visits: set[Visit] = set()
        self.is_closed: bool = False

    def let_in(self, parallel: int) -> None:
        """
        Admits that many requests at a time to each model from now on.
        """
        self._parallel = parallel

    @property
    def waiting(self) -> int:
        """
        The requests beyond those that may be at work.
        """
        return sum(max(0, n - self._parallel) for n in self._under_way.values())

    @contextmanager
    def visit(self, name: str) -> Iterator[Visit]:
        """
        Lets a request for the model of that *name* in, for the ``with`` block. Raises a
        TooManyWaiters, or a CacheClosed.
        """
        self.check_open()
        is_taken = self._under_way[name] >= self._parallel
        if is_taken and self.waiting >= self._max_waiting:
            raise TooManyWaiters(name, self.waiting)
        visit = Visit(self)
        self._visits.add(visit)
        self._under_way[name] += 1
        try:
            yield visit
        finally:
            self._under_way[name] -= 1
            self._visits.remove(visit)

    def check_open(self) -> None:
        """
        Raises a CacheClosed if the gate was closed.
        """
        if self.is_closed:
            raise CacheClosed("the server is shutting down")

    def close(self) -> None:
        """
        Refuses the requests that wait, and all that come. Those that have begun go on.
        """
        self.is_closed = True
        for visit in self._visits:
            visit.refuse()
