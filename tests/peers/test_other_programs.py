"""
Other tenants: programs that take memory without a word, and caches that talk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest
from driver import ThreadDriver
from real import child_environment, packaged

from whispercache import EvictionCause, ModelCache, ModelEvicted, ModelTooLarge
from whispercache.peers.ledger import Ledger
from whispercache.peers.pressure import WATCH_S
from whispercache.testing import (
    FakeClock,
    FakeLoader,
    FakeMachine,
    settle,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeCache
    from tenants import Tenants

    from whispercache import Event

GIB = 1024**3
MIB = 1024**2


@pytest.fixture
def driver() -> ThreadDriver:
    """
    Calls on threads.
    """
    return ThreadDriver()


def names(cache: ModelCache) -> set[str]:
    """
    What is in memory.
    """
    return {info.key.model for info in cache.models() if info.state == "resident"}


# The gauge before a load --------------------------------------------------------------


def test_a_load_looks_at_the_gauge_again(
    make_cache: MakeCache,
    machine: FakeMachine,
    loader: FakeLoader,
    driver: ThreadDriver,
) -> None:
    """
    Memory that others took since the request was admitted is not tried; idle models
    make room instead.
    """
    cache = make_cache()
    cache.preload("medium", "cuda:0")
    with loader.holding_unloads("tiny") as gate:
        cache.preload("tiny", "cuda:0")
        evicting = driver.start(cache, "evict", "tiny")
        gate.wait_reached()
        waiting = driver.waiting(cache, "small", "cuda:0")  # behind the unload
        wait_until(lambda: "loading" in {info.state for info in cache.models()})
        machine.others("cuda:0", 6 * GIB)
    waiting.result(10).release()
    evicting.result(10)
    assert names(cache) == {"small"}
    assert machine.peak_bytes["cuda:0"] <= 4 * GIB
    assert cache.stats().load_failures == 0


def test_a_load_that_others_made_impossible_says_so(
    make_cache: MakeCache,
    machine: FakeMachine,
    loader: FakeLoader,
    driver: ThreadDriver,
) -> None:
    """
    Rather than running out of memory, or waiting for ever.
    """
    cache = make_cache()
    with loader.holding_unloads("tiny") as gate:
        cache.preload("tiny", "cuda:0")
        evicting = driver.start(cache, "evict", "tiny")
        gate.wait_reached()
        waiting = driver.waiting(cache, "large-v3", "cuda:0")
        wait_until(lambda: "loading" in {info.state for info in cache.models()})
        machine.others("cuda:0", 9 * GIB)
    error = waiting.exception(10)
    assert isinstance(error, ModelTooLarge)
    assert "other programs hold the rest" in str(error)
    evicting.result(10)
    assert not loader.loads["large-v3"]


# Watching -----------------------------------------------------------------------------


def test_idle_models_leave_when_others_need_the_room(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    Within a second, the least recently used first, and no more than it takes.
    """
    cache = make_cache(pressure="watch")
    events: list[Event] = []
    cache.subscribe(events.append)
    for model in ("tiny", "base", "small"):
        cache.preload(model, "cuda:0")
        clock.tick(0.1)
    machine.others("cuda:0", "6.3GiB")  # of the headroom, 300 MiB are left then
    clock.tick(WATCH_S)
    settle(cache)
    assert names(cache) == {"base", "small"}
    (evicted,) = (event for event in events if isinstance(event, ModelEvicted))
    assert evicted.cause is EvictionCause.PRESSURE
    machine.others("cuda:0", "9.5GiB")
    clock.tick(WATCH_S)
    settle(cache)
    assert names(cache) == set()


def test_what_is_used_or_pinned_stays_under_pressure(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    It leaves once it is idle and still asked for.
    """
    cache = make_cache(pressure="watch")
    cache.pin("tiny", "cuda:0")
    lease = cache.lease("base", "cuda:0")
    machine.others("cuda:0", "8.4GiB")
    clock.tick(3)
    settle(cache)
    assert names(cache) == {"tiny", "base"}
    lease.release()
    clock.tick(WATCH_S)
    settle(cache)
    assert names(cache) == {"tiny"}
    cache.unpin()


def test_nothing_leaves_unless_watching_was_asked_for(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    The negative control of the two above.
    """
    cache = make_cache()
    cache.preload("tiny", "cuda:0")
    machine.others("cuda:0", "9.5GiB")
    clock.tick(30)
    settle(cache)
    assert names(cache) == {"tiny"}


def test_who_waits_is_served_when_others_leave(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock, driver: ThreadDriver
) -> None:
    """
    Nothing of ours ends then, so only a look at the gauge can tell.
    """
    cache = make_cache(pressure="watch")
    machine.others("cuda:0", 3 * GIB)
    lease = cache.lease("large-v3", "cuda:0")
    waiting = driver.waiting(cache, "medium", "cuda:0")
    clock.tick(WATCH_S)
    assert not waiting.done()
    machine.others("cuda:0", 0)
    clock.tick(WATCH_S)
    waiting.result(10).release()
    lease.release()


def test_a_gauge_that_fails_does_not_end_the_watch(
    make_cache: MakeCache, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    It works again a second later.
    """
    cache = make_cache(pressure="watch")
    cache.preload("tiny", "cuda:0")
    machine.others("cuda:0", "9.5GiB")
    machine.reading_fails = OSError("driver is busy")
    clock.tick(WATCH_S)
    assert names(cache) == {"tiny"}
    machine.reading_fails = None
    clock.tick(WATCH_S)
    settle(cache)
    assert names(cache) == set()


def test_an_unknown_pressure_is_refused() -> None:
    """
    With those that are known.
    """
    with pytest.raises(ValueError, match="pressure must be one of load, watch"):
        ModelCache(pressure="high")  # type: ignore[arg-type]


def test_a_forgotten_cache_is_watched_no_more(
    machine: FakeMachine, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    Its watch ends with it.
    """
    cache = ModelCache(pressure="watch", loader=loader, probe=machine, clock=clock)
    cache.close()
    del cache
    clock.tick(WATCH_S)
    clock.tick(WATCH_S)
    assert not clock._calls


# Two caches on one device -------------------------------------------------------------


def test_idle_models_leave_when_another_process_wants_the_room(
    tenants: Tenants, driver: ThreadDriver
) -> None:
    """
    It waits for them, rather than being told that there is no room; and gets it.
    """
    ours, theirs = tenants.caches
    for model in ("large-v3", "medium"):
        theirs.preload(model, "cuda:0")
    waiting = driver.waiting(ours, "large-v3", "cuda:0")
    assert not waiting.done()
    for _ in range(6):
        tenants.tick()
    waiting.result(10).release()
    assert names(ours) == {"large-v3"}
    assert names(theirs) == {"medium"}
    assert theirs.stats().evictions == 1


def test_what_another_process_uses_is_waited_for(
    tenants: Tenants, driver: ThreadDriver
) -> None:
    """
    It leaves once it is idle.
    """
    ours, theirs = tenants.caches
    lease = theirs.lease("large-v3", "cuda:0")
    waiting = driver.waiting(ours, "large-v3", "cuda:0")
    for _ in range(6):
        tenants.tick()
    assert not waiting.done()
    lease.release()
    for _ in range(6):
        tenants.tick()
    waiting.result(10).release()


def test_the_work_that_others_have_not_begun_is_left_to_them(
    tenants: Tenants, machine: FakeMachine, driver: ThreadDriver
) -> None:
    """
    The gauge does not show it, the ledger does.
    """
    ours, theirs = tenants.caches
    tenants.loaders[1].workspace_bytes = 5 * GIB
    lease = theirs.lease("medium", "cuda:0")
    tenants.tick()
    waiting = driver.waiting(ours, "medium", "cuda:0")
    assert not waiting.done()
    fits = ours.lease("small", "cuda:0")
    assert machine.held_bytes["cuda:0"] == 5 * GIB
    fits.release()
    lease.release()
    for _ in range(3):
        tenants.tick()
    waiting.result(10).release()


def test_loads_take_turns(tenants: Tenants, driver: ThreadDriver) -> None:
    """
    Two processes never load to one device at once; to two devices they do.
    """
    ours, theirs = tenants.caches
    with tenants.loaders[0].holding_loads("small") as gate:
        first = driver.start(ours, "lease", "small", "cuda:0")
        gate.wait_reached()
        second = driver.start(theirs, "lease", "tiny", "cuda:0")
        elsewhere = driver.start(theirs, "lease", "tiny", "cuda:1")
        elsewhere.result(10).release()
        assert not second.done()
        assert not tenants.loaders[1].loads["base"]
    first.result(10).release()
    second.result(10).release()


def test_the_account_goes_with_the_cache(
    tenants: Tenants, runtime: Path, machine: FakeMachine
) -> None:
    """
    Nobody waits for what a closed cache once promised.
    """
    ours, theirs = tenants.caches
    theirs.preload("small", "cuda:0")
    tenants.tick()
    ledger = Ledger(runtime, machine.device_id("cuda:0"))
    assert {account.held_bytes for account in ledger.others()} >= {2 * GIB}
    theirs.close()
    tenants.tick()
    assert not any(account.held_bytes for account in ledger.others())
    assert ours.explain("large-v3", "cuda:0").outcome == "load"


def test_a_ledger_that_cannot_be_written_stops_nothing(
    tenants: Tenants, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The cache goes on alone, and says so.
    """
    ours, _ = tenants.caches
    ours.preload("tiny", "cuda:1")
    tenants.tick()
    for path in runtime.iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        path.write_text("in the way")
    lease = ours.lease("base", "cuda:1")
    lease.release()
    tenants.tick()
    assert "cannot be" in caplog.text or "out of turn" in caplog.text
    for path in runtime.iterdir():
        path.unlink()


# Two real processes -------------------------------------------------------------------

WORKER = """
import sys, time
import numpy as np
from whispercache import ModelCache

path, role = sys.argv[1:]
audio = np.zeros(16000, np.float32)
cache = ModelCache(coordinate=True, ram="2GiB")
if role == "killed":
    real = cache._core.loader.load
    def load(key, files):
        loaded = real(key, files)
        print("loading", flush=True)
        time.sleep(600)  # killed in here, with its turn and its reservation
        return loaded
    type(cache._core.loader).load = lambda self, key, files: load(key, files)
model = cache.get_model(path, "cpu", "int8", cpu_threads=1)
segments, info = model.transcribe(audio, language="en")
list(segments)
print("served", flush=True)
sys.stdin.readline()
cache.close()
"""


def worker(role: str, path: str, runtime: Path) -> subprocess.Popen[str]:
    """
    Another process with a cache on the same host.
    """
    program = textwrap.dedent(WORKER)
    return subprocess.Popen(
        [sys.executable, "-c", program, path, role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment() | {"XDG_RUNTIME_DIR": str(runtime.parent)},
    )


@pytest.mark.process
def test_a_process_that_is_killed_while_it_loads_holds_nobody_up(
    runtime: Path,
) -> None:
    """
    Real models, kill -9: the other, which waits for its turn, goes on, and nothing of
    the dead one is left.
    """
    path = str(packaged("tiny.en"))
    killed = worker("killed", path, runtime)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "loading\n"
    ledger = Ledger(runtime, "cpu")
    (account,) = ledger.others()
    assert account.owner.pid == killed.pid
    assert account.promised_bytes > 30 * MIB
    other = worker("served", path, runtime)
    assert other.stdout is not None
    # It has said what it will load, and waits for its turn to do so.
    wait_until(lambda: len(ledger.others()) == 2, "the other's account")
    with ledger.turn(0) as has_turn:
        assert not has_turn
    started_s = time.monotonic()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(10)
    assert other.stdout.readline() == "served\n"
    assert time.monotonic() - started_s < 60
    (left,) = ledger.others()
    assert left.owner.pid == other.pid
    other.communicate("\n", timeout=60)
    assert other.returncode == 0
    assert ledger.others() == ()
    killed.communicate()
