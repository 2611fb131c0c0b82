"""
Routing: the replica for a request, out of several that each have a cache of their own.

A replica is to a cluster what a card is to a cache (`placement`): first where the model
is, unless the wait there would be longer than a load elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Seconds of calls and of loads until a replica has measured its own.
CALL_S = 0.5
LOAD_S = 0.5

RELUCTANCE = 8.0
"""
How much a second of loading counts beside one of waiting, for a model that nobody waits
for: a load tends to bring others, of what left for it. The more wait, the less it
counts, down to once: those to come share what it brings.

Source: benchmarks/simulate/routed.py: from 1 to 8 loads get fewer by more than half;
above, the longest waits get longer.
"""

# Waits that differ by less, in seconds, are alike: what is measured is rounded, too.
_ALIKE_DIGITS = 2


@dataclass(frozen=True, slots=True)
class Replica:
    """
    A cache in another process, as a router knows it.

    Attributes:
        name: Tells it from others, and stays.
        capacity_bytes: What may be charged, by device.
        resident: The device of each model that is in memory, or on its way there.
        pinned: Those that do not leave for others.
        sizes: Bytes of each model; one that is not known takes none.
        load_s: Seconds of a load, by model.
        calls_s: Seconds that it is busy for a call, by model.
        call_s: The same for others.
        parallel: Number of calls at once, of which each takes so long.
        queued: Number of requests that it has, by model; ``""`` for those of which the
            model is not known.
    """

    name: str
    capacity_bytes: Mapping[str, int]
    resident: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = field(default_factory=dict)
    load_s: Mapping[str, float] = field(default_factory=dict)
    calls_s: Mapping[str, float] = field(default_factory=dict)
    call_s: float = CALL_S
    parallel: int = 1
    queued: Mapping[str, int] = field(default_factory=dict)

    @property
    def room_bytes(self) -> int:
        """
        Free bytes of the device that has the most.
        """
        return max(map(self._free_bytes, self.capacity_bytes), default=0)

    @property
    def queue_s(self) -> float:
        """
        Seconds of the calls that wait or work.
        """
        calls_s = (
            n * self.calls_s.get(model, self.call_s) for model, n in self.queued.items()
        )
        return sum(calls_s) / self.parallel

    def wait_s(self, model: str, reluctance: float) -> float:
        """
        Returns the seconds until a request for *model* begins: those of the queue, of a
        load if it is not there, and of loading again what must leave for it. Loads
        count *reluctance* times. Infinite if it never fits.
        """
        queue_s = self.queue_s
        if model in self.resident:
            return queue_s
        displaced_s = min(
            (self._displaced_s(model, device) for device in self.capacity_bytes),
            # One that has told nothing yet may have all the room.
            default=0.0,
        )
        return queue_s + reluctance * (self._load_s(model) + displaced_s)

    def _load_s(self, model: str) -> float:
        return self.load_s.get(model, LOAD_S)

    def _free_bytes(self, device: str) -> int:
        taken = (self.sizes.get(each, 0) for each in self._on(device))
        return self.capacity_bytes[device] - sum(taken)

    def _on(self, device: str) -> Iterable[str]:
        return (each for each, place in self.resident.items() if place == device)

    def _displaced_s(self, model: str, device: str) -> float:
        """
        Returns the seconds of loads that will bring back what leaves *device*.
        """
        short_bytes = self.sizes.get(model, 0) - self._free_bytes(device)
        # As a cache would: cheap ones that bring much, then none that need not leave.
        leaving = []
        idle = (each for each in self._on(device) if each not in self.pinned)
        for each in sorted(idle, key=self._cost):
            if short_bytes <= 0:
                break
            leaving.append(each)
            short_bytes -= self.sizes.get(each, 0)
        if short_bytes > 0:
            return math.inf
        for each in tuple(leaving):
            if short_bytes + self.sizes.get(each, 0) <= 0:
                leaving.remove(each)
                short_bytes += self.sizes.get(each, 0)
        return sum(map(self._load_s, leaving))

    def _cost(self, model: str) -> tuple[float, str]:
        n_bytes = self.sizes.get(model, 0)
        # The name, so that the answer does not depend on an order.
        return (self._load_s(model) / n_bytes if n_bytes else math.inf), model


def pooled(replicas: Iterable[Replica]) -> list[Replica]:
    """
    Returns the replicas, each with the seconds that others have measured of models
    which it has not had yet: machines of a cluster differ less than models do.
    """
    known = list(replicas)
    load_s: dict[str, float] = {}
    calls_s: dict[str, float] = {}
    for each in known:
        load_s |= each.load_s
        calls_s |= each.calls_s
    return [
        replace(
            each,
            load_s={**load_s, **each.load_s},
            calls_s={**calls_s, **each.calls_s},
        )
        for each in known
    ]


def order(
    model: str, replicas: Iterable[Replica], reluctance: float = RELUCTANCE
) -> Sequence[Replica]:
    """
    Returns all *replicas*, the one first where a request for *model* begins soonest. Of
    those that are alike the one with the most room, and then by rendezvous hashing, on
    which routers agree without a word, and which moves no model when others come or go.
    """
    known = list(replicas)
    waiting = sum(each.queued.get(model, 0) for each in known)
    times = 1 + (reluctance - 1) / (1 + waiting)

    def rank(replica: Replica) -> tuple[float, int, bytes]:
        wait_s = replica.wait_s(model, times)
        return round(wait_s, _ALIKE_DIGITS), -replica.room_bytes, _hash(model, replica)

    return sorted(known, key=rank)


def _hash(model: str, replica: Replica) -> bytes:
    text = f"{model}\0{replica.name}".encode()
    return blake2b(text, digest_size=8).digest()
