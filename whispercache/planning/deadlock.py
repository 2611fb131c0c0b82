"""
Deadlock: the waiting requests that no release of others can ever help.

It is the classic reduction of a resource graph: the leases of all owners that do not
wait are taken as ended; requests that fit then are taken as served, and their leases as
ended too; and so on. The requests that are left wait for memory that only their own
owners hold. Rules of fairness do not count here, only bytes and numbers of models.

Hundreds may wait, so each step looks only at what it can help. Requests for the same
are judged as one wish. A wish that does not fit waits at one gate, the bytes or the
models of one device or the leases on one model, with what it takes there; the least
first. When a lease ends, the first in line are looked at, and those that want the very
model. Every step can be taken back, so that questions of the kind "what if this one
kept its leases" share the rest.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, TypeAlias

from .rooms import Room, Wish

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from whispercache.keys import ModelKey

    from .rooms import Lack

Owner: TypeAlias = object
"""
A holder of leases, or one that waits for them: a token of a thread or of a task.
"""


@dataclass(frozen=True, slots=True)
class Model:
    """
    A model that is held or wanted.

    Attributes:
        key: The model.
        device: The device where it is.
        weights_bytes: Bytes that it takes while it is in memory.
        workers: The number of calls that it runs at a time.
    """

    key: ModelKey
    device: str
    weights_bytes: int
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Hold:
    """
    A lease that is held.

    Attributes:
        owner: Its holder.
        model: The model that is leased, described alike by all of its leases.
        workspace_bytes: Bytes that its calls take.
    """

    owner: Owner
    model: Model
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """
    A request that waits. It equals itself alone.

    Attributes:
        owner: The one that waits.
        since_s: The time when it began to wait.
        parts: The models that it wants together, with the bytes of work on each.
        loading_bytes: Bytes that their loads take on top at the peak, by device.
        parallel: Most leases on each of them, with its own; None for any number.
    """

    owner: Owner
    since_s: float
    parts: tuple[tuple[Model, int], ...]
    loading_bytes: Mapping[str, int] = field(default_factory=dict)
    parallel: int | None = None


@dataclass(frozen=True, slots=True)
class Ceiling:
    """
    The most that a device can hold.

    Attributes:
        n_bytes: Bytes by its limit.
        max_models: Models; None for any number.
        pinned: The pinned models there, which are not evicted.
        gauge_bytes: Bytes by its gauge, which may count the work of leases as taken;
            None where it cannot be read.
    """

    n_bytes: float
    max_models: int | None = None
    pinned: tuple[Model, ...] = ()
    gauge_bytes: int | None = None


class System:
    """
    All requests that wait and all leases at one moment, and the questions about them.

    Args:
        claims: All that wait, the oldest first.
        holds: All leases.
        ceilings: The devices of them all.
    """

    def __init__(
        self,
        claims: Sequence[Claim],
        holds: Iterable[Hold],
        ceilings: Mapping[str, Ceiling],
    ) -> None:
        self._claims = claims
        self._rooms = {name: Room(ceiling) for name, ceiling in ceilings.items()}
        self._held: dict[Owner, list[Hold]] = {}
        for hold in holds:
            self._held.setdefault(hold.owner, []).append(hold)
            self._rooms[hold.model.device].begin(hold, returns=False)
        # Claims that want the same are one wish; the place of each claim's.
        self._wishes: list[Wish] = []
        self._places: list[int] = []
        self._waiting = Counter(claim.owner for claim in claims)
        self._idle = [owner for owner in self._held if owner not in self._waiting]
        # As often as each was not let go yet: as it waits, or once.
        self._everybody = [*(claim.owner for claim in claims), *self._idle]
        self._bound = Counter(self._everybody)
        # The claims that are not served, but for those of bound owners and lost ones.
        self._n_asked = 0
        self._lost: Counter[Owner] = Counter()
        # What has to be looked at since leases ended: devices, and wishes.
        self._eased: list[Room] = []
        self._changed: list[int] = []
        self._undo: list[Callable[[], None]] = []
        self._group()
        for place in range(len(self._wishes)):
            self._judge(place)
        self._undo.clear()

    # Questions ------------------------------------------------------------------------

    def unserved(self, never: Collection[Owner] = ()) -> tuple[Claim, ...]:
        """
        Returns the claims that can never be served while their owners wait.

        Args:
            never: Owners that are assumed never to release anything. Their own claims
                are not asked about.
        """
        never = set(never)
        with self._trial():
            self._let_go(owner for owner in self._everybody if owner not in never)
            return tuple(c for c in self._left() if c.owner not in never)

    def culprit(self) -> Claim | None:
        """
        Returns the claim that completed a deadlock, the latest that did; None if there
        is no deadlock.
        """
        with self._trial():
            self._let_go(self._everybody)
            suspects = sorted(
                (claim for claim in self._left() if claim.owner in self._held),
                key=lambda claim: claim.since_s,
            )
            n_left = self._n_asked
            # From the latest: without it, the others might have been served.
            for suspect in reversed(suspects):
                with self._trial():
                    self._forget(suspect.owner)
                    if self._n_asked < n_left:  # it, or somebody else, would get on
                        return suspect
            return suspects[-1] if suspects else None

    def detained(self) -> list[Claim]:
        """
        Returns the claims whose owners hold leases that block another claim, the
        youngest first.

        They must not wait for that one's turn, or both would wait for ever. If letting
        one of several pass is enough, the oldest passes.
        """
        # Those are not detained by anybody's turn.
        self._lost = Counter(claim.owner for claim in self.unserved())
        suspects, others = [], list(self._idle)
        for claim in self._claims:
            # An owner of None is not known: the lease was handed over.
            if claim.owner is not None and claim.owner in self._held:
                suspects.append(claim)
            else:
                others.append(claim.owner)
        with self._trial():
            self._let_go(others)
            # From the youngest: as many as possible keep to the order of arrival.
            return self._passing(suspects[::-1])

    def _passing(self, suspects: Sequence[Claim]) -> list[Claim]:
        """
        Returns those of *suspects* that have to pass. Of the other suspects, those that
        come later in this order, or pass, were let go.

        Halves, so that what both have in common is done once.
        """
        middle = len(suspects) // 2
        if not middle:
            return list(suspects) if self._n_asked else []
        first, second = suspects[:middle], suspects[middle:]
        with self._trial():
            self._let_go(claim.owner for claim in second)
            passing = self._passing(first)
        with self._trial():
            self._let_go(claim.owner for claim in passing)
            return passing + self._passing(second)

    def _left(self) -> list[Claim]:
        """
        Returns the claims that are not served.
        """
        wishes = self._wishes
        pairs = zip(self._claims, self._places, strict=True)
        return [claim for claim, place in pairs if wishes[place].lack is not None]

    # Steps, which can be taken back ---------------------------------------------------

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """
        Takes back, at its end, all steps since its begin.
        """
        mark = len(self._undo)
        try:
            yield
        finally:
            while len(self._undo) > mark:
                self._undo.pop()()

    def _let_go(self, owners: Iterable[Owner]) -> None:
        """
        Has *owners* release their leases once they are served.
        """
        for owner in owners:
            self._undo.append(partial(self._bind, owner))
            self._bound[owner] -= 1
            if not self._bound[owner]:
                self._n_asked += self._waiting[owner] - self._lost[owner]
                if not self._waiting[owner]:
                    self._end(owner)
        self._settle()

    def _bind(self, owner: Owner) -> None:
        if not self._bound[owner]:
            self._n_asked -= self._waiting[owner] - self._lost[owner]
        self._bound[owner] += 1

    def _end(self, owner: Owner, *, returns: bool = True) -> None:
        """
        Ends the leases of *owner*.
        """
        for hold in self._held.get(owner, ()):
            room = self._rooms[hold.model.device]
            self._changed += room.end(hold, returns=returns)
            self._undo.append(partial(room.begin, hold, returns=returns))
            self._eased.append(room)

    def _forget(self, owner: Owner) -> None:
        """
        Takes the leases of *owner* as never begun.
        """
        self._end(owner, returns=False)
        holds = self._held.pop(owner)
        self._undo.append(partial(self._held.__setitem__, owner, holds))
        self._settle()

    def _settle(self) -> None:
        """
        Serves the wishes that fit by now, and those that fit then, and so on.
        """
        while self._eased:
            while self._changed:
                self._judge(self._changed.pop())
            room = self._eased.pop()
            for gate in (room.by_bytes, room.by_models):
                while gate.line and gate.line[0][0] <= gate.free:
                    taken, place = heappop(gate.line)
                    # It may be served, or stand elsewhere by now.
                    if self._wishes[place].lack == (gate, taken):
                        self._judge(place)

    def _judge(self, place: int) -> None:
        """
        Serves a wish if it fits; else it lines up.
        """
        wish = self._wishes[place]
        before = wish.lack
        if before is None or (lack := wish.find_lack(self._rooms)) == before:
            return
        self._undo.append(partial(self._line_up, place, before))
        self._line_up(place, lack)
        if lack is None:
            self._undo.append(partial(self._withdraw, wish))
            for owner in wish.owners:
                self._waiting[owner] -= 1
                if not self._bound[owner]:
                    self._n_asked -= 1
                    if not self._waiting[owner]:
                        self._end(owner)

    def _line_up(self, place: int, lack: Lack | None) -> None:
        self._wishes[place].lack = lack
        if lack is not None:
            gate, taken = lack
            heappush(gate.line, (taken, place))

    def _withdraw(self, wish: Wish) -> None:
        for owner in wish.owners:
            self._waiting[owner] += 1
            if not self._bound[owner]:
                self._n_asked += 1

    def _group(self) -> None:
        places: dict[object, int] = {}
        for claim in self._claims:
            loading = frozenset(claim.loading_bytes.items())
            same = claim.parts, loading, claim.parallel
            place = places.setdefault(same, len(places))
            if place == len(self._wishes):
                self._wishes.append(Wish(claim))
                for model, _ in claim.parts:
                    is_limited = claim.parallel is not None
                    room = self._rooms[model.device]
                    room.note(model, place, is_limited=is_limited)
            self._wishes[place].owners.append(claim.owner)
            self._places.append(place)
