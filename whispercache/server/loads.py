"""
Loads, for the requests that wait for them.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from whispercache.events import ModelLoaded, ModelLoadFailed, ModelLoading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from whispercache.events import Event
    from whispercache.keys import ModelKey

    from .engine import Phase


class Loads:
    """
    Tells requests when the load of their model begins and ends.

    Args:
        names_of: Returns the served names of a model.
    """

    def __init__(self, names_of: Callable[[ModelKey], Iterable[str]]) -> None:
        self._names_of = names_of
        # By an object of each request's own. Looked at and changed from any thread, in
        # single steps.
        self._waiting: dict[object, tuple[str, Callable[[Phase], None]]] = {}
        self._loading: dict[ModelKey, tuple[str, ...]] = {}

    @contextmanager
    def told(self, name: str, tell: Callable[[Phase], None]) -> Iterator[None]:
        """
        Has *tell* called with the phase of a request that waits for the model of that
        *name*, for the ``with`` block.
        """
        token = object()
        # First: a load that begins in between is told twice, and not never.
        self._waiting[token] = name, tell
        try:
            if any(name in names for names in list(self._loading.values())):
                tell("loading")
            yield
        finally:
            del self._waiting[token]

    def note(self, event: Event) -> None:
        """
        Takes an event of the cache.
        """
        if isinstance(event, ModelLoading):
            names = self._loading[event.key] = tuple(self._names_of(event.key))
            self._tell(names, "loading")
        elif isinstance(event, (ModelLoaded, ModelLoadFailed)):
            self._tell(self._loading.pop(event.key, ()), "waiting")

    def _tell(self, names: tuple[str, ...], phase: Phase) -> None:
        for name, tell in list(self._waiting.values()):
            if name in names:
                tell(phase)
