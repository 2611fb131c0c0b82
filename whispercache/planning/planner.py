"""
The planner: which requests get memory, which wait, and which idle models are evicted.

`plan` walks the queue once, oldest first, over scratch copies of the devices' rooms,
and returns a decision for each request. `core.scheduler` carries it out, in a cache, in
``explain()`` and in the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from whispercache.keys import ModelKey

    from .policies import Resident

MAX_OVERTAKES = 16
"""
Loads that may pass a request which cannot be served yet.

Source: simulated; at a quarter of the working set, stall falls by 16 % against strict
order, and more overtakes gain nothing (benchmarks/simulate).
"""


class Need(Enum):
    """
    The next thing that a waiting request needs.
    """

    LOAD = auto()
    """
    Room for its model, which is absent, and then a load.
    """
    WORKSPACE = auto()
    """
    Room for the workspace of one more lease: its model is resident.
    """
    NOTHING = auto()
    """
    No room: its model is on its way in or out, or held back for an older request.
    """


@dataclass(frozen=True, slots=True)
class Demand:
    """
    The memory that serving a request would add on one device.

    Attributes:
        device: The device.
        n_bytes: Bytes to add.
        models: Models to add.
        own_bytes: Bytes of its own models there, which cannot be evicted to serve it.
            Pinned ones are not counted: no request counts on their memory.
        own_models: The number of those models.
    """

    device: str
    n_bytes: int
    models: int = 0
    own_bytes: int = 0
    own_models: int = 0


@dataclass(frozen=True, slots=True)
class Pending:
    """
    A request in the queue, for one model or for several at once.

    Attributes:
        keys: The models that it wants, all or nothing.
        need: The next thing that it needs.
        demands: The memory that serving it would add, by device.
        overtaken: Loads that have passed it so far.
        impatient: It has waited longer than the patience of the cache.
        passes: An older request waits for leases of its caller, so it must not wait
            for that one in turn.
        shares: Other leases on its own models add to its demands.
    """

    keys: tuple[ModelKey, ...]
    need: Need
    demands: tuple[Demand, ...] = ()
    overtaken: int = 0
    impatient: bool = False
    passes: bool = False
    shares: bool = False


@dataclass(slots=True)
class Room:
    """
    A device's memory as the cache may use it; scratch for one `plan`.

    Attributes:
        capacity_bytes: Most that may be charged now, by the limit and by the gauge.
        ceiling_bytes: Most that could be charged if the cache held nothing.
        charged_bytes: Reserved and resident bytes, loads in flight included.
        coming_bytes: The part of *charged_bytes* that unloads in flight will return.
        pinned_bytes: The part of pinned models, which are not evicted.
        max_models: Most models that may be there; None for any number.
        models: The number there, loads and unloads in flight included.
        coming_models: The models of these that are being unloaded.
        pinned_models: The models of these that are pinned.
    """

    capacity_bytes: int
    ceiling_bytes: int
    charged_bytes: int = 0
    coming_bytes: int = 0
    pinned_bytes: int = 0
    max_models: int | None = None
    models: int = 0
    coming_models: int = 0
    pinned_models: int = 0

    @property
    def free_bytes(self) -> int:
        """
        Bytes that may still be charged; negative after a limit was lowered.
        """
        return self.capacity_bytes - self.charged_bytes

    @property
    def free_models(self) -> int:
        """
        The number of models that may still be loaded.
        """
        # More than there ever are, so that it can be compared and subtracted.
        if self.max_models is None:
            return 1 << 62
        return self.max_models - self.models

    def fits(self, demand: Demand) -> bool:
        """
        Returns True if *demand* can be served at once.
        """
        return self._short(demand, coming=False) == (0, 0)

    def shortfall(self, demand: Demand) -> tuple[int, int]:
        """
        Returns the bytes and models that are missing even after unloads in flight.
        """
        return self._short(demand, coming=True)

    def _short(self, demand: Demand, *, coming: bool) -> tuple[int, int]:
        free_bytes = self.free_bytes + coming * self.coming_bytes
        free_models = self.free_models + coming * self.coming_models
        # A demand for nothing is served even if a lowered limit leaves less than that.
        return (
            max(0, demand.n_bytes - free_bytes) if demand.n_bytes else 0,
            max(0, demand.models - free_models) if demand.models else 0,
        )

    def reachable_bytes(self) -> int:
        """
        Returns the bytes that one request could have if all unpinned models were gone.
        """
        return self.ceiling_bytes - self.pinned_bytes

    def reachable_models(self) -> int:
        """
        Returns the number of models that one request could have then.
        """
        if self.max_models is None:
            return 1 << 62
        return self.max_models - self.pinned_models

    def charge(self, demand: Demand) -> None:
        """
        Gives *demand* its memory.
        """
        self.charged_bytes += demand.n_bytes
        self.models += demand.models

    def promise(self, demand: Demand) -> None:
        """
        Sets aside what is free and what unloads return, so that no younger request
        takes it.
        """
        # First from what is free, the rest from what unloads will return.
        from_free = max(0, min(demand.n_bytes, self.free_bytes))
        self.charged_bytes += from_free
        self.coming_bytes -= demand.n_bytes - from_free
        self.models += min(demand.models, max(0, self.free_models))
        self.coming_models -= demand.models

    def expect(self, victim: Resident) -> None:
        """
        Counts *victim* as being unloaded.
        """
        self.coming_bytes += victim.weights_bytes
        self.coming_models += 1


class Outcome(Enum):
    """
    The kinds of decisions on a request.
    """

    GRANT = auto()
    LOAD = auto()
    WAIT = auto()
    NEVER = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """
    A decision on one request of the queue.

    Attributes:
        outcome: Grant it, start its load, keep it waiting, or fail it.
        victims: Idle models to unload for it.
        overtakes: Places in the queue of the stuck requests that its load passes.
        drain: Models on which no new lease should be granted until it is served.
        lacking: The demand that can never be met, and the most that could be had.
    """

    outcome: Outcome
    victims: tuple[Resident, ...] = ()
    overtakes: tuple[int, ...] = ()
    drain: tuple[ModelKey, ...] = ()
    lacking: tuple[Demand, int] | None = None


def choose_victims(
    idle: Iterable[Resident], n_bytes: int, models: int = 0
) -> tuple[Resident, ...] | None:
    """
    Returns the models to unload so that *n_bytes* and *models* become free; None if
    there are too few.

    They are taken in the order given until there is enough. Then the keep pass, from
    the last taken to the first, spares each whose bytes turned out not to be needed.
    For models of one size that is exactly the order given.
    """
    taken: list[Resident] = []
    missing_bytes = n_bytes
    # In the order of the policy, as many as it takes.
    for resident in idle:
        if missing_bytes <= 0 and len(taken) >= models:
            break
        taken.append(resident)
        missing_bytes -= resident.weights_bytes
    if missing_bytes > 0 or len(taken) < models:
        return None
    # The keep pass: a large one taken late may make small ones taken early needless.
    for resident in reversed(taken[:]):
        if missing_bytes + resident.weights_bytes <= 0 and len(taken) > models:
            taken.remove(resident)
            missing_bytes += resident.weights_bytes
    return tuple(taken)


Shelf: TypeAlias = "Callable[[str], Sequence[Resident]]"
"""
A look at the models of a device that may be evicted, the first to go first.
"""

Planner: TypeAlias = (
    "Callable[[Sequence[Pending], Mapping[str, Room], Shelf, Shelf], list[Decision]]"
)
"""
The type of `plan`, and of other rules in its place.
"""


@dataclass(slots=True)
class _Scratch:
    """
    The state that one walk along the queue passes on from request to request.

    Attributes:
        rooms: The devices' memory, with what older requests were given.
        idle: The models that may be evicted from a device.
        busy: The models that may be evicted once they are idle.
        chosen: Models that were decided on: to be evicted, to stay, or to be loaded.
        stuck: Places of stuck requests, by device.
        barred: Devices on which no load may pass a stuck request any more.
        wanted: Models of stuck requests.
    """

    rooms: Mapping[str, Room]
    idle: Shelf
    busy: Shelf
    chosen: set[ModelKey] = field(default_factory=set)
    stuck: dict[str, list[int]] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)
    wanted: set[ModelKey] = field(default_factory=set)


def plan(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Shelf,
    busy: Shelf,
) -> list[Decision]:
    """
    Returns what should happen to each request of *queue*, oldest first.

    Args:
        queue: The requests that wait.
        rooms: The devices' memory. They are written to; pass copies.
        idle: Given a device, the models that may be evicted from it, the first to go
            first. Asked only when something has to go.
        busy: Likewise, leased models that may be evicted once they are idle.
    """
    scratch = _Scratch(rooms, idle, busy)
    return [_decide(scratch, place, pending) for place, pending in enumerate(queue)]


def _decide(scratch: _Scratch, place: int, pending: Pending) -> Decision:
    """
    Returns the decision on one request, in one of six cases.
    """
    # (1) Its models are on their way, or were chosen for an older request.
    if pending.need is Need.NOTHING or not scratch.chosen.isdisjoint(pending.keys):
        return Decision(Outcome.WAIT)
    # (2) It can never fit.
    if lacking := _never(scratch, pending):
        return Decision(Outcome.NEVER, lacking=lacking)
    # (3) A stuck request was overtaken too often here. A request that passes is spared:
    # the stuck one waits for leases of its caller, so both would wait for ever.
    devices = [demand.device for demand in pending.demands]
    is_load = pending.need is Need.LOAD
    if is_load and not pending.passes and not scratch.barred.isdisjoint(devices):
        return Decision(Outcome.WAIT)
    # (4) It fits.
    rooms = [scratch.rooms[device] for device in devices]
    if all(map(Room.fits, rooms, pending.demands)):
        for room, demand in zip(rooms, pending.demands, strict=True):
            room.charge(demand)
        scratch.chosen.update(pending.keys)
        passed = {i for device in devices for i in scratch.stuck.get(device, ())}
        outcome = Outcome.LOAD if is_load else Outcome.GRANT
        overtakes = tuple(sorted(passed)) if is_load else ()
        return Decision(outcome, overtakes=overtakes)
    # (5) It fits once idle models are unloaded. They and what is free are set aside, so
    # that no younger request takes them.
    victims = _victims_for(scratch, pending)
    if victims is not None:
        scratch.chosen.update(pending.keys)
        for victim in victims:
            scratch.chosen.add(victim.key)
            scratch.rooms[victim.device].expect(victim)
        for room, demand in zip(rooms, pending.demands, strict=True):
            room.promise(demand)
        return Decision(Outcome.WAIT, victims=victims)
    # (6) It is stuck until leases end.
    return _stick(scratch, place, pending)


def _never(scratch: _Scratch, pending: Pending) -> tuple[Demand, int] | None:
    """
    Returns the first demand that no release of ours could ever meet, and the most that
    could be had.
    """
    for demand in pending.demands:
        room = scratch.rooms[demand.device]
        reachable_bytes = max(0, room.reachable_bytes() - demand.own_bytes)
        if demand.n_bytes > reachable_bytes:
            return demand, reachable_bytes
        if demand.models and room.reachable_models() < (
            demand.models + demand.own_models
        ):
            return demand, 0
    return None


def _victims_for(scratch: _Scratch, pending: Pending) -> tuple[Resident, ...] | None:
    victims: list[Resident] = []
    for demand in pending.demands:
        # What an older request will use, or is being unloaded for it, is no candidate.
        idle = [
            resident
            for resident in scratch.idle(demand.device)
            if resident.key not in scratch.chosen
        ]
        candidates = [each for each in idle if each.key not in pending.keys]
        # A model of its own is evicted only if its copy stands in another one's way:
        # then it is loaded again, without a copy.
        candidates += [r for r in idle if r.key in pending.keys and r.is_copy]
        missing = scratch.rooms[demand.device].shortfall(demand)
        found = choose_victims(candidates, *missing)
        # All or nothing: an eviction on one device is wasted if another one is full.
        if found is None:
            return None
        victims.extend(found)
    return tuple(victims)


def _stick(scratch: _Scratch, place: int, pending: Pending) -> Decision:
    """
    Keeps a request waiting that no idle model can serve, and says for what it waits.
    """
    for demand in pending.demands:
        scratch.stuck.setdefault(demand.device, []).append(place)
        # Impatience alone bars nothing: drained models return what it needs, and loads
        # that fit may go on (benchmarks/simulate: a fifth less stall on a small card).
        if pending.overtaken >= MAX_OVERTAKES:
            scratch.barred.add(demand.device)
    drain: list[ModelKey] = []
    if pending.impatient:
        for demand in pending.demands:
            room = scratch.rooms[demand.device]
            there = (*scratch.idle(demand.device), *scratch.busy(demand.device))
            leaving = [
                resident
                for resident in there
                if (resident.key not in pending.keys or resident.is_copy)
                and resident.key not in scratch.chosen
                and resident.key not in scratch.wanted
            ]
            found = choose_victims(leaving, *room.shortfall(demand))
            drain.extend(each.key for each in (leaving if found is None else found))
            # With several workers, other leases on its own model use its memory up.
            if pending.shares:
                drain.extend(each.key for each in there if each.key in pending.keys)
    # No younger request drains what this one will use.
    scratch.wanted.update(pending.keys)
    return Decision(Outcome.WAIT, drain=tuple(drain))


def shrink(room: Room, idle: Iterable[Resident]) -> tuple[Resident, ...]:
    """
    Returns the idle models to unload after a limit was lowered: all, if it takes so
    many.
    """
    idle = tuple(idle)
    # What is being unloaded already counts as gone.
    excess_bytes = -room.free_bytes - room.coming_bytes
    excess_models = max(0, -room.free_models - room.coming_models)
    if excess_bytes <= 0 and not excess_models:
        return ()
    victims = choose_victims(idle, excess_bytes, excess_models)
    return idle if victims is None else victims
