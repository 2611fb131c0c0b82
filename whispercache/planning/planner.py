"""
Admit: who gets memory, who waits, and who leaves. Pure: no lock, clock, thread or I/O.

`plan` walks the queue once, oldest first, over scratch copies of the devices' rooms,
and says for each request what should happen. The caller carries it out. The same code
runs under a cache, in ``explain()``, and in a simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from whispercache.keys import ModelKey

__all__ = [
    "MAX_OVERTAKES",
    "POLICIES",
    "Decision",
    "Demand",
    "Need",
    "Outcome",
    "Pending",
    "Policy",
    "Resident",
    "Room",
    "choose_victims",
    "next_gap_s",
    "plan",
    "shrink",
]

MAX_OVERTAKES = 16
"""
Loads that may pass a request which cannot be served yet.

Source: simulated; at a quarter of the working set, stall falls by 16 % against strict
order, and more overtakes gain nothing (FACTS, simulated policies).
"""


@dataclass(frozen=True, slots=True)
class Resident:
    """
    A model in memory, as a policy sees it.

    Attributes:
        key: The model.
        device: Where it is.
        weights_bytes: What its leaving would free.
        last_used_s: When its last lease ended, on the cache's clock.
        gap_s: Smoothed seconds between its uses; see `next_gap_s`.
        cost_s: Seconds that it takes to bring it back.
    """

    key: ModelKey
    device: str
    weights_bytes: int
    last_used_s: float
    gap_s: float
    cost_s: float

    @property
    def is_copy(self) -> bool:
        """
        True for the copy of its weights that the host keeps beside those on a card.
        """
        return self.device != self.key.device


Policy: TypeAlias = "Callable[[Resident, float], float]"
"""
A policy: a model and the time now, to a score. The lowest score leaves first.
"""


def _lru(resident: Resident, now_s: float) -> float:
    """
    Least recently used first.
    """
    return resident.last_used_s - now_s


def _gap(resident: Resident, now_s: float) -> float:
    """
    Cheapest second of absence per byte first.

    Source: simulated, 105 cells: 1.36 × the optimum's load seconds against LRU's 1.58
    (FACTS, simulated policies).
    """
    idle_s = max(now_s - resident.last_used_s, resident.gap_s, 1e-9)
    return resident.cost_s / (max(resident.weights_bytes, 1) * idle_s)


POLICIES: Mapping[str, Policy] = {"lru": _lru, "gap": _gap}


def next_gap_s(gap_s: float | None, since_last_use_s: float) -> float:
    """
    The smoothed gap after one more use; None before the first.
    """
    if gap_s is None:
        return since_last_use_s
    return gap_s + (min(since_last_use_s, 4 * gap_s) - gap_s) / 8


class Need(Enum):
    """
    What a waiting request is waiting for.
    """

    LOAD = auto()
    """
    Its model is absent: room for it, then a load.
    """
    WORKSPACE = auto()
    """
    Its model is resident: room for the work of one more lease.
    """
    NOTHING = auto()
    """
    Its model is on its way in or out, or kept back for an older request.
    """


@dataclass(frozen=True, slots=True)
class Demand:
    """
    What serving a request would add on one device, and what it keeps there already.

    Attributes:
        device: The device.
        n_bytes: Bytes to add.
        models: Models to add.
        own_bytes: What its own models hold there, which cannot leave to serve it;
            pinned ones are not counted, since they never leave.
        own_models: How many those are.
    """

    device: str
    n_bytes: int
    models: int = 0
    own_bytes: int = 0
    own_models: int = 0


@dataclass(frozen=True, slots=True)
class Pending:
    """
    One request in the queue, for one model or for several at once.

    Attributes:
        keys: The models that it wants, all or nothing.
        need: What it waits for.
        demands: What serving it would add, by device.
        overtaken: Loads that have passed it so far.
        impatient: It has waited longer than the patience of the cache.
        passes: An older request waits for leases of its caller, so it must not wait
            for that one in turn.
        shares: Other leases on its own models add to what it needs.
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
    A device's memory, as the cache may use it; scratch for one `plan`.

    Attributes:
        capacity_bytes: What may be charged now, by the limit and by the gauge.
        ceiling_bytes: What could be charged if the cache held nothing.
        charged_bytes: Reserved and resident bytes, loads in flight included.
        coming_bytes: Those of *charged_bytes* that unloads in flight will return.
        pinned_bytes: Those that never leave by themselves.
        max_models: How many models may be there; None for any number.
        models: How many are, loads and unloads in flight included.
        coming_models: Those of *models* that are being unloaded.
        pinned_models: Those that never leave by themselves.
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
        What may still be charged; negative after a limit was lowered.
        """
        return self.capacity_bytes - self.charged_bytes

    @property
    def free_models(self) -> int:
        """
        How many more models may come.
        """
        if self.max_models is None:
            return 1 << 62
        return self.max_models - self.models

    def fits(self, demand: Demand) -> bool:
        """
        Whether *demand* can be served at once.
        """
        return self._short(demand, coming=False) == (0, 0)

    def shortfall(self, demand: Demand) -> tuple[int, int]:
        """
        Bytes and models that are missing even after the unloads in flight.
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
        What one request could have if every model that may leave had left.
        """
        return self.ceiling_bytes - self.pinned_bytes

    def reachable_models(self) -> int:
        """
        How many models one request could have, likewise.
        """
        if self.max_models is None:
            return 1 << 62
        return self.max_models - self.pinned_models

    def charge(self, demand: Demand) -> None:
        """
        Give *demand* its memory.
        """
        self.charged_bytes += demand.n_bytes
        self.models += demand.models

    def promise(self, demand: Demand) -> None:
        """
        Set aside what is free and what comes, so that nobody behind takes it.
        """
        from_free = max(0, min(demand.n_bytes, self.free_bytes))
        self.charged_bytes += from_free
        self.coming_bytes -= demand.n_bytes - from_free
        self.models += min(demand.models, max(0, self.free_models))
        self.coming_models -= demand.models

    def expect(self, victim: Resident) -> None:
        """
        Count *victim* as being unloaded.
        """
        self.coming_bytes += victim.weights_bytes
        self.coming_models += 1


class Outcome(Enum):
    """
    What `plan` decided for one request.
    """

    GRANT = auto()
    LOAD = auto()
    WAIT = auto()
    NEVER = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """
    What should happen to one request of the queue.

    Attributes:
        outcome: Grant it, start its load, let it wait, or fail it.
        victims: Idle models to unload for it.
        overtakes: Places in the queue of the stuck requests that its load passes.
        drain: Busy models on which no new lease should be granted until it is served.
        lacking: The demand that can never be met, and what could be had at most.
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
    The models to unload so that *n_bytes* and *models* come free; None if too few.

    Taken in the order given until there is enough. Then the keep pass, from the last
    taken to the first, spares each whose bytes turned out not to be needed. For models
    of one size that is exactly the order given.
    """
    taken: list[Resident] = []
    missing_bytes = n_bytes
    for resident in idle:
        if missing_bytes <= 0 and len(taken) >= models:
            break
        taken.append(resident)
        missing_bytes -= resident.weights_bytes
    if missing_bytes > 0 or len(taken) < models:
        return None
    for resident in reversed(taken[:]):
        if missing_bytes + resident.weights_bytes <= 0 and len(taken) > models:
            taken.remove(resident)
            missing_bytes += resident.weights_bytes
    return tuple(taken)


@dataclass(slots=True)
class _Scratch:
    """
    The state that one walk along the queue passes on from request to request.
    """

    rooms: Mapping[str, Room]
    idle: Callable[[str], Sequence[Resident]]
    busy: Callable[[str], Sequence[Resident]]
    chosen: set[ModelKey] = field(default_factory=set)  # to leave, to stay, or to come
    stuck: dict[str, list[int]] = field(default_factory=dict)
    barred: set[str] = field(default_factory=set)
    wanted: set[ModelKey] = field(default_factory=set)  # by who is stuck


def plan(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Callable[[str], Sequence[Resident]],
    busy: Callable[[str], Sequence[Resident]],
) -> list[Decision]:
    """
    What should happen to each request of *queue*, oldest first.

    Args:
        queue: The requests that wait.
        rooms: The devices' memory. They are written to; pass copies.
        idle: Given a device, the models that may leave it, the first to leave first.
            Asked only when something has to leave.
        busy: Likewise, leased models that may leave once they are idle.
    """
    scratch = _Scratch(rooms, idle, busy)
    return [_decide(scratch, place, pending) for place, pending in enumerate(queue)]


def _decide(scratch: _Scratch, place: int, pending: Pending) -> Decision:
    if pending.need is Need.NOTHING or not scratch.chosen.isdisjoint(pending.keys):
        return Decision(Outcome.WAIT)  # the latter: chosen for an older one
    if lacking := _never(scratch, pending):
        return Decision(Outcome.NEVER, lacking=lacking)
    devices = [demand.device for demand in pending.demands]
    is_load = pending.need is Need.LOAD
    if is_load and not pending.passes and not scratch.barred.isdisjoint(devices):
        return Decision(Outcome.WAIT)
    rooms = [scratch.rooms[device] for device in devices]
    passed = tuple(
        sorted({i for device in devices for i in scratch.stuck.get(device, ())})
    )
    if all(map(Room.fits, rooms, pending.demands)):
        for room, demand in zip(rooms, pending.demands, strict=True):
            room.charge(demand)
        scratch.chosen.update(pending.keys)
        outcome = Outcome.LOAD if is_load else Outcome.GRANT
        return Decision(outcome, overtakes=passed if is_load else ())
    victims = _victims_for(scratch, pending)
    if victims is None:
        return _stick(scratch, place, pending)
    scratch.chosen.update(pending.keys)
    for victim in victims:
        scratch.chosen.add(victim.key)
        scratch.rooms[victim.device].expect(victim)
    for room, demand in zip(rooms, pending.demands, strict=True):
        room.promise(demand)
    return Decision(Outcome.WAIT, victims=victims)


def _never(scratch: _Scratch, pending: Pending) -> tuple[Demand, int] | None:
    """
    The first demand that no release of ours could ever meet.
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
    """
    Idle models whose leaving would meet all demands of *pending*.
    """
    victims: list[Resident] = []
    for demand in pending.demands:
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
        if found is None:
            return None
        victims.extend(found)
    return tuple(victims)


def _stick(scratch: _Scratch, place: int, pending: Pending) -> Decision:
    """
    Let a request wait that nothing idle can serve, and say what it waits for.
    """
    for demand in pending.demands:
        scratch.stuck.setdefault(demand.device, []).append(place)
        # Not impatience: drained models return what it needs, and loads that fit may
        # go on (benchmarks/simulate.py: a fifth less stall on a small card).
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
            if pending.shares:
                drain.extend(each.key for each in there if each.key in pending.keys)
    # Nobody behind holds back what this one will use.
    scratch.wanted.update(pending.keys)
    return Decision(Outcome.WAIT, drain=tuple(drain))


def shrink(room: Room, idle: Iterable[Resident]) -> tuple[Resident, ...]:
    """
    The idle models to unload after a limit was lowered; all, if it takes so many.
    """
    idle = tuple(idle)
    excess_bytes = -room.free_bytes - room.coming_bytes
    excess_models = max(0, -room.free_models - room.coming_models)
    if excess_bytes <= 0 and not excess_models:
        return ()
    victims = choose_victims(idle, excess_bytes, excess_models)
    return idle if victims is None else victims
