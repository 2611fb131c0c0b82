"""
The requests that a server has seen: what is under way, and what was done lately.

The one place that knows the phases of a request. It is told what happens, and tells the
list for people, the log, and the traces. It holds no texts, names of files or keys.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Phase: TypeAlias = Literal[
    "arriving", "decoding", "waiting", "downloading", "loading", "working"
]
Outcome: TypeAlias = Literal["answered", "refused", "failed", "left"]

# While a request wants a model: the phases of which others may tell.
_WANTING = ("waiting", "downloading", "loading")

# Methods that only look.
LOOKING = ("GET", "HEAD", "OPTIONS")

# Number of requests that are remembered when they are over, and most of those under way
# that are listed.
LATELY = 100
MOST_LISTED = 200

# A status that nginx has for clients that hang up, for logs.
CLIENT_LEFT = 499

_REFUSED, _FAILED = 400, 500


@dataclass(frozen=True, slots=True)
class Spell:
    """
    A stretch of time in one phase; times as of the clock.
    """

    phase: Phase
    began_s: float
    ended_s: float


class SeenRequest:
    """
    One request, from its first byte to its last.

    Attributes:
        id: Its name in logs and answers.
        at_s: When it came, in seconds since 1970 (UTC).
        method: HTTP's.
        route: The path of the route that answers it, with names in braces; never what
            the client wrote. None where there is none.
        who: The name of its key.
        model: The served name of the model that it is for.
        audio_s: Seconds of its audio, once it is decoded.
        priority: As it was asked for, or its key has.
        status: HTTP's, once it is told.
        error: The code of the error that it ended with.
    """

    def __init__(self, seen: RequestsSeen, request_id: str, method: str) -> None:
        self._seen = seen
        self.id = request_id
        self.method = method
        self.at_s: float = seen.wall()
        self.route: str | None = None
        self.who: str | None = None
        self.model: str | None = None
        self.audio_s: float | None = None
        self.priority: str | None = None
        self.status: int | None = None
        self.error: str | None = None
        self.outcome: Outcome | None = None
        self._spells: list[Spell] = []
        # The phase it is in; None once it is over.
        self._phase: Phase | None = "arriving"
        self._since_s = self._began_s = seen.clock()

    @property
    def phase(self) -> Phase | None:
        """
        The phase that it is in; None once it is over.
        """
        return self._phase

    @property
    def is_over(self) -> bool:
        """
        True once it was answered, or its client has left.
        """
        return self._phase is None

    def admit(self, who: str | None = None) -> None:
        """
        Lists it, as one of the key that is called *who*, unless it only looks.
        """
        self.who = who
        if self.method not in LOOKING:
            self._seen.admit(self)

    def enter(self, phase: Phase) -> None:
        """
        Ends its phase, and begins the next one.
        """
        with self._seen.lock:
            self._turn(phase)

    def told(self, phase: Phase) -> None:
        """
        Does the same while it wants a model. Any thread may call it, at any time.
        """
        with self._seen.lock:
            if self._phase in _WANTING:
                self._turn(phase)

    def end(self, outcome: Outcome | None = None) -> None:
        """
        Ends it. Without an *outcome*, its status and its error tell that. A second call
        does nothing.
        """
        with self._seen.lock:
            if self._phase is None:
                return
            self._turn(None)
            self.outcome = outcome or self._by_status()
        self._seen.retire(self)

    def _by_status(self) -> Outcome:
        if self.status is None or self.status == CLIENT_LEFT:
            return "left"
        # An error in the middle of a stream comes after the status.
        if self.status >= _FAILED or (self.error and self.status < _REFUSED):
            return "failed"
        return "refused" if self.status >= _REFUSED else "answered"

    def _turn(self, phase: Phase | None) -> None:
        if self._phase is None or phase == self._phase:
            return
        now_s = self._seen.clock()
        self._spells.append(Spell(self._phase, self._since_s, now_s))
        self._phase, self._since_s = phase, now_s

    def spells(self) -> tuple[Spell, ...]:
        """
        Returns its phases so far, in their order.
        """
        with self._seen.lock:
            done = tuple(self._spells)
            if self._phase is None:
                return done
            return (*done, Spell(self._phase, self._since_s, self._seen.clock()))

    def seconds(self) -> dict[Phase, float]:
        """
        Returns the seconds that it spent in each phase so far; 0 in none.
        """
        sums: dict[Phase, float] = {}
        for spell in self.spells():
            spent_s = spell.ended_s - spell.began_s
            sums[spell.phase] = sums.get(spell.phase, 0.0) + spent_s
        return sums


class RequestsSeen:
    """
    The requests under way, and the last ones that are over. Safe to use from any
    thread.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        self.wall = wall
        # Reentrant: the garbage collector may end a lease in here, which makes events.
        self.lock: threading.RLock = threading.RLock()
        # In the order of their arrival; a dict, since a set has none.
        self._under_way: dict[SeenRequest, None] = {}
        self._lately: deque[SeenRequest] = deque(maxlen=LATELY)

    def begin(self, request_id: str, method: str) -> SeenRequest:
        """
        Returns a new request, which is not listed before it is admitted.
        """
        return SeenRequest(self, request_id, method)

    def admit(self, request: SeenRequest) -> None:
        """
        Lists a request that is not over.
        """
        with self.lock:
            if not request.is_over:
                self._under_way[request] = None

    def retire(self, request: SeenRequest) -> None:
        """
        Remembers a request that is over, if it was listed.
        """
        with self.lock:
            if request in self._under_way:
                del self._under_way[request]
                self._lately.appendleft(request)

    def under_way(self) -> tuple[SeenRequest, ...]:
        """
        Returns the requests under way, the oldest first.
        """
        with self.lock:
            return tuple(self._under_way)

    def lately(self) -> tuple[SeenRequest, ...]:
        """
        Returns the last requests that are over, the newest first.
        """
        with self.lock:
            return tuple(self._lately)


_CURRENT: ContextVar[SeenRequest | None] = ContextVar("whispercache_request")


def current() -> SeenRequest | None:
    """
    Returns the request that this task or thread works for, if any.
    """
    return _CURRENT.get(None)


@contextmanager
def following(request: SeenRequest) -> Iterator[None]:
    """
    Notes that this task, and all that it starts, works for *request* in a ``with``
    block.
    """
    token = _CURRENT.set(request)
    try:
        yield
    finally:
        _CURRENT.reset(token)


# Without a current request, as where parts are tested by themselves, nothing happens.


def admit(who: str | None) -> None:
    """
    Notes that the current request was let in, by the key that is called *who*.
    """
    if (request := current()) is not None:
        request.admit(who)


def wants(model: str) -> None:
    """
    Notes the served name of the model that the current request is for.
    """
    if (request := current()) is not None:
        request.model = model


def asks_for(priority: str) -> None:
    """
    Notes the priority that the current request asks for, or that its key has.
    """
    if (request := current()) is not None:
        request.priority = priority


def failed(code: str | None) -> None:
    """
    Notes the code of the error that the current request ends with.
    """
    if (request := current()) is not None:
        request.error = code


def enter(phase: Phase) -> None:
    """
    Begins a phase of the current request.
    """
    if (request := current()) is not None:
        request.enter(phase)


def teller(audio_s: float | None = None) -> Callable[[Phase], None]:
    """
    Notes that the current request waits for a model, for *audio_s* seconds of audio,
    and returns what to call with the phases until it has it.
    """
    request = current()
    if request is None:
        return lambda _phase: None
    request.audio_s = audio_s
    request.enter("waiting")
    return request.told
