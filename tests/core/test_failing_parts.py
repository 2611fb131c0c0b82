"""
Seams: whatever is handed to a cache may fail, and nobody waits for ever for it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from children import in_child
from driver import ThreadDriver

from whispercache import (
    AsyncModelCache,
    CacheForked,
    LeaseDeadlock,
    LeaseTimeout,
    LoadFailed,
    ModelLoading,
    lifetime,
)
from whispercache.peers.ledger import Ledger
from whispercache.testing import FakeLoader, settle, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeCache
    from tenants import Tenants

    from whispercache import Event
    from whispercache.planning.policies import Resident
    from whispercache.testing import FakeClock, FakeMachine


GIB = 1024**3
AUDIO: Any = "audio"


@pytest.fixture
def driver() -> ThreadDriver:
    """
    Calls on threads.
    """
    return ThreadDriver()


def fail(*_: object) -> Any:
    """
    Stand for something that fails.
    """
    raise OSError("it is broken")


# Listeners, policies, log handlers ----------------------------------------------------


def test_a_listener_that_exits_ends_no_thread(
    make_cache: MakeCache, driver: ThreadDriver
) -> None:
    """
    Whose thread it runs on is chance; loads go on.
    """

    def leave(event: Event) -> None:
        if isinstance(event, ModelLoading):
            sys.exit(1)

    cache = make_cache()
    cache.subscribe(leave)
    for model in ("tiny", "base"):
        driver.lease(cache, model, "cuda:0").release()


def test_a_policy_that_fails_leaves_no_request_behind(make_cache: MakeCache) -> None:
    """
    Its error reaches the caller, and nobody is given the lease that he did not get.
    """

    def broken(_resident: Resident, _now_s: float) -> float:
        raise ZeroDivisionError

    cache = make_cache(vram="3GiB", policy=broken)
    cache.preload("small", "cuda:0")
    with pytest.raises(ZeroDivisionError):
        cache.lease("medium", "cuda:0", timeout_s=5)
    assert (cache.stats().waiting, cache.stats().leases) == (0, 0)


def test_ctrl_c_before_a_timer_was_set_stops_no_others(
    make_cache: MakeCache,
    clock: FakeClock,
    driver: ThreadDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Nobody waits for ever for a time-out, and the request whose caller left is gone.
    """
    cache = make_cache(vram="4GiB")
    small = driver.lease(cache, "small", "cuda:0")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clock, "call_at", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.lease("medium", "cuda:0", timeout_s=1)
    assert cache.stats().waiting == 0
    waiting = driver.waiting(cache, "medium", "cuda:0", timeout_s=3)
    clock.tick(10)
    with pytest.raises(LeaseTimeout):
        waiting.result(5)
    small.release()


def test_ctrl_c_before_an_unload_was_begun_loses_no_memory(
    make_cache: MakeCache, driver: ThreadDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The model does not stay on its way out, charged, until the process ends.
    """
    cache = make_cache(vram="3.5GiB")
    cache.preload("small", "cuda:0")
    thread = cache._core.devices["cuda:0"].thread
    submit = thread.submit

    def interrupt(_: object) -> None:
        monkeypatch.setattr(thread, "submit", submit)
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "submit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.lease("medium", "cuda:0")
    driver.start(cache, "lease", "medium", "cuda:0").result(5).release()


def test_ctrl_c_while_a_cache_stops_leaves_no_thread(
    make_cache: MakeCache, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What is left of the end is done.
    """
    cache = make_cache()
    cache.lease("tiny", "cpu").release()
    cache.evict("tiny")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clock, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.close()
    for device in cache._core.all_devices():
        device.thread.join(5)
        assert not device.thread._thread.is_alive()


def test_a_log_handler_may_ask_the_cache(
    make_cache: MakeCache, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    No message is written while the lock is held, not even of a lost device.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    seen: list[object] = []

    class Asking(logging.Handler):
        """
        Reads the cache for each message.
        """

        def emit(self, record: logging.LogRecord) -> None:
            """
            Ask.
            """
            seen.append((record.getMessage(), cache.stats()))

    def lose(*_: object, **__: object) -> Any:
        raise RuntimeError("CUDA failed with error unspecified launch failure")

    handler = Asking()
    logging.getLogger("whispercache").addHandler(handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(FakeLoader, "unload", lose)
            cache.evict("tiny", timeout_s=10)
    finally:
        logging.getLogger("whispercache").removeHandler(handler)
    assert "stay on cuda:0 until the process ends" in str(seen)
    machine.give_back("cuda:0", GIB)


# Loaders, gauges ----------------------------------------------------------------------


def test_memory_that_cannot_be_returned_fails_the_load(
    make_cache: MakeCache,
    machine: FakeMachine,
    loader: FakeLoader,
    driver: ThreadDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Wherever it is tried: before the load, when others took the room, and between tries.
    """
    cache = make_cache()
    monkeypatch.setattr(FakeLoader, "return_memory", fail)
    loader.fail_loads["base"] = [RuntimeError("CUDA failed with error out of memory")]
    error = driver.start(cache, "lease", "base", "cuda:0").exception(10)
    assert isinstance(error, LoadFailed)
    with loader.holding_loads("tiny") as gate:
        tiny = driver.start(cache, "lease", "tiny", "cuda:0")
        gate.wait_reached()
        medium = driver.waiting(cache, "medium", "cuda:0")
        machine.others("cuda:0", 8 * GIB)
    error = medium.exception(10)
    assert isinstance(error, LoadFailed)
    assert "it is broken" in str(error)
    tiny.result(10).release()


def test_a_gauge_that_failed_once_is_read_again_for_who_waits(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock, driver: ThreadDriver
) -> None:
    """
    A second later, though nothing of ours ends then.
    """
    cache = make_cache()
    machine.others("cuda:0", 3 * GIB)
    held = [driver.lease(cache, model, "cuda:0") for model in ("medium", "medium.en")]
    waiting = driver.waiting(cache, "large-v3", "cuda:0")
    machine.others("cuda:0", 0)
    machine.reading_fails = OSError("busy")
    for lease in held:
        lease.release()
    settle(cache)
    machine.reading_fails = None
    clock.tick(1.1)
    waiting.result(10).release()


def test_an_unload_that_is_refused_does_not_freeze_the_gauge(
    make_cache: MakeCache, machine: FakeMachine, loader: FakeLoader
) -> None:
    """
    Nothing moves between two tries; what others gave back can be had.
    """
    cache = make_cache()
    machine.others("cuda:0", 6 * GIB)
    cache.preload("tiny", "cuda:0")
    loader.refuse_unloads = 1
    cache._core.evict(lambda _key: True)
    settle(cache)
    assert cache.models()[0].state == "unloading"
    machine.others("cuda:0", 0)
    cache.lease("large-v3", "cuda:0").release()


def test_the_work_of_leases_is_no_room_for_others(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: ThreadDriver
) -> None:
    """
    Without a limit, too, a circle is seen that only the work of leases closes.
    """
    loader.workspace_bytes = GIB
    cache = make_cache()

    def nested() -> None:
        with cache.lease("medium", "cuda:0"):
            cache.lease("large-v3", "cuda:0").release()

    asked = driver.start_on(SimpleNamespace(nested=nested), "nested")
    wait_until(lambda: (cache.stats().leases, cache.stats().waiting) == (1, 1))
    clock.tick(0.1)
    assert isinstance(asked.exception(10), LeaseDeadlock)


def test_a_clock_that_is_set_back_does_not_prolong_a_cool_down(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    No pause is longer than the longest.
    """
    cache = make_cache()
    loader.fail_loads["base"] = [RuntimeError("broken")] * 2
    for _ in "12":
        with pytest.raises(LoadFailed):
            cache.lease("base", "cuda:0")
    clock._now_s -= 3600
    cache.lease("base", "cuda:0").release()


# Errors of calls ----------------------------------------------------------------------


def test_errors_of_others_lose_no_device(make_cache: MakeCache) -> None:
    """
    What passes through a block may be another library's, of another device; and nothing
    loses the CPU.
    """
    cache = make_cache()
    for device, text in (
        ("cuda:0", "CUDA error: device-side assert triggered"),
        ("cpu", "CUDA failed with error unspecified launch failure"),
    ):
        with pytest.raises(RuntimeError), cache.lease("base", device):
            raise RuntimeError(text)
        cache.lease("base", device).release()


def test_running_out_of_memory_in_a_block_evicts_nothing(
    make_cache: MakeCache,
) -> None:
    """
    Nothing is tried again there, so nothing would be gained; closed or not.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    for _ in "12":
        with pytest.raises(RuntimeError), cache.lease("base", "cuda:0"):
            raise RuntimeError("CUDA failed with error out of memory")
    assert cache.stats().loads == 2
    lease = cache.lease("base", "cuda:0")
    cache._core.close()
    with pytest.raises(RuntimeError), lease:
        raise RuntimeError("CUDA failed with error out of memory")


def test_a_call_of_a_closed_cache_that_runs_out_of_memory_ends(
    make_cache: MakeCache,
) -> None:
    """
    There is no thread any more to make room.
    """
    cache = make_cache()
    lease = cache.lease("base", "cuda:0")
    cache._core.close()
    assert not lease.recover(RuntimeError("CUDA failed with error out of memory"))
    lease.release()


def test_a_fallback_keeps_no_lease_in_a_cycle(make_cache: MakeCache) -> None:
    """
    What was got is released as soon as it is dropped, not when cycles are looked for.
    """
    cache = make_cache(vram="2GiB", fallback=["cpu"])
    gc.disable()
    try:
        segments, _ = cache.get_model("medium", "cuda:0").transcribe(AUDIO)
        assert cache.stats().leases == 1
        del segments
        wait_until(lambda: cache.stats().leases == 0)
    finally:
        gc.enable()


def test_an_async_block_that_fails_lets_go_at_once(make_cache: MakeCache) -> None:
    """
    However busy the threads for calls are.
    """
    cache = make_cache()

    async def main() -> None:
        with pytest.raises(RuntimeError):
            async with AsyncModelCache(cache).lease("base", "cuda:0"):
                raise RuntimeError("CUDA failed with error out of memory")
        assert cache.stats().leases == 0

    asyncio.run(main())


# Closing and forking ------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_children_know_of_closed_and_forgotten_caches(
    make_cache: MakeCache, loader: FakeLoader, how: str
) -> None:
    """
    As long as a lease is out, there is something of the parent to touch.
    """
    cache = make_cache()
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)
    core = cache._core
    if how == "closed":
        core.close()
    else:
        assert core in lifetime._cores
        del lifetime._caches[cache]

    def check() -> str:
        try:
            next(segments)
        except CacheForked:
            return "forked"
        return "used"

    with core.lock.mutex:
        assert in_child(check) == "forked"
    assert len(list(segments)) == 3
    assert loader.loads["base"] == 1


def test_closing_without_a_limit_in_a_signal_handler_returns(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nothing can leave before the handler has returned.
    """
    monkeypatch.setattr("whispercache.core.core.SIGNAL_S", 0.05)
    cache = make_cache()
    cache.preload("base", "cuda:0")
    before = signal.signal(signal.SIGUSR1, lambda *_: cache.close(timeout_s=None))
    try:
        with cache._core.changing():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    wait_until(lambda: not cache.models())


# Ledgers ------------------------------------------------------------------------------


def accounts(runtime: Path, machine: FakeMachine) -> set[tuple[int, int]]:
    """
    What all processes promise and want on the first card.
    """
    found = Ledger(runtime, machine.device_id("cuda:0")).others()
    return {(each.promised_bytes, each.wanted_bytes) for each in found}


def test_a_load_that_failed_promises_nothing(
    tenants: Tenants, runtime: Path, machine: FakeMachine
) -> None:
    """
    Or its room would be nobody's for ever.
    """
    tenants.loaders[0].fail_loads["large-v3"] = [RuntimeError("broken file")]
    with pytest.raises(LoadFailed):
        tenants.caches[0].lease("large-v3", "cuda:0")
    settle(tenants.caches[0])
    assert accounts(runtime, machine) == {(0, 0)}


def test_a_request_that_gave_up_wants_nothing(
    tenants: Tenants, runtime: Path, machine: FakeMachine, driver: ThreadDriver
) -> None:
    """
    Or the idle models of others would leave again and again for nobody.
    """
    ours, theirs = tenants.caches
    held = theirs.lease("large-v3", "cuda:0")
    waiting = driver.waiting(ours, "large-v3", "cuda:0", timeout_s=3)
    tenants.tick()
    assert (0, 6 * GIB) in accounts(runtime, machine)
    tenants.tick(5)
    assert isinstance(waiting.exception(10), LeaseTimeout)
    tenants.tick()
    assert accounts(runtime, machine) == {(0, 0)}
    held.release()


def test_a_ledger_without_a_device_id_stops_nothing(
    tenants: Tenants, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The cache goes on alone.
    """
    monkeypatch.setattr(type(machine), "device_id", fail)
    tenants.caches[0].lease("tiny", "cuda:1").release()
    tenants.tick()
