"""
Several models at once: `lease_many`, from threads and from tasks.
"""

from __future__ import annotations

import gc
import random
import threading
import time
import tracemalloc
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from driver import TaskDriver, wait_waiting

from whispercache import (
    AsyncModelCache,
    CacheClosed,
    Leases,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    ModelTooLarge,
    TooManyWaiters,
)
from whispercache.core.core import Core
from whispercache.core.threads import MonotonicClock
from whispercache.testing import FakeLoader, FakeMachine, check, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from conftest import MakeCache
    from driver import Driver

    from whispercache.core.waiters import Waiter
    from whispercache.testing import FakeClock

GIB = 1024**3


@pytest.fixture(autouse=True)
def _sizes(loader: FakeLoader) -> None:
    """
    Another model of 2 GiB.
    """
    loader.sizes = {**loader.sizes, "small.en": "2GiB"}


def lease_many(
    driver: Driver, cache: ModelCache, models: object, *args: object, **options: object
) -> Leases:
    """
    Ask for several models, and wait for them.
    """
    leases = driver.call(cache, "lease_many", models, *args, **options)
    assert isinstance(leases, Leases)
    return leases


def waiting_for(
    driver: Driver, cache: ModelCache, models: object, *args: object, **options: object
) -> Future[Any]:
    """
    Begin to ask for several models, and wait until that waits in the queue.
    """
    before = cache.stats().waiting
    asked = driver.start(cache, "lease_many", models, *args, **options)
    wait_until(lambda: cache.stats().waiting > before or asked.done(), "a waiter")
    return asked


def state_of(cache: ModelCache, name: str) -> str:
    """
    The state of one model.
    """
    states = [info.state for info in cache.models() if info.key.model == name]
    return states[0] if states else "absent"


def leases_on(cache: ModelCache, name: str) -> int:
    """
    How many leases are held on one model.
    """
    return sum(info.leases for info in cache.models() if info.key.model == name)


def charged_gib(cache: ModelCache, device: str = "cuda:0") -> float:
    """
    What is counted on a device.
    """
    held = {info.device: info.charged_bytes for info in cache.devices()}
    return held[device] / GIB


def peak_gib(cache: ModelCache, device: str = "cuda:0") -> float:
    """
    The most that was ever counted on a device.
    """
    return max(i.peak_bytes for i in cache.devices() if i.device == device) / GIB


def names(leases: Leases) -> list[str]:
    """
    The models that are held, in order.
    """
    return [lease.key.model for lease in leases]


# What is granted ----------------------------------------------------------------------


def test_leases_come_in_the_order_in_which_they_were_asked_for(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Whether their models were in memory before or not.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda:0").release()
    leases = lease_many(driver, cache, ["tiny", "base", "small"], "cuda:0")
    assert names(leases) == ["tiny", "base", "small"]
    assert loader.loads == {"base": 1, "tiny": 1, "small": 1}
    leases.release()


def test_leases_are_a_sequence(make_cache: MakeCache, driver: Driver) -> None:
    """
    With a length, places and slices; its text names each model.
    """
    cache = make_cache()
    leases = lease_many(driver, cache, ["tiny", "base", "small"], "cuda:0")
    assert len(leases) == 3
    assert leases[0].key.model == "tiny"
    assert leases[-1] is leases[2]
    assert leases[1:] == (leases[1], leases[2])
    assert list(leases) == [leases[0], leases[1], leases[2]]
    with pytest.raises(IndexError):
        _ = leases[3]
    assert "base/cuda:0/float16 held" in repr(leases)
    leases.release()
    leases.release()
    assert repr(leases).count("released") == 3
    assert cache.stats().leases == 0


def test_a_with_block_has_the_models_themselves(make_cache: MakeCache) -> None:
    """
    All of them are held until its end, however it ends.
    """
    cache = make_cache()
    with cache.lease_many(["tiny", "base"], "cuda:0") as (tiny, base):
        segments, _ = base.transcribe("audio")
        assert next(iter(segments)).text == "base/cuda:0/float16"
        assert tiny is not base
        assert cache.stats().leases == 2
    assert cache.stats().leases == 0
    with pytest.raises(KeyError), cache.lease_many(["tiny", "base"], "cuda:0"):
        raise KeyError
    assert cache.stats().leases == 0


def test_an_async_with_block_has_the_models_themselves(make_cache: MakeCache) -> None:
    """
    Awaited instead, they are leases as threads have them.
    """
    cache = make_cache()
    driver = TaskDriver()

    class Caller:
        async def use(self) -> None:
            tasks = AsyncModelCache(cache)
            async with tasks.lease_many(["tiny", "base"], "cuda:0") as (tiny, base):
                segments, _ = base.transcribe("audio")
                assert next(iter(segments)).text == "base/cuda:0/float16"
                assert tiny is not base
            assert cache.stats().leases == 0
            with pytest.raises(KeyError):
                async with tasks.lease_many(["tiny", "base"], "cuda:0"):
                    raise KeyError
            assert cache.stats().leases == 0
            leases = await tasks.lease_many(["tiny", "base"], "cuda:0")
            assert names(leases) == ["tiny", "base"]
            leases.release()

    driver.call_on(Caller(), "use")
    driver.close()


def test_an_error_in_the_block_releases_all(make_cache: MakeCache) -> None:
    """
    It passes as it is; which of the models it is about cannot be told.
    """
    cache = make_cache()
    leases = cache.lease_many(["tiny", "base"], "cuda:0")
    with pytest.raises(RuntimeError, match="launch failure"), leases:
        raise RuntimeError("CUDA failed with error unspecified launch failure")
    held = cache.stats().leases
    leases.release()
    assert held == 0
    cache.lease("tiny", "cuda:0").release()


def test_duplicates_share_a_load_and_have_a_lease_each(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Other names of one model are duplicates too.
    """
    cache = make_cache(vram="3GiB")
    models = ["base", "tiny", ("base", "cuda:0"), "Systran/faster-whisper-base"]
    leases = lease_many(driver, cache, models, "cuda:0")
    assert names(leases) == ["base", "tiny", "base", "base"]
    assert loader.loads == {"base": 1, "tiny": 1}
    assert len(set(leases)) == cache.stats().leases == 4
    leases[0].release()
    assert leases[2].whisper is leases[3].whisper
    leases.release()


def test_the_same_model_twice_is_two_leases_on_it(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Their work counts for as many workers as it has, when it loads and when it is there.
    """
    loader.workspace_bytes = GIB
    cache = make_cache(vram="4GiB")
    for _ in range(2):
        models = ["small", "small", "small"]
        leases = lease_many(driver, cache, models, "cuda:0", num_workers=2)
        assert charged_gib(cache) == 4
        leases.release()
        assert charged_gib(cache) == 2
    with pytest.raises(ModelTooLarge):
        lease_many(driver, cache, ["small"] * 3, "cuda:0", num_workers=3)


def test_each_model_may_name_its_own_device_and_type(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The others take what is given for all.
    """
    cache = make_cache()
    models = [
        "tiny",
        ("base",),
        ("base", "cpu"),
        ("small", "cuda:0", "int8"),
        Path("tiny"),
    ]
    leases = lease_many(driver, cache, models[:4], "cuda:1", "float32")
    assert [str(lease.key) for lease in leases] == [
        "tiny/cuda:1/float32",
        "base/cuda:1/float32",
        "base/cpu/float32",
        "small/cuda:0/int8_float16",
    ]
    leases.release()


def test_one_model_is_a_group_of_one(make_cache: MakeCache, driver: Driver) -> None:
    """
    It is served like any other request.
    """
    cache = make_cache()
    leases = lease_many(driver, cache, ("tiny",), "cuda:0")
    assert names(leases) == ["tiny"]
    leases.release()


def test_each_model_counts_as_a_request(make_cache: MakeCache, driver: Driver) -> None:
    """
    Hits and misses are counted model by model.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda:0").release()
    lease_many(driver, cache, ["tiny", "base", "small"], "cuda:0").release()
    stats = cache.stats()
    assert (stats.requests, stats.hits, stats.misses) == (4, 1, 3)
    assert (stats.loads, stats.waiting, stats.leases) == (3, 0, 0)


def test_a_keep_alive_holds_for_each(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    In place of the cache's.
    """
    cache = make_cache(keep_alive="5m")
    leases = lease_many(driver, cache, ["tiny", "base"], "cuda:0", keep_alive=7)
    leases[0].release()
    clock.tick(4)
    leases[1].release()
    clock.tick(3)
    settle(cache)
    assert state_of(cache, "tiny") == "absent"
    assert state_of(cache, "base") == "resident"
    clock.tick(4)
    settle(cache)
    assert not cache.models()


@pytest.mark.parametrize(
    ("models", "kind", "message"),
    [
        ("base", TypeError, "must be a list"),
        (Path("base"), TypeError, "must be a list"),
        ([], ValueError, "at least one"),
        ([("base", "cuda:0", "int8", "tiny")], ValueError, "compute_type"),
        ([()], ValueError, "compute_type"),
    ],
)
def test_nonsense_is_explained(
    make_cache: MakeCache,
    driver: Driver,
    models: object,
    kind: type[Exception],
    message: str,
) -> None:
    """
    And nothing was asked for.
    """
    cache = make_cache()
    with pytest.raises(kind, match=message):
        lease_many(driver, cache, models, "cuda:0")
    assert cache.stats().requests == 0


def test_a_leaked_lease_tells_where_it_was_taken(make_cache: MakeCache) -> None:
    """
    While tracemalloc traces, like any other lease.
    """
    cache = make_cache()
    tracemalloc.start()
    try:
        leases = cache.lease_many(["tiny", "base"], "cuda:0")
    finally:
        tracemalloc.stop()
    assert [Path(lease.taken_at.rpartition(":")[0]).name for lease in leases] == [
        "test_lease_many.py",
        "test_lease_many.py",
    ]
    leases.release()


# All or nothing -----------------------------------------------------------------------


def test_who_waits_holds_nothing(make_cache: MakeCache, driver: Driver) -> None:
    """
    Others may take what is free, and what is idle may leave for them.
    """
    cache = make_cache(vram="4GiB")
    driver.lease(cache, "tiny", "cuda:0").release()
    held = driver.lease(cache, "small", "cuda:0")
    asked = waiting_for(driver, cache, ["tiny", "base", "medium.en"], "cuda:0")
    assert cache.stats().leases == 1
    assert charged_gib(cache) == 3
    others = [driver.lease(cache, name, "cuda:0") for name in ("tiny.en", "base.en")]
    assert state_of(cache, "tiny") == "absent"
    assert not asked.done()
    for lease in (held, *others):
        lease.release()
    asked.result(10).release()


def test_memory_is_granted_in_one_step(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    All of it is counted when the first load begins, so that nobody comes between.
    """
    cache = make_cache(vram="5GiB")
    with loader.holding_loads("small") as gate:
        asked = waiting_for(driver, cache, ["small", "tiny", "base"], "cuda:0")
        gate.wait_reached()
        assert charged_gib(cache) == 4
        late = driver.waiting(cache, "small.en", "cuda:0")
        fits = driver.start(cache, "lease", "tiny.en", "cuda:0")
        settling = driver.waiting(cache, "tiny", "cuda:0")
        assert not late.done()
        gate.open()
        leases = asked.result(10)
    for each in (fits, settling):
        each.result(10).release()
    leases.release()
    late.result(10).release()
    assert loader.loads["tiny"] == 1


def test_loads_on_one_device_take_their_peaks_in_turn(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Beside what stays, there must be room for the largest peak only, not for all.
    """
    loader.loading_factor = 1.5
    cache = make_cache(vram="5GiB")
    with loader.holding_loads("small") as gate:
        asked = waiting_for(driver, cache, ["small", "tiny", "base"], "cuda:0")
        gate.wait_reached()
        assert charged_gib(cache) == 5  # 2 + 1 + 1 GiB that stay, and once 1 GiB more
    leases = asked.result(10)
    assert charged_gib(cache) == 4
    assert peak_gib(cache) == 5
    leases.release()
    cache.resize(vram="4.9GiB")
    driver.call(cache, "evict")
    with pytest.raises(ModelTooLarge):
        lease_many(driver, cache, ["small", "tiny", "base"], "cuda:0")


def test_loads_onto_a_card_take_their_host_memory_in_turn(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Those of two cards run at once and need it at once.
    """
    loader.host_loading_bytes = 2 * GIB
    cache = make_cache(ram="2GiB")
    lease_many(driver, cache, ["small", "tiny"], "cuda:0").release()
    assert peak_gib(cache, "cpu") == 2
    with pytest.raises(ModelTooLarge, match=r"needs 4\.0 GiB on cpu"):
        lease_many(driver, cache, ["base", ("base", "cuda:1")], "cuda:0")


def test_members_on_two_devices_load_at_once(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Neither waits for the other's load.
    """
    cache = make_cache()
    with (
        loader.holding_loads("small") as one,
        loader.holding_loads("base") as other,
    ):
        models = [("small", "cuda:0"), ("base", "cuda:1")]
        asked = waiting_for(driver, cache, models)
        one.wait_reached()
        other.wait_reached()
    asked.result(10).release()


def test_a_member_in_memory_stays_while_the_others_load(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    It is held from the moment at which the memory was granted.
    """
    cache = make_cache(vram="4GiB", keep_alive=5)
    driver.lease(cache, "tiny", "cuda:0").release()
    with loader.holding_loads("small") as gate:
        asked = waiting_for(driver, cache, ["small", "tiny"], "cuda:0")
        gate.wait_reached()
        assert leases_on(cache, "tiny") == 1
        pressing = driver.waiting(cache, "small.en", "cuda:0")
        clock.tick(100)
        assert state_of(cache, "tiny") == "resident"
        check(cache)
    leases = asked.result(10)
    assert not loader.unloads
    leases.release()
    pressing.result(10).release()


def test_others_leave_for_a_group_and_its_own_models_do_not(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Even if one of its own was used longest ago.
    """
    cache = make_cache(vram="4GiB")
    for name in ("tiny", "base", "small"):
        driver.lease(cache, name, "cuda:0").release()
    lease_many(driver, cache, ["tiny", "medium"], "cuda:0").release()
    assert loader.unloads == {"base": 1, "small": 1}
    assert loader.loads["tiny"] == 1


def test_a_group_joins_a_load_in_flight(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model that somebody else has begun to load is not loaded again.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        single = driver.waiting(cache, "base", "cuda:0")
        gate.wait_reached()
        asked = waiting_for(driver, cache, ["base", "tiny"], "cuda:0")
        gate.open()
        single.result(10).release()
        asked.result(10).release()
    assert loader.loads == {"base": 1, "tiny": 1}


def test_singles_join_the_loads_of_a_group(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model of it that is there is leased to others while the rest still loads.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0")
        gate.wait_reached()
        driver.lease(cache, "tiny", "cuda:0").release()
        assert not asked.done()
    asked.result(10).release()
    assert loader.loads == {"base": 1, "tiny": 1}


# What can never be --------------------------------------------------------------------


def test_more_than_fits_together_fails_at_once_and_evicts_nothing(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The error has the numbers of all together.
    """
    cache = make_cache(vram="4GiB")
    driver.lease(cache, "tiny.en", "cuda:0").release()
    held = driver.lease(cache, "base.en", "cuda:0")
    with pytest.raises(ModelTooLarge, match="that is the limit") as caught:
        lease_many(driver, cache, ["medium", "small"], "cuda:0")
    assert caught.value.needed_bytes == 5 * GIB
    assert caught.value.capacity_bytes == 4 * GIB
    assert caught.value.device == "cuda:0"
    assert caught.value.model == "medium/cuda:0/float16 + small/cuda:0/float16"
    assert state_of(cache, "tiny.en") == "resident"
    assert not loader.unloads
    assert cache.stats().waiting == 0
    held.release()


def test_the_numbers_do_not_depend_on_what_is_in_memory(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    A member that is there counts with what it takes.
    """
    cache = make_cache(vram="4GiB")
    driver.lease(cache, "medium", "cuda:0").release()
    with pytest.raises(ModelTooLarge) as caught:
        lease_many(driver, cache, ["medium", "small"], "cuda:0")
    assert caught.value.needed_bytes == 5 * GIB
    assert caught.value.capacity_bytes == 4 * GIB


def test_a_group_beside_a_pinned_model(make_cache: MakeCache, driver: Driver) -> None:
    """
    A pinned model takes room, unless it belongs to the group.
    """
    cache = make_cache(vram="4GiB")
    driver.call(cache, "pin", "tiny", "cuda:0")
    with pytest.raises(ModelTooLarge, match=r"1\.0 GiB are pinned"):
        lease_many(driver, cache, ["small", "small.en"], "cuda:0")
    lease_many(driver, cache, ["small", "tiny", "base"], "cuda:0").release()
    assert cache.unpin() == 1
    lease_many(driver, cache, ["small", "small.en"], "cuda:0").release()


def test_more_than_max_models_fail_at_once(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The error says how many were wanted; duplicates and other devices do not count.
    """
    cache = make_cache(max_models=2)
    driver.lease(cache, "tiny", "cuda:0").release()
    with pytest.raises(ModelTooLarge, match=r"max_models is 2.*3 are wanted at once"):
        lease_many(driver, cache, ["tiny", "base", "small"], "cuda:0")
    models = ["tiny", "base", "tiny", ("small", "cpu")]
    lease_many(driver, cache, models, "cuda:0").release()


# Failures -----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["tiny", "small", "base"])
def test_a_load_that_fails_fails_the_group_and_releases_the_rest(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver, broken: str
) -> None:
    """
    Whichever it is; the others stay in memory, idle, and can be had at once.
    """
    cache = make_cache()
    driver.lease(cache, "base.en", "cuda:0").release()
    loader.fail_loads[broken] = [RuntimeError("disk on fire")]
    models = ["base.en", "tiny", "small", "base"]
    with pytest.raises(LoadFailed, match="disk on fire") as caught:
        lease_many(driver, cache, models, "cuda:0")
    assert caught.value.model == f"{broken}/cuda:0/float16"
    settle(cache)
    assert cache.stats().leases == 0
    assert state_of(cache, broken) == "absent"
    for name in set(models) - {broken}:
        driver.lease(cache, name, "cuda:0", timeout_s=0).release()
    lease_many(driver, cache, models, "cuda:0").release()


def test_a_timeout_of_zero_takes_what_is_there_or_nothing(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    One absent model refuses them all, and nothing is loaded for that.
    """
    cache = make_cache()
    driver.lease(cache, "tiny", "cuda:0").release()
    with pytest.raises(LeaseTimeout):
        lease_many(driver, cache, ["tiny", "base"], "cuda:0", timeout_s=0)
    assert loader.loads == {"tiny": 1}
    assert cache.stats().leases == 0
    driver.lease(cache, "base", "cuda:0").release()
    lease_many(driver, cache, ["tiny", "base"], "cuda:0", timeout_s=0).release()


def test_a_timeout_while_it_waits_leaves_nothing(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    The error tells the place in the queue.
    """
    cache = make_cache(vram="4GiB")
    held = driver.lease(cache, "medium", "cuda:0")
    asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0", timeout_s=5)
    wait_until(lambda: clock._calls, "the timer")
    clock.tick(5)
    error = asked.exception(10)
    assert isinstance(error, LeaseTimeout)
    assert (error.waited_s, error.position) == (5, 1)
    assert error.model == "tiny/cuda:0/float16 + base/cuda:0/float16"
    assert (cache.stats().timeouts, cache.stats().leases) == (1, 1)
    held.release()


def test_a_timeout_while_it_loads_releases_what_it_has(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    The loads go on; their models are there, idle, for others.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0", timeout_s=5)
        gate.wait_reached()
        wait_until(lambda: leases_on(cache, "tiny"), "the first model")
        wait_until(lambda: clock._calls, "the timer")
        clock.tick(5)
        assert isinstance(asked.exception(10), LeaseTimeout)
        assert leases_on(cache, "tiny") == 0
        check(cache)
    settle(cache)
    assert cache.stats().leases == 0
    driver.lease(cache, "base", "cuda:0", timeout_s=0).release()


def test_a_task_that_is_cancelled_leaves_nothing(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Neither while it waits nor while it loads.
    """
    cache = make_cache(vram="4GiB")
    driver = TaskDriver()
    held = cache.lease("medium", "cuda:0")
    asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0")
    asked.cancel()
    wait_waiting(cache, 0)
    held.release()
    with loader.holding_loads("base") as gate:
        asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0")
        gate.wait_reached()
        wait_until(lambda: leases_on(cache, "tiny"), "the first model")
        asked.cancel()
        wait_waiting(cache, 0)
        assert cache.stats().leases == 0
        check(cache)
    settle(cache)
    with cache.lease_many(["tiny", "base"], "cuda:0", timeout_s=0):
        pass
    driver.close()


def test_a_task_that_is_cancelled_after_its_grant_gives_it_back(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    The leases were on their way to it.
    """
    cache = make_cache()
    driver = TaskDriver()
    with loader.holding_loads("base") as gate:
        asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0")
        gate.wait_reached()
        blocked, go_on = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            assert go_on.wait(10)

        driver.loop.call_soon_threadsafe(block)
        assert blocked.wait(10)
        gate.open()
        wait_until(lambda: cache.stats().leases == 2, "the grant")
        asked.cancel()  # runs in the loop before or after the grant; both were its own
        go_on.set()
    wait_until(lambda: cache.stats().leases == 0 or not asked.cancelled(), "an end")
    if not asked.cancelled():
        asked.result(10).release()
    assert cache.stats().leases == 0
    driver.close()


@pytest.fixture
def abandoning(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """
    Who was cancelled hears of it only once this is set: others may be faster.
    """
    may_abandon = threading.Event()
    abandon = Core.abandon

    def abandon_late(core: Core, waiter: Waiter) -> None:
        assert may_abandon.wait(10)
        abandon(core, waiter)

    monkeypatch.setattr(Core, "abandon", abandon_late)
    yield may_abandon
    may_abandon.set()


@pytest.mark.parametrize("models", [["base"], ["tiny", "base"]])
def test_what_is_cancelled_as_it_is_granted_gets_nothing(
    make_cache: MakeCache,
    loader: FakeLoader,
    driver: Driver,
    abandoning: threading.Event,
    models: list[str],
) -> None:
    """
    The last load ends in between: no lease is left that nobody has heard of.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = waiting_for(driver, cache, models, "cuda:0")
        gate.wait_reached()
        (waiter,) = cache._core.queue
        assert waiter.future.cancel()
        gate.open()
        wait_waiting(cache, 0)
        settle(cache)
    assert cache.stats().leases == 0
    assert {state_of(cache, name) for name in models} == {"resident"}
    abandoning.set()
    with pytest.raises(CancelledError):
        asked.result(10)


def test_what_is_cancelled_as_it_fails_is_not_told(
    make_cache: MakeCache,
    loader: FakeLoader,
    driver: Driver,
    abandoning: threading.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    Others who waited for the same load are, and nothing else goes wrong.
    """
    loader.fail_loads["base"].append(RuntimeError("broken"))
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        gone = waiting_for(driver, cache, ["base"], "cuda:0")
        (waiter,) = cache._core.queue
        told = driver.waiting(cache, "base", "cuda:0")
        assert waiter.future.cancel()
        gate.open()
        wait_waiting(cache, 0)
    abandoning.set()
    with pytest.raises(LoadFailed, match="broken"):
        told.result(10)
    with pytest.raises(CancelledError):
        gone.result(10)
    assert not caplog.records


def test_closing_ends_groups_that_wait_and_that_load(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    What they held leaves at once, and what loads after its load.
    """
    cache = make_cache(vram="4GiB")
    with loader.holding_loads("small") as gate:
        loading = waiting_for(driver, cache, ["tiny", "small"], "cuda:0")
        gate.wait_reached()
        wait_until(lambda: leases_on(cache, "tiny"), "the first model")
        stuck = waiting_for(driver, cache, ["base", "base.en"], "cuda:0")
        closing = driver.start(cache, "close", None)
        for each in (loading, stuck):
            assert isinstance(each.exception(10), CacheClosed)
        assert cache.stats().leases == 0
        with pytest.raises(CacheClosed):
            lease_many(driver, cache, ["tiny", "base"], "cuda:0")
    closing.result(10)
    assert not cache.models()
    assert not loader.resident


def test_an_evicted_member_leaves_once_the_group_lets_go(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Be it held already or still on its way when the eviction comes.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0")
        gate.wait_reached()
        wait_until(lambda: leases_on(cache, "tiny"), "the first model")
        evicting = [driver.start(cache, "evict", name) for name in ("tiny", "base")]
        entries = cache._core.entries.values()
        wait_until(lambda: all(entry.gone for entry in entries), "the evictions")
    leases = asked.result(10)
    assert [lease.whisper for lease in leases]
    assert not any(each.done() for each in evicting)
    leases.release()
    assert [each.result(10) for each in evicting] == [1, 1]
    assert not cache.models()


def test_a_group_waits_for_the_end_of_an_eviction(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Then the model comes back for it.
    """
    cache = make_cache()
    held = driver.lease(cache, "tiny", "cuda:0")
    evicting = driver.start(cache, "evict", "tiny")
    wait_until(lambda: held._entry.gone, "the eviction")
    asked = waiting_for(driver, cache, ["tiny", "base"], "cuda:0")
    assert not asked.done()
    assert loader.loads == {"tiny": 1}
    held.release()
    asked.result(10).release()
    assert evicting.result(10) == 1
    assert loader.loads == {"tiny": 2, "base": 1}


def test_a_load_that_no_longer_fits_lets_the_group_wait_again(
    make_cache: MakeCache, machine: FakeMachine, loader: FakeLoader, driver: Driver
) -> None:
    """
    Other programs came meanwhile: it holds nothing, and is told what is left.
    """
    cache = make_cache()
    with loader.holding_loads("tiny") as gate:
        asked = waiting_for(driver, cache, ["tiny", "large-v3"], "cuda:0")
        gate.wait_reached()
        machine.others("cuda:0", "3.5GiB")
    error = asked.exception(10)
    assert isinstance(error, ModelTooLarge)
    assert "other programs" in str(error)
    assert cache.stats().leases == 0
    machine.others("cuda:0", 0)
    lease_many(driver, cache, ["tiny", "large-v3"], "cuda:0").release()


def test_loads_that_no_longer_fit_together_are_told_apart(
    make_cache: MakeCache, machine: FakeMachine, loader: FakeLoader, driver: Driver
) -> None:
    """
    Of two that waited for their loads, what still fits alone is loaded.
    """
    cache = make_cache()
    with loader.holding_loads("tiny") as gate:
        asked = waiting_for(driver, cache, ["tiny", "large-v3"], "cuda:0")
        gate.wait_reached()
        single = driver.waiting(cache, "base", "cuda:0")
        machine.others("cuda:0", "3.5GiB")
    assert isinstance(asked.exception(10), ModelTooLarge)
    single.result(10).release()
    assert cache.stats().leases == 0


def test_a_group_is_refused_at_the_door_like_any_other(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Waiting groups count once, whatever they ask for.
    """
    cache = make_cache(vram="4GiB", max_waiting=2)
    held = driver.lease(cache, "medium", "cuda:0")
    asked = [waiting_for(driver, cache, ["tiny", "base"], "cuda:0") for _ in range(2)]
    with pytest.raises(TooManyWaiters) as caught:
        lease_many(driver, cache, ["tiny", "base"], "cuda:0")
    assert caught.value.waiting == 2
    held.release()
    for each in asked:
        each.result(10).release()


# Fairness -----------------------------------------------------------------------------


def test_sixteen_loads_pass_a_group_that_is_stuck(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The seventeenth waits behind it.
    """
    cache = make_cache(vram="4GiB", patience_s=1e9, keep_alive=0)
    held = driver.lease(cache, "small", "cuda:0")
    stuck = waiting_for(driver, cache, ["tiny", "small.en"], "cuda:0")
    for _ in range(16):
        driver.lease(cache, "base", "cuda:0").release()
        wait_until(lambda: state_of(cache, "base") == "absent", "the end of base")
    barred = driver.waiting(cache, "base", "cuda:0")
    settle(cache)
    assert not barred.done()
    held.release()
    stuck.result(10).release()
    barred.result(10).release()


def test_a_group_is_not_starved_by_leases_that_overlap(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    After its patience no new lease is granted on what must leave for it.
    """
    cache = make_cache(vram="4GiB", patience_s=5)
    lease = driver.lease(cache, "small", "cuda:0")
    asked = waiting_for(driver, cache, ["tiny", "small.en"], "cuda:0")
    overlapping = driver.lease(cache, "small", "cuda:0")
    lease.release()
    clock.tick(5)
    late = driver.waiting(cache, "small", "cuda:0")
    assert not late.done()
    overlapping.release()
    leases = asked.result(10)
    assert not late.done()
    leases.release()
    late.result(10).release()
    assert not any(entry.drained_for for entry in cache._core.entries.values())


def test_groups_in_opposite_order_are_served_one_after_the_other(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Neither takes the half that the other one needs.
    """
    cache = make_cache(vram="4GiB")
    blocker = driver.lease(cache, "tiny", "cuda:0")
    groups = [
        waiting_for(driver, cache, models, "cuda:0")
        for models in (["small", "small.en"], ["small.en", "small", "small"])
    ]
    settle(cache)
    assert not loader.loads["small"]
    blocker.release()
    for group in groups:
        group.result(10).release()
    assert loader.loads == {"tiny": 1, "small": 1, "small.en": 1}


def test_overlapping_groups_never_deadlock() -> None:
    """
    Many threads that each want some of four models at once, in any order, in real time.
    """
    machine = FakeMachine({"cpu": "16GiB", "cuda:0": "16GiB", "cuda:1": "16GiB"})
    loader = FakeLoader(machine, workspace_bytes=GIB // 8, loading_factor=1.25)
    models = [
        (name, device)
        for name in ("tiny", "base", "small")
        for device in ("cuda:0", "cuda:1")
    ]
    seed = time.time_ns()
    print(f"seed {seed}")  # noqa: T201
    served: list[int] = []
    wrong: list[BaseException] = []
    over = time.monotonic() + 1.0

    def work(number: int) -> None:
        dice = random.Random(seed + number)  # noqa: S311
        try:
            while number not in served or time.monotonic() < over:
                wanted = [dice.choice(models) for _ in range(dice.randint(1, 3))]
                with cache.lease_many(wanted, timeout_s=10) as whispers:
                    for whisper in whispers:
                        whisper.detect_language()
                served.append(number)
        except BaseException as error:  # noqa: BLE001 - told below
            wrong.append(error)

    with ModelCache(
        vram="4.5GiB",
        max_models=3,
        patience_s=0.01,
        loader=loader,
        probe=machine,
        clock=MonotonicClock(),
    ) as cache:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        check(cache)
    assert not wrong, wrong
    assert set(served) == set(range(12)), "somebody was never served"
    assert not any(machine.held_bytes.values())


def test_nothing_of_a_group_is_left_to_the_collector(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Leases that are dropped unreleased come back, each with its warning.
    """
    cache = make_cache()
    kept = [lease_many(driver, cache, ["tiny", "base"], "cuda:0")]

    def drop() -> None:
        kept.clear()
        gc.collect()
        wait_until(lambda: cache.stats().leases == 0, "the end of the leases")

    with pytest.warns(ResourceWarning, match="never released"):
        drop()
