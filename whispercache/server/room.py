"""
Room: the audio that calls have in memory.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from dataclasses import dataclass, field

from whispercache.planning.priority import INTERACTIVE, turn_s


class Room:
    """
    Room for a number of seconds of audio, in the order in which it is asked for, but
    for priorities, as in a cache; one alone may take more. For the tasks of one event
    loop.

    Whoever waits for it must hold no model: those that have room may wait for just that
    one.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._inside: set[Place] = set()
        self._line: list[Place] = []

    def enter(self, audio_s: float, level: float = INTERACTIVE) -> Place:
        """
        Returns a place for so many seconds of audio, which may still be waited for, by
        a request of that priority. It must be left.
        """
        place = Place(self, audio_s, turn_s(time.monotonic(), level))
        # After those that came at the same time.
        insort(self._line, place, key=lambda each: each.turn_s)
        self._look()
        return place

    def leave(self, place: Place) -> None:
        """
        Gives a place up, had or waited for. A second call does nothing.
        """
        if place in self._inside:
            self._inside.remove(place)
        elif place in self._line:
            self._line.remove(place)
        self._look()

    def _look(self) -> None:
        # None takes that for which an older one waits, or a long recording would wait
        # for ever.
        while self._line and self._has_room_for(self._line[0]):
            place = self._line.pop(0)
            self._inside.add(place)
            place.is_had.set()

    def _has_room_for(self, place: Place) -> bool:
        sum_s = place.audio_s + sum(each.audio_s for each in self._inside)
        return not self._inside or sum_s <= self._most_s


@dataclass(eq=False, slots=True)
class Place:
    """
    A place in a `Room`.

    Attributes:
        audio_s: Seconds of audio.
        turn_s: The time by which it stands in the line.
        is_had: Set once there is room for them.
    """

    room: Room
    audio_s: float
    turn_s: float
    is_had: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self) -> None:
        """
        Gives it up, had or waited for. A second call does nothing.
        """
        self.room.leave(self)
