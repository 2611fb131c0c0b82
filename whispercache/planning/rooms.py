"""
Rooms: what is held on each device, and what a wish lacks beside that.

The arithmetic of `deadlock`, kept up to date lease by lease rather than added up.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from whispercache.keys import ModelKey

    from .deadlock import Ceiling, Claim, Hold, Model, Owner

Work: TypeAlias = tuple[int, int]
"""
The calls on a model, and the bytes of work of the largest.
"""


@dataclass(slots=True, eq=False)
class Gate:
    """
    The bytes of a device, its number of models, or the leases on a model.

    Attributes:
        free: How much is not taken there.
        line: The wishes that lack it, as a heap: what each would take, and its place.
    """

    free: float = math.inf
    line: list[tuple[int, int]] = field(default_factory=list)


Lack: TypeAlias = tuple[Gate, int]
"""
The gate at which a wish does not fit, and what it would take there.
"""

UNKNOWN: Lack = Gate(), 0
"""
The lack of a wish that was not compared with any room yet.
"""


@dataclass(slots=True, eq=False)
class Held:
    """
    A model on a device that is leased there or pinned, now or at first.

    Attributes:
        works_bytes: The work of each lease, the smallest first.
        wishes: The places of the wishes that want it.
        is_limited: Some of them allow so many leases on it alone.
        turns: Where these wait, for the end of any.
    """

    model: Model
    is_pinned: bool = False
    works_bytes: list[int] = field(default_factory=list)
    wishes: list[int] = field(default_factory=list)
    is_limited: bool = False
    turns: Gate = field(default_factory=Gate)

    @property
    def is_there(self) -> bool:
        """
        True if it takes a model's place, and bytes.
        """
        return self.is_pinned or bool(self.works_bytes)

    @property
    def work(self) -> Work:
        """
        All that one more lease has to know of the others.
        """
        busy = min(len(self.works_bytes), self.model.workers)
        return busy, self.works_bytes[-1] if busy else 0

    @property
    def n_bytes(self) -> int:
        """
        Bytes that it takes.
        """
        return _bytes_with(self.model, self.work) if self.is_there else 0


class Room:
    """
    A device, with what is held on it.

    Attributes:
        by_bytes: Its bytes.
        by_models: Its number of models.
    """

    def __init__(self, ceiling: Ceiling) -> None:
        self.by_bytes: Gate = Gate()
        self.by_models: Gate = Gate()
        self._ceiling = ceiling
        self._held = {
            model.key: Held(model, is_pinned=True) for model in ceiling.pinned
        }
        self._n_bytes = sum(held.n_bytes for held in self._held.values())
        self._n_models = len(self._held)
        self._returned_bytes = 0
        self._count()

    def begin(self, hold: Hold, *, returns: bool) -> None:
        """
        Takes a lease in; if it *returns*, what its work took is no longer returned.
        """
        held = self._held.setdefault(hold.model.key, Held(hold.model))
        self._add(held, -1)
        insort(held.works_bytes, hold.workspace_bytes)
        self._add(held, 1)
        self._returned_bytes -= hold.workspace_bytes * hold.model.workers * returns
        self._count()

    def end(self, hold: Hold, *, returns: bool) -> Sequence[int]:
        """
        Ends a lease, and *returns* what its work took, or takes it as never begun.

        Returns:
            The places of the wishes that take other bytes now than before, or may have
            a turn.
        """
        held = self._held[hold.model.key]
        before = held.work
        self._add(held, -1)
        held.works_bytes.pop(bisect_left(held.works_bytes, hold.workspace_bytes))
        self._add(held, 1)
        self._returned_bytes += hold.workspace_bytes * hold.model.workers * returns
        self._count()
        is_same = held.work == before and not held.is_limited
        return () if is_same else held.wishes

    def note(self, model: Model, place: int, *, is_limited: bool) -> None:
        """
        Notes that a wish wants a model; a limited one, if it has not too many leases.
        """
        if (held := self._held.get(model.key)) is not None:
            held.wishes.append(place)
            held.is_limited |= is_limited

    def find_lack(self, asks: Asks, parallel: int | None) -> Lack | None:
        """
        Returns what a wish lacks here beside all that is held; None if it fits.
        """
        n_bytes, n_models = asks.loading_bytes, 0
        for model, work in asks.parts.values():
            held = self._held.get(model.key)
            leases = 0 if held is None else len(held.works_bytes)
            if held is not None and parallel is not None and leases >= parallel:
                return held.turns, parallel
            if held is None or not held.is_there:
                n_models += 1
                n_bytes += _bytes_with(model, work)
            else:
                n_bytes += _bytes_with(model, _both(work, held.work)) - held.n_bytes
        if n_bytes > self.by_bytes.free:
            return self.by_bytes, n_bytes
        if n_models > self.by_models.free:
            return self.by_models, n_models
        return None

    def _add(self, held: Held, sign: int) -> None:
        self._n_bytes += sign * held.n_bytes
        self._n_models += sign * held.is_there

    def _count(self) -> None:
        ceiling = self._ceiling
        most_bytes = ceiling.n_bytes
        if ceiling.gauge_bytes is not None:
            # Perhaps their work is what the gauge does not show as free.
            shown_bytes = ceiling.gauge_bytes + self._returned_bytes
            most_bytes = min(most_bytes, shown_bytes)
        self.by_bytes.free = most_bytes - self._n_bytes
        # Models count as well as bytes, the pinned ones among them.
        if ceiling.max_models is not None:
            self.by_models.free = ceiling.max_models - self._n_models


@dataclass(slots=True)
class Asks:
    """
    What a wish takes on one device: the peak of its loads, and its models with their
    work.
    """

    loading_bytes: int = 0
    parts: dict[ModelKey, tuple[Model, Work]] = field(default_factory=dict)


class Wish:
    """
    What one or more claims want.

    Attributes:
        owners: Those that wait for it.
        lack: Where it waits; None if it is served.
    """

    def __init__(self, claim: Claim) -> None:
        self.owners: list[Owner] = []
        self.lack: Lack | None = UNKNOWN
        self._parallel = claim.parallel
        self._asks: dict[str, Asks] = {
            device: Asks(n_bytes) for device, n_bytes in claim.loading_bytes.items()
        }
        for model, workspace_bytes in claim.parts:
            parts = self._asks.setdefault(model.device, Asks()).parts
            _, others = parts.get(model.key, (model, (0, 0)))
            parts[model.key] = model, _both(others, (1, workspace_bytes))

    def find_lack(self, rooms: Mapping[str, Room]) -> Lack | None:
        """
        Returns the first gate at which it does not fit beside all that is held.
        """
        for device, asks in self._asks.items():
            if (lack := rooms[device].find_lack(asks, self._parallel)) is not None:
                return lack
        return None


def _both(one: Work, other: Work) -> Work:
    return one[0] + other[0], max(one[1], other[1])


def _bytes_with(model: Model, work: Work) -> int:
    calls, largest_bytes = work
    return model.weights_bytes + largest_bytes * min(calls, model.workers)
