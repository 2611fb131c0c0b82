"""
The scheduler by itself: what it decides, as effects, with no thread, clock or model.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from whispercache import CacheClosed, LeaseTimeout, ModelTooLarge
from whispercache.core import effects, scheduler
from whispercache.core.agenda import Agenda, Rules
from whispercache.core.budget import Use
from whispercache.core.device import Device
from whispercache.core.effects import (
    LookAgain,
    Settle,
    StartLoad,
    StartUnload,
    Stop,
    WakeAt,
)
from whispercache.core.entries import Entry, State
from whispercache.core.evictions import Evictions
from whispercache.core.held_leases import HeldLeases
from whispercache.core.lock import Outbox
from whispercache.core.lookout import DEADLOCK_S
from whispercache.core.reports import FIRST_RETRY_S, Reports
from whispercache.core.scheduler import Scheduler
from whispercache.core.state import CacheState, Kept
from whispercache.core.ticks import Ticks
from whispercache.core.waiters import Waiter, Wanted
from whispercache.engine.api import LoadedModel, Released
from whispercache.engine.files import ModelFiles
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD, Footprint
from whispercache.events import EvictionCause
from whispercache.keys import ModelKey
from whispercache.planning.planner import MAX_OVERTAKES
from whispercache.planning.policies import POLICIES
from whispercache.units import Limit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache.planning.policies import Policy, Resident

CARD = "cuda:0"
FILES = ModelFiles("", "float16")
KEPT = Kept(0, 0, {})


class World:
    """
    A card with room for ten, its scheduler, and what that asked for.
    """

    def __init__(self, policy: Policy = POLICIES["lru"]) -> None:
        self.state = CacheState(lambda _: Limit(n_bytes=10), None, Outbox())
        for name in (CARD, "cpu"):
            device = Device(name, Limit(n_bytes=10), None, cast("Any", None))
            self.state.devices[name] = device
        self.now_s = 100.0
        self.noted: list[effects.Effect] = []
        self.lessor = SimpleNamespace(drop=lambda *_: None)
        agenda = Agenda(
            self.state,
            Rules(policy, keep_alive_s=60.0, patience_s=5.0),
            lambda: self.now_s,
            self.noted.append,
        )
        self.evictions = Evictions(agenda)
        self.scheduler = Scheduler(agenda, self.evictions, cast("Any", self.lessor))
        self.held_leases = HeldLeases(agenda, self.scheduler)
        self.ticks = Ticks(agenda, self.evictions, self.scheduler)
        self.reports = Reports(agenda, self.evictions, self.scheduler)

    def model(
        self, name: str, weights: int, workspace: int = 0, device: str = CARD
    ) -> Entry:
        """
        Returns a model that is located, and not in memory.
        """
        key = ModelKey(name, device, "float16")
        entry = Entry(key, self.state.devices[device], self.state.devices["cpu"])
        entry.locate(FILES, {DEFAULT_WORKLOAD: Footprint(weights, workspace, 0, 0)})
        self.state.entries[key] = entry
        return entry

    def ask(self, *entries: Entry, timeout_s: float | None = None) -> Waiter:
        """
        Queues a request.
        """
        wanted = tuple(Wanted(entry, DEFAULT_WORKLOAD) for entry in entries)
        waiter = Waiter(wanted, None, self.now_s, None)
        self.scheduler.enqueue(waiter, timeout_s)
        return waiter

    def load(self, entry: Entry) -> None:
        """
        Ends a load.
        """
        model = cast("Any", None)
        loaded = LoadedModel(
            entry.key,
            FILES,
            model,
            compute_type="float16",
            is_multilingual=True,
            supported_languages=(),
        )
        self.reports.loaded(entry, loaded, 1.0, KEPT)

    def idle(self, name: str, weights: int) -> Entry:
        """
        Returns a model that is in memory and not leased.
        """
        entry = self.model(name, weights)
        self.ask(entry)
        self.load(entry)
        self.release(entry)
        self.noted.clear()
        return entry

    def held(self, name: str, weights: int) -> Entry:
        """
        Returns a model that is leased.
        """
        entry = self.model(name, weights)
        self.ask(entry)
        self.load(entry)
        self.of(Settle)
        self.noted.clear()
        return entry

    def release(self, entry: Entry) -> None:
        """
        Ends all leases on a model.
        """
        for serial in list(entry.leases):
            self.scheduler.release(entry, serial, None)

    def of(self, kind: type[Any]) -> list[Any]:
        """
        Returns the effects of one kind so far, and forgets them.
        """
        found = [effect for effect in self.noted if isinstance(effect, kind)]
        for effect in self.noted:
            for lease in effect.leases if isinstance(effect, Settle) else ():
                lease.owned = True  # it ends by its number, and may be dropped
        self.noted[:] = [e for e in self.noted if not isinstance(e, kind)]
        return found

    def wake(self) -> None:
        """
        Lets time pass until the scheduler wants to be called, and calls it.
        """
        self.state.unset_s.clear()  # the clock knows of all
        at_s = self.state.wake_at_s
        self.now_s = max(self.now_s, at_s)
        self.ticks.tick(at_s)


@pytest.fixture
def world() -> Iterator[World]:
    """
    One, whose invariants hold at the end.
    """
    made = World()
    yield made
    made.scheduler.check()
    for entry in made.state.entries.values():
        made.release(entry)


# The six cases ------------------------------------------------------------------------


def test_a_second_request_shares_the_load(world: World) -> None:
    """
    (1) Its model is on its way: it waits, and both are granted by one load.
    """
    entry = world.model("base", 4)
    world.ask(entry)
    world.ask(entry)
    assert world.of(StartLoad) == [StartLoad(entry)]
    world.load(entry)
    assert len(world.of(Settle)) == 2


def test_what_can_never_fit_fails_and_evicts_nothing(world: World) -> None:
    """
    (2) With the numbers, and at once.
    """
    world.idle("tiny", 4)
    world.ask(world.model("large-v3", 11))
    [settle] = world.of(Settle)
    assert isinstance(settle.error, ModelTooLarge)
    assert (settle.error.needed_bytes, settle.error.capacity_bytes) == (11, 10)
    assert world.of(StartUnload) == []


def test_a_stuck_request_is_overtaken_so_often_and_no_more(world: World) -> None:
    """
    (3), (4) A load that fits passes it, until it was passed too often.
    """
    held = world.held("base", 5)
    stuck = world.ask(world.model("medium", 8))
    small = world.model("tiny", 2)
    for count in range(1, MAX_OVERTAKES + 1):
        world.ask(small)
        assert stuck.overtaken == count
        world.load(small)
        world.release(small)
        world.evictions.evict(lambda key: key.model == "tiny")
        world.reports.unloaded(small, Released(confirmed=True), KEPT)
    world.of(StartLoad)
    world.ask(small)
    assert world.of(StartLoad) == []
    assert held.leases


def test_idle_models_are_unloaded_for_a_request(world: World) -> None:
    """
    (5) It waits until their unload is confirmed, and only then is its load begun.
    """
    old = world.idle("base", 6)
    wanted = world.model("medium", 8)
    world.ask(wanted)
    assert world.of(StartUnload) == [StartUnload(old)]
    assert old.cause is EvictionCause.CAPACITY
    assert world.of(StartLoad) == []
    world.reports.unloaded(old, Released(confirmed=True), KEPT)
    assert world.of(StartLoad) == [StartLoad(wanted)]


def test_an_impatient_request_holds_new_leases_back(world: World) -> None:
    """
    (6) Stuck for longer than the patience, it keeps hits off the model in its way.
    """
    held = world.held("base", 6)
    stuck = world.ask(world.model("medium", 8))
    assert held.drained_for is None
    world.now_s += 6.0
    world.scheduler.admit()
    assert held.drained_for is stuck
    assert world.scheduler.hit(held, DEFAULT_WORKLOAD, None, None) is None


# Time ---------------------------------------------------------------------------------


def test_it_says_when_it_is_to_be_called(world: World) -> None:
    """
    For the first of all that is due: here a request that times out, then a model that
    was idle for long enough.
    """
    world.idle("tiny", 1)
    world.held("base", 6)
    waiter = world.ask(world.model("medium", 9), timeout_s=7.0)
    assert WakeAt(107.0) in world.of(WakeAt)
    world.wake()
    [settle] = world.of(Settle)
    assert isinstance(settle.error, LeaseTimeout)
    assert settle.future is waiter.future
    assert world.state.wake_at_s == 160.0


def test_a_model_expires_when_its_keep_alive_is_over(world: World) -> None:
    """
    Not before, and with that as the cause.
    """
    idle = world.idle("tiny", 1)
    assert world.state.wake_at_s == idle.expires_at_s == 160.0
    world.wake()
    assert world.of(StartUnload) == [StartUnload(idle)]
    assert idle.cause is EvictionCause.EXPIRED


def test_a_call_that_another_one_replaced_does_nothing(world: World) -> None:
    """
    There is no way to cancel a timer.
    """
    idle = world.idle("tiny", 1)
    world.now_s = 200.0
    world.ticks.tick(150.0)
    assert idle.state is State.RESIDENT


def test_time_goes_on_when_a_policy_fails() -> None:
    """
    Its error ends one call; the next request times out all the same.
    """
    is_broken: list[bool] = []

    def broken(resident: Resident, _now_s: float) -> float:
        if is_broken:
            raise ZeroDivisionError
        return resident.last_used_s

    world = World(broken)
    world.idle("tiny", 1)
    held = world.held("base", 6)
    medium = world.model("medium", 9)
    # Once it has lost its patience, the models that it drains are asked for.
    for timeout_s in (6.0, 7.0):
        world.ask(medium, timeout_s=timeout_s)
    is_broken.append(True)
    with pytest.raises(ZeroDivisionError):
        world.wake()
    assert len(world.of(Settle)) == 1
    assert world.state.wake_at_s == 107.0
    world.wake()
    assert len(world.of(Settle)) == 1
    world.release(held)


def test_a_gauge_is_read_again_for_what_a_time_out_left(world: World) -> None:
    """
    Even in the call that looks for deadlocks.
    """
    held, idle = world.held("base", 6), world.idle("tiny", 1)
    coming = world.model("small", 1, device="cpu")
    world.ask(idle, coming, timeout_s=1.0)
    world.ask(world.model("medium", 9)).owner = "another thread"
    world.of(LookAgain)
    world.state.deadlocks_at_s = 101.0
    world.wake()
    assert LookAgain(held.device) in world.of(LookAgain)
    world.load(coming)


def test_no_timer_is_set_for_what_another_one_will_see(world: World) -> None:
    """
    There is no way to cancel one: they would pile up until the last keep-alive ends.
    """
    idle = world.idle("tiny", 1)
    held = world.held("base", 6)
    medium = world.model("medium", 9)
    world.of(WakeAt)
    for _ in range(5):
        world.ask(medium, timeout_s=1.0)
        world.wake()
        assert len(world.of(WakeAt)) == 1
        lease = world.scheduler.hit(idle, DEFAULT_WORKLOAD, None, None)
        world.release(idle)
        assert lease is not None
    assert held.leases


def test_an_unload_that_did_nothing_is_tried_again(world: World) -> None:
    """
    Its bytes stay charged meanwhile.
    """
    idle = world.idle("tiny", 3)
    world.evictions.evict(lambda _: True)
    world.noted.clear()
    world.reports.refused(idle, "nothing happened")
    assert world.state.devices[CARD].budget.of(idle, Use.WEIGHTS) == 3
    assert world.state.wake_at_s == world.now_s + FIRST_RETRY_S
    world.wake()
    assert world.of(StartUnload) == [StartUnload(idle)]


def test_deadlocks_are_looked_for_when_a_holder_waits(world: World) -> None:
    """
    Some time later: the lease may just be moving to another thread.
    """
    held = world.held("base", 6)
    held.leases = dict.fromkeys(held.leases, "a thread")
    waiter = Waiter(
        (Wanted(world.model("medium", 8), DEFAULT_WORKLOAD),), None, 100.0, "a thread"
    )
    world.scheduler.enqueue(waiter, None)
    assert world.state.deadlocks_at_s == 100.0 + DEADLOCK_S
    world.wake()
    assert world.of(Settle)[0].future is waiter.future


# The end ------------------------------------------------------------------------------


def test_closing_fails_who_waits_and_stops_when_all_is_gone(world: World) -> None:
    """
    The threads end after the last unload was confirmed.
    """
    idle, held = world.idle("tiny", 1), world.held("base", 6)
    world.ask(world.model("medium", 9))
    world.scheduler.close()
    assert isinstance(world.of(Settle)[0].error, CacheClosed)
    assert world.of(StartUnload) == [StartUnload(idle)]
    world.reports.unloaded(idle, Released(confirmed=True), KEPT)
    assert world.of(Stop) == []
    world.release(held)
    world.reports.unloaded(held, Released(confirmed=True), KEPT)
    assert world.of(Stop) == [Stop()]


def test_nothing_is_asked_for_after_the_end(world: World) -> None:
    """
    Too much is kept on the host when the last model is gone; the end sees to that.
    """
    idle = world.idle("tiny", 1)
    world.scheduler.close()
    world.reports.unloaded(idle, Released(confirmed=True), Kept(1, 100, {}))
    assert world.noted[-1] == Stop()


def test_a_model_of_a_lost_device_stays_charged(world: World) -> None:
    """
    It is forgotten, but its memory is not to be had.
    """
    idle = world.idle("tiny", 3)
    world.evictions.evict(lambda _: True)
    world.reports.lost(idle, "an illegal memory access")
    world.reports.write_off(idle)
    budget = world.state.devices[CARD].budget
    assert (idle.state, budget.sum_of(Use.LOST)) == (State.ABSENT, 3)


def test_a_request_is_ended_in_two_places() -> None:
    """
    Those after which it is no longer in the queue: so each ends once.
    """
    core = Path(inspect.getfile(scheduler)).parent
    found = {
        (path.name, function.name)
        for path in core.glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Settle"
    }
    assert found == {("endings.py", "fail"), ("endings.py", "_settle")}


def test_only_entries_assign_their_state() -> None:
    """
    Each transition of a model has a method of its own.
    """
    core = Path(inspect.getfile(scheduler)).parent
    found = {
        path.name
        for path in core.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr == "state"
    }
    assert found == {"entries.py"}
