"""
Calls over calls: one that holds a lease, which those that it makes on a view go to.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

from whispercache.results import is_lazy

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from whispercache.engine.api import LoadedModel
    from whispercache.lease import Lease


class Call:
    """
    A call that holds a lease over all its inner calls.

    Attributes:
        lease: The lease.
        loaded: Its model. This object is gone before the lease ends.
        extractor: The call's own feature extractor, once it was taken;
        made_of: a copy of this one, or of the model's if None.
    """

    __slots__ = ("extractor", "lease", "loaded", "made_of")

    def __init__(self, lease: Lease) -> None:
        self.lease: Lease = lease
        self.loaded: LoadedModel = lease.loaded
        self.extractor: object = None
        self.made_of: object = None

    def take(self, extractor: object) -> None:
        """
        Takes a copy of a feature extractor, of the model's if None: faster-whisper
        keeps the ``chunk_length`` of a call in it.
        """
        theirs: Any = self.loaded.whisper
        whole = theirs.feature_extractor if extractor is None else extractor
        self.extractor, self.made_of = copy.copy(whole), extractor


class BatchCall(Call):
    """
    A call whose model may be taken away between two segments, and waited for again.
    """

    __slots__ = ("_loaded", "_refill")

    @property
    def loaded(self) -> LoadedModel:
        """
        Its model. Waits for it if it was given back for a while.
        """
        if self._loaded is None and self._refill is not None:
            self._refill()
        assert self._loaded is not None
        return self._loaded

    @loaded.setter
    def loaded(self, loaded: LoadedModel) -> None:
        self._loaded: LoadedModel | None = loaded
        self._refill: Callable[[], None] | None = None

    def empty(self, refill: Callable[[], None]) -> None:
        """
        Takes the model away; see `results.Seat`.
        """
        self._loaded, self._refill = None, refill


class Here(threading.local):
    """
    A place where each thread has a value of its own.

    Attributes:
        call: The call that this thread is in, if there is one.
    """

    call: Call | None = None


class Bound:
    """
    A call of a function whose own calls on a view go to a lease that is held, in the
    steps of its lazy result too. Each step may be on another thread.
    """

    __slots__ = (
        *("_audio", "_call", "_function", "_here", "_lease", "_options"),
        "kind",
    )

    def __init__(
        self,
        here: Here,
        lease: Lease,
        function: Callable[..., object],
        audio: object,
        options: Mapping[str, object],
    ) -> None:
        self._here = here
        self._lease = lease
        self._function = function
        self._audio = audio
        self._options = options
        self.kind: type[Call] = Call
        # That of a lazy result, once it has begun.
        self._call: Call | None = None

    def empty(self, refill: Callable[[], None]) -> None:
        """
        Takes the model away; see `results.Seat`.
        """
        if isinstance(self._call, BatchCall):
            self._call.empty(refill)

    def put(self, lease: Lease) -> None:
        """
        Puts the model of another lease here.
        """
        self._lease = lease
        if self._call is not None:
            self._call.lease, self._call.loaded = lease, lease.loaded

    def __call__(self) -> object:
        """
        Makes the call.
        """
        call, here = self.kind(self._lease), self._here
        before, here.call = here.call, call
        try:
            result = self._function(self._audio, **self._options)
        finally:
            here.call = before
        if isinstance(result, tuple):
            if result and is_lazy(result[0]):
                self._call = call
                return (self._steps(call, result[0]), *result[1:])
        elif is_lazy(result):
            self._call = call
            return self._steps(call, result)
        return result

    def _steps(
        self, call: Call, items: Iterator[object]
    ) -> Generator[object, None, None]:
        here = self._here
        try:
            while True:
                before, here.call = here.call, call
                try:
                    item = next(items)
                except StopIteration:
                    return
                finally:
                    here.call = before
                yield item
        finally:
            # Iterators of a program's own may have no close().
            close = getattr(items, "close", None)
            if close is not None:
                close()
