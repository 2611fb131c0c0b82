"""
What a card does once, and keeps for good: its warm-up, its floor, unreturned bytes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from whispercache import (
    DeviceLost,
    DeviceUnavailable,
    LoadFailed,
    ModelEvicted,
    ModelLoaded,
    ModelLoading,
)
from whispercache.events import DeviceWarmedUp, DeviceWarmingUp
from whispercache.testing import FakeLoader, check, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import MakeCache
    from driver import Driver

    from whispercache import DeviceInfo, Event, ModelCache
    from whispercache.keys import ModelKey
    from whispercache.testing import FakeClock, FakeMachine

GIB = 1024**3
MIB = 1024**2
CARD = "cuda:0"
WARM_UP = f"warm-up of {CARD}"
OUT_OF_MEMORY = "CUDA failed with error out of memory"
ILLEGAL = "CUDA failed with error an illegal memory access was encountered"


@pytest.fixture(autouse=True)
def _cold(loader: FakeLoader) -> None:
    """
    Cards that have to be warmed up.
    """
    loader.warm_up_reason = "kernels are compiled"


def record(cache: ModelCache, *kinds: type[Event]) -> list[Any]:
    """
    The events of some kinds, from now on.
    """
    events: list[Any] = []

    def note(event: Event) -> None:
        if isinstance(event, kinds):
            events.append(event)

    cache.subscribe(note)
    return events


def device(cache: ModelCache, name: str = CARD) -> DeviceInfo:
    """
    The numbers of a card.
    """
    return next(info for info in cache.devices() if info.device == name)


# Warm-up ------------------------------------------------------------------------------


def test_it_is_told_before_and_after(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    In order, with what it is for and what it cost; the load begins with it.
    """
    loader.clock, loader.warm_up_s, loader.floor_size = clock, 1.5, "200MiB"
    cache = make_cache()
    kinds = (ModelLoading, DeviceWarmingUp, DeviceWarmedUp, ModelLoaded)
    events = record(cache, *kinds)
    with driver.lease(cache, "base", CARD) as whisper:
        key = whisper.key
    settle(cache)
    assert [type(event) for event in events] == list(kinds)
    assert events[1] == DeviceWarmingUp(key, CARD, "kernels are compiled")
    assert events[2] == DeviceWarmedUp(key, CARD, 1.5, 200 * MIB)


def test_its_seconds_are_no_load_s(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    Or the first model would be taken for one that is dear to bring back.
    """
    loader.clock, loader.warm_up_s, loader.load_s = clock, 20.0, 3.0
    cache = make_cache()
    events = record(cache, ModelLoaded)
    driver.lease(cache, "base", CARD).release()
    settle(cache)
    assert events[0].load_s == cache.models()[0].load_s == 3.0
    assert cache.stats().load_s == 3.0


class Watched(FakeLoader):
    """
    A loader whose warm-ups wait for the test.
    """

    reached: threading.Event
    opened: threading.Event

    def warm_up(self, key: ModelKey) -> int | None:
        """
        Wait, then be done.
        """
        self.reached.set()
        assert self.opened.wait(10)
        return super().warm_up(key)


@pytest.fixture
def watched(machine: FakeMachine) -> Watched:
    """
    One of these, closed.
    """
    loader = Watched(machine, warm_up_reason="kernels are compiled")
    loader.reached, loader.opened = threading.Event(), threading.Event()
    return loader


def test_whoever_waits_is_told_why_after_two_seconds(
    make_cache: MakeCache,
    watched: Watched,
    clock: FakeClock,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    While it happens, not when it is over.
    """
    cache = make_cache(loader=watched)
    asked = driver.start(cache, "lease", "base", CARD)
    assert watched.reached.wait(10)
    clock.tick(1.9)
    assert "warming up" not in caplog.text
    clock.tick(0.2)
    assert "cuda:0 is warming up: kernels are compiled" in caplog.text
    assert not asked.done()
    watched.opened.set()
    asked.result(10).release()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_said_of_a_quick_one(
    make_cache: MakeCache,
    loader: FakeLoader,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    *,
    fails: bool,
) -> None:
    """
    Nor of one that failed at once.
    """
    cache = make_cache()
    if fails:
        loader.fail_loads[WARM_UP] = [RuntimeError("libcublas.so.12 is not found")]
        with pytest.raises(LoadFailed):
            cache.lease("base", CARD)
    else:
        cache.lease("base", CARD).release()
    clock.tick(10)
    assert "warming up" not in caplog.text


def test_each_card_is_warmed_up_once_a_type(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    And the CPU never.
    """
    cache = make_cache()
    for name in (CARD, "cuda:1", "cpu"):
        for model in ("base", "tiny"):
            for compute_type in ("float32", "int8", "float32"):
                cache.lease(model, name, compute_type, keep_alive=0).release()
    settle(cache)
    cards = (CARD, "cuda:1")
    types = ("float32", "int8_float16")
    assert sorted(loader.warm) == sorted((c, t) for c in cards for t in types)


def test_a_failure_is_that_of_the_load(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    All who wait get it, nothing stays charged, and the next request tries again.
    """
    reason = "libcublas.so.12 is not found"
    loader.fail_loads[WARM_UP] = [RuntimeError(reason)]
    cache = make_cache()
    events = record(cache, DeviceWarmingUp, DeviceWarmedUp)
    with pytest.raises(LoadFailed, match=reason):
        driver.lease(cache, "base", CARD)
    assert device(cache).charged_bytes == 0
    driver.lease(cache, "base", CARD).release()
    settle(cache)
    kinds = [type(event) for event in events]
    assert kinds == [DeviceWarmingUp, DeviceWarmingUp, DeviceWarmedUp]


def test_a_failure_reaches_all_who_wait(
    make_cache: MakeCache, watched: Watched, driver: Driver
) -> None:
    """
    Each with an error of his own.
    """
    watched.fail_loads[WARM_UP] = [RuntimeError("no kernel image")]
    cache = make_cache(loader=watched)
    asked = [driver.waiting(cache, "base", CARD) for _ in range(3)]
    watched.opened.set()
    failures = [each.exception(10) for each in asked]
    assert all(isinstance(failure, LoadFailed) for failure in failures)
    assert len(set(map(id, failures))) == 3


def test_out_of_memory_in_it_evicts_and_tries_again(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    As in the load itself.
    """
    cache = make_cache()
    driver.lease(cache, "base", CARD, "float32").release()
    loader.fail_loads[WARM_UP] = [RuntimeError(OUT_OF_MEMORY)]
    driver.lease(cache, "tiny", CARD, "float16").release()
    assert [info.key.model for info in cache.models()] == ["tiny"]
    assert loader.warm == [(CARD, "float32"), (CARD, "float16")]


def test_a_card_that_breaks_in_it_is_lost(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It is told, and not tried again.
    """
    loader.fail_loads[WARM_UP] = [RuntimeError(ILLEGAL)]
    cache = make_cache()
    events = record(cache, DeviceLost)
    with pytest.raises(LoadFailed):
        driver.lease(cache, "base", CARD)
    with pytest.raises(DeviceUnavailable):
        driver.lease(cache, "base", CARD)
    settle(cache)
    assert [event.device for event in events] == [CARD]


# The floor ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "headroom"), [("2MiB", 510), ("300MiB", 212), ("400MiB", 128)]
)
def test_the_floor_is_no_longer_kept_free(
    make_cache: MakeCache, loader: FakeLoader, floor: str, headroom: int
) -> None:
    """
    What the process keeps was part of the headroom as long as nobody had measured it.
    """
    loader.floor_size = floor
    cache = make_cache()
    cache.lease("base", CARD).release()
    assert device(cache).capacity_bytes == 10 * GIB
    cache.lease("tiny", CARD).release()
    info = device(cache)
    floor_bytes = int(floor.removesuffix("MiB")) * MIB
    assert info.floor_bytes == floor_bytes
    total_bytes = 10 * GIB + 512 * MIB
    assert info.capacity_bytes == total_bytes - floor_bytes - headroom * MIB


def test_a_floor_is_unknown_until_it_is_measured(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Of each card for itself; the host has none.
    """
    loader.floor_size = "200MiB"
    cache = make_cache()
    cache.lease("base", CARD).release()
    cache.explain("base", "cuda:1")
    known = {info.device: info.floor_bytes for info in cache.devices()}
    assert known == {CARD: 200 * MIB, "cuda:1": None, "cpu": None}


# Bytes that do not come back ----------------------------------------------------------


def leave(cache: ModelCache, model: str = "medium", name: str = CARD) -> ModelEvicted:
    """
    Use a model and let it leave; the event of that.
    """
    events = record(cache, ModelEvicted)
    cache.lease(model, name).release()
    cache.evict(model)
    settle(cache)
    assert len(events) == 1
    event: ModelEvicted = events[0]
    return event


def look(cache: ModelCache, name: str = CARD) -> None:
    """
    Read a gauge.
    """
    core = cache._core
    core.gauges.observe(core.device(name))
    check(cache)


@pytest.fixture
def _keeping(loader: FakeLoader, machine: FakeMachine) -> Iterator[None]:
    """
    Each unload from a card leaves one GiB of it; given back when the test is over.
    """
    loader.warm_up_reason, loader.kept_size = "", "1GiB"
    yield
    assert all(n == 0 for n in machine.held_bytes.values()), "give it back in the test"


@pytest.mark.usefixtures("_keeping")
def test_what_did_not_come_back_stays_charged(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    It is told, and ends once the gauge shows it.
    """
    cache = make_cache()
    event = leave(cache)
    assert event.credited_bytes == event.returned_bytes == 2 * GIB
    assert event.unreturned_bytes == GIB
    assert event.predicted_bytes == 3 * GIB
    look(cache)
    info = device(cache)
    assert info.charged_bytes == info.unreturned_bytes == GIB
    assert info.capacity_bytes == 10 * GIB
    machine.give_back(CARD, GIB)
    look(cache)
    info = device(cache)
    assert info.charged_bytes == info.unreturned_bytes == 0
    assert info.capacity_bytes == 10 * GIB


@pytest.mark.usefixtures("_keeping")
def test_no_more_is_kept_than_is_in_use(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    A part that came back is seen where nothing else is on the card.
    """
    cache = make_cache()
    leave(cache)
    machine.give_back(CARD, GIB // 4)
    look(cache)
    assert device(cache).unreturned_bytes == 3 * GIB // 4
    with cache.lease("small", CARD):
        check(cache)
        assert device(cache).charged_bytes == 11 * GIB // 4
    machine.give_back(CARD, 3 * GIB // 4)
    look(cache)
    assert device(cache).charged_bytes == 2 * GIB
    cache.evict("small")
    machine.give_back(CARD, GIB)


@pytest.mark.usefixtures("_keeping")
def test_what_models_left_adds_up(make_cache: MakeCache, machine: FakeMachine) -> None:
    """
    And no more than the model had.
    """
    cache = make_cache()
    leave(cache)
    leave(cache, "small")
    assert device(cache).unreturned_bytes == 2 * GIB
    machine.give_back(CARD, 2 * GIB)
    look(cache)
    assert device(cache).unreturned_bytes == 0


@pytest.mark.usefixtures("_keeping")
def test_the_gauge_shows_the_return_beside_other_programs(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    What they hold does not hide that it fell.
    """
    machine.others(CARD, "2GiB")
    cache = make_cache()
    leave(cache)
    look(cache)
    assert device(cache).unreturned_bytes == GIB
    machine.give_back(CARD, GIB)
    look(cache)
    assert device(cache).unreturned_bytes == 0


@pytest.mark.usefixtures("_keeping")
def test_a_return_before_the_next_reading_counts(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    The fall is one since the unload, not since somebody looked.
    """
    machine.others(CARD, "2GiB")
    cache = make_cache()
    leave(cache)
    machine.give_back(CARD, GIB)
    look(cache)
    look(cache)
    assert device(cache).unreturned_bytes == 0


@pytest.mark.usefixtures("_keeping")
def test_who_waits_for_it_is_served_once_it_comes_back(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock, driver: Driver
) -> None:
    """
    Nothing of ours will move, so the gauge is read again.
    """
    cache = make_cache(vram="3GiB")
    leave(cache)
    waiting = driver.waiting(cache, "medium", CARD)
    settle(cache)
    assert not waiting.done()
    machine.give_back(CARD, GIB)
    for _ in range(3):
        clock.tick(1)
        settle(cache)
    was_done = waiting.done()
    look(cache)
    cache.resize(vram="3GiB")  # or it would wait for ever
    waiting.result(10).release()
    cache.evict("medium")
    machine.give_back(CARD, GIB)
    assert was_done, "nobody looked again"


@pytest.mark.usefixtures("_keeping")
def test_nothing_of_it_is_kept_of_a_model_on_the_host(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    There the heap does what it does.
    """
    cache = make_cache()
    event = leave(cache, "base", "cpu")
    assert (event.credited_bytes, event.unreturned_bytes) == (GIB, 0)
    assert machine.held_bytes["cpu"] == 0


@pytest.mark.usefixtures("_keeping")
def test_a_wait_for_a_load_beside_it_ends(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    An idle model leaves for what the kept bytes would have held.
    """
    cache = make_cache(vram="6GiB")
    leave(cache, "small")
    driver.lease(cache, "base", CARD).release()
    with driver.lease(cache, "medium", CARD):
        assert device(cache).charged_bytes == 5 * GIB
    driver.lease(cache, "small", CARD).release()
    wait_until(lambda: device(cache).charged_bytes <= 6 * GIB)
    check(cache)
    cache.close()
    machine.give_back(CARD, machine.held_bytes[CARD])
