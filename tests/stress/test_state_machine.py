"""
A state machine over a whole cache on the fakes: anything may happen, in any order.

Nothing here is left to the scheduler: there are no threads, and each device does its
work when it is told to.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from effort import tries
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "simulate"))

from plain import undone

from whispercache import (
    CacheClosed,
    Event,
    LeaseDeadlock,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    ModelEvicted,
    ModelGranted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelTooLarge,
    NoRoom,
    ReleaseUnconfirmed,
    TooManyWaiters,
    Workload,
)
from whispercache.core import core, entries
from whispercache.core.entries import State
from whispercache.core.waiters import Wanted
from whispercache.testing import FakeClock, FakeLoader, FakeMachine, check
from whispercache.units import Limit

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from whispercache import Lease, ModelKey
    from whispercache.core.entries import Entry
    from whispercache.core.waiters import Waiter

pytestmark = pytest.mark.soak

GIB = 1024**3
SIZES = {"tiny": GIB, "base": GIB, "small": 2 * GIB, "medium": 3 * GIB}
DEVICES = {"cpu": "8GiB", "cuda:0": "8.5GiB"}

models = st.sampled_from(sorted(SIZES))
devices = st.sampled_from(["cuda:0", "cuda:0", "cpu"])
limits = st.sampled_from(["auto", "2GiB", "3GiB", "5GiB", "7GiB"])
counts = st.sampled_from([None, None, 1, 2, 3])
MAX_WAITING = 8
ALLOWED = (LeaseTimeout, LoadFailed, ModelTooLarge, CacheClosed, LeaseDeadlock)
OWNERS = tuple("abcdef")
STEPS = 40
"""
Steps of one history.
"""


@dataclass(frozen=True)
class Asked:
    """
    A request, as somebody may make it.
    """

    model: str
    device: str
    batch: int
    workers: int
    keep_alive_s: float | None
    timeout_s: float | None
    owner: str
    priority: float = 0.0
    resumes: bool = False
    parallel: int | None = None


requests = st.builds(
    Asked,
    model=models,
    device=devices,
    batch=st.sampled_from([1, 1, 1, 4, 12]),
    workers=st.sampled_from([1, 1, 1, 2]),
    keep_alive_s=st.sampled_from([None, None, 0.0, 1.0, 30.0, float("inf")]),
    timeout_s=st.sampled_from([None, None, None, 0.0, 3.0, 20.0]),
    owner=st.sampled_from(OWNERS),
    priority=st.sampled_from([0.0, 0.0, -1.0, -1.0, -2.0, 1.0]),
    resumes=st.sampled_from([False, False, True]),
    parallel=st.sampled_from([None, None, None, 1, 2]),
)


class Turns:
    """
    Stands for the thread of a device: its calls are made when the machine says so.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.calls: deque[Callable[[], None]] = deque()
        self.is_over = False

    def submit(self, call: Callable[[], None]) -> None:
        """
        Note a call.
        """
        assert not self.is_over, f"{call} comes after the end of {self.device}"
        self.calls.append(call)

    def is_current(self) -> bool:
        """
        Everything is done on one thread here.
        """
        return True

    def stop(self) -> None:
        """
        Take no more.
        """
        self.is_over = True


class CacheMachine(RuleBasedStateMachine):
    """
    Rules, each with what must follow from it; the invariants hold after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(core, "DeviceThread", Turns)
        self.machine = FakeMachine(DEVICES)
        self.loader = FakeLoader(self.machine, sizes=SIZES)
        self.loader.workspace_bytes = GIB // 8
        self.loader.host_loading_bytes = GIB // 4
        self.loader.loading_factor = 1.25
        self.loader.shell_size = GIB // 2
        self.clock = FakeClock()
        self.cache = ModelCache(
            vram="5GiB",
            ram="5GiB",
            keep_alive=20,
            patience_s=5,
            max_waiting=MAX_WAITING,
            loader=self.loader,
            probe=self.machine,
            clock=self.clock,
        )
        self.core = self.cache._core
        self.held: set[tuple[str, str]] = set()
        self.requests: list[Waiter] = []
        self.ends: Counter[int] = Counter()
        self.numbers = itertools.count()
        self.leases: list[Lease] = []
        self.results: list[Callable[[], None]] = []
        self.retries_in_s: list[float | None] = []
        self.evictions: list[tuple[Entry, Future[None]]] = []
        self.life: defaultdict[ModelKey, list[Event]] = defaultdict(list)
        self.charged_bytes: Counter[str] = Counter()
        self.cache.subscribe(self.note)
        self.cache.subscribe(fail_always)

    @initialize(parks=st.booleans())
    def choose_to_park(self, *, parks: bool) -> None:
        """
        Copies of weights may take some of the host.
        """
        self.core.copies.limit = Limit(n_bytes=4 * GIB) if parks else None

    # Requests -------------------------------------------------------------------------

    @precondition(lambda self: not self.core.is_closed)
    @rule(asked=st.lists(requests, min_size=1, max_size=4))
    def ask(self, asked: list[Asked]) -> None:
        """
        As `ModelCache.lease` does, but for the wait.
        """
        for each in asked:
            self.ask_one(each)
            self.rest()

    def ask_one(self, asked: Asked) -> None:
        """
        One request: a hit, or one for the queue.
        """
        if self.waits(asked.owner):
            return
        part = self.part(asked)
        request = (str(part.entry.key),)
        self.core.requests[request] = part.entry  # as the resolver does
        hit: Callable[..., Lease | None] = self.core.hit
        if asked.parallel is not None:
            hit = partial(self.core.hit_below, asked.parallel)
        lease = hit(request, part.workload, asked.keep_alive_s, asked.owner)
        if lease is not None:
            self.leases.append(lease)
            return
        self.queue_up([part], asked)

    @precondition(lambda self: not self.core.is_closed)
    @rule(asked=st.lists(requests, min_size=2, max_size=4))
    def ask_many(self, asked: list[Asked]) -> None:
        """
        As `ModelCache.lease_many` does, but for the wait.
        """
        if not self.waits(asked[0].owner):
            self.queue_up([self.part(each) for each in asked], asked[0])
            self.rest()

    def waits(self, owner: str) -> bool:
        """
        Whether *owner* waits already, and cannot ask for more.
        """
        return any(waiter.owner == owner for waiter in self.core.queue)

    def part(self, asked: Asked) -> Wanted:
        """
        One model, located.
        """
        workload = Workload(batch_size=asked.batch)
        options = [("num_workers", 2)] * (asked.workers - 1)
        target = self.cache._resolver.resolve(
            (asked.model, asked.device, "default", *options)
        )
        self.cache._resolver.locate(target, workload)
        return Wanted(target.entry, workload)

    def queue_up(self, parts: list[Wanted], asked: Asked) -> None:
        """
        One request for the queue.
        """
        waiting = len(self.core.queue)
        try:
            waiter = self.core.request(
                parts,
                asked.keep_alive_s,
                asked.timeout_s,
                asked.owner,
                priority=asked.priority,
                resumes=asked.resumes,
                parallel=asked.parallel,
            )
        except LeaseTimeout:
            assert asked.timeout_s == 0
        except TooManyWaiters:
            assert waiting >= MAX_WAITING
        except LoadFailed as cooling:
            self.retries_in_s.append(cooling.retry_in_s)
        else:
            self.requests.append(waiter)
            # A number, not the waiter: a cycle would keep its lease from collection.
            number = next(self.numbers)
            waiter.future.add_done_callback(lambda _: self.ends.update([number]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """
        End a lease, and end it again.
        """
        place = data.draw(st.integers(0, len(self.leases) - 1))
        lease = self.leases.pop(place)
        lease.release()
        lease.release()
        self.rest()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), level=st.sampled_from([-1.0, -2.0]))
    def offer(self, data: st.DataObject, level: float) -> None:
        """
        A lease is one that its holder gives back when it is asked to.
        """
        place = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases[place].offer(level)
        self.rest()

    @precondition(lambda self: any(lease.is_asked(-2.0) for lease in self.leases))
    @rule()
    def give_way(self) -> None:
        """
        Those who are asked give their leases back.
        """
        for lease in [each for each in self.leases if each.is_asked(-2.0)]:
            # Others may ask no more once one has given way.
            if lease.is_asked(-2.0):
                self.leases.remove(lease)
                lease.release()
                self.rest()

    @precondition(lambda self: self.leases)
    @rule()
    def drop(self) -> None:
        """
        Forget a lease, as one of our iterators may.
        """
        lease = self.leases.pop()
        lease.owned = True
        self.requests = [each for each in self.requests if not each.future.done()]
        del lease
        self.cache.stats()  # whoever comes next sees to it, if the device is busy
        self.rest()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        """
        Cancel a request, in whatever state.
        """
        # Places are drawn: Hypothesis would keep what it draws from.
        waiter = self.requests[data.draw(st.integers(0, len(self.requests) - 1))]
        taken = [each for each in self.leases if is_granted(waiter, each)]
        self.core.abandon(waiter)
        self.requests.remove(waiter)
        for lease in taken:
            self.leases.remove(lease)
            assert lease.is_released
        self.rest()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), owner=st.sampled_from([None, *OWNERS]))
    def hand_over(self, data: st.DataObject, owner: str | None) -> None:
        """
        Let somebody else end a lease. Who waits for that very model, and holds it from
        now on, is not made to wait for himself.
        """
        place = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases[place].hand_over(owner)
        self.rest()

    # Time and faults ------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 6.0, 21.0, 100.0]))
    def tick(self, seconds: float) -> None:
        """
        Let time pass.
        """
        self.clock.tick(seconds)
        self.rest()

    @rule(seconds=st.sampled_from([0.5, 30.0]))
    def jump_back(self, seconds: float) -> None:
        """
        Let the clock be wrong for once.
        """
        self.clock._now_s -= seconds
        self.rest()

    @rule(
        model=models,
        count=st.integers(1, 3),
        text=st.sampled_from(["broken", "CUDA failed with error out of memory"]),
    )
    def fail_loads(self, model: str, count: int, text: str) -> None:
        """
        The next loads of a model will fail.
        """
        self.loader.fail_loads[model] = [RuntimeError(text) for _ in range(count)]

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def run_out_of_memory(self, data: st.DataObject) -> None:
        """
        A call on a leased model does.
        """
        place = data.draw(st.integers(0, len(self.leases) - 1))
        self.leases[place].recover(RuntimeError("CUDA failed with error out of memory"))

    @rule(fails=st.sampled_from([None, OSError("no driver")]))
    def break_the_gauge(self, fails: Exception | None) -> None:
        """
        It cannot be read, or can again.
        """
        # A device that was never read cannot be used at all, and says so.
        if len(self.core.devices) == len(DEVICES) and all(
            device.budget.total_bytes for device in self.core.devices.values()
        ):
            self.machine.reading_fails = fails

    @rule(device=st.sampled_from(sorted(DEVICES)), gib=st.integers(0, 3))
    def make_room_for_others(self, device: str, gib: int) -> None:
        """
        As under pressure from outside.
        """
        if device in self.core.devices:
            self.core.make_room_for_others(self.core.devices[device], gib * GIB)
            self.rest()

    @rule(count=st.integers(1, 3))
    def refuse_unloads(self, count: int) -> None:
        """
        Some unloads to come will do nothing.
        """
        self.loader.refuse_unloads = count

    @rule(device=st.sampled_from(sorted(DEVICES)), gib=st.sampled_from([0, 0, 1, 3]))
    def others(self, device: str, gib: int) -> None:
        """
        Other programs take memory, as far as there is some, or give it back.
        """
        self.machine.others(device, 0)
        # Never so much that what was admitted before cannot be had.
        books = self.core.devices.get(device)
        reserved_bytes = max(5 * GIB, books.budget.charged_bytes if books else 0)
        room_bytes = max(0, self.machine.total_bytes[device] - reserved_bytes)
        self.machine.others(device, min(gib * GIB, room_bytes))

    @rule(model=models, word=st.sampled_from(["load", "unload"]))
    def hold(self, model: str, word: str) -> None:
        """
        Let loads, or unloads, of a model take their time.
        """
        self.held.add((word, model))

    @rule()
    def let_go(self) -> None:
        """
        Hold nothing any more.
        """
        self.held.clear()
        self.rest()

    # Words ----------------------------------------------------------------------------

    @rule(model=st.none() | models)
    def evict(self, model: str | None) -> None:
        """
        Begin to evict.
        """
        leaving = self.core.evict(lambda key: model in (None, key.model))
        self.evictions.extend(leaving)
        self.rest()

    @precondition(lambda self: self.evictions)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """
        Take an eviction back, as after a timeout.
        """
        place = data.draw(st.integers(0, len(self.evictions) - 1))
        entry, gone = self.evictions[place]
        was_pinned = entry.pinned
        gone.cancel()
        self.core.withdraw(entry, gone)
        assert entry.pinned is was_pinned
        self.rest()

    @precondition(lambda self: self.leases)
    @rule()
    def pin(self) -> None:
        """
        Pin a model that is leased.
        """
        self.core.pin(self.leases[-1]._entry)

    @precondition(lambda self: self.leases)
    @rule()
    def spare(self) -> None:
        """
        Keep a result of a model that is leased, which needs it again.
        """
        self.results.append(self.leases[-1].spare())

    @precondition(lambda self: self.results)
    @rule(data=st.data())
    def unspare(self, data: st.DataObject) -> None:
        """
        Drop a result, in use or long out of date.
        """
        self.results.pop(data.draw(st.integers(0, len(self.results) - 1)))()
        self.cache.stats()  # as in `drop`
        self.rest()

    @rule(model=st.none() | models)
    def unpin(self, model: str | None) -> None:
        """
        Unpin some or all.
        """
        self.cache.unpin(model)
        assert not any(
            info.pinned
            for info in self.cache.models()
            if model in (None, info.key.model)
        )
        self.rest()

    @rule(vram=limits, ram=limits, max_models=counts)
    def resize(self, vram: str, ram: str, max_models: int | None) -> None:
        """
        Set other limits.
        """
        self.cache.resize(vram=vram, ram=ram, max_models=max_models)
        self.rest()

    @rule(model=models, device=devices)
    def explain(self, model: str, device: str) -> None:
        """
        A dry run changes nothing.
        """
        if self.core.is_closed:
            with pytest.raises(CacheClosed):
                self.cache.explain(model, device)
            return
        before = (self.cache.stats(), self.cache.models())
        explained = self.cache.explain(model, device)
        assert (self.cache.stats(), self.cache.models()) == before
        evicted = {str(key) for key in explained.evicts}
        idle = {
            str(info.key) for info in self.cache.models() if info.idle_s is not None
        }
        assert evicted <= idle

    @precondition(lambda self: len(self.requests) > 12)
    @rule()
    def close(self) -> None:
        """
        Close; nobody waits any more.
        """
        self.evictions.extend(self.core.close() or [])
        self.rest()
        assert not self.core.queue
        assert all(waiter.future.done() for waiter in self.requests)

    @rule()
    def calm(self) -> None:
        """
        When all leases end and nothing fails, everybody is served, and soon.
        """
        self.cache.unpin()
        self.loader.refuse_unloads = 0
        self.loader.fail_loads.clear()
        self.machine.reading_fails = None
        self.held.clear()
        for device in DEVICES:
            self.machine.others(device, 0)
        for _ in range(100):
            for lease in self.leases:
                lease.release()
            self.leases.clear()
            self.clock.tick(5)
            self.rest()
            if not self.core.queue and not self.leases:
                break
        assert not self.core.queue, f"stranded: {self.cache!r}"
        assert all(waiter.future.done() for waiter in self.requests)
        assert self.core.state.leases == 0
        states = {info.state for info in self.cache.models()}
        if states <= {"resident"}:
            assert all(gone.done() for _, gone in self.evictions)
            self.evictions.clear()

    # Invariants -----------------------------------------------------------------------

    def rest(self) -> None:
        """
        Let each device do all that it can, then take what was granted.
        """
        for _ in range(500):
            ready = [turns for turns in self.turns() if self.is_ready(turns)]
            self.watch()
            if not ready:
                self.collect()
                return
            for turns in ready:
                turns.calls.popleft()()
                self.watch()
        raise AssertionError(f"it never comes to rest: {self.cache!r}")

    def watch(self) -> None:
        """
        No more is charged than is allowed, but for what was there before a limit fell.
        """
        for name, device in self.core.devices.items():
            before_bytes = self.charged_bytes[name]
            budget = device.budget
            assert budget.charged_bytes <= max(budget.capacity_bytes, before_bytes)
            self.charged_bytes[name] = budget.charged_bytes

    def turns(self) -> list[Turns]:
        """
        The devices.
        """
        devices = self.core.devices.values()
        return [cast("Turns", device.thread) for device in devices]

    def is_ready(self, turns: Turns) -> bool:
        """
        Whether a device has something to do that nothing holds up.
        """
        if not turns.calls:
            return False
        call = turns.calls[0]
        if isinstance(call, partial) and isinstance(call.args[0], entries.Entry):
            return (call.func.__name__, call.args[0].key.model) not in self.held
        return True

    def collect(self) -> None:
        """
        Take the leases that were granted.
        """
        for waiter in self.requests:
            future = waiter.future
            if not future.done() or future.cancelled():
                continue
            error = future.exception()
            assert error is None or isinstance(error, ALLOWED), error
            if error is None:
                self.leases.extend(
                    lease
                    for lease in future.result()
                    if lease not in self.leases and not lease.is_released
                )

    def note(self, event: Event) -> None:
        """
        Keeps what happens to a model; a request for it that fails is not of its life.
        """
        if not isinstance(event, NoRoom):
            self.life[event.key].append(event)

    @invariant()
    def the_books_agree(self) -> None:
        """
        With themselves.
        """
        check(self.cache)

    @invariant()
    def nothing_is_missed(self) -> None:
        """
        A plan of the whole queue would do nothing that was not done, as of the last
        event: nothing happens by itself when patience ends.
        """
        state = self.core.state
        now_s = min(self.core.clock.now(), state.impatient_at_s - 1e-6)
        is_known = all(each.outlook.is_known for each in state.devices.values())
        # Else the next event looks at all anew.
        if state.closed is None and is_known:
            assert not undone(state, self.core.rules, now_s)

    @invariant()
    def the_line_is_in_order(self) -> None:
        """
        By priority and arrival, in each of its parts.
        """
        queue = self.core.queue
        turns = [waiter.turn for waiter in queue]
        assert turns == sorted(turns)
        assert len(turns) == len(queue)
        for entry in self.core.entries.values():
            turns = [waiter.turn for waiter in entry.waiting]
            assert turns == sorted(turns)

    @invariant()
    def each_request_ends_once(self) -> None:
        """
        And none that still waits has ended.
        """
        assert all(count == 1 for count in self.ends.values())
        for waiter in self.core.queue:
            assert not waiter.future.done()

    @invariant()
    def who_is_refused_for_failures_is_told_when_to_retry(self) -> None:
        """
        In seconds from then.
        """
        assert all(seconds and seconds > 0 for seconds in self.retries_in_s)

    @invariant()
    def leases_are_on_models_in_memory(self) -> None:
        """
        Which can be used.
        """
        for lease in self.leases:
            assert not lease.is_released
            assert lease.whisper.detect_language()[0] == "en"
        held = sum(len(waiter.held or ()) for waiter in self.core.queue)
        assert self.core.state.leases == len(self.leases) + held

    @invariant()
    def memory_is_what_the_books_say(self) -> None:
        """
        Nothing is held that is not charged; nothing is credited that is still held.
        """
        there = (State.RESIDENT, State.UNLOADING)
        for name, device in self.core.devices.items():
            held = [e for e in device.entries.values() if e.state in there]
            weights_bytes = sum(entry.weights_bytes for entry in held)
            held_bytes = weights_bytes + device.kept_bytes
            held_bytes += device.budget.copies_bytes
            assert self.machine.held_bytes[name] == held_bytes
            assert {entry.key for entry in held} == {
                key for key in self.loader.resident if key.device == name
            }
        if (host := self.core.devices.get("cpu")) is not None:
            coming = [e for e in self.core.entries.values() if e.state is State.LOADING]
            claimed_bytes = sum(entry.copy_bytes for entry in coming)
            assert host.kept_bytes + claimed_bytes == self.loader.kept_bytes()

    @invariant()
    def lives_make_sense(self) -> None:
        """
        Loading comes first, then loaded or failed; only what is loaded is granted;
        refusals come before the end.
        """
        after: dict[type[Event] | None, tuple[type[Event], ...]] = {
            None: (ModelLoading,),
            ModelLoading: (ModelLoaded, ModelLoadFailed),
            ModelLoaded: (ModelGranted, ReleaseUnconfirmed, ModelEvicted),
            ModelGranted: (ModelGranted, ReleaseUnconfirmed, ModelEvicted),
            ReleaseUnconfirmed: (ReleaseUnconfirmed, ModelEvicted),
            ModelLoadFailed: (ModelLoading,),
            ModelEvicted: (ModelLoading,),
        }
        for events in self.life.values():
            kinds = [None, *map(type, events)]
            for kind, following in itertools.pairwise(kinds):
                assert following in after[kind], kinds

    def teardown(self) -> None:
        """
        Calm down, close, and find nothing left.
        """
        try:
            self.calm()
            self.core.close()
            for _ in range(50):
                self.rest()
                if not self.cache.models():
                    break
                self.clock.tick(31)
            assert not self.cache.models()
            assert not any(self.machine.held_bytes.values())
            assert all(turns.is_over for turns in self.turns())
            check(self.cache)
        finally:
            self.patch.undo()  # or the caches of later tests would have no threads


def fail_always(event: Event) -> None:
    """
    A listener that fails, which must not matter.
    """
    raise RuntimeError(f"no ear for {event}")


def is_granted(waiter: Waiter, lease: Lease) -> bool:
    """
    Whether *lease* is how a request ended.
    """
    future = waiter.future
    if not future.done() or future.cancelled() or future.exception() is not None:
        return False
    return lease in future.result()


@pytest.mark.slow
def test_whatever_happens_the_invariants_hold() -> None:
    """
    And when it calms down, everybody has been served and all memory is back.
    """
    logging.disable()  # or every step would be told of by the listener that fails
    try:
        run_state_machine_as_test(
            CacheMachine,
            settings=settings(max_examples=tries(200), stateful_step_count=STEPS),
        )
    finally:
        logging.disable(logging.NOTSET)
