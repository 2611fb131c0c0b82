"""
The queue of requests for a turn with a model.

A model computes one call after the other, and a call can only be stopped between two
segments. Requests hence wait here, where they can still be refused, and where waiting
takes no memory and no thread. The cache sees only those whose turn it is: it shares a
model between any number of leases, and has no bound for the calls on one.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from bisect import insort
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from whispercache.errors import CacheClosed, LeaseTimeout, TooManyWaiters
from whispercache.events import WaitingInfo
from whispercache.keys import ModelKey
from whispercache.options import PATIENCE_S
from whispercache.planning.priority import INTERACTIVE, turn_s

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from faster_whisper.transcribe import Segment
    from typing_extensions import Self

    from .engine import Segments


@dataclass(eq=False, slots=True)
class Turn:
    """
    A turn with a model, had or waited for; *settled* once the wait is over, with a turn
    or without.

    Attributes:
        name: The model.
        audio_s: Seconds of its audio.
        level: Its priority.
        place: Its place in the queue, see `whispercache.planning.priority`.
        left_s: Seconds that are left to wait for the model.
        has_audio: Its audio is in memory.
        has_turn: It is its turn.
        firm_until_s: Until then it is not given up for others: it was waited for long.
    """

    gate: Gate
    name: str
    audio_s: float
    level: float
    place: tuple[float, int]
    since_s: float
    left_s: float = 0.0
    has_audio: bool = False
    has_turn: bool = False
    firm_until_s: float = -math.inf
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waited_s(self) -> float:
        """
        Seconds since it was asked for.
        """
        return time.monotonic() - self.since_s

    async def give_way(self) -> None:
        """
        Gives the turn up if one of a higher priority waits for it, and waits for
        another. To be called between two segments.
        """
        await self.gate.give_way(self)


class Gate:
    """
    A queue that admits a number of requests at a time to each model, in the order of
    their priority and arrival, and a number of seconds of audio to all of them, which
    is in memory. One alone may bring more.

    For the tasks of one event loop.
    """

    def __init__(self, parallel: int, max_waiting: int, max_audio_s: float) -> None:
        self._parallel = parallel
        self._max_waiting = max_waiting
        self._max_audio_s = max_audio_s
        # What works: the number of requests by model, and the audio of all.
        self._working: Counter[str] = Counter()
        self._audio_s = 0.0
        self._queue: list[Turn] = []
        self._numbers = itertools.count()
        self.is_closed: bool = False

    def let_in(self, parallel: int) -> None:
        """
        Admits that many requests at a time to each model from now on.
        """
        self._parallel = parallel
        self._admit()

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        Returns the requests that wait, in the order of their turns.
        """
        return tuple(
            # The device and the type are settled after the gate.
            WaitingInfo((ModelKey(turn.name, "", ""),), turn.waited_s, turn.level)
            for turn in self._queue
        )

    def close(self) -> None:
        """
        Refuses the requests that wait, and all that come. Those that have begun go on.
        """
        self.is_closed = True
        for turn in tuple(self._queue):
            if turn.has_audio:
                self._begin(turn)
            turn.settled.set()

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
        self,
        name: str,
        timeout_s: float,
        audio_s: float = 0.0,
        level: float = INTERACTIVE,
    ) -> AsyncIterator[Turn]:
        """
        Waits for a turn with the model of that *name* and *audio_s* seconds of audio,
        and holds it for the ``async with`` block; its value has the seconds left of
        *timeout_s*. Raises what `check` does, or a LeaseTimeout.
        """
        self.check(name)
        now_s = time.monotonic()
        place = turn_s(now_s, level), next(self._numbers)
        turn = Turn(self, name, audio_s, level, place, now_s)
        self._line_up(turn)
        try:
            if not turn.has_turn and len(self._queue) > self._max_waiting:
                raise TooManyWaiters(name, len(self._queue) - 1)
            if not turn.has_turn:
                with anyio.move_on_after(timeout_s):
                    await turn.settled.wait()
            if not turn.has_turn:
                self._check_open()
                same = [each for each in self._queue if each.name == name]
                raise LeaseTimeout(name, turn.waited_s, same.index(turn) + 1)
            turn.left_s = max(0.0, timeout_s - turn.waited_s)
            yield turn
        finally:
            self._working[name] -= turn.has_turn
            self._audio_s -= turn.audio_s if turn.has_audio else 0.0
            if not turn.has_turn:
                self._queue.remove(turn)
            if not self.is_closed:
                self._admit()

    async def give_way(self, turn: Turn) -> None:
        """
        Has *turn* waited for anew if one of a higher priority waits for it.
        """
        now_s = time.monotonic()
        is_firm = turn.level >= INTERACTIVE or now_s < turn.firm_until_s
        if (
            is_firm
            or self.is_closed
            or not any(
                other.name == turn.name and other.level > turn.level
                for other in self._queue
            )
        ):
            return
        self._working[turn.name] -= 1
        turn.has_turn = False
        turn.settled = asyncio.Event()
        # Before others that are as patient, and have not begun.
        alike = (each.place[0] for each in self._queue if each.level == turn.level)
        before_s = min(turn_s(now_s, turn.level), *alike, math.inf)
        turn.place = max(now_s, math.nextafter(before_s, 0.0)), next(self._numbers)
        self._line_up(turn)
        await turn.settled.wait()

    def _check_open(self) -> None:
        if self.is_closed:
            raise CacheClosed("the server is shutting down")

    def _line_up(self, turn: Turn) -> None:
        insort(self._queue, turn, key=lambda each: each.place)
        self._admit()

    def _admit(self) -> None:
        """
        Gives turns to requests, in their order, as far as models and audio allow.
        """
        for turn in tuple(self._queue):
            # Those for other models may pass.
            if self._working[turn.name] >= self._parallel:
                continue
            # But none takes the audio for which this one waits, or a long recording
            # would wait for ever. One that is longer than the limit goes alone.
            audio_s = self._audio_s + turn.audio_s
            is_too_much = self._working.total() and audio_s > self._max_audio_s
            if is_too_much and not turn.has_audio:
                break
            self._begin(turn)

    def _begin(self, turn: Turn) -> None:
        self._queue.remove(turn)
        self._working[turn.name] += 1
        if not turn.has_audio:
            self._audio_s += turn.audio_s
        turn.has_audio = turn.has_turn = True
        now_s = time.monotonic()
        if turn.level < INTERACTIVE and now_s >= turn.place[0]:
            turn.firm_until_s = now_s + PATIENCE_S
        turn.settled.set()


class Paced:
    """
    Segments of a batch, which gives its turn up between two of them where others of a
    higher priority wait for it.
    """

    def __init__(self, segments: Segments, turn: Turn) -> None:
        self._segments = segments
        self._turn = turn

    def __aiter__(self) -> AsyncIterator[Segment]:
        return self

    async def __anext__(self) -> Segment:
        await self._turn.give_way()
        return await self._segments.__anext__()

    async def __aenter__(self) -> Self:
        await self._segments.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._segments.__aexit__(*exception)
