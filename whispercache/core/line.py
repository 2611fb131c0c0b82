"""
The line: the requests that wait, in the order of their turns and by what they wait for.

An event should cost those requests that it can help, not all that wait. So they are
found by their model, by their owner, and by what the planner makes of them: requests
for one absent model share its load, and absent models that take the same memory are
alike to the planner, which therefore looks at the first of each cohort. "Older" means
an earlier turn throughout, which is that of arrival among those of one priority.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

from whispercache.planning import planner
from whispercache.planning.priority import turn_s

from . import demands
from .entries import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from whispercache.planning.deadlock import Owner
    from whispercache.planning.priority import Turn
    from whispercache.planning.room import Demand

    from .device import Device
    from .entries import Entry
    from .waiters import Waiter


Kind: TypeAlias = "tuple[tuple[Demand, ...], bool, float]"
"""
The memory that requests of a cohort want, if they pass older ones, and their priority.
"""

FIRST: Turn = (-math.inf, -1)
"""
A turn before all others.
"""


class Cohort:
    """
    Requests for absent models that are alike to the planner: each is the oldest for its
    model, their loads take the same memory, and they have the same priority.

    Attributes:
        demands: That memory.
        passes: They wait for no older request.
        priority: Their level.
        turns: Their turns, in order.
        worn: Those of them that were overtaken as often as may be.
        stopped_in: The number of the last walk in which one of them had to wait, and so
            all younger ones.
        stopped_at: The turn of that one.
    """

    __slots__ = (
        *("_waiters", "demands", "passes", "priority", "turns"),
        *("stopped_at", "stopped_in", "worn"),
    )

    def __init__(
        self, demands: tuple[Demand, ...], priority: float, *, passes: bool
    ) -> None:
        self.demands: tuple[Demand, ...] = demands
        self.passes: bool = passes
        self.priority: float = priority
        self.turns: list[Turn] = []
        self.worn: list[Turn] = []
        self.stopped_in: int = -1
        self.stopped_at: Turn = FIRST
        self._waiters: dict[Turn, Waiter] = {}

    @property
    def kind(self) -> Kind:
        """
        All that its requests have in common.
        """
        return self.demands, self.passes, self.priority

    def add(self, waiter: Waiter) -> None:
        """
        Adds a request.
        """
        # Mostly it is the youngest, but for those that waited for the same model.
        insort(self.turns, waiter.turn)
        self._waiters[waiter.turn] = waiter
        if waiter.overtaken >= planner.MAX_OVERTAKES:
            insort(self.worn, waiter.turn)

    def remove(self, waiter: Waiter) -> None:
        """
        Removes a request.
        """
        del self._waiters[waiter.turn]
        for turns in (self.turns, self.worn):
            _remove(turns, waiter.turn)

    def after(self, turn: Turn) -> Waiter | None:
        """
        Returns the oldest request younger than *turn*.
        """
        return self._at(self.turns, bisect_right(self.turns, turn))

    def worn_after(self, turn: Turn) -> Waiter | None:
        """
        Returns the oldest worn request younger than *turn*.
        """
        return self._at(self.worn, bisect_right(self.worn, turn))

    def _at(self, turns: list[Turn], place: int) -> Waiter | None:
        return self._waiters[turns[place]] if place < len(turns) else None

    def between(self, first: Turn, end: Turn) -> Iterator[Waiter]:
        """
        Returns the requests from *first* on that are older than *end*.
        """
        place = bisect_left(self.turns, first)
        for turn in self.turns[place : bisect_left(self.turns, end)]:
            yield self._waiters[turn]

    def wear(self, waiter: Waiter) -> None:
        """
        Notes that a request was overtaken as often as may be.
        """
        insort(self.worn, waiter.turn)


class Line:
    """
    The requests that wait.

    Attributes:
        waiters: All, by serial number.
        cohorts: Those for one absent model, by what its load takes.
        groups: Those for several models.
        resident: Models in memory that requests for one model wait for.
        copied: Absent models that such requests wait for, and that have a host copy.
            What their loads take depends on what is left on the host.
        owners: The requests whose owners are known, by these.
        passing: Those that wait for no older request.
        held: How many leases each owner holds. Kept while anybody waits.
        suspects: The owners that wait and hold leases.
    """

    def __init__(self) -> None:
        self.waiters: dict[int, Waiter] = {}
        self._turns: list[Turn] = []
        self._next_serial = 0
        # A clock may be set back; the order of arrival is not.
        self._latest_s = -math.inf
        self._devices: Counter[Device] = Counter()
        self._levels: Counter[float] = Counter()
        self._cohort_of: dict[Entry, tuple[Cohort, Waiter]] = {}
        self.cohorts: dict[Kind, Cohort] = {}
        self.groups: dict[Waiter, None] = {}
        self.resident: set[Entry] = set()
        self.copied: set[Entry] = set()
        self.owners: dict[Owner, dict[Waiter, None]] = {}
        self.passing: set[Waiter] = set()
        self.held: dict[Owner, int] = {}
        self.suspects: set[Owner] = set()

    def __len__(self) -> int:
        return len(self.waiters)

    def __iter__(self) -> Iterator[Waiter]:
        # Those that leave meanwhile are not met any more.
        found = (self.waiters.get(serial) for _, serial in self._turns.copy())
        return (waiter for waiter in found if waiter is not None)

    def __contains__(self, waiter: Waiter) -> bool:
        return self.waiters.get(waiter.serial) is waiter

    def get(self, serial: int) -> Waiter | None:
        """
        Returns the request with that number, if it waits.
        """
        return self.waiters.get(serial)

    @property
    def devices(self) -> Iterable[Device]:
        """
        The devices of the models that are waited for.
        """
        return self._devices.keys()

    def place(self, waiter: Waiter) -> int:
        """
        Returns the place of a request, from 1.
        """
        return bisect_left(self._turns, waiter.turn) + 1

    # Join and leave -------------------------------------------------------------------

    def join(self, waiter: Waiter) -> None:
        """
        Adds a request, at the end but for those of a lower priority.
        """
        waiter.turn = self.next_turn(waiter)
        self._latest_s = max(self._latest_s, waiter.since_s)
        self._next_serial += 1
        self.waiters[waiter.serial] = waiter
        insort(self._turns, waiter.turn)
        self._levels[waiter.priority] += 1
        if waiter.owner is not None:
            self.owners.setdefault(waiter.owner, {})[waiter] = None
            self._suspect(waiter.owner)
        if waiter.is_group:
            self.groups[waiter] = None
        if waiter.passes:
            self.passing.add(waiter)
        for entry in waiter.entries:
            self._line_up(waiter, entry)
            self._devices[entry.device] += 1
            filed = self._cohort_of.get(entry)
            # A load that is asked for already will be shared.
            if (
                filed is None
                or waiter.turn < filed[1].turn
                or (waiter.priority > filed[0].priority)
            ):
                self.file(entry)

    def next_turn(self, waiter: Waiter) -> Turn:
        """
        Returns the turn that a request would have that joins now.
        """
        arrived_s = max(self._latest_s, waiter.since_s)
        at_s = turn_s(arrived_s, waiter.priority)
        if waiter.resumes:
            # Before others that are as patient as it is, which have not begun yet.
            alike = (w for w in self if w.priority == waiter.priority)
            first_s = next((w.turn[0] for w in alike), math.inf)
            before_s = math.nextafter(first_s, -math.inf)
            at_s = max(arrived_s, min(at_s, before_s))
        return at_s, self._next_serial

    def _line_up(self, waiter: Waiter, entry: Entry) -> None:
        waiting = entry.waiting
        last = next(reversed(waiting), None)
        waiting[waiter] = None
        if last is not None and waiter.turn < last.turn:
            ordered = sorted(waiting, key=lambda each: each.turn)
            waiting.clear()
            waiting.update(dict.fromkeys(ordered))

    def leave(self, waiter: Waiter) -> None:
        """
        Removes a request, even one that Ctrl-C kept from joining completely.
        """
        if self.waiters.pop(waiter.serial, None) is not None:
            self._levels[waiter.priority] -= 1
            if not self._levels[waiter.priority]:
                del self._levels[waiter.priority]
        _remove(self._turns, waiter.turn)
        self.groups.pop(waiter, None)
        self.passing.discard(waiter)
        others = self.owners.get(waiter.owner, {})
        others.pop(waiter, None)
        if not others:
            self.owners.pop(waiter.owner, None)
        self._suspect(waiter.owner)
        for entry in waiter.entries:
            self._leave(waiter, entry)
        if not self.waiters:
            self.held.clear()

    def _leave(self, waiter: Waiter, entry: Entry) -> None:
        if waiter in entry.waiting:
            del entry.waiting[waiter]
            self._devices[entry.device] -= 1
            if self._devices[entry.device] <= 0:
                del self._devices[entry.device]
        filed = self._cohort_of.get(entry)
        # It may have lent the load that others share its turn, or its priority, or that
        # it passes.
        if (
            filed is None
            or filed[1] is waiter
            or waiter.passes
            or waiter.priority >= filed[0].priority > filed[1].priority
        ):
            self.file(entry)

    # What they wait for ---------------------------------------------------------------

    def file(self, entry: Entry) -> None:
        """
        Files the requests for one model anew, by where it is now.
        """
        entry.device.moved.discard(entry)
        if (filed := self._cohort_of.pop(entry, None)) is not None:
            cohort, waiter = filed
            cohort.remove(waiter)
            if not cohort.turns:
                del self.cohorts[cohort.kind]
        self.resident.discard(entry)
        self.copied.discard(entry)
        first = self.first(entry)
        if first is None:
            return
        if entry.state is State.RESIDENT:
            self.resident.add(entry)
        elif entry.state is State.ABSENT and entry.parked_bytes:
            self.copied.add(entry)
        elif entry.state is State.ABSENT:
            takes = demands.demands(first.wanted)
            cohort = Cohort(takes, self.priority(entry), passes=self.passes(entry))
            cohort = self.cohorts.setdefault(cohort.kind, cohort)
            cohort.add(first)
            self._cohort_of[entry] = cohort, first

    def cohort_of(self, entry: Entry) -> Cohort | None:
        """
        Returns the cohort of the oldest request for an absent model.
        """
        filed = self._cohort_of.get(entry)
        return None if filed is None else filed[0]

    def wear(self, waiter: Waiter) -> None:
        """
        Notes that a request was overtaken as often as may be.
        """
        for entry in waiter.entries:
            cohort, first = self._cohort_of.get(entry, (None, None))
            if cohort is not None and first is waiter:
                cohort.wear(waiter)

    def awaits_load(self, device: Device) -> bool:
        """
        Returns True if a request waits for room on *device* to load a model.
        """
        if any(entry.device is device for entry in self.copied):
            return True
        names = {cohort.demands[0].device for cohort in self.cohorts.values()}
        if device.name in names:
            return True
        return any(
            entry.device is device and not entry.is_present
            for waiter in self.groups
            for entry in waiter.entries
        )

    def first(self, entry: Entry) -> Waiter | None:
        """
        Returns the oldest request for *entry* alone. The others share its load.
        """
        if not self.groups:
            return next(iter(entry.waiting), None)
        return next((each for each in entry.waiting if not each.is_group), None)

    def passes(self, entry: Entry) -> bool:
        """
        Returns True if a request for *entry* alone waits for no older one: the load
        that it shares must not wait either.
        """
        # There are hardly ever any.
        return any(
            not waiter.is_group and entry in waiter.entries for waiter in self.passing
        )

    def priority(self, entry: Entry) -> float:
        """
        Returns the highest priority of the requests for *entry* alone, which is that of
        the load that they share.
        """
        # Mostly all are alike, and there is nothing to go through.
        if len(self._levels) == 1:
            return next(iter(self._levels))
        levels = (each.priority for each in entry.waiting if not each.is_group)
        return max(levels, default=-math.inf)

    def let_pass(self, waiter: Waiter) -> None:
        """
        Lets a request pass older ones from now on.
        """
        waiter.passes = True
        self.passing.add(waiter)
        for entry in waiter.entries:
            self.file(entry)

    def open_waiters(self, entry: Entry) -> list[Waiter]:
        """
        Returns the requests for a resident model alone to which a lease on it may be
        granted, the oldest first.
        """
        found: Iterable[Waiter] = entry.waiting
        if entry.cause is not None or entry.drained_for is not None:
            # Only those that are exempt; there are few.
            held = [w for owner in entry.leases.values() for w in self._of(owner)]
            drained_for = () if entry.drained_for is None else (entry.drained_for,)
            exempt = {*self.passing, *held, *drained_for}
            found = sorted(exempt & entry.waiting.keys(), key=lambda w: w.turn)
        return [w for w in found if not w.is_group and entry.is_open_to(w)]

    def _of(self, owner: Owner) -> Iterable[Waiter]:
        return () if owner is None else self.owners.get(owner, ())

    # Owners ---------------------------------------------------------------------------

    def count_held(self, entries: Iterable[Entry]) -> None:
        """
        Counts the leases on *entries*, as the first request begins to wait.
        """
        self.held = _held(entries)

    def holds(self, owner: Owner, more: int) -> None:
        """
        Counts the leases that an owner holds, while anybody waits.
        """
        if owner is None or not self.waiters:
            return
        count = self.held.get(owner, 0) + more
        if count:
            self.held[owner] = count
        else:
            del self.held[owner]
        if owner in self.owners:
            self._suspect(owner)

    def _suspect(self, owner: Owner) -> None:
        if owner in self.held and owner in self.owners:
            self.suspects.add(owner)
        else:
            self.suspects.discard(owner)

    # Proof ----------------------------------------------------------------------------

    def check(self, entries: Iterable[Entry]) -> None:
        """
        Asserts that the leases on *entries* were counted, if anybody waits.
        """
        held = _held(entries) if self.waiters else {}
        assert self.held == held, f"{self.held} leases counted, not {held}"


def _remove(turns: list[Turn], turn: Turn) -> None:
    place = bisect_left(turns, turn)
    if place < len(turns) and turns[place] == turn:
        del turns[place]


def _held(entries: Iterable[Entry]) -> dict[Owner, int]:
    return Counter(
        owner
        for entry in entries
        if entry.leases
        for owner in entry.leases.values()
        if owner is not None
    )
