"""
Deadlock: who is told when callers that hold leases wait for each other.

First the pure part, against every order in which callers might finish; then through a
cache, for threads, for tasks, and for both at once.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from driver import PATIENCE_S, TaskDriver, ThreadDriver, wait_waiting
from hypothesis import event, given
from hypothesis import strategies as st

from whispercache import (
    AsyncModelCache,
    LeaseDeadlock,
    LeaseTimeout,
    ModelKey,
    WhisperCacheError,
)
from whispercache.planning.deadlock import (
    Ceiling,
    Claim,
    Hold,
    Model,
    System,
)
from whispercache.planning.planner import MAX_OVERTAKES
from whispercache.testing import settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from conftest import MakeCache

    from whispercache import ModelCache
    from whispercache.testing import FakeClock, FakeLoader

CHECK_S = 0.1
"""
Seconds within which whoever closes a circle is told.
"""


# The pure part ------------------------------------------------------------------------


def model(name: str, weights_bytes: int, device: str = "cuda:0", **more: Any) -> Model:
    """
    A model of so many bytes.
    """
    return Model(ModelKey(name, device, "int8"), device, weights_bytes, **more)


def claim(owner: object, since_s: float, *models: Model, work_bytes: int = 0) -> Claim:
    """
    A request for models together.
    """
    return Claim(owner, since_s, tuple((one, work_bytes) for one in models))


A, B, C, D = (model(name, 2) for name in "abcd")
FOUR = {"cuda:0": Ceiling(4)}


def test_who_waits_for_somebody_that_does_not_will_be_served() -> None:
    """
    Whoever does not wait is taken to finish.
    """
    holds = [Hold("x", A), Hold("y", B)]
    claims = [claim("x", 0, C)]
    assert System(claims, holds, FOUR).unserved() == ()
    assert System(claims, holds, FOUR).culprit() is None


def test_two_that_wait_for_each_other_are_not_served() -> None:
    """
    The later one closed the circle.
    """
    holds = [Hold("x", A), Hold("y", B)]
    claims = [claim("x", 0, C), claim("y", 1, D)]
    assert System(claims, holds, FOUR).unserved() == tuple(claims)
    assert System(claims, holds, FOUR).culprit() is claims[1]
    assert System(claims[::-1], holds, FOUR).culprit() is claims[1]


def test_one_alone_is_a_circle() -> None:
    """
    It waits for what it holds itself.
    """
    claims = [claim("x", 0, B)]
    assert System(claims, [Hold("x", A)], {"cuda:0": Ceiling(3)}).culprit() is claims[0]


def test_bystanders_are_not_to_blame() -> None:
    """
    One that came after the circle, and whose leases would help nobody, is not told.
    """
    holds = [Hold("x", A), Hold("y", B), Hold("z", model("e", 1, "cpu"))]
    claims = [claim("x", 0, C), claim("y", 1, D), claim("z", 2, C)]
    ceilings = {**FOUR, "cpu": Ceiling(8)}
    assert System(claims, holds, ceilings).unserved() == tuple(claims)
    assert System(claims, holds, ceilings).culprit() is claims[1]


def test_who_holds_nothing_is_never_to_blame() -> None:
    """
    A request that no release could serve closes no circle.
    """
    claims = [claim("x", 0, model("e", 9))]
    assert System(claims, [], FOUR).unserved() == tuple(claims)
    assert System(claims, [], FOUR).culprit() is None


def test_a_held_model_is_there_for_others_too() -> None:
    """
    Who asks for what another waiter holds needs no room of its own.
    """
    holds = [Hold("x", A), Hold("y", B)]
    claims = [claim("x", 0, C), claim("y", 1, A)]
    assert System(claims, holds, FOUR).unserved() == ()


def test_the_work_of_all_leases_counts_up_to_the_workers() -> None:
    """
    One worker runs one call, however many wait in the model.
    """
    one, two = model("a", 2), model("b", 2, workers=2)
    room = {"cuda:0": Ceiling(3)}
    holds = [Hold("x", one, 1), Hold("y", two, 1)]
    assert not System([claim("x", 0, one, work_bytes=1)], holds[:1], room).unserved()
    assert System([claim("y", 0, two, work_bytes=1)], holds[1:], room).unserved()


def test_pinned_models_and_their_number_count() -> None:
    """
    A pinned model takes its bytes and its place, wanted or not.
    """
    claims = [claim("x", 0, A, B)]
    assert System(claims, [], {"cuda:0": Ceiling(5, 3, (C,))}).unserved()
    assert not System(claims, [], {"cuda:0": Ceiling(6, 3, (C,))}).unserved()
    assert System(claims, [], {"cuda:0": Ceiling(6, 2, (C,))}).unserved()
    assert not System(claims, [], {"cuda:0": Ceiling(4, 2, (A,))}).unserved()


def test_the_peak_of_a_load_counts() -> None:
    """
    Also on a device where the model will not stay.
    """
    loads = Claim("x", 0, ((A, 0),), {"cuda:0": 1, "cpu": 3})
    assert not System([loads], [], {"cuda:0": Ceiling(3), "cpu": Ceiling(3)}).unserved()
    assert System([loads], [], {"cuda:0": Ceiling(2), "cpu": Ceiling(3)}).unserved()
    assert System([loads], [], {"cuda:0": Ceiling(3), "cpu": Ceiling(2)}).unserved()


def test_the_question_may_take_some_for_such_as_never_let_go() -> None:
    """
    Their leases stay, and their own requests are not asked about.
    """
    holds = [Hold("x", A)]
    claims = [claim("x", 0, B), claim("y", 1, C, D)]
    assert System(claims, holds, FOUR).unserved() == ()
    assert System(claims, holds, FOUR).unserved(never=["x"]) == (claims[1],)


World = tuple["list[Claim]", "list[Hold]", "dict[str, Ceiling]"]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """
    Up to four callers, two devices and five models.
    """
    devices = ["cpu", "cuda:0"][: draw(st.sampled_from([1, 1, 2]))]
    models = [
        model(
            name,
            draw(st.integers(1, 4)),
            draw(st.sampled_from(devices)),
            workers=draw(st.sampled_from([1, 1, 2])),
        )
        for name in "abcde"
    ]
    some, work = st.sampled_from(models), st.sampled_from([0, 0, 1])
    owners = range(draw(st.integers(1, 4)))
    holds = [
        Hold(owner, draw(some), draw(work))
        for owner in owners
        for _ in range(draw(st.integers(0, 2)))
    ]
    claims = [
        Claim(
            owner,
            float(since_s),
            tuple((draw(some), draw(work)) for _ in range(draw(st.integers(1, 2)))),
            {device: 1 for device in devices if draw(st.sampled_from([0, 0, 1]))},
        )
        for since_s, owner in enumerate(draw(st.permutations(owners)))
        if draw(st.sampled_from([True, True, True, False]))
    ]
    ceilings = {
        device: Ceiling(
            draw(st.integers(2, 12)),
            draw(st.sampled_from([None, None, 2, 3])),
            tuple(one for one in models[:1] if one.device == device and draw(work)),
        )
        for device in devices
    }
    return claims, holds, ceilings


def used(device: str, leases: Sequence[tuple[Model, int]]) -> dict[ModelKey, int]:
    """
    Bytes of each leased model on a device: its weights, and its largest piece of work
    for as many workers as are busy.
    """
    bytes_by_key: dict[ModelKey, int] = {}
    for one, _ in leases:
        if one.device == device:
            work = [n_bytes for other, n_bytes in leases if other.key == one.key]
            busy = min(len(work), one.workers)
            bytes_by_key[one.key] = one.weights_bytes + busy * max(work)
    return bytes_by_key


def can_be_met(
    wanted: Claim, holds: Sequence[Hold], ceilings: Mapping[str, Ceiling]
) -> bool:
    """
    Whether a request fits beside what is held, on each device that it touches.
    """
    held = [(hold.model, hold.workspace_bytes) for hold in holds]
    for device, ceiling in ceilings.items():
        asks = [part for part in wanted.parts if part[0].device == device]
        extra_bytes = wanted.loading_bytes.get(device, 0)
        if not asks and not extra_bytes:
            continue
        there = used(device, [*held, *asks])
        for one in ceiling.pinned:
            there.setdefault(one.key, one.weights_bytes)
        if sum(there.values()) + extra_bytes > ceiling.n_bytes:
            return False
        if ceiling.max_models is not None and len(there) > ceiling.max_models:
            return False
    return True


def in_any_order(
    claims: Sequence[Claim],
    holds: Sequence[Hold],
    ceilings: Mapping[str, Ceiling],
    never: Sequence[object] = (),
) -> set[float]:
    """
    When those asked who are served in some order of finishing.
    """
    served: set[float] = set()

    def go_on(left: tuple[Claim, ...]) -> None:
        waiting = {*never, *(one.owner for one in left)}
        kept = [hold for hold in holds if hold.owner in waiting]
        for one in left:
            if can_be_met(one, kept, ceilings):
                served.add(one.since_s)
                go_on(tuple(other for other in left if other is not one))

    go_on(tuple(one for one in claims if one.owner not in never))
    return served


@given(worlds(), st.sampled_from([[], [], [0]]))
def test_unserved_are_those_whom_no_order_of_finishing_serves(
    world: World, never: list[object]
) -> None:
    """
    The reduction finds the same as trying all orders.
    """
    claims, holds, ceilings = world
    left = System(claims, holds, ceilings).unserved(never)
    served = in_any_order(claims, holds, ceilings, never)
    asked = [one for one in claims if one.owner not in never]
    event(f"{len(left)} of {len(asked)} unserved")
    assert list(left) == [one for one in asked if one.since_s not in served]


@given(worlds())
def test_the_culprit_is_the_latest_without_whose_leases_somebody_gets_on(
    world: World,
) -> None:
    """
    By trying all orders, with its leases and without.
    """
    claims, holds, ceilings = world
    served = in_any_order(claims, holds, ceilings)
    holders = {hold.owner for hold in holds}
    stuck = [c for c in claims if c.since_s not in served and c.owner in holders]
    helpful = [
        one.since_s
        for one in stuck
        if in_any_order(claims, [h for h in holds if h.owner != one.owner], ceilings)
        - served
    ]
    found = System(claims, holds, ceilings).culprit()
    event(f"{len(stuck)} stuck, {len(helpful)} of them in the way")
    if not stuck:
        assert found is None
    else:
        assert found is not None
        expected = helpful or [one.since_s for one in stuck]
        assert found.since_s == max(expected)


# Callers ------------------------------------------------------------------------------


class OneThread(ThreadDriver):
    """
    A caller that makes all of its calls on one thread.
    """

    step, end = "__next__", "close"

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _begin(self, run: Callable[[], None]) -> None:
        self._calls.put(run)

    def close(self) -> None:
        """
        See `Driver`.
        """
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # it holds what it returned


class OneTask(TaskDriver):
    """
    A caller that makes all of its calls in one task.
    """

    step, end = "__anext__", "aclose"

    def __init__(self) -> None:
        super().__init__()
        self._calls: asyncio.Queue[Callable[[], Any] | None] = asyncio.Queue()
        self._life = asyncio.run_coroutine_threadsafe(self._live(), self.loop)

    def start_on(
        self, thing: object, method: str, *args: object, **options: object
    ) -> Future[Any]:
        """
        See `Driver`.
        """
        future: Future[Any] = Future()
        call = getattr(thing, method)

        async def run() -> None:
            try:
                result = call(*args, **options)
                if inspect.isawaitable(result):
                    result = await result
                future.set_result(result)
            except BaseException as error:  # noqa: BLE001 - the future tells it
                future.set_exception(error)

        self.loop.call_soon_threadsafe(self._calls.put_nowait, run)
        return future

    def close(self) -> None:
        """
        See `Driver`.
        """
        self.loop.call_soon_threadsafe(self._calls.put_nowait, None)
        self._life.result(PATIENCE_S)
        super().close()

    async def _live(self) -> None:
        while (call := await self._calls.get()) is not None:
            await call()
            del call


Caller = OneThread | OneTask
KINDS: dict[str, tuple[type[Caller], ...]] = {
    "threads": (OneThread,),
    "tasks": (OneTask,),
    "threads and tasks": (OneThread, OneTask),
}


class MakeCallers(Protocol):
    """
    Makes callers: threads, tasks, or by turns.
    """

    def __call__(self, count: int) -> list[Caller]:
        """
        Make so many.
        """


def _making(kinds: tuple[type[Caller], ...]) -> Iterator[MakeCallers]:
    made: list[Caller] = []

    def make(count: int) -> list[Caller]:
        first = len(made)
        made.extend(
            kinds[place % len(kinds)]() for place in range(first, first + count)
        )
        return made[first:]

    yield make
    for each in made:
        each.close()


@pytest.fixture(params=KINDS)
def callers(request: pytest.FixtureRequest) -> Iterator[MakeCallers]:
    """
    Threads, then tasks, then both at once.
    """
    yield from _making(KINDS[request.param])


@pytest.fixture(params=["threads", "tasks"])
def alike(request: pytest.FixtureRequest) -> Iterator[MakeCallers]:
    """
    Threads, then tasks: for what one may pass on to another of its kind.
    """
    yield from _making(KINDS[request.param])


@pytest.fixture(autouse=True)
def _sizes(loader: FakeLoader) -> None:
    """
    Two models each of 2, 3 and 6 GiB; all others take 1 GiB.
    """
    two = dict.fromkeys(("small", "small.en"), "2GiB")
    three = dict.fromkeys(("medium", "medium.en"), "3GiB")
    six = dict.fromkeys(("large-v2", "large-v3"), "6GiB")
    loader.sizes = {**two, **three, **six}


def assert_waiting(cache: ModelCache, clock: FakeClock, *asked: Future[Any]) -> None:
    """
    These go on waiting, however much time passes, and nobody is told of a circle.
    """
    before = cache.stats().deadlocks
    for _ in range(20):
        clock.tick(CHECK_S)
        settle(cache)
    assert not any(each.done() for each in asked)
    stats = cache.stats()
    assert (stats.deadlocks - before, stats.waiting) == (0, len(asked))


def pass_often(cache: ModelCache) -> None:
    """
    Let as many loads pass the request that waits as may; the next one waits behind it.
    """
    for _ in range(MAX_OVERTAKES):
        cache.lease("tiny.en", "cuda:0", keep_alive=0).release()
        settle(cache)


def told(asked: Future[Any]) -> LeaseDeadlock:
    """
    The error of somebody who closed a circle.
    """
    error = asked.exception(PATIENCE_S)
    assert isinstance(error, LeaseDeadlock), error
    return error


# Circles ------------------------------------------------------------------------------


def test_who_waits_for_its_own_memory_is_told(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    In place of a hang, with the names of what it holds and what to do.
    """
    cache = make_cache(vram="4GiB")
    (one,) = callers(1)
    held = one.lease(cache, "medium", "cuda:0")
    asked = one.waiting(cache, "small", "cuda:0")
    assert not asked.done()
    clock.tick(CHECK_S)
    error = told(asked)
    assert error.model == "small/cuda:0/float16"
    assert error.held == ("medium/cuda:0/float16",)
    assert "medium/cuda:0/float16 can free" in str(error)
    assert "lease_many" in str(error)
    assert isinstance(error, (WhisperCacheError, RuntimeError))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.model, again.held) == (
        str(error),
        error.model,
        error.held,
    )
    assert (cache.stats().deadlocks, cache.stats().waiting) == (1, 0)
    assert held.whisper
    held.release()
    one.lease(cache, "small", "cuda:0").release()


def test_nobody_is_told_at_once(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    A lease may be on its way to somebody who will end it.
    """
    cache = make_cache(vram="4GiB")
    (one,) = callers(1)
    held = one.lease(cache, "medium", "cuda:0")
    asked = one.waiting(cache, "small", "cuda:0")
    clock.tick(0.01)
    assert cache.stats().deadlocks == 0
    held.release()
    asked.result(10).release()
    clock.tick(1)
    assert cache.stats().deadlocks == 0


def test_nobody_is_told_while_somebody_else_may_let_go(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Somebody who holds what is needed, and does not wait, will end his leases one day.
    """
    cache = make_cache(vram="4GiB")
    one, other = callers(2)
    mine = one.lease(cache, "tiny", "cuda:0")
    its = other.lease(cache, "small", "cuda:0")
    asked = one.waiting(cache, "medium", "cuda:0")
    assert_waiting(cache, clock, asked)
    its.release()
    asked.result(10).release()
    mine.release()


def test_somebody_else_who_begins_to_wait_closes_the_circle(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Of two, the one that came last is told, and the other one is served.
    """
    cache = make_cache(vram="6GiB")
    one, other = callers(2)
    mine = one.lease(cache, "medium", "cuda:0")
    its = other.lease(cache, "small", "cuda:0")
    first = one.waiting(cache, "medium.en", "cuda:0")
    assert_waiting(cache, clock, first)
    last = other.waiting(cache, "small.en", "cuda:0")
    clock.tick(CHECK_S)
    assert told(last).held == ("small/cuda:0/float16",)
    assert_waiting(cache, clock, first)
    its.release()
    first.result(10).release()
    mine.release()
    assert cache.stats().deadlocks == 1


def test_three_in_a_circle(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    The third is told; once it lets go, the two others are served.
    """
    cache = make_cache(vram="3GiB")
    everybody = callers(3)
    leases = [
        each.lease(cache, name, "cuda:0")
        for each, name in zip(everybody, ("tiny", "tiny.en", "base"), strict=True)
    ]
    asked: list[Future[Any]] = []
    for each in everybody:
        assert_waiting(cache, clock, *asked)
        asked.append(each.waiting(cache, "base.en", "cuda:0"))
    clock.tick(CHECK_S)
    told(asked[2])
    leases[2].release()
    for future, lease in zip(asked[:2], leases[:2], strict=True):
        future.result(10).release()
        lease.release()
    assert cache.stats().deadlocks == 1


def test_a_circle_over_two_devices(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Each holds one card, and wants the other one.
    """
    cache = make_cache(vram="3GiB")
    one, other = callers(2)
    mine = one.lease(cache, "medium", "cuda:0")
    its = other.lease(cache, "medium", "cuda:1")
    first = one.waiting(cache, "small", "cuda:1")
    assert_waiting(cache, clock, first)
    last = other.waiting(cache, "small", "cuda:0")
    clock.tick(CHECK_S)
    told(last)
    its.release()
    first.result(10).release()
    mine.release()


def test_a_circle_by_max_models(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Not only bytes can be what two wait for.
    """
    cache = make_cache(max_models=2)
    one, other = callers(2)
    mine = one.lease(cache, "tiny", "cuda:0")
    its = other.lease(cache, "base", "cuda:0")
    first = one.waiting(cache, "small", "cuda:0")
    assert_waiting(cache, clock, first)
    last = other.waiting(cache, "small.en", "cuda:0")
    clock.tick(CHECK_S)
    told(last)
    its.release()
    first.result(10).release()
    mine.release()


def test_a_circle_by_the_work_on_one_model(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Two calls at once on a model that one holds may be more than fits.
    """
    loader.workspace_bytes = 1024**3
    cache = make_cache(vram="3GiB")
    (one,) = callers(1)
    held = one.lease(cache, "tiny", "cuda:0", num_workers=2)
    lease = one.lease(cache, "tiny", "cuda:0", num_workers=2)
    lease.release()
    asked = one.waiting(cache, "base", "cuda:0")
    clock.tick(CHECK_S)
    told(asked)
    held.release()


def test_two_circles_are_told_one_after_the_other(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Both within the time for one.
    """
    cache = make_cache(vram="4GiB", ram="4GiB")
    one, other = callers(2)
    leases = [one.lease(cache, "medium", "cuda:0"), other.lease(cache, "medium", "cpu")]
    asked = [
        one.waiting(cache, "small", "cuda:0"),
        other.waiting(cache, "small", "cpu"),
    ]
    clock.tick(CHECK_S)
    for each in asked:
        told(each)
    for lease in leases:
        lease.release()
    assert cache.stats().deadlocks == 2


def test_a_request_for_several_may_close_a_circle(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    It holds nothing of what it asks for, but its caller holds something else.
    """
    cache = make_cache(vram="4GiB")
    (one,) = callers(1)
    held = one.lease(cache, "medium", "cuda:0")
    asked = one.start(cache, "lease_many", ["tiny", "base"], "cuda:0")
    wait_waiting(cache, 1)
    clock.tick(CHECK_S)
    assert told(asked).model == "tiny/cuda:0/float16 + base/cuda:0/float16"
    held.release()


def test_lease_many_closes_no_circle(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Two that each want both, in opposite order, are served one after the other.
    """
    cache = make_cache(vram="5GiB")
    blocker = cache.lease("tiny", "cuda:0")
    one, other = callers(2)
    first = one.start(cache, "lease_many", ["medium", "small"], "cuda:0")
    wait_waiting(cache, 1)
    second = other.start(cache, "lease_many", ["small", "medium"], "cuda:0")
    wait_waiting(cache, 2)
    assert_waiting(cache, clock, first, second)
    blocker.release()
    first.result(10).release()
    second.result(10).release()
    assert cache.stats().deadlocks == 0


def test_tasks_of_one_loop_are_told_apart(
    make_cache: MakeCache, clock: FakeClock
) -> None:
    """
    Two tasks on one thread close a circle like two threads.
    """
    cache = AsyncModelCache(make_cache(vram="2GiB"))
    both_hold = asyncio.Event()

    async def hold_and_wait(mine: str, wanted: str) -> str:
        async with cache.lease(mine, "cuda:0"):
            if cache.stats().leases == 2:
                both_hold.set()
            await both_hold.wait()
            try:
                async with cache.lease(wanted, "cuda:0"):
                    return "served"
            except LeaseDeadlock:
                return "told"

    async def main() -> list[str]:
        tasks = [
            asyncio.create_task(hold_and_wait("tiny", "small")),
            asyncio.create_task(hold_and_wait("base", "small.en")),
        ]
        while not all(task.done() for task in tasks):
            clock.tick(CHECK_S if cache.stats().waiting else 0)
            await asyncio.sleep(0.001)
        return [task.result() for task in tasks]

    # Whichever is served must let the model of the other one go as well: nothing fits
    # beside what it holds itself, so it is told in its turn.
    assert asyncio.run(main()) == ["told", "told"]


def test_a_timeout_that_is_shorter_than_the_check_comes_first(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Whoever gives up by himself was in no circle.
    """
    cache = make_cache(vram="4GiB")
    (one,) = callers(1)
    held = one.lease(cache, "medium", "cuda:0")
    timers = len(clock._calls)
    asked = one.waiting(cache, "small", "cuda:0", timeout_s=0.01)
    wait_until(lambda: len(clock._calls) == timers + 2, "both timers")
    clock.tick(1)
    assert isinstance(asked.exception(10), LeaseTimeout)
    assert cache.stats().deadlocks == 0
    held.release()


def test_pins_may_close_a_circle_later(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    What could have left stays from then on.
    """
    cache = make_cache(vram="6GiB")
    one, other = callers(2)
    mine = one.lease(cache, "medium", "cuda:0")
    its = other.lease(cache, "tiny", "cuda:0")
    asked = one.waiting(cache, "medium.en", "cuda:0")
    assert_waiting(cache, clock, asked)
    other.call(cache, "pin", "tiny", "cuda:0")
    its.release()
    clock.tick(CHECK_S)
    told(asked)
    mine.release()
    cache.unpin()


def test_a_lowered_limit_may_close_a_circle_later(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Even with all that others hold, there would not be enough any more.
    """
    cache = make_cache(vram="6GiB")
    one, other = callers(2)
    mine = one.lease(cache, "medium", "cuda:0")
    its = other.lease(cache, "tiny", "cuda:0")
    asked = one.waiting(cache, "medium.en", "cuda:0")
    assert_waiting(cache, clock, asked)
    cache.resize(vram="5GiB")
    clock.tick(CHECK_S)
    told(asked)
    mine.release()
    its.release()


# Whose a lease is ---------------------------------------------------------------------


def test_segments_that_nobody_consumes_are_named(
    make_cache: MakeCache, clock: FakeClock, alike: MakeCallers
) -> None:
    """
    They hold their model while their caller asks for another one.
    """
    cache = make_cache(vram="4GiB")
    (one,) = alike(1)
    medium = one.call(cache, "get_model", "medium", "cuda:0")
    small = one.call(cache, "get_model", "small", "cuda:0")
    segments, _ = one.call_on(medium, "transcribe", "audio")
    one.call_on(segments, one.step)
    asked = one.start_on(small, "transcribe", "audio")
    wait_waiting(cache, 1)
    clock.tick(CHECK_S)
    assert "consume or close their segments" in str(told(asked))
    one.call_on(segments, one.end)
    segments, _ = one.call_on(small, "transcribe", "audio")
    one.call_on(segments, one.end)


def test_segments_that_somebody_else_consumes_are_waited_for(
    make_cache: MakeCache, clock: FakeClock, alike: MakeCallers
) -> None:
    """
    It is up to him to let their model go.
    """
    cache = make_cache(vram="4GiB")
    one, other = alike(2)
    medium = one.call(cache, "get_model", "medium", "cuda:0")
    segments, _ = one.call_on(medium, "transcribe", "audio")
    other.call_on(segments, other.step)
    asked = one.waiting(cache, "small", "cuda:0")
    assert_waiting(cache, clock, asked)
    other.call_on(segments, other.end)
    asked.result(10).release()


def test_who_consumes_the_segments_of_others_holds_their_model(
    make_cache: MakeCache, clock: FakeClock, alike: MakeCallers
) -> None:
    """
    He is told if he waits for memory in the midst of it.
    """
    cache = make_cache(vram="4GiB")
    one, other = alike(2)
    medium = one.call(cache, "get_model", "medium", "cuda:0")
    segments, _ = one.call_on(medium, "transcribe", "audio")
    other.call_on(segments, other.step)
    asked = other.waiting(cache, "small", "cuda:0")
    clock.tick(CHECK_S)
    told(asked)
    other.call_on(segments, other.end)


def test_a_lease_that_was_handed_over_is_waited_for(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Somebody else said that he will end it.
    """
    cache = make_cache(vram="4GiB")
    one, other = callers(2)
    held = one.lease(cache, "medium", "cuda:0")
    held.hand_over()
    asked = one.waiting(cache, "small", "cuda:0")
    assert_waiting(cache, clock, asked)
    other.call_on(held, "release")
    asked.result(10).release()


def test_a_lease_that_is_handed_over_to_one_who_waits_closes_a_circle(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    From then on only he could end what he waits for.
    """
    cache = make_cache(vram="4GiB")
    one, other = callers(2)
    mine = one.lease(cache, "tiny", "cuda:0")
    its = other.lease(cache, "small", "cuda:0")
    asked = one.waiting(cache, "medium", "cuda:0")
    assert_waiting(cache, clock, asked)
    its.hand_over(mine._entry.leases[mine._serial])
    clock.tick(CHECK_S)
    assert len(told(asked).held) == 2
    mine.release()
    its.release()


def test_a_lease_that_somebody_else_ends_serves_its_holder(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    It need not be the holder that releases.
    """
    cache = make_cache(vram="4GiB")
    one, other = callers(2)
    held = one.lease(cache, "medium", "cuda:0")
    asked = one.waiting(cache, "small", "cuda:0")
    other.call_on(held, "release")
    asked.result(10).release()
    clock.tick(1)
    assert cache.stats().deadlocks == 0


# Fairness -----------------------------------------------------------------------------


def test_a_nested_lease_is_granted_while_the_model_is_drained(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Or the holder would wait for the end of his own lease.
    """
    cache = make_cache(vram="4GiB", patience_s=5)
    one, other, third = callers(3)
    held = one.lease(cache, "small", "cuda:0")
    waiting = other.waiting(cache, "medium", "cuda:0")
    clock.tick(5)
    stranger = third.waiting(cache, "small", "cuda:0")
    nested = one.lease(cache, "small", "cuda:0")
    assert not stranger.done()
    nested.release()
    held.release()
    waiting.result(10).release()
    stranger.result(10).release()


def test_a_nested_lease_is_granted_while_the_model_is_evicted(
    make_cache: MakeCache, callers: MakeCallers
) -> None:
    """
    The eviction waits for both leases.
    """
    cache = make_cache()
    one, other = callers(2)
    held = one.lease(cache, "small", "cuda:0")
    evicting = other.start(cache, "evict", "small")
    wait_until(lambda: held._entry.gone, "the eviction")
    nested = one.lease(cache, "small", "cuda:0")
    several = one.call(cache, "lease_many", ["small", "tiny"], "cuda:0")
    held.release()
    nested.release()
    assert not evicting.done()
    several.release()
    assert evicting.result(10) == 1


def test_who_holds_what_an_older_request_needs_need_not_wait_for_it(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    That one would wait for him, and he for its turn, for ever.
    """
    cache = make_cache(vram="4GiB")
    one, other = callers(2)
    held = one.lease(cache, "small", "cuda:0")
    waiting = other.waiting(cache, "medium", "cuda:0")
    pass_often(cache)
    asked = one.waiting(cache, "tiny", "cuda:0")
    clock.tick(CHECK_S)
    asked.result(10).release()
    assert not waiting.done()
    held.release()
    waiting.result(10).release()
    assert cache.stats().deadlocks == 0


def test_a_load_that_somebody_else_asked_for_first_passes_for_a_holder(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Only the first asks for a load that many share; it does so for whoever may pass.
    """
    cache = make_cache(vram="4GiB")
    one, other, third = callers(3)
    held = one.lease(cache, "small", "cuda:0")
    waiting = other.waiting(cache, "medium", "cuda:0")
    pass_often(cache)
    first = third.waiting(cache, "tiny", "cuda:0")
    asked = one.waiting(cache, "tiny", "cuda:0")
    clock.tick(CHECK_S)
    asked.result(10).release()
    first.result(10).release()
    held.release()
    waiting.result(10).release()


@pytest.mark.parametrize("wanted", ["medium", "large-v3"])
def test_holders_do_not_rely_on_each_other_to_let_go_first(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers, wanted: str
) -> None:
    """
    An older request waits for one of two, or for both, and they for its turn.
    """
    cache = make_cache(vram="6GiB")
    one, other, older = callers(3)
    leases = [
        one.lease(cache, "small", "cuda:0"),
        other.lease(cache, "small.en", "cuda:0"),
    ]
    waiting = older.waiting(cache, wanted, "cuda:0")
    pass_often(cache)
    asked = [
        one.waiting(cache, "tiny", "cuda:0"),
        other.waiting(cache, "base", "cuda:0"),
    ]
    clock.tick(CHECK_S)
    for _ in range(2):
        wait_until(lambda: any(each.done() for each in asked), "a lease for a holder")
        place = next(place for place, each in enumerate(asked) if each.done())
        asked.pop(place).result(10).release()
        leases.pop(place).release()
        clock.tick(CHECK_S)
        if wanted == "medium":
            break
    waiting.result(10).release()
    for future, lease in zip(asked, leases, strict=True):
        future.result(10).release()
        lease.release()
    assert cache.stats().deadlocks == 0


def test_who_holds_nothing_that_is_needed_waits_for_his_turn(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Or a caller that holds any model for ever could starve an older request.
    """
    cache = make_cache(vram="4GiB")
    one, other, third = callers(3)
    unrelated = one.lease(cache, "base", "cuda:0")
    needed = third.lease(cache, "small", "cuda:0")
    waiting = other.waiting(cache, "medium", "cuda:0")
    pass_often(cache)
    asked = one.waiting(cache, "tiny", "cuda:0")
    assert_waiting(cache, clock, waiting, asked)
    needed.release()
    waiting.result(10).release()
    asked.result(10).release()
    unrelated.release()


def test_circles_of_others_let_nobody_pass(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Whoever holds nothing that an older request needs waits for his turn even then.
    """
    cache = make_cache(vram="4GiB", ram="4GiB")
    one, other, third, fourth, fifth = callers(5)
    unrelated = one.lease(cache, "base", "cuda:0")
    needed = third.lease(cache, "small", "cuda:0")
    circles = [
        each.lease(cache, "medium", device)
        for each, device in ((fourth, "cpu"), (fifth, "cuda:1"))
    ]
    waiting = other.waiting(cache, "medium", "cuda:0")
    pass_often(cache)
    asked = one.waiting(cache, "tiny", "cuda:0")
    for each, device in ((fourth, "cpu"), (fifth, "cuda:1")):
        each.waiting(cache, "small", device)
    clock.tick(CHECK_S)
    assert cache.stats().deadlocks == 2
    assert_waiting(cache, clock, waiting, asked)
    needed.release()
    waiting.result(10).release()
    asked.result(10).release()
    for lease in (unrelated, *circles):
        lease.release()


def test_a_caller_in_a_circle_may_ask_again_and_is_told_again(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    The one that waits on is never told in its place.
    """
    cache = make_cache(vram="4GiB")
    one, other = callers(2)
    mine, its = (
        one.lease(cache, "small", "cuda:0"),
        other.lease(cache, "small.en", "cuda:0"),
    )
    first = one.waiting(cache, "tiny", "cuda:0")
    for count in (1, 2, 3):
        last = other.waiting(cache, "base", "cuda:0")
        clock.tick(CHECK_S)
        told(last)
        assert cache.stats().deadlocks == count
    assert_waiting(cache, clock, first)
    its.release()
    first.result(10).release()
    mine.release()


# Evictions ----------------------------------------------------------------------------


def test_evicting_what_one_holds_is_refused_at_once(
    make_cache: MakeCache, callers: MakeCallers
) -> None:
    """
    Without a timeout, the caller would wait for himself; nothing was evicted.
    """
    cache = make_cache()
    (one,) = callers(1)
    held = one.lease(cache, "small", "cuda:0")
    with pytest.raises(LeaseDeadlock, match=r"small/cuda:0/float16") as caught:
        one.call(cache, "evict", "small")
    assert caught.value.held == ("small/cuda:0/float16",)
    one.call(cache, "lease", "small", "cuda:0", timeout_s=0).release()
    held.hand_over()
    evicting = one.start(cache, "evict", "small")
    wait_until(lambda: held._entry.gone, "the eviction")
    held.release()
    assert evicting.result(10) == 1


def test_evicting_what_one_holds_with_a_timeout_times_out(
    make_cache: MakeCache, clock: FakeClock, callers: MakeCallers
) -> None:
    """
    Somebody else might release it until then; the model stays as it was.
    """
    cache = make_cache()
    (one,) = callers(1)
    held = one.lease(cache, "small", "cuda:0")
    evicting = one.start(cache, "evict", "small", timeout_s=1)
    wait_until(lambda: clock._calls, "the timer")
    clock.tick(1)
    assert isinstance(evicting.exception(10), LeaseTimeout)
    one.call(cache, "lease", "small", "cuda:0", timeout_s=0).release()
    held.release()
