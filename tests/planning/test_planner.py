"""
Admission: the pure plan, on examples and on whatever Hypothesis thinks of.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
from effort import tries
from hypothesis import event, given, settings
from hypothesis import strategies as st

from whispercache.keys import ModelKey
from whispercache.planning.planner import (
    MAX_OVERTAKES,
    Decision,
    Need,
    Outcome,
    Pending,
    choose_victims,
    plan,
    shrink,
)
from whispercache.planning.policies import POLICIES, Resident, next_gap_s
from whispercache.planning.room import Demand, Room

pytestmark = pytest.mark.soak

MANY = settings(max_examples=tries(250))
CARD, HOST = "cuda:0", "cpu"


def key(name: object, device: str = CARD) -> ModelKey:
    """
    Some key.
    """
    return ModelKey(str(name), device, "float16")


def resident(name: object, weights_bytes: int, device: str = CARD) -> Resident:
    """
    A model in memory.
    """
    return Resident(key(name, device), device, weights_bytes, 0.0, 0.0, 1.0)


@dataclass
class World:
    """
    Devices, what is on them, and who waits.
    """

    rooms: dict[str, Room]
    idle: dict[str, list[Resident]]
    busy: dict[str, list[Resident]]
    queue: list[Pending]

    def plan(self) -> list[Decision]:
        """
        What should happen, on copies.
        """
        return plan(
            self.queue,
            copy.deepcopy(self.rooms),
            self.idle.__getitem__,
            self.busy.__getitem__,
        )


sizes = st.integers(1, 8)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """
    Books that agree with each other, and a queue that they may or may not serve.
    """
    world = World({}, {}, {}, [])
    for device in (CARD, HOST):
        draw_device(draw, world, device)
    absent = [f"new {number}" for number in range(6)]
    idle = world.idle[CARD]
    for _ in range(draw(st.sampled_from(range(1, 8)))):
        overtaken = draw(st.sampled_from([0, 0, 1, MAX_OVERTAKES - 1, MAX_OVERTAKES]))
        impatient = draw(st.sampled_from([False, False, True]))
        kinds = ["nothing", *["load"] * (2 * bool(absent)), *["work"] * bool(idle)]
        kind = draw(st.sampled_from(kinds))
        if kind == "load":
            demands = [Demand(CARD, draw(sizes), models=1)]
            if draw(st.booleans()):
                demands.append(Demand(HOST, draw(sizes)))
            count = draw(st.integers(1, min(2, len(absent))))
            demands[0] = replace(demands[0], models=count)
            keys = tuple(key(absent.pop()) for _ in range(count))
            pending = Pending(keys, Need.LOAD, tuple(demands), overtaken, impatient)
        elif kind == "work":
            model = draw(st.sampled_from(idle))
            demand = Demand(CARD, draw(st.integers(0, 8)), 0, model.weights_bytes, 1)
            keys, need = (model.key,), Need.WORKSPACE
            if absent and draw(
                st.sampled_from([False, True])
            ):  # together with one that is not there
                keys, need = (*keys, key(absent.pop())), Need.LOAD
                demand = replace(demand, n_bytes=demand.n_bytes + 1, models=1)
            pending = Pending(
                keys,
                need,
                (demand,),
                overtaken,
                impatient,
                passes=draw(st.sampled_from([False, False, True])),
                shares=draw(st.booleans()),
            )
        else:
            pending = Pending((key("leaving"),), Need.NOTHING)
        world.queue.append(pending)
    return world


def draw_device(draw: st.DrawFn, world: World, device: str) -> None:
    """
    Add a device with models on it.
    """
    lists: dict[str, list[Resident]] = {}
    for kind in ("idle", "busy", "coming", "pinned"):
        weights = draw(st.lists(sizes, max_size=4 if kind == "idle" else 2))
        lists[kind] = [
            resident(f"{kind} {place}", weight, device)
            for place, weight in enumerate(weights)
        ]
    held = {
        kind: sum(each.weights_bytes for each in models)
        for kind, models in lists.items()
    }
    work = draw(st.integers(0, 4)) if lists["busy"] else 0
    charged = sum(held.values()) + work
    count = sum(map(len, lists.values()))
    capacity = charged + draw(st.sampled_from([-3, 0, 1, 2, 3, 4, 6, 8, 12]))
    world.idle[device], world.busy[device] = lists["idle"], lists["busy"]
    world.rooms[device] = Room(
        capacity_bytes=max(0, capacity),
        ceiling_bytes=max(0, capacity) + draw(st.sampled_from([0, 0, work])),
        charged_bytes=charged,
        coming_bytes=held["coming"],
        pinned_bytes=held["pinned"],
        max_models=draw(st.none() | st.integers(max(1, count - 1), count + 3)),
        models=count,
        coming_models=len(lists["coming"]),
        pinned_models=len(lists["pinned"]),
    )


def served(world: World, decisions: list[Decision]) -> dict[str, tuple[int, int]]:
    """
    Bytes and models that granted requests add, by device.
    """
    added: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for pending, decision in zip(world.queue, decisions, strict=True):
        if decision.outcome in (Outcome.GRANT, Outcome.LOAD):
            add(added, pending)
    return added


def add(added: defaultdict[str, tuple[int, int]], pending: Pending) -> None:
    """
    Count the demands of a request.
    """
    for demand in pending.demands:
        n_bytes, models = added[demand.device]
        added[demand.device] = n_bytes + demand.n_bytes, models + demand.models


@pytest.mark.slow
@MANY
@given(worlds())
def test_capacity_is_never_exceeded(world: World) -> None:
    """
    All that is granted together fits into what is free, in bytes and in number.
    """
    for device, (n_bytes, models) in served(world, world.plan()).items():
        event("something is served")
        room = world.rooms[device]
        assert not n_bytes or room.charged_bytes + n_bytes <= room.capacity_bytes
        if models and room.max_models is not None:
            assert room.models + models <= room.max_models


@pytest.mark.slow
@MANY
@given(worlds())
def test_victims_are_idle_and_chosen_once(world: World) -> None:
    """
    Nobody's own model leaves for it, and no model leaves that is granted.
    """
    decisions = world.plan()
    victims = [victim for decision in decisions for victim in decision.victims]
    idle = [*world.idle[CARD], *world.idle[HOST]]
    assert all(victim in idle for victim in victims)
    assert len({victim.key for victim in victims}) == len(victims)
    for pending, decision in zip(world.queue, decisions, strict=True):
        own = set(pending.keys)
        assert own.isdisjoint(victim.key for victim in decision.victims)
        if decision.outcome in (Outcome.GRANT, Outcome.LOAD):
            assert own.isdisjoint(victim.key for victim in victims)


@pytest.mark.slow
@MANY
@given(worlds())
def test_who_waits_for_victims_gets_what_they_free(world: World) -> None:
    """
    A promised byte is not given to anybody behind: when all unloads are over, all who
    were served and all who wait for victims fit together.
    """
    decisions = world.plan()
    added: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    freed: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for pending, decision in zip(world.queue, decisions, strict=True):
        if decision.victims or decision.outcome in (Outcome.GRANT, Outcome.LOAD):
            add(added, pending)
        for victim in decision.victims:
            n_bytes, models = freed[victim.device]
            freed[victim.device] = n_bytes + victim.weights_bytes, models + 1
    for device, (n_bytes, models) in added.items():
        room = world.rooms[device]
        free_bytes = room.free_bytes + room.coming_bytes + freed[device][0]
        assert not n_bytes or n_bytes <= free_bytes
        if models and room.max_models is not None:
            free_models = room.free_models + room.coming_models + freed[device][1]
            assert models <= free_models


@pytest.mark.slow
@MANY
@given(worlds())
def test_what_can_never_be_had_evicts_nothing(world: World) -> None:
    """
    It fails, with the demand that is too much; whatever may be had one day does not.
    """
    for decision in world.plan():
        if decision.outcome is not Outcome.NEVER:
            assert decision.lacking is None
            continue
        event("never")
        assert not decision.victims
        assert not decision.drain
        assert decision.lacking is not None
        demand, reachable_bytes = decision.lacking
        room = world.rooms[demand.device]
        too_many = room.max_models is not None and (
            room.max_models < room.pinned_models + demand.models + demand.own_models
        )
        most_bytes = room.ceiling_bytes - room.pinned_bytes - demand.own_bytes
        most_bytes = max(0, most_bytes)
        assert reachable_bytes in (0, most_bytes)
        assert demand.n_bytes > most_bytes or (demand.models and too_many)


@pytest.mark.slow
@MANY
@given(worlds())
def test_a_load_passes_only_those_who_may_be_passed(world: World) -> None:
    """
    Not one that was passed often enough.
    """
    for place, decision in enumerate(world.plan()):
        assert decision.outcome is Outcome.LOAD or not decision.overtakes
        assert list(decision.overtakes) == sorted(set(decision.overtakes))
        for passed in decision.overtakes:
            event("overtakes")
            assert passed < place
            may_pass = world.queue[place].passes
            assert may_pass or world.queue[passed].overtaken < MAX_OVERTAKES


@pytest.mark.slow
@MANY
@given(worlds())
def test_what_is_drained_is_enough_and_no_more(world: World) -> None:
    """
    On each device whose models are enough for an impatient request, exactly as many are
    held back as it takes; where they are too few, all.
    """
    pending = replace(world.queue[0], impatient=True)
    world.queue = [pending]
    (decision,) = world.plan()
    if not decision.drain:
        return
    event("drains")
    for demand in pending.demands:
        models = [*world.idle[demand.device], *world.busy[demand.device]]
        models = [each for each in models if each.key not in pending.keys]
        drained = [each for each in models if each.key in decision.drain]
        short_bytes, short_models = world.rooms[demand.device].shortfall(demand)
        if sum(each.weights_bytes for each in models) < short_bytes or (
            len(models) < short_models
        ):
            assert drained == models
            continue
        freed = sum(each.weights_bytes for each in drained)
        assert freed >= short_bytes
        assert len(drained) >= short_models
        for each in drained:
            spared = freed - each.weights_bytes
            assert spared < short_bytes or len(drained) == short_models


@pytest.mark.slow
@MANY
@given(worlds())
def test_the_patient_drain_nothing(world: World) -> None:
    """
    Until a request has waited for long enough, hits pass it.
    """
    for pending, decision in zip(world.queue, world.plan(), strict=True):
        assert pending.impatient or not decision.drain


@pytest.mark.slow
@MANY
@given(worlds())
def test_a_plan_changes_only_its_copies(world: World) -> None:
    """
    The same world gives the same plan.
    """
    assert world.plan() == world.plan()


@given(st.lists(sizes, max_size=8), st.integers(0, 30), st.integers(0, 4))
def test_no_victim_can_be_spared(weights: list[int], n_bytes: int, models: int) -> None:
    """
    Victims are enough, each is needed, and there are none only where all are too few.
    """
    idle = [resident(place, weight) for place, weight in enumerate(weights)]
    victims = choose_victims(iter(idle), n_bytes, models)
    if victims is None:
        assert sum(weights) < n_bytes or len(weights) < models
        return
    freed = sum(victim.weights_bytes for victim in victims)
    assert freed >= n_bytes
    assert len(victims) >= models
    assert list(victims) == [each for each in idle if each in victims]
    for victim in victims:
        assert freed - victim.weights_bytes < n_bytes or len(victims) == models


@given(st.integers(0, 8), st.integers(0, 30), st.integers(0, 4))
def test_equal_models_leave_exactly_in_order(
    count: int, n_bytes: int, models: int
) -> None:
    """
    The keep pass is no deviation from the policy where sizes are equal.
    """
    idle = [resident(place, 4) for place in range(count)]
    needed = max(-(-n_bytes // 4), models)
    victims = choose_victims(idle, n_bytes, models)
    assert victims == (tuple(idle[:needed]) if needed <= count else None)


def test_the_keep_pass_spares_small_ones() -> None:
    """
    The last model that is taken may be enough by itself.
    """
    idle = [resident("small", 1), resident("smaller", 1), resident("large", 8)]
    assert choose_victims(idle, 8) == (idle[2],)


@given(worlds(), st.integers(0, 12), st.none() | st.integers(0, 5))
def test_a_lowered_limit_is_met_or_nothing_idle_remains(
    world: World, capacity_bytes: int, max_models: int | None
) -> None:
    """
    What is on its way out already counts as gone.
    """
    room = replace(
        world.rooms[CARD], capacity_bytes=capacity_bytes, max_models=max_models
    )
    idle = world.idle[CARD]
    victims = shrink(room, idle)
    freed = sum(victim.weights_bytes for victim in victims)
    left_bytes = room.charged_bytes - room.coming_bytes - freed
    left_models = room.models - room.coming_models - len(victims)
    met = left_bytes <= capacity_bytes and left_models <= (max_models or left_models)
    if max_models == 0:
        met = met and left_models <= 0
    assert met or victims == tuple(idle)


def test_the_impatient_do_not_drain_where_nothing_is_missing() -> None:
    """
    A load that waits for a card holds back nothing on a host with room enough.
    """
    world = World(
        rooms={
            CARD: Room(10, 10, charged_bytes=8, models=1),
            HOST: Room(10, 10, charged_bytes=4, models=2),
        },
        idle={CARD: [], HOST: [resident("idle", 2, HOST)]},
        busy={CARD: [resident("busy", 8)], HOST: [resident("busy", 2, HOST)]},
        queue=[
            Pending(
                (key("new"),),
                Need.LOAD,
                (Demand(CARD, 6, 1), Demand(HOST, 2)),
                impatient=True,
            )
        ],
    )
    (decision,) = world.plan()
    assert decision.drain == (key("busy"),)


def test_a_victim_of_an_older_request_is_not_granted() -> None:
    """
    It is about to leave, whoever asks for it next.
    """
    old = resident("old", 4)
    world = World(
        rooms={CARD: Room(4, 4, charged_bytes=4, models=1)},
        idle={CARD: [old]},
        busy={CARD: []},
        queue=[
            Pending((key("new"),), Need.LOAD, (Demand(CARD, 4, 1),)),
            Pending((old.key,), Need.WORKSPACE, (Demand(CARD, 0, 0, 4, 1),)),
        ],
    )
    first, second = world.plan()
    assert first.victims == (old,)
    assert second == Decision(Outcome.HELD)


def test_a_place_that_one_victim_leaves_is_not_asked_of_another() -> None:
    """
    The first request takes the free place under ``max_models``, and only the bytes of
    its victim, whose place the second one takes.
    """
    old, idle = resident("old", 8), resident("idle", 1)
    world = World(
        rooms={CARD: Room(10, 10, charged_bytes=9, max_models=3, models=2)},
        idle={CARD: [old, idle]},
        busy={CARD: []},
        queue=[
            Pending((key("new"),), Need.LOAD, (Demand(CARD, 5, 1),)),
            Pending((key("newer"),), Need.LOAD, (Demand(CARD, 3, 1),)),
        ],
    )
    first, second = world.plan()
    assert first == Decision(Outcome.PROMISED, victims=(old,))
    assert second == Decision(Outcome.PROMISED)


def test_lru_and_gap_score_as_they_say() -> None:
    """
    LRU knows only the last use; gap weighs seconds of load against bytes and idleness.
    """
    old = replace(resident("old", 4), last_used_s=10.0)
    new = replace(resident("new", 4), last_used_s=20.0)
    assert POLICIES["lru"](old, 30.0) < POLICIES["lru"](new, 30.0)
    assert POLICIES["gap"](old, 30.0) < POLICIES["gap"](new, 30.0)
    dear = replace(old, cost_s=5.0)
    assert POLICIES["gap"](dear, 30.0) > POLICIES["gap"](new, 30.0)
    rare = replace(new, gap_s=100.0)
    assert POLICIES["gap"](rare, 30.0) < POLICIES["gap"](old, 30.0)
    assert POLICIES["gap"](replace(old, weights_bytes=0), 10.0) > 0


def test_the_gap_is_smoothed() -> None:
    """
    The first gap is the first pause; a single long pause counts four times at most.
    """
    assert next_gap_s(None, 8.0) == 8.0
    assert next_gap_s(8.0, 16.0) == 9.0
    assert next_gap_s(8.0, 1e9) == pytest.approx(8.0 + 24.0 / 8)


@pytest.mark.parametrize(
    ("overtaken", "impatient", "passed"),
    [(0, False, True), (MAX_OVERTAKES, False, False), (0, True, True)],
)
def test_a_load_that_fits_passes_one_that_is_stuck(
    *, overtaken: int, impatient: bool, passed: bool
) -> None:
    """
    So many times, however long that one has waited; on other devices always.
    """
    world = World(
        rooms={
            CARD: Room(10, 10, charged_bytes=8, models=1),
            HOST: Room(10, 10),
        },
        idle={CARD: [], HOST: []},
        busy={CARD: [resident("busy", 8)], HOST: []},
        queue=[
            Pending(
                (key("stuck"),),
                Need.LOAD,
                (Demand(CARD, 6, 1),),
                overtaken=overtaken,
                impatient=impatient,
            ),
            Pending((key("small"),), Need.LOAD, (Demand(CARD, 2, 1),)),
            Pending((key("small", HOST),), Need.LOAD, (Demand(HOST, 2, 1),)),
        ],
    )
    stuck, small, elsewhere = world.plan()
    assert stuck.outcome is Outcome.STUCK
    assert small.outcome is (Outcome.LOAD if passed else Outcome.BARRED)
    assert small.overtakes == ((0,) if passed else ())
    assert elsewhere == Decision(Outcome.LOAD)
