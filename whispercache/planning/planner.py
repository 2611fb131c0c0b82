"""
The planner: which requests get memory, which wait, and which idle models are evicted.

A `Walk` goes along the queue once, oldest first, over scratch copies of the devices'
rooms, and decides on each request that it is shown. `core.round` shows it those on
which it matters, and `core.scheduler` carries the decisions out. `plan` shows it all of
a queue: the same rules, at their plainest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from .room import Margin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from whispercache.keys import ModelKey

    from .policies import Resident
    from .room import Demand, Room

MAX_OVERTAKES = 16
"""
Loads that may pass a request which cannot be served yet.

Source: simulated; at a quarter of the working set, stall falls by 16 % against strict
order, and more overtakes gain nothing (benchmarks/simulate).
"""


Place = TypeVar("Place")
"""
A place in a queue: of any kind that can be compared, and grows along it.
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


@dataclass(slots=True)
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
        asks_below: Leases of a lower level that can be given back are asked to be, for
            it; minus infinity for none.
    """

    keys: tuple[ModelKey, ...]
    need: Need
    demands: tuple[Demand, ...] = ()
    overtaken: int = 0
    impatient: bool = False
    passes: bool = False
    shares: bool = False
    asks_below: float = -math.inf


class Outcome(Enum):
    """
    The kinds of decisions on a request, in the order in which they are considered.
    """

    HELD = auto()
    """
    It waits: its models are on their way, or were chosen for an older request.
    """
    NEVER = auto()
    """
    It fails: it can never fit.
    """
    BARRED = auto()
    """
    It waits its turn: a stuck request was overtaken too often.
    """
    GRANT = auto()
    LOAD = auto()
    PROMISED = auto()
    """
    It waits for unloads; its memory is set aside.
    """
    STUCK = auto()
    """
    It waits until leases end.
    """


@dataclass(slots=True)
class Decision:
    """
    A decision on one request of the queue.

    Attributes:
        outcome: The kind of decision.
        victims: Idle models to unload for it.
        overtakes: Places of the stuck requests that its load passes.
        drain: Models on which no new lease should be granted until it is served.
        lacking: The demand that can never be met, and the most that could be had.
    """

    outcome: Outcome
    victims: tuple[Resident, ...] = ()
    overtakes: tuple[Any, ...] = ()
    drain: tuple[ModelKey, ...] = ()
    lacking: tuple[Demand, int] | None = None

    @property
    def waits(self) -> bool:
        """
        True if the request stays in the queue, and no load of its own starts.
        """
        return self.outcome not in (Outcome.GRANT, Outcome.LOAD, Outcome.NEVER)


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


Shelf: TypeAlias = "Callable[[str], Iterable[Resident]]"
"""
A look at the models of a device that may be evicted, the first to go first.
"""

Planner: TypeAlias = (
    "Callable[[Sequence[Pending], Mapping[str, Room], Shelf, Shelf], list[Decision]]"
)
"""
The type of `plan`, and of other rules in its place.
"""


def plan(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Shelf,
    busy: Shelf,
) -> list[Decision]:
    """
    Returns what should happen to each request of *queue*, oldest first.

    The parameters are those of `Walk`.
    """
    walk: Walk[int] = Walk(rooms, idle, busy)
    return [walk.decide(place, pending) for place, pending in enumerate(queue)]


class Walk(Generic[Place]):
    """
    A walk along a queue, and what it passes on from request to request.

    Args:
        rooms: The devices' memory. They are written to; pass copies.
        idle: Given a device, the models that may be evicted from it, the first to go
            first. Asked only when something has to go.
        busy: Likewise, leased models that may be evicted once they are idle.

    Attributes:
        chosen: Models that were decided on: to be evicted, to stay, or to be loaded.
        stuck: The devices of each stuck request, by its place.
        barred: Devices on which no load may pass a stuck request any more, with the
            place of that.
        promised_bytes: Bytes that were set aside, by device.
        margins: The growth that might change a decision, by device.
    """

    def __init__(self, rooms: Mapping[str, Room], idle: Shelf, busy: Shelf) -> None:
        self._rooms = rooms
        self._idle = idle
        self._busy = busy
        self.chosen: set[ModelKey] = set()
        self.stuck: dict[Place, tuple[str, ...]] = {}
        self.barred: dict[str, Place] = {}
        self.promised_bytes: defaultdict[str, int] = defaultdict(int)
        self.margins: defaultdict[str, Margin] = defaultdict(Margin)
        # Models of stuck requests.
        self._wanted: set[ModelKey] = set()

    def decide(self, place: Place, pending: Pending) -> Decision:
        """
        Returns the decision on one request, in one of six cases. Those before it in the
        queue come first; *place* grows along it.
        """
        # (1) Its models are on their way, or were chosen for an older request.
        if pending.need is Need.NOTHING or not self.chosen.isdisjoint(pending.keys):
            return Decision(Outcome.HELD)
        # (2) It can never fit.
        if lacking := self._never(pending):
            return Decision(Outcome.NEVER, lacking=lacking)
        # (3) A stuck request was overtaken too often here.
        if self.barred and self._is_barred(pending):
            return Decision(Outcome.BARRED)
        # (4) It fits.
        rooms = self._rooms
        if all(rooms[demand.device].fits(demand) for demand in pending.demands):
            return self._serve(pending)
        # (5) It fits once idle models are unloaded. They and what is free are set
        # aside, so that no younger request takes them.
        victims = self._victims_for(pending)
        if victims is not None:
            self._promise(pending, victims)
            return Decision(Outcome.PROMISED, victims=victims)
        # (6) It is stuck until leases end.
        return self._stick(place, pending)

    def _is_barred(self, pending: Pending) -> bool:
        # A request that passes is spared: the stuck one waits for leases of its caller,
        # so both would wait for ever.
        if pending.need is not Need.LOAD or pending.passes:
            return False
        return any(demand.device in self.barred for demand in pending.demands)

    def _serve(self, pending: Pending) -> Decision:
        for demand in pending.demands:
            self._rooms[demand.device].charge(demand)
        self.chosen.update(pending.keys)
        if pending.need is not Need.LOAD:
            return Decision(Outcome.GRANT)
        return Decision(Outcome.LOAD, overtakes=self._passed(pending.demands))

    def _passed(self, demands: tuple[Demand, ...]) -> tuple[Place, ...]:
        devices = {demand.device for demand in demands}
        return tuple(
            place
            for place, theirs in self.stuck.items()
            if not devices.isdisjoint(theirs)
        )

    def _never(self, pending: Pending) -> tuple[Demand, int] | None:
        """
        Returns the first demand that no release of ours could ever meet, and the most
        that could be had.
        """
        for demand in pending.demands:
            room = self._rooms[demand.device]
            reachable_bytes = max(0, room.reachable_bytes() - demand.own_bytes)
            if demand.n_bytes > reachable_bytes:
                return demand, reachable_bytes
            models = demand.models + demand.own_models
            if demand.models and models > room.reachable_models():
                return demand, 0
        return None

    def _victims_for(self, pending: Pending) -> tuple[Resident, ...] | None:
        victims: list[Resident] = []
        for demand in pending.demands:
            room = self._rooms[demand.device]
            n_bytes, models = room.shortfall(demand)
            # All or nothing: an eviction on one device is wasted if another is full.
            if not n_bytes and not models:
                continue
            if n_bytes > room.idle_bytes or models > room.idle_models:
                self._note_reach(demand, n_bytes - room.idle_bytes)
                return None
            found = choose_victims(self._candidates(demand, pending), n_bytes, models)
            if found is None:
                idle = self._candidates(demand, pending)
                more_bytes = n_bytes - sum(each.weights_bytes for each in idle)
                self._note_reach(demand, more_bytes)
                return None
            victims.extend(found)
        return tuple(victims)

    def _note_reach(self, demand: Demand, more_bytes: float) -> None:
        margin = self.margins[demand.device]
        # One of the two is enough to keep it waiting.
        if more_bytes > 0:
            margin.reach_bytes = min(margin.reach_bytes, more_bytes)
        else:
            margin.reach_models = min(margin.reach_models, 1)

    def _candidates(self, demand: Demand, pending: Pending) -> Iterator[Resident]:
        """
        Returns the models that may be evicted from the device of *demand* for it.
        """
        own_copies = []
        for resident in self._idle(demand.device):
            # What an older request will use, or is being unloaded for it, is none.
            if resident.key in self.chosen:
                continue
            if resident.key not in pending.keys:
                yield resident
            elif resident.is_copy:
                own_copies.append(resident)
        # A model of its own is evicted only if its copy stands in another one's way:
        # then it is loaded again, without a copy.
        yield from own_copies

    def _promise(self, pending: Pending, victims: tuple[Resident, ...]) -> None:
        """
        Sets memory aside for a request that waits for unloads.
        """
        is_noted = False
        for demand in pending.demands:
            n_bytes, models = self._rooms[demand.device].lack(demand)
            # What one device lacks is enough to keep it waiting.
            if (n_bytes or models) and not is_noted:
                is_noted = True
                margin = self.margins[demand.device]
                if n_bytes:
                    margin.free_bytes = min(margin.free_bytes, n_bytes)
                else:
                    margin.free_models = min(margin.free_models, models)
        self.chosen.update(pending.keys)
        for victim in victims:
            self.chosen.add(victim.key)
            self._rooms[victim.device].expect(victim)
        for demand in pending.demands:
            self._rooms[demand.device].promise(demand)
            self.promised_bytes[demand.device] += demand.n_bytes

    def _stick(self, place: Place, pending: Pending) -> Decision:
        """
        Keeps a request waiting that no idle model can serve, and says for what it
        waits.
        """
        self.stuck[place] = tuple(demand.device for demand in pending.demands)
        # Impatience alone bars nothing: drained models return what it needs, and loads
        # that fit may go on (benchmarks/simulate: a fifth less stall on a small card).
        if pending.overtaken >= MAX_OVERTAKES:
            for demand in pending.demands:
                self.barred.setdefault(demand.device, place)
        drain: list[ModelKey] = []
        asks = pending.impatient or pending.asks_below > -math.inf
        for demand in pending.demands if asks else ():
            found = self._drain_for(demand, pending)
            # Without impatience, nothing is kept back unless it helps for sure.
            if found is None:
                drain.clear()
                break
            drain += found
        # No younger request drains what this one will use.
        self._wanted.update(pending.keys)
        return Decision(Outcome.STUCK, drain=tuple(drain))

    def _drain_for(self, demand: Demand, pending: Pending) -> list[ModelKey] | None:
        """
        Returns the models that should take no new leases until *demand* is met; None if
        the request is patient, and those whose leases end for it are too few.
        """
        device = demand.device
        there = [*self._idle(device), *self._busy(device)]
        leaving = [
            resident
            for resident in there
            if (resident.key not in pending.keys or resident.is_copy)
            and resident.key not in self.chosen
            and resident.key not in self._wanted
            and (pending.impatient or resident.yields_to < pending.asks_below)
        ]
        n_bytes, models = self._rooms[device].shortfall(demand)
        found = choose_victims(leaving, n_bytes, models)
        if found is None and not pending.impatient:
            # As much more as it takes may come without the end of one of these.
            leaving_bytes = sum(each.weights_bytes for each in leaving)
            self._note_reach(demand, n_bytes - leaving_bytes)
            return None
        drain = [each.key for each in (leaving if found is None else found)]
        # With several workers, other leases on its own model use its memory up.
        if pending.impatient and pending.shares:
            drain += (each.key for each in there if each.key in pending.keys)
        return drain


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
