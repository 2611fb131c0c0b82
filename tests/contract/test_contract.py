"""
The contract of a cache: each behaviour once, from threads and from tasks.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from driver import wait_waiting

from whispercache import (
    CacheClosed,
    DeviceUnavailable,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    ModelTooLarge,
    TooManyWaiters,
    Workload,
)
from whispercache.planning import planner as admission
from whispercache.testing import check, settle, wait_until

if TYPE_CHECKING:
    from conftest import MakeCache
    from driver import Driver

    from whispercache.testing import FakeClock, FakeLoader, FakeMachine

GIB = 1024**3


def names(cache: ModelCache) -> list[str]:
    """
    The models that are in memory, or on their way.
    """
    return sorted(info.key.model for info in cache.models())


def charged_gib(cache: ModelCache, device: str = "cuda:0") -> float:
    """
    What is counted on a device.
    """
    held = {info.device: info.charged_bytes for info in cache.devices()}
    return held[device] / GIB


def state_of(cache: ModelCache, name: str) -> str:
    """
    The state of one model.
    """
    states = [info.state for info in cache.models() if info.key.model == name]
    return states[0] if states else "absent"


def use(
    driver: Driver, cache: ModelCache, *models: str, device: str = "cuda:0"
) -> None:
    """
    Lease and release models, one after the other.
    """
    for model in models:
        driver.lease(cache, model, device).release()


# Requests -----------------------------------------------------------------------------


def test_a_miss_loads_and_a_hit_does_not(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The second request finds what the first one loaded.
    """
    cache = make_cache()
    use(driver, cache, "base", "base")
    assert loader.loads == {"base": 1}
    stats = cache.stats()
    assert (stats.requests, stats.hits, stats.misses) == (2, 1, 1)
    assert (stats.loads, stats.leases, stats.waiting) == (1, 0, 0)
    assert stats.hit_ratio == 0.5


def test_many_callers_cause_one_load(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    All who ask for an absent model share its load, and each gets a lease of its own.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = [driver.start(cache, "lease", "base", "cuda:0") for _ in range(8)]
        gate.wait_reached()
        wait_waiting(cache, 8)
        gate.open()
        leases = [each.result(10) for each in asked]
    assert loader.loads == {"base": 1}
    assert cache.stats().leases == len(set(leases)) == 8
    for lease in leases:
        lease.release()


def test_a_hit_needs_no_other_thread(make_cache: MakeCache, driver: Driver) -> None:
    """
    A model in memory is leased while the thread of its device is busy with a load.
    """
    cache = make_cache()
    use(driver, cache, "base")
    loader = cache._core.loader
    with loader.holding_loads("tiny") as gate:  # type: ignore[attr-defined]
        loading = driver.start(cache, "lease", "tiny", "cuda:0")
        gate.wait_reached()
        use(driver, cache, "base")
        assert not loading.done()
    loading.result(10).release()


def test_a_lease_is_the_model_itself(make_cache: MakeCache, driver: Driver) -> None:
    """
    What is leased can be used, until the lease ends.
    """
    cache = make_cache()
    lease = driver.lease(cache, "base.en", "cuda:0", "int8")
    assert str(lease.key) == "base.en/cuda:0/int8_float16"
    with lease as whisper:
        segments, _ = whisper.transcribe("audio")
        assert [segment.text for segment in segments] == [str(lease.key)] * 3
    with pytest.raises(RuntimeError, match="released"):
        _ = lease.whisper


def test_a_lease_may_be_released_twice_and_by_any_thread(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The second release does nothing, whoever calls it.
    """
    cache = make_cache()
    first, second = (driver.lease(cache, "base", "cuda:0") for _ in range(2))
    for _ in range(2):
        thread = threading.Thread(target=first.release)
        thread.start()
        thread.join()
    first.release()
    assert first.is_released
    assert not second.is_released
    assert cache.stats().leases == 1
    second.release()


def test_a_failed_load_reaches_all_who_wait_and_the_next_one_loads_anew(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Each gets an error of its own, with the loader's error as its cause.
    """
    cache = make_cache()
    broken = RuntimeError("disk\n on   fire")
    loader.fail_loads["base"] = [broken]
    with loader.holding_loads("base") as gate:
        asked = [driver.start(cache, "lease", "base", "cuda:0") for _ in range(3)]
        wait_waiting(cache, 3)
        gate.open()
    errors = [each.exception(10) for each in asked]
    assert {type(error) for error in errors} == {LoadFailed}
    assert len({id(error) for error in errors}) == 3
    assert {id(error.__cause__) for error in errors if error} == {id(broken)}
    assert "disk on fire" in str(errors[0])
    assert cache.stats().load_failures == 1
    assert not cache.models()
    use(driver, cache, "base")
    assert loader.loads == {"base": 1}


def test_an_error_of_ours_keeps_its_type(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    What the loader says in our own words is passed on as such, a copy for each.
    """
    cache = make_cache()
    said = DeviceUnavailable("cuda:0", "libcublas is missing")
    loader.fail_loads["base"] = [said]
    with pytest.raises(DeviceUnavailable, match="libcublas") as caught:
        driver.lease(cache, "base", "cuda:0")
    assert caught.value is not said


def test_a_failed_load_is_told_even_if_cleaning_up_fails_too(
    make_cache: MakeCache,
    loader: FakeLoader,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    Nobody waits for ever because a broken card cannot even be trimmed.
    """

    def fail(*_: object) -> None:
        raise OSError("the card fell off")

    monkeypatch.setattr(type(loader), "return_memory", fail)
    cache = make_cache()
    loader.fail_loads["base"] = [RuntimeError("broken")]
    with pytest.raises(LoadFailed, match="broken"):
        driver.lease(cache, "base", "cuda:0")
    assert "the card fell off" in caplog.text


# Waiting ------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [0, -1, -0.5, float("-inf")])
def test_a_timeout_that_is_over_never_waits(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver, timeout_s: float
) -> None:
    """
    An absent model is refused at once, and not loaded for that; one in memory is not.
    A negative timeout is what is left of a deadline that has passed.
    """
    cache = make_cache()
    with pytest.raises(LeaseTimeout):
        driver.lease(cache, "base", "cuda:0", timeout_s=timeout_s)
    assert not loader.loads
    use(driver, cache, "base")
    driver.lease(cache, "base", "cuda:0", timeout_s=timeout_s).release()
    assert cache.stats().timeouts == 1


def test_a_timeout_of_zero_takes_what_is_there_while_others_wait(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Somebody who waits for another model does not hide the one that is in memory.
    """
    cache = make_cache(vram="4GiB")
    use(driver, cache, "tiny")
    held = driver.lease(cache, "small", "cuda:0")
    waiting = driver.waiting(cache, "medium", "cuda:0")
    driver.lease(cache, "tiny", "cuda:0", timeout_s=0).release()
    other = Workload(beam_size=1)
    driver.lease(cache, "tiny", "cuda:0", timeout_s=0, workload=other).release()
    held.release()
    waiting.result(10).release()


def test_a_timeout_ends_the_wait_and_not_the_load(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    The load goes on, and its model is there for the next request.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = driver.waiting(cache, "base", "cuda:0", timeout_s=5)
        gate.wait_reached()
        wait_until(lambda: clock._calls, "the timer")
        clock.tick(4.9)
        assert not asked.done()
        clock.tick(0.1)
        with pytest.raises(LeaseTimeout) as caught:
            asked.result(10)
    assert caught.value.waited_s == pytest.approx(5)
    assert caught.value.position == 1
    settle(cache)
    driver.lease(cache, "base", "cuda:0", timeout_s=0).release()
    assert loader.loads == {"base": 1}
    assert cache.stats().timeouts == 1


def test_who_times_out_makes_room_for_the_next(
    make_cache: MakeCache,
    clock: FakeClock,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Those behind a request that gave up are looked at again.
    """
    monkeypatch.setattr(admission, "MAX_OVERTAKES", 0)
    cache = make_cache(vram="4GiB")
    held = driver.lease(cache, "small", "cuda:0")
    stuck = driver.waiting(cache, "medium", "cuda:0", timeout_s=5)
    behind = driver.waiting(cache, "base", "cuda:0")
    wait_until(lambda: clock._calls, "the timer")
    assert not behind.done()  # nobody passes
    clock.tick(5)
    with pytest.raises(LeaseTimeout):
        stuck.result(10)
    behind.result(10).release()
    held.release()


def test_more_than_max_waiting_are_refused_at_the_door(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The error tells how many wait.
    """
    cache = make_cache(max_waiting=2)
    with loader.holding_loads("base") as gate:
        asked = [driver.waiting(cache, "base", "cuda:0") for _ in range(2)]
        with pytest.raises(TooManyWaiters) as caught:
            driver.lease(cache, "base", "cuda:0")
        assert caught.value.waiting == 2
        assert cache.stats().refused == 1
        gate.open()
    for each in asked:
        each.result(10).release()


def test_max_waiting_does_not_refuse_who_need_not_wait(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    A model in memory is leased however many wait for others.
    """
    cache = make_cache(vram="4GiB", max_waiting=1)
    use(driver, cache, "tiny")
    held = driver.lease(cache, "small", "cuda:0")
    waiting = driver.waiting(cache, "medium", "cuda:0")
    use(driver, cache, "tiny")
    held.release()
    waiting.result(10).release()


def test_closing_ends_all_waits(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Whoever waits, for a load or for room, is told; new requests are refused.
    """
    cache = make_cache(vram="4GiB")
    held = driver.lease(cache, "small", "cuda:0")
    with loader.holding_loads("base"):
        loading = driver.waiting(cache, "base", "cuda:0")
        stuck = driver.waiting(cache, "medium", "cuda:0")
        closing = driver.start(cache, "close", None)
        for each in (loading, stuck):
            with pytest.raises(CacheClosed):
                each.result(10)
        with pytest.raises(CacheClosed):
            driver.lease(cache, "small", "cuda:0")
        with pytest.raises(CacheClosed):
            driver.lease(cache, "tiny", "cpu")
    assert not closing.done()
    held.release()
    closing.result(10)
    assert not cache.models()
    assert not loader.resident


def test_closing_twice_is_closing(make_cache: MakeCache, driver: Driver) -> None:
    """
    The second close has nothing to do.
    """
    cache = make_cache()
    use(driver, cache, "base")
    driver.call(cache, "close")
    driver.call(cache, "close")
    assert "closed" in repr(cache)


def test_closing_with_a_timeout_names_what_is_held(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    A model that is still leased then leaves when its lease ends.
    """
    cache = make_cache()
    lease = driver.lease(cache, "base", "cuda:0")
    use(driver, cache, "tiny")
    closing = driver.start(cache, "close", 5)
    wait_until(lambda: "tiny" not in names(cache), "the end of tiny")
    wait_until(lambda: clock._calls, "the timer")
    clock.tick(5)
    with pytest.raises(LeaseTimeout, match=r"base/cuda:0/float16 was not unloaded"):
        closing.result(10)
    assert lease.whisper
    lease.release()
    wait_until(lambda: not cache.models(), "the end of base")


# Room ---------------------------------------------------------------------------------


def test_the_least_recently_released_leaves_first(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    What counts is when a lease ended, not when it began.
    """
    cache = make_cache(vram="3GiB")
    long = driver.lease(cache, "tiny", "cuda:0")
    for model in ("base", "base.en"):
        use(driver, cache, model)
        clock.tick(1)
    long.release()
    clock.tick(1)
    use(driver, cache, "tiny.en")
    assert names(cache) == ["base.en", "tiny", "tiny.en"]
    use(driver, cache, "base")
    assert names(cache) == ["base", "tiny", "tiny.en"]


def test_the_gap_policy_keeps_what_is_dear(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    The cheapest second of absence per byte leaves first, though it was used last.
    """
    loader.clock = clock
    cache = make_cache(vram="2GiB", policy="gap")
    loader.load_s = 10
    use(driver, cache, "tiny")
    loader.load_s = 1
    use(driver, cache, "base")
    clock.tick(1)
    use(driver, cache, "tiny.en")
    assert names(cache) == ["tiny", "tiny.en"]


def test_a_policy_is_a_function(make_cache: MakeCache, driver: Driver) -> None:
    """
    The lowest score leaves first, whatever it means.
    """
    cache = make_cache(
        vram="2GiB", policy=lambda resident, _now_s: len(resident.key.model)
    )
    use(driver, cache, "tiny", "tiny.en", "base.en")
    assert names(cache) == ["base.en", "tiny.en"]


def test_a_leased_model_is_never_evicted(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Others wait for as long as it takes.
    """
    cache = make_cache(vram="2GiB")
    leases = [driver.lease(cache, model, "cuda:0") for model in ("tiny", "base")]
    waiting = driver.waiting(cache, "small", "cuda:0")
    leases[0].release()
    settle(cache)
    assert not waiting.done()
    assert leases[1].whisper
    assert not loader.unloads["base"]
    leases[1].release()
    waiting.result(10).release()
    assert names(cache) == ["small"]


def test_what_can_never_fit_fails_at_once_and_evicts_nothing(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The error has the numbers, and says what bounds them.
    """
    cache = make_cache(vram="4GiB")
    use(driver, cache, "tiny", "base")
    with pytest.raises(ModelTooLarge, match="that is the limit") as caught:
        driver.lease(cache, "large-v3", "cuda:0")
    assert caught.value.needed_bytes == 6 * GIB
    assert caught.value.capacity_bytes == 4 * GIB
    assert names(cache) == ["base", "tiny"]


def test_a_limit_too_small_for_anything_is_no_hang(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Every request fails at once.
    """
    cache = make_cache(vram="1MiB", ram="1MiB")
    for device in ("cpu", "cuda:0"):
        with pytest.raises(ModelTooLarge):
            driver.lease(cache, "tiny", device)


def test_a_device_without_memory_is_no_hang(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    Other programs hold everything: a request fails at once, and says so.
    """
    machine.others("cuda:0", "10.5GiB")
    cache = make_cache()
    with pytest.raises(ModelTooLarge, match="other programs hold the rest"):
        driver.lease(cache, "tiny", "cuda:0")
    machine.others("cuda:0", 0)
    use(driver, cache, "tiny")


def test_no_more_than_max_models_are_on_a_device(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The number bounds each device on its own.
    """
    cache = make_cache(max_models=2)
    use(driver, cache, "tiny", "base", "small")
    use(driver, cache, "tiny", "base", device="cpu")
    placed = [(info.device, info.key.model) for info in cache.models()]
    assert placed == [
        ("cpu", "base"),
        ("cpu", "tiny"),
        ("cuda:0", "base"),
        ("cuda:0", "small"),
    ]
    with pytest.raises(ValueError, match="at least 1"):
        make_cache(max_models=0)


def test_pins_that_fill_max_models_are_named(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Whoever asks for one more model is told what is in the way.
    """
    cache = make_cache(max_models=1)
    driver.call(cache, "pin", "tiny", "cuda:0")
    with pytest.raises(ModelTooLarge, match="max_models is 1, and all of them are"):
        driver.lease(cache, "base", "cuda:0")


def test_the_work_of_a_lease_is_reserved(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A second lease adds nothing, since one worker runs one call at a time.
    """
    loader.workspace_bytes = GIB
    cache = make_cache(vram="4GiB")
    first = driver.lease(cache, "small", "cuda:0")
    second = driver.lease(cache, "small", "cuda:0")
    assert charged_gib(cache) == 3
    waiting = driver.waiting(cache, "tiny", "cuda:0")
    first.release()
    assert charged_gib(cache) == 3
    second.release()
    waiting.result(10).release()
    assert charged_gib(cache) == 3


def test_each_worker_runs_a_call_of_its_own(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    With two workers two leases may work at once, and a third waits inside the model.
    """
    loader.workspace_bytes = GIB
    cache = make_cache(vram="8GiB")
    charged = []
    with ExitStack() as stack:
        for _ in range(3):
            lease = driver.lease(cache, "small", "cuda:0", num_workers=2)
            stack.callback(lease.release)
            charged.append(charged_gib(cache))
    assert charged == [3, 4, 4]
    assert charged_gib(cache) == 2


def test_a_larger_batch_waits_for_its_work_to_fit(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    An idle neighbour leaves for it; a model is never evicted for its own work.
    """
    loader.workspace_bytes = GIB // 4
    cache = make_cache(vram="4GiB")
    use(driver, cache, "tiny", "small")
    lease = driver.lease(cache, "small", "cuda:0", workload=Workload(batch_size=8))
    assert names(cache) == ["small"]
    assert charged_gib(cache) == 4
    lease.release()
    with pytest.raises(ModelTooLarge):
        driver.lease(cache, "small", "cuda:0", workload=Workload(batch_size=9))


def test_a_load_onto_a_card_needs_host_memory_meanwhile(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It is charged during the load, and models on the CPU leave for it.
    """
    loader.host_loading_bytes = 2 * GIB
    cache = make_cache(ram="2GiB")
    use(driver, cache, "tiny", device="cpu")
    with loader.holding_loads("base") as gate:
        loading = driver.start(cache, "lease", "base", "cuda:0")
        gate.wait_reached()
        assert state_of(cache, "tiny") == "absent"
        assert charged_gib(cache, "cpu") == 2
    loading.result(10).release()
    assert charged_gib(cache, "cpu") == 0
    cache.resize(ram="1GiB")
    with pytest.raises(ModelTooLarge, match=r"needs 2\.0 GiB on cpu"):
        driver.lease(cache, "small", "cuda:0")


def test_auto_is_the_card_with_most_room_that_can_hold_the_model(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Then another card, then the CPU.
    """
    loader.sizes = {"small": "5GiB", "medium": "8GiB", "large-v3": "12GiB"}
    cache = make_cache(vram={"cuda:0": "4GiB"})
    for model in ("tiny", "small", "medium", "large-v3"):
        driver.lease(cache, model).release()
    placed = {info.key.model: info.device for info in cache.models()}
    assert placed == {
        "tiny": "cuda:1",
        "small": "cuda:1",
        "medium": "cpu",
        "large-v3": "cpu",
    }


def test_a_shrinking_card_holds_less(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock, driver: Driver
) -> None:
    """
    What other programs take is not planned with.
    """
    cache = make_cache()
    for model in ("small", "medium"):
        use(driver, cache, model)
        clock.tick(1)
    machine.others("cuda:0", "4GiB")
    use(driver, cache, "tiny.en")
    assert names(cache) == ["medium", "small", "tiny.en"]
    use(driver, cache, "tiny")
    assert names(cache) == ["medium", "tiny", "tiny.en"]
    machine.others("cuda:0", "5GiB")
    with pytest.raises(ModelTooLarge, match="other programs"):
        driver.lease(cache, "large-v3", "cuda:0")


def test_what_others_give_back_serves_those_who_wait(
    make_cache: MakeCache,
    machine: FakeMachine,
    loader: FakeLoader,
    driver: Driver,
) -> None:
    """
    Memory in use by a call when the gauge was read is known to be free afterwards.
    """
    loader.workspace_bytes = 3 * GIB
    cache = make_cache()
    held = driver.lease(cache, "medium", "cuda:0")
    machine.others("cuda:0", 3 * GIB)  # its work, as the gauge sees it
    waiting = driver.waiting(cache, "large-v3", "cuda:0")
    machine.others("cuda:0", 0)
    held.release()
    waiting.result(10).release()


def test_a_gauge_that_fails_stops_only_who_has_no_limit(
    make_cache: MakeCache,
    machine: FakeMachine,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    With a limit to go by, models are loaded as before.
    """
    machine.reading_fails = OSError("no\n driver")
    with pytest.raises(DeviceUnavailable, match="no driver"):
        driver.lease(make_cache(), "tiny", "cpu")
    use(driver, make_cache(vram="4GiB", ram="4GiB"), "tiny")
    assert "free memory of cuda:0 is unknown" in caplog.text
    machine.reading_fails = DeviceUnavailable("cpu", "gone")
    with pytest.raises(DeviceUnavailable, match="gone"):
        driver.lease(make_cache(), "tiny", "cpu")
    machine.reading_fails = None


def test_auto_passes_over_a_card_whose_gauge_fails(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    A broken driver does not keep models off the CPU.
    """
    cache = make_cache()
    use(driver, cache, "tiny", device="cpu")
    machine.reading_fails = OSError("no driver")
    driver.lease(cache, "base").release()
    assert {info.device for info in cache.models()} == {"cpu"}
    machine.reading_fails = None


# Keep-alive and pins ------------------------------------------------------------------


def test_an_idle_model_leaves_after_its_keep_alive(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    The clock starts when the last lease ends.
    """
    cache = make_cache(keep_alive="5m")
    first, second = (driver.lease(cache, "base", "cuda:0") for _ in range(2))
    clock.tick(1000)
    first.release()
    clock.tick(1000)
    assert state_of(cache, "base") == "resident"
    second.release()
    clock.tick(299)
    settle(cache)
    assert state_of(cache, "base") == "resident"
    clock.tick(1)
    settle(cache)
    assert not cache.models()


def test_each_use_starts_the_keep_alive_anew(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    A model in use now and then stays.
    """
    cache = make_cache(keep_alive=10)
    for _ in range(5):
        use(driver, cache, "base")
        clock.tick(9)
        settle(cache)
        assert names(cache) == ["base"]
    clock.tick(1)
    settle(cache)
    assert not cache.models()


@pytest.mark.parametrize(
    ("keep_alive", "left_after_s"), [(0, 0), (7, 7), ("1h", 3600), (-1, None)]
)
def test_a_request_may_say_its_own_keep_alive(
    make_cache: MakeCache,
    clock: FakeClock,
    driver: Driver,
    keep_alive: float | str,
    left_after_s: float | None,
) -> None:
    """
    It counts instead of the cache's, for the lease that ended last.
    """
    cache = make_cache()
    driver.lease(cache, "base", "cuda:0", keep_alive=keep_alive).release()
    settle(cache)
    if left_after_s is None:
        clock.tick(1e9)
        settle(cache)
        assert names(cache) == ["base"]
        return
    if left_after_s:
        assert cache.models()[0].expires_in_s == left_after_s
        clock.tick(left_after_s - 1)
        settle(cache)
        assert names(cache) == ["base"]
        clock.tick(1)
        settle(cache)
    assert not cache.models()


def test_a_model_that_was_never_used_waits_for_its_keep_alive(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    It is counted from the end of a load that nobody waits for any more.
    """
    cache = make_cache(keep_alive=10)
    with loader.holding_loads("base") as gate:
        asked = driver.waiting(cache, "base", "cuda:0", timeout_s=5)
        gate.wait_reached()
        wait_until(lambda: clock._calls, "the timer")
        clock.tick(100)
        assert isinstance(asked.exception(10), LeaseTimeout)
    settle(cache)
    clock.tick(9)
    settle(cache)
    assert names(cache) == ["base"]
    clock.tick(1)
    settle(cache)
    assert not cache.models()


def test_many_keep_alives_leave_one_timer(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    Short ones among long ones do not pile up timers.
    """
    cache = make_cache(keep_alive=300)
    use(driver, cache, "base")
    for _ in range(20):
        driver.lease(cache, "tiny", "cuda:0", keep_alive=1).release()
        clock.tick(2)
        settle(cache)
    clock.tick(300)
    use(driver, cache, "base")
    clock.tick(1)
    assert len(clock._calls) <= 2


def test_a_model_expires_though_somebody_waited_for_it_in_vain(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    A request for more work than fits holds its model; when it gives up, the model goes.
    """
    loader.workspace_bytes = GIB // 4
    cache = make_cache(vram="4GiB", keep_alive=10)
    use(driver, cache, "tiny")
    held = driver.lease(cache, "small", "cuda:0")
    waiting = driver.waiting(
        cache, "tiny", "cuda:0", timeout_s=30, workload=Workload(batch_size=8)
    )
    clock.tick(20)
    settle(cache)
    assert state_of(cache, "tiny") == "resident"
    clock.tick(10)
    assert isinstance(waiting.exception(10), LeaseTimeout)
    clock.tick(1)
    settle(cache)
    assert state_of(cache, "tiny") == "absent"
    held.release()


def test_a_pinned_model_stays_until_it_is_unpinned(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    Neither time nor need moves it; then its keep-alive begins.
    """
    cache = make_cache(vram="2GiB", keep_alive=10)
    driver.call(cache, "pin", "tiny", "cuda:0")
    clock.tick(100)
    use(driver, cache, "base", "base.en")
    assert names(cache) == ["base.en", "tiny"]
    with pytest.raises(ModelTooLarge, match=r"1\.0 GiB are pinned; unpin"):
        driver.lease(cache, "small", "cuda:0")
    info = cache.models()[1]
    assert info.pinned
    assert info.expires_in_s is None
    assert driver.call(cache, "unpin", "tiny") == 1
    assert driver.call(cache, "unpin") == 0
    clock.tick(10)
    settle(cache)
    assert not cache.models()


def test_unpinning_serves_those_who_wait(make_cache: MakeCache, driver: Driver) -> None:
    """
    A model that is leased and unpinned leaves for a waiter as soon as it is idle.
    """
    cache = make_cache(vram="3GiB")
    driver.call(cache, "pin", "tiny", "cuda:0")
    held = driver.lease(cache, "base", "cuda:0")
    waiting = driver.waiting(cache, "small", "cuda:0")
    assert driver.call(cache, "unpin", device="cuda:0") == 1
    waiting.result(10).release()
    held.release()


# Eviction -----------------------------------------------------------------------------


def test_evict_returns_the_memory_of_idle_models(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    It has been returned when evict does; how many left is told.
    """
    cache = make_cache()
    use(driver, cache, "tiny", "base")
    use(driver, cache, "tiny", device="cpu")
    driver.call(cache, "pin", "small", "cuda:0")
    assert driver.call(cache, "evict", "medium") == 0
    assert driver.call(cache, "evict", "tiny", "cuda:0") == 1
    assert machine.held_bytes["cuda:0"] == 3 * GIB
    assert driver.call(cache, "evict", compute_type="float32") == 1
    assert driver.call(cache, "evict") == 2
    assert not any(machine.held_bytes.values())
    assert cache.stats().evictions == 4
    driver.call(cache, "pin", "small", "cuda:0")
    assert driver.call(cache, "unpin") == 1


def test_evicting_a_leased_model_waits_and_new_leases_wait_too(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It leaves when its lease ends, and comes back for whoever asked meanwhile.
    """
    cache = make_cache()
    lease = driver.lease(cache, "base", "cuda:0")
    evicting = driver.start(cache, "evict", "base")
    wait_until(lambda: not cache._core.entries[lease.key].is_open_to(None), "eviction")
    asked = driver.waiting(cache, "base", "cuda:0")
    assert not asked.done()
    assert not evicting.done()
    lease.release()
    assert evicting.result(10) == 1
    asked.result(10).release()
    assert loader.loads == {"base": 2}


def test_evicting_a_model_that_loads_serves_its_waiters_first(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Their load was paid for; then it leaves.
    """
    cache = make_cache()
    with loader.holding_loads("base") as gate:
        asked = driver.waiting(cache, "base", "cuda:0")
        gate.wait_reached()
        evicting = driver.start(cache, "evict", "base")
        wait_until(lambda: cache._core.entries[next(iter(cache._core.entries))].gone)
    lease = asked.result(10)
    assert lease.whisper
    assert not evicting.done()
    lease.release()
    assert evicting.result(10) == 1
    assert loader.loads == {"base": 1}
    loader.fail_loads["base"] = [RuntimeError("broken")]
    with loader.holding_loads("base") as gate:
        asked = driver.waiting(cache, "base", "cuda:0")
        gate.wait_reached()
        evicting = driver.start(cache, "evict", "base")
        wait_until(lambda: cache._core.entries[next(iter(cache._core.entries))].gone)
    assert isinstance(asked.exception(10), LoadFailed)
    assert evicting.result(10) == 1


def test_an_eviction_that_times_out_is_taken_back(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    The model stays, pinned as it was, and whoever waited for it is served.
    """
    cache = make_cache()
    driver.call(cache, "pin", "base", "cuda:0")
    lease = driver.lease(cache, "base", "cuda:0")
    evicting = driver.start(cache, "evict", "base", timeout_s=5)
    wait_until(lambda: clock._calls, "the timer")
    asked = driver.waiting(cache, "base", "cuda:0")
    clock.tick(5)
    with pytest.raises(LeaseTimeout, match="was not unloaded within"):
        evicting.result(10)
    asked.result(10).release()
    lease.release()
    settle(cache)
    assert state_of(cache, "base") == "resident"
    assert cache.models()[0].pinned
    assert cache.stats().evictions == 0


def test_one_of_two_evictions_may_be_taken_back(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    The other still stands.
    """
    cache = make_cache()
    lease = driver.lease(cache, "base", "cuda:0")
    short = driver.start(cache, "evict", "base", timeout_s=5)
    wait_until(lambda: clock._calls, "the timer")
    long = driver.start(cache, "evict", "base")
    entry = cache._core.entries[lease.key]
    wait_until(lambda: len(entry.gone) == 2, "two evictions")
    clock.tick(5)
    with pytest.raises(LeaseTimeout):
        short.result(10)
    lease.release()
    assert long.result(10) == 1


def test_a_pin_does_not_outlive_an_eviction(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    A model that comes back after `evict` leaves like any other.
    """
    cache = make_cache(vram="2GiB")
    driver.call(cache, "pin", "base", "cuda:0")
    driver.call(cache, "evict", "base")
    use(driver, cache, "base")
    assert not cache.models()[0].pinned
    use(driver, cache, "small")
    assert names(cache) == ["small"]


def test_a_victim_is_not_resurrected(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Whoever asks for a model on its way out waits until it has left, and is served then.
    """
    cache = make_cache(vram="2GiB")
    use(driver, cache, "small")
    with loader.holding_unloads("small") as gate:
        first = driver.waiting(cache, "base", "cuda:0")
        gate.wait_reached()
        again = driver.waiting(cache, "small", "cuda:0")
        assert state_of(cache, "small") == "unloading"
        assert cache.stats().waiting == 2
    lease = first.result(10)
    assert not again.done()
    lease.release()
    again.result(10).release()
    assert loader.loads == {"small": 2, "base": 1}


def test_memory_is_credited_when_the_unload_is_confirmed(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    A refused unload keeps its bytes charged, and is tried again, ever more rarely.
    """
    cache = make_cache(vram="2GiB")
    use(driver, cache, "small")
    loader.refuse_unloads = 3
    waiting = driver.waiting(cache, "base", "cuda:0")
    for pause_s in (0.1, 0.2, 0.4):
        settle(cache)
        assert state_of(cache, "small") == "unloading"
        assert charged_gib(cache) == 2
        assert not waiting.done()
        clock.tick(pause_s * 0.99)
        settle(cache)
        assert loader.resident
        clock.tick(pause_s * 0.02)
    waiting.result(10).release()
    stats = cache.stats()
    assert (stats.unconfirmed, stats.evictions) == (1, 1)


def test_an_unload_that_raises_is_a_refused_one(
    make_cache: MakeCache,
    loader: FakeLoader,
    clock: FakeClock,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Nothing is credited for it either.
    """
    cache = make_cache()
    use(driver, cache, "base")

    def fail(*_: object, **__: object) -> object:
        raise OSError("the card fell off")

    with monkeypatch.context() as patch:
        patch.setattr(type(loader), "unload", fail)
        evicting = driver.start(cache, "evict", "base")
        wait_until(lambda: cache.stats().unconfirmed, "the refusal")
    assert state_of(cache, "base") == "unloading"
    clock.tick(1)
    assert evicting.result(10) == 1


# Limits -------------------------------------------------------------------------------


def test_a_lowered_limit_is_met_as_leases_end(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Idle models leave at once, leased ones when they are idle; nobody need ask again.
    """
    cache = make_cache(vram="8GiB")
    held = driver.lease(cache, "medium", "cuda:0")
    use(driver, cache, "small", "base")
    driver.call(cache, "resize", vram="2GiB")
    settle(cache)
    assert names(cache) == ["medium"]
    check(cache)
    held.release()
    check(cache)
    settle(cache)
    assert not cache.models()
    use(driver, cache, "small")


def test_a_lowered_limit_takes_no_more_than_it_needs(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    Models that may stay do, while one is still on its way out.
    """
    cache = make_cache()
    for model in ("tiny", "base", "base.en"):
        use(driver, cache, model)
        clock.tick(1)
    with loader.holding_unloads("tiny") as gate:
        driver.call(cache, "resize", vram="2GiB")
        gate.wait_reached()
        check(cache)
    settle(cache)
    assert names(cache) == ["base", "base.en"]
    driver.call(cache, "resize", max_models=1)
    settle(cache)
    assert names(cache) == ["base.en"]


def test_a_raised_limit_serves_those_who_wait(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Bytes and numbers alike; what is not given stays as it was.
    """
    cache = make_cache(vram="2GiB", max_models=1)
    held = driver.lease(cache, "base", "cuda:0")
    waiting = driver.waiting(cache, "tiny", "cuda:0")
    driver.call(cache, "resize", max_models=2)
    waiting.result(10).release()
    waiting = driver.waiting(cache, "small", "cuda:0")
    driver.call(cache, "resize", vram="4GiB", ram="1GiB")
    waiting.result(10).release()
    assert len(cache.models()) == 2
    held.release()


def test_a_nonsense_limit_changes_none(make_cache: MakeCache, driver: Driver) -> None:
    """
    All are read before one is set.
    """
    cache = make_cache(vram="2GiB")
    nonsense: list[dict[str, Any]] = [
        {"vram": "8GiB", "ram": "much"},
        {"vram": "8GiB", "max_models": -1},
        {"vram": "8GiB", "max_models": True},
    ]
    for options in nonsense:
        with pytest.raises((TypeError, ValueError)):
            driver.call(cache, "resize", **options)
    with pytest.raises(ModelTooLarge):
        driver.lease(cache, "medium", "cuda:0")


# Fairness -----------------------------------------------------------------------------


def test_hits_pass_a_waiter_until_its_patience_ends(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    Then no new lease is granted on what it needs, however busy that is.
    """
    cache = make_cache(vram="4GiB", patience_s=5)
    lease = driver.lease(cache, "small", "cuda:0")
    waiting = driver.waiting(cache, "medium", "cuda:0")
    overlapping = driver.lease(cache, "small", "cuda:0")
    lease.release()
    clock.tick(5)
    late = driver.waiting(cache, "small", "cuda:0")
    assert not late.done()
    overlapping.release()
    first = waiting.result(10)
    assert not late.done()
    first.release()
    late.result(10).release()
    assert not any(entry.drained_for for entry in cache._core.entries.values())


def test_draining_leaves_other_devices_alone(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    A load that waits for a card, and has enough of the host, holds back nothing there.
    """
    loader.host_loading_bytes = GIB
    cache = make_cache(vram="3GiB", ram="8GiB", patience_s=5)
    held = driver.lease(cache, "small", "cuda:0")
    use(driver, cache, "tiny", device="cpu")
    waiting = driver.waiting(cache, "medium", "cuda:0")
    clock.tick(5)
    driver.lease(cache, "tiny", "cpu", timeout_s=0).release()
    held.release()
    waiting.result(10).release()


def test_a_drain_ends_with_the_waiter_that_wanted_it(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    When that one gives up, leases are granted again.
    """
    cache = make_cache(vram="4GiB", patience_s=5)
    lease = driver.lease(cache, "small", "cuda:0")
    waiting = driver.waiting(cache, "medium", "cuda:0", timeout_s=10)
    wait_until(lambda: clock._calls, "the timer")
    clock.tick(6)
    late = driver.waiting(cache, "small", "cuda:0")
    assert not late.done()
    clock.tick(4)
    assert isinstance(waiting.exception(10), LeaseTimeout)
    late.result(10).release()
    lease.release()


def test_a_model_that_an_older_request_will_get_does_not_leave_for_a_younger_one(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    Once room is on its way for the older one: it would have to be loaded again.
    """
    loader.workspace_bytes = GIB // 4
    cache = make_cache(vram="3GiB", patience_s=5)
    leases = [driver.lease(cache, model, "cuda:0") for model in ("base", "tiny")]
    large = Workload(batch_size=8)
    older = driver.waiting(cache, "base", "cuda:0", workload=large)
    younger = driver.waiting(cache, "small", "cuda:0")
    clock.tick(6)
    late = driver.waiting(cache, "tiny", "cuda:0")
    for lease in leases:
        lease.release()
    older.result(10).release()
    younger.result(10).release()
    late.result(10).release()
    assert loader.loads["base"] == 1


def test_sixteen_loads_pass_one_that_is_stuck(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The seventeenth waits behind it.
    """
    cache = make_cache(vram="4GiB", patience_s=1e9, keep_alive=0)
    held = driver.lease(cache, "small", "cuda:0")
    stuck = driver.waiting(cache, "medium", "cuda:0")
    for _ in range(16):
        use(driver, cache, "base")
        wait_until(lambda: "base" not in names(cache), "the end of base")
    barred = driver.waiting(cache, "base", "cuda:0")
    settle(cache)
    assert not barred.done()
    driver.lease(cache, "base", "cpu").release()
    held.release()
    stuck.result(10).release()
    barred.result(10).release()


# Explain ------------------------------------------------------------------------------


def test_explain_says_what_would_happen_and_changes_nothing(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    Hit, load, evict, wait, never: with the numbers.
    """
    loader.missing = {"base.en"}
    cache = make_cache(vram="4GiB")
    use(driver, cache, "tiny", "base")
    held = driver.lease(cache, "base", "cuda:0")

    def outcome(model: str) -> str:
        before = snapshot(cache, clock)
        explained = driver.call(cache, "explain", model, "cuda:0")
        assert snapshot(cache, clock) == before
        assert explained.key.model == model
        assert explained.reason
        outcome: str = explained.outcome
        return outcome

    assert outcome("tiny") == "hit"
    assert outcome("base.en") == "load"
    assert outcome("large-v3") == "never"
    assert outcome("medium") == "evict"
    explained = driver.call(cache, "explain", "medium", "cuda:0")
    assert [key.model for key in explained.evicts] == ["tiny"]
    assert explained.needed_bytes == 3 * GIB
    assert explained.free_bytes == 2 * GIB
    assert explained.capacity_bytes == 4 * GIB
    second = driver.lease(cache, "tiny", "cuda:0")
    assert outcome("medium") == "wait"
    with loader.holding_loads("tiny.en") as gate:
        loading = driver.start(cache, "lease", "tiny.en", "cuda:0")
        gate.wait_reached()
        assert outcome("tiny.en") == "wait"
    loading.result(10).release()
    with loader.holding_unloads("tiny.en") as gate:
        evicting = driver.start(cache, "evict", "tiny.en")
        gate.wait_reached()
        assert outcome("tiny.en") == "wait"
    evicting.result(10)
    for lease in (held, second):
        lease.release()
    assert not loader.downloads


def snapshot(cache: ModelCache, clock: FakeClock) -> tuple[object, ...]:
    """
    All that can be seen of a cache from outside.
    """
    return cache.stats(), cache.models(), cache.devices(), len(clock._calls)


def test_a_download_holds_no_memory(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    Files are fetched before room is asked for, once for all who want them.
    """
    loader.missing = {"base"}
    cache = make_cache()
    asked = [driver.start(cache, "lease", "base", "cuda:0") for _ in range(4)]
    for each in asked:
        each.result(10).release()
    assert loader.downloads == {"base": 1}
    assert loader.loads == {"base": 1}


def test_preload_leaves_the_model_idle(make_cache: MakeCache, driver: Driver) -> None:
    """
    The next call on it need not wait.
    """
    cache = make_cache()
    driver.call(cache, "preload", "base", "cuda:0")
    assert state_of(cache, "base") == "resident"
    assert cache.stats().leases == 0
    driver.lease(cache, "base", "cuda:0", timeout_s=0).release()


def test_load_options_that_cannot_be_compared_are_explained(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    A list of cards, as faster-whisper takes it, gets the answer that says what to do.
    """
    cache = make_cache()
    with pytest.raises(TypeError, match="device_index must be one integer"):
        driver.lease(cache, "base", "cuda:0", device_index=[0, 1])
    with pytest.raises(ValueError, match="files= is not supported"):
        driver.lease(cache, "base", "cuda:0", files={"model.bin": b""})


def test_pin_holds_the_model_that_was_loaded_for_it(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Not the one that the same words would mean a moment later.
    """
    cache = make_cache()
    loader = cache._core.loader
    with loader.holding_loads("small") as gate:  # type: ignore[attr-defined]
        pinning = driver.start(cache, "pin", "small")
        gate.wait_reached()
        cache.resize(vram="1.5GiB")
        cache._resolver._known.clear()
    pinning.result(10)
    pinned = [(info.device, info.pinned) for info in cache.models()]
    assert pinned == [("cuda:0", True)]


def test_a_closed_cache_starts_no_thread(make_cache: MakeCache, driver: Driver) -> None:
    """
    A request that comes too late leaves nothing behind.
    """
    cache = make_cache()
    driver.call(cache, "close")
    with pytest.raises(CacheClosed):
        driver.lease(cache, "base")
    assert not cache._core.devices


# Parameters ---------------------------------------------------------------------------


def test_nonsense_makes_no_cache(make_cache: MakeCache) -> None:
    """
    The error says what would make sense.
    """
    with pytest.raises(ValueError, match="policy must be one of lru, gap, or a func"):
        make_cache(policy="fifo")  # type: ignore[arg-type]
    for patience_s in (-1, float("nan"), "-1", "soon"):
        with pytest.raises(ValueError, match="patience_s must be "):
            make_cache(patience_s=patience_s)
    with pytest.raises(TypeError, match="patience_s must be a number or text"):
        make_cache(patience_s=None)  # type: ignore[arg-type]
    make_cache(patience_s="5s")
    with pytest.raises(TypeError, match="max_waiting must be a whole number"):
        make_cache(max_waiting=True)


def test_a_card_that_is_not_there_is_refused(
    make_cache: MakeCache,
    loader: FakeLoader,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    By the probe, who knows why; or because CTranslate2 does not see it.
    """
    cache = make_cache()
    with pytest.raises(DeviceUnavailable, match="there are cpu, cuda:0, cuda:1"):
        driver.lease(cache, "base", "cuda:7")
    monkeypatch.setattr(type(loader), "devices", lambda _: ("cpu", "cuda:0"))
    with pytest.raises(DeviceUnavailable, match="CTranslate2 sees cpu, cuda:0; is"):
        driver.lease(cache, "base", "cuda:1")


def test_auto_passes_over_a_card_that_cannot_compute_so(
    make_cache: MakeCache,
    loader: FakeLoader,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    An explicit compute type is kept, and the device follows from it.
    """
    supported = {"cpu": {"int16"}, "cuda:0": {"float16"}, "cuda:1": {"float16"}}
    monkeypatch.setattr(
        type(loader),
        "supported_compute_types",
        lambda _, device: frozenset(supported[device]),
    )
    lease = driver.lease(make_cache(), "base", compute_type="int16")
    assert str(lease.key) == "base/cpu/int16"
    lease.release()


def test_a_gauge_that_fails_while_somebody_waits_is_logged(
    make_cache: MakeCache,
    machine: FakeMachine,
    loader: FakeLoader,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    What was read last counts, until it can be read again.
    """
    loader.workspace_bytes = 3 * GIB
    cache = make_cache()
    held = driver.lease(cache, "medium", "cuda:0")
    machine.others("cuda:0", 3 * GIB)  # its work, as the gauge sees it
    waiting = driver.waiting(cache, "large-v3", "cuda:0")
    machine.others("cuda:0", 0)
    machine.reading_fails = OSError("no driver")
    held.release()
    wait_until(lambda: "free memory of cuda:0 is unknown" in caplog.text)
    assert not waiting.done()
    machine.reading_fails = None
    reading = driver.start(cache, "lease", "tiny", "cuda:0")
    waiting.result(10).release()
    reading.result(10).release()
