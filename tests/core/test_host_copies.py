"""
The host tier: copies of weights that stay in host memory when models leave a card.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from driver import DRIVERS

from whispercache import (
    CacheForked,
    LeaseDeadlock,
    LoadFailed,
    ModelEvicted,
    ModelLoaded,
    ModelTooLarge,
    WhisperCacheError,
)
from whispercache.testing import FakeLoader, FakeMachine, check, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from conftest import MakeCache
    from driver import Driver

    from whispercache import DeviceInfo, Event, Lease, ModelCache
    from whispercache.engine.api import LoadedModel
    from whispercache.engine.files import ModelFiles
    from whispercache.keys import ModelKey
    from whispercache.testing import FakeClock

GIB = 1024**3
CARD = "cuda:0"

ILLEGAL_ACCESS = "CUDA failed with error an illegal memory access was encountered"


def visit(cache: ModelCache, *models: str, device: str = CARD) -> None:
    """
    Lease each model and let it leave at once.
    """
    for model in models:
        cache.lease(model, device, keep_alive=0).release()
        settle(cache)


def host(cache: ModelCache) -> DeviceInfo:
    """
    The numbers of the host.
    """
    return next(info for info in cache.devices() if info.device == "cpu")


def kept_copies(loader: FakeLoader) -> list[str]:
    """
    The models that have left a card and whose weights are on the host.
    """
    return sorted(key.model for key in loader.host_copies())


def record(cache: ModelCache, kind: type[Event]) -> list[Any]:
    """
    The events of one kind, from now on.
    """
    events: list[Any] = []

    def note(event: Event) -> None:
        if isinstance(event, kind):
            events.append(event)

    cache.subscribe(note)
    return events


# Copies come and go -------------------------------------------------------------------


def test_nothing_is_copied_unless_asked_for(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Host memory is the caller's, too.
    """
    cache = make_cache()
    visit(cache, "base", "base")
    assert kept_copies(loader) == []
    assert host(cache).shell_bytes == 0
    assert cache.stats().restores == 0


def test_a_model_comes_back_from_its_copy(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The first eviction leaves the copy, and the next load says where it came from.
    """
    cache = make_cache(park=True)
    evicted, loaded = record(cache, ModelEvicted), record(cache, ModelLoaded)
    visit(cache, "base")
    assert kept_copies(loader) == ["base"]
    with driver.lease(cache, "base", CARD):
        settle(cache)
        assert kept_copies(loader) == []
    assert [event.parked for event in evicted] == [True]
    assert [event.restored for event in loaded] == [False, True]
    assert cache.stats().restores == 1


def test_a_model_is_copied_once(
    make_cache: MakeCache, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The copy stays while the model is back, and later evictions take no more memory.
    """
    cache = make_cache(park=True)
    visit(cache, "small")
    taken: list[int] = []
    take = FakeMachine.take

    def note(self: FakeMachine, device: str, n_bytes: int) -> None:
        if device == "cpu":
            taken.append(n_bytes)
        take(self, device, n_bytes)

    with cache.lease("small", CARD):
        assert machine.held_bytes["cpu"] == 2 * GIB
        monkeypatch.setattr(FakeMachine, "take", note)
        with cache._core.changing():
            entry = next(iter(cache._core.entries.values()))
            assert entry.copy_bytes == 2 * GIB
    cache._core.make_room_for_others(entry.device, 2 * GIB)
    settle(cache)
    assert taken == []
    assert machine.held_bytes == {CARD: 0, "cpu": 2 * GIB}


def test_the_books_tell_a_copy_once(make_cache: MakeCache) -> None:
    """
    As a shell while the model is away; beside the model, and charged, while it is back.
    """
    cache = make_cache(park=True)
    visit(cache, "small")
    info = host(cache)
    assert (info.shell_bytes, info.copies_bytes, info.charged_bytes) == (2 * GIB, 0, 0)
    with cache.lease("small", CARD):
        info = host(cache)
        assert (info.shell_bytes, info.copies_bytes) == (0, 2 * GIB)
        assert info.charged_bytes == 2 * GIB
        assert [model.copy_bytes for model in cache.models()] == [2 * GIB]
        assert info.capacity_bytes == 62 * GIB
        check(cache)
    visit(cache, "small")
    info = host(cache)
    assert (info.shell_bytes, info.copies_bytes, info.charged_bytes) == (2 * GIB, 0, 0)
    assert info.peak_bytes == 2 * GIB


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"park": "2GiB"}, id="park"),
        pytest.param({"park": "4%"}, id="share"),
        pytest.param({"park": True, "ram": "2GiB"}, id="ram"),
    ],
)
def test_older_copies_make_way_within_the_limit(
    make_cache: MakeCache, loader: FakeLoader, options: dict[str, Any]
) -> None:
    """
    Two GiB hold two models of one.
    """
    cache = make_cache(**options)
    visit(cache, "tiny", "base")
    assert kept_copies(loader) == ["base", "tiny"]
    visit(cache, "tiny.en")
    assert kept_copies(loader) == ["base", "tiny.en"]
    visit(cache, "medium")
    assert kept_copies(loader) == ["base", "tiny.en"], (
        "medium alone is more than the limit"
    )


def test_copies_beside_their_models_count_against_the_limit(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    One that is back keeps its copy, and leaves that much less for others.
    """
    cache = make_cache(park="2GiB")
    visit(cache, "small")
    with cache.lease("small", CARD):
        visit(cache, "base")
        assert kept_copies(loader) == []


def test_no_copy_is_made_that_other_programs_would_pay_for(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine
) -> None:
    """
    The gauge is read before each.
    """
    cache = make_cache(park=True)
    with cache.lease("base", CARD, keep_alive=0):
        machine.others("cpu", "61.5GiB")
    settle(cache)
    assert kept_copies(loader) == []


def test_no_copy_is_made_without_a_gauge(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine
) -> None:
    """
    What one can do without is not done blindly.
    """
    cache = make_cache(park=True)
    with cache.lease("base", CARD, keep_alive=0):
        machine.reading_fails = OSError("no /proc")
    settle(cache)
    machine.reading_fails = None
    assert kept_copies(loader) == []


def test_some_models_are_not_copied(make_cache: MakeCache, loader: FakeLoader) -> None:
    """
    Those of the CPU, those with several workers, and those that were sent away.
    """
    cache = make_cache(park=True)
    visit(cache, "base", device="cpu")
    cache.lease("tiny", CARD, num_workers=2, keep_alive=0).release()
    cache.lease("small", CARD).release()
    cache.evict("small")
    settle(cache)
    assert kept_copies(loader) == []


def test_an_eviction_drops_copies(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, driver: Driver
) -> None:
    """
    Those that were named, of models that are away or back.
    """
    cache = make_cache(park=True)
    visit(cache, "base", "small", "tiny")
    cache.lease("small", CARD).release()
    assert driver.call(cache, "evict", "small") == 1
    driver.call(cache, "evict", "base", "cuda")
    settle(cache)
    assert kept_copies(loader) == ["tiny"]
    assert machine.held_bytes["cpu"] == host(cache).shell_bytes == GIB
    driver.call(cache, "evict")
    settle(cache)
    assert host(cache).shell_bytes == machine.held_bytes["cpu"] == 0


def test_nothing_is_left_after_close(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    Neither copies of models that are away, nor of those that are back.
    """
    cache = make_cache(park=True)
    visit(cache, "base", "small")
    cache.lease("small", CARD).release()
    cache.close()
    assert not any(machine.held_bytes.values())


def test_a_copy_that_cannot_be_used_costs_a_read(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It went between admission and load: the request is admitted anew, and succeeds.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    loader.forget(next(iter(loader.host_copies())))
    with driver.lease(cache, "base", CARD):
        assert cache.stats().restores == 0
        assert host(cache).charged_bytes == 0


def test_the_host_pays_for_a_read_where_the_copy_went(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Admitted anew, its load takes what any other would.
    """
    loader.host_loading_bytes = 3 * GIB
    cache = make_cache(park=True)
    visit(cache, "base")
    loader.forget(next(iter(loader.host_copies())))
    with loader.holding_loads("base") as gate:
        asked = DRIVERS["threads"]().start(cache, "lease", "base", CARD)
        gate.wait_reached()
        assert host(cache).charged_bytes == 3 * GIB
        gate.open()
        asked.result(10).release()


def test_a_restore_needs_no_other_room_on_the_host(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    While it loads, its copy is charged, and nothing else.
    """
    loader.host_loading_bytes = 3 * GIB
    cache = make_cache(park=True)
    visit(cache, "base")
    with loader.holding_loads("base") as gate:
        asked = DRIVERS["threads"]().start(cache, "lease", "base", CARD)
        gate.wait_reached()
        assert host(cache).charged_bytes == GIB
        gate.open()
        asked.result(10).release()


class Changing(FakeLoader):
    """
    A loader that finds other files than those that its copies are of.
    """

    has_changed = False

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        Read them, as the real one does.
        """
        if self.has_changed:
            self.forget(key)
        return super().load(key, files)


def test_changed_files_are_read(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    The copy that was charged is gone with the load, and the next one is of the new.
    """
    changing = Changing(machine)
    cache = make_cache(loader=changing, park=True)
    visit(cache, "base")
    changing.has_changed = True
    loaded = record(cache, ModelLoaded)
    with driver.lease(cache, "base", CARD, keep_alive=0):
        info = host(cache)
        assert (info.shell_bytes, info.copies_bytes, info.charged_bytes) == (0, 0, 0)
    settle(cache)
    changing.has_changed = False
    visit(cache, "base")
    assert [event.restored for event in loaded] == [False, True]


def test_a_refused_unload_is_tried_again_with_its_copy(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    Its copy is charged meanwhile, once.
    """
    cache = make_cache(park=True)
    loader.refuse_unloads = 2
    visit(cache, "base")
    assert host(cache).charged_bytes == GIB
    check(cache)
    ticks(cache, clock, 2)
    assert kept_copies(loader) == ["base"]
    assert host(cache).charged_bytes == 0


def test_a_model_that_is_kept_alive_keeps_its_copy(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock
) -> None:
    """
    An idle model leaves with its keep-alive, its copy stays without end.
    """
    cache = make_cache(park=True, keep_alive=60)
    visit(cache, "base")
    cache.lease("base", CARD).release()
    clock.tick(30)
    settle(cache)
    assert host(cache).copies_bytes == GIB
    clock.tick(31)
    settle(cache)
    assert host(cache).copies_bytes == 0
    clock.tick(60)
    settle(cache)
    assert kept_copies(loader) == ["base"]


# Copies give way ----------------------------------------------------------------------


def test_copies_of_models_that_left_give_way_to_a_load(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model of the CPU is admitted as if they were not there.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "tiny", "small")
    with driver.lease(cache, "medium", "cpu", timeout_s=5):
        assert kept_copies(loader) == []


def test_idle_models_leave_for_the_room_of_their_copies(
    make_cache: MakeCache, loader: FakeLoader, clock: FakeClock, driver: Driver
) -> None:
    """
    A model of the CPU waits for nobody who is idle, wherever that is; who was used last
    stays.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "tiny", "small")
    for model in ("small", "tiny"):
        driver.lease(cache, model, CARD).release()
        clock.tick(1)
    assert host(cache).copies_bytes == 3 * GIB
    with driver.lease(cache, "medium", "cpu", timeout_s=5):
        assert {info.key.model for info in cache.models()} == {"tiny", "medium"}
        assert kept_copies(loader) == []
        assert host(cache).copies_bytes == GIB


def test_leased_models_keep_their_copies(make_cache: MakeCache, driver: Driver) -> None:
    """
    Who needs that room waits for the end of the lease, and has it then.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "small")
    with driver.lease(cache, "small", CARD):
        waiting = driver.waiting(cache, "medium", "cpu")
        settle(cache)
        assert not waiting.done()
        assert host(cache).copies_bytes == 2 * GIB
    waiting.result(10).release()


def test_other_programs_get_copies_within_two_seconds(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    First those of models that are away, then those of idle ones, with their models;
    never those of leased ones.
    """
    cache = make_cache(park=True)
    visit(cache, "tiny", "base", "small")
    for model in ("base", "tiny"):
        cache.lease(model, CARD).release()
        clock.tick(0.1)
    with cache.lease("small", CARD):
        machine.others("cpu", "59GiB")  # 64 - 2 of headroom - 59 = 3 of 4 GiB
        ticks(cache, clock, 2)
        assert {info.key.model for info in cache.models()} == {"small", "tiny"}
        machine.others("cpu", "62GiB")
        ticks(cache, clock, 2)
        assert {info.key.model for info in cache.models()} == {"small"}
        assert host(cache).copies_bytes == 2 * GIB
    assert kept_copies(loader) == []


def test_models_of_the_cpu_do_not_leave_for_other_programs(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    That is for ``pressure="watch"``; without, only copies do.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    cache.lease("tiny", "cpu").release()
    machine.others("cpu", "62GiB")
    ticks(cache, clock, 2)
    assert kept_copies(loader) == []
    assert [info.key.model for info in cache.models()] == ["tiny"]


def test_the_gauge_of_the_host_is_obeyed_by_a_watching_cache(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, clock: FakeClock
) -> None:
    """
    With ``pressure="watch"`` copies go likewise.
    """
    cache = make_cache(park=True, pressure="watch")
    visit(cache, "base", "small")
    machine.others("cpu", "59.5GiB")
    ticks(cache, clock, 2)
    assert kept_copies(loader) == ["small"]


def ticks(cache: ModelCache, clock: FakeClock, count: int) -> None:
    """
    Let so many seconds pass.
    """
    for _ in range(count):
        clock.tick(1)
        settle(cache)


def test_a_model_that_leaves_for_other_programs_takes_its_copy_along(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine
) -> None:
    """
    One look is enough: else a card loses a model and the host wins nothing.
    """
    cache = make_cache(park=True, pressure="watch")
    visit(cache, "base")
    cache.lease("base", CARD).release()
    assert host(cache).copies_bytes == GIB
    machine.others("cpu", "62.5GiB")  # 0.5 GiB are free, 2 are to be
    core = cache._core
    core.make_room_for_others(core.device("cpu"), GIB // 2)
    settle(cache)
    assert not cache.models()
    assert kept_copies(loader) == []


def test_a_lowered_limit_drops_copies(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    At once, those of models that are away.
    """
    cache = make_cache(park=True)
    visit(cache, "base", "small")
    cache.resize(ram="2GiB")
    settle(cache)
    assert kept_copies(loader) == ["small"]


def test_a_lowered_limit_sends_no_more_models_away_than_it_must(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    A copy on its way out counts as room to come.
    """
    cache = make_cache(park=True, ram="8GiB")
    visit(cache, "base", "tiny")
    cache.lease("base", CARD).release()
    cache.lease("tiny", CARD).release()
    with loader.holding_unloads("base") as gate:
        cache.resize(ram="1.5GiB")
        gate.wait_reached()
        cache.resize(ram="1.5GiB")  # looks again
        gate.open()
    settle(cache)
    assert [info.key.model for info in cache.models()] == ["tiny"]


def test_a_copy_that_is_about_to_be_used_gives_way_to_nothing(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It is charged already; the older of two is not dropped in the other's place.
    """
    cache = make_cache(park=True, ram="6GiB")
    visit(cache, "base", "small")
    with loader.holding_loads("tiny") as gate:
        busy = driver.start(cache, "lease", "tiny", CARD)
        gate.wait_reached()
        asked = driver.start(cache, "lease", "base", CARD)
        wait_until(lambda: host(cache).copies_bytes)
        driver.lease(cache, "medium", "cpu").release()  # 5 - 3 = 2: room for small
        driver.lease(cache, "turbo", "cpu").release()
        kept = kept_copies(loader)
        gate.open()
        busy.result(10).release()
    asked.result(10).release()
    assert "base" in kept
    assert cache.stats().restores == 1


def test_other_programs_on_a_card_cost_no_copies_on_the_host(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, driver: Driver
) -> None:
    """
    What the host has does not make room on a card.
    """
    cache = make_cache(park=True)
    visit(cache, "base", "small", device="cuda:1")
    with loader.holding_loads("tiny") as gate:
        busy = driver.start(cache, "lease", "tiny", CARD)
        gate.wait_reached()
        asked = driver.start(cache, "lease", "turbo", CARD)
        wait_until(lambda: len(cache.models()) == 2)
        machine.others(CARD, "9GiB")
        gate.open()
        lease = busy.result(10)
    settle(cache)
    kept = kept_copies(loader)
    machine.others(CARD, 0)
    lease.release()
    cache._core.gauges.look_again(cache._core.device(CARD))
    asked.result(10).release()
    assert kept == ["base", "small"]


def test_peers_are_told_of_a_copy_once(make_cache: MakeCache) -> None:
    """
    It is something to give up while its model is away, and no promise once it is back.
    """
    cache = make_cache(park=True)
    visit(cache, "small")
    device = cache._core.device("cpu")
    account = cache._core.account(device)
    assert account["promised_bytes"] == 0
    assert account["held_bytes"] == account["idle_bytes"] == 2 * GIB
    with cache.lease("small", CARD):
        assert cache._core.account(device) == {
            "promised_bytes": 0,
            "held_bytes": 0,
            "idle_bytes": 0,
            "wanted_bytes": 0,
        }


def test_a_forked_child_has_no_copies(make_cache: MakeCache) -> None:
    """
    A cache that has them was used, and is closed in the child.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    core = cache._core
    state, clock, devices = core.state, core.clock, dict(core.devices)
    core.forked(gpu_in_use=False)
    with pytest.raises(CacheForked):
        cache.lease("base", CARD)
    # The parent goes on.
    state.closed = None
    core._put_together(state, clock, core.gauges.peers)
    assert core.devices == devices
    check(cache)


def test_cards_that_park_and_load_at_once_keep_the_books(
    make_cache: MakeCache,
) -> None:
    """
    Two threads on two cards and one on the host, on a host that is too small for all.
    """
    cache = make_cache(park=True, ram="4GiB")
    models = {CARD: ("large-v3", "medium", "small"), "cuda:1": ("medium", "small")}
    models["cpu"] = ("tiny", "small")
    failures: list[BaseException] = []

    def use(device: str) -> None:
        try:
            for turn in range(40):
                name = models[device][turn % len(models[device])]
                cache.lease(name, device, keep_alive=turn % 3, timeout_s=10).release()
                check(cache)
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=use, args=(device,)) for device in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    settle(cache)
    check(cache)


# What goes wrong ----------------------------------------------------------------------


def test_an_eviction_of_a_model_on_its_way_out_leaves_no_copy(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It was leaving for its room, and was then sent away.
    """
    cache = make_cache(park=True)
    with loader.holding_unloads("base") as gate:
        cache.lease("base", CARD, keep_alive=0).release()
        gate.wait_reached()
        evicted = driver.start(cache, "evict", "base")
        wait_until(lambda: any(entry.gone for entry in cache._core.entries.values()))
        gate.open()
        assert evicted.result(10) == 1
    settle(cache)
    assert kept_copies(loader) == []


def test_a_copy_that_a_full_host_cannot_spare_fails_no_request(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    Other programs took the host since: the copy is no condition, a read takes nothing.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    machine.others("cpu", "61.5GiB")
    try:
        driver.lease(cache, "base", CARD).release()
    except ModelTooLarge as error:
        pytest.fail(f"the copy itself is in the way: {error}")


def test_a_copy_takes_nothing_from_idle_models_of_the_cpu(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    It is not worth another model's leaving.
    """
    cache = make_cache(park=True, pressure="load")
    driver.lease(cache, "medium", "cpu").release()
    visit(cache, "base")
    machine.others("cpu", "58.5GiB")
    driver.lease(cache, "base", CARD).release()
    assert {info.key.model for info in cache.models()} == {"base", "medium"}


def test_a_copy_that_is_in_the_way_makes_nobody_wait(
    make_cache: MakeCache, machine: FakeMachine, driver: Driver
) -> None:
    """
    A leased model of the CPU has the rest of the host; the card's is read again.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    with driver.lease(cache, "medium", "cpu"):
        machine.others("cpu", "58.5GiB")
        waiting = driver.waiting(cache, "base", CARD)
        settle(cache)
        was_done = waiting.done()
    waiting.result(10).release()
    assert was_done, "it waited for a lease on the CPU"


def test_who_waits_for_the_copy_that_he_holds_himself_is_told(
    make_cache: MakeCache, clock: FakeClock
) -> None:
    """
    A lease on a card keeps its copy on the host, where its holder asks for that room.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "small")
    failures: list[type[BaseException]] = []

    def use() -> None:
        with cache.lease("small", CARD):
            try:
                cache.lease("medium", "cpu", timeout_s=5).release()
            except WhisperCacheError as error:
                failures.append(type(error))

    thread = threading.Thread(target=use)
    thread.start()

    def has_failed() -> bool:
        clock.tick(0.1)
        return bool(failures)

    wait_until(has_failed)
    thread.join(10)
    assert failures == [LeaseDeadlock]


def test_leases_that_overlap_starve_nobody_of_a_copy_s_room(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    As on one device, new leases wait once an older request has lost its patience.
    """
    cache = make_cache(park=True, ram="4GiB", patience_s=5)
    visit(cache, "small")
    lease: Lease = driver.lease(cache, "small", CARD)
    waiting = driver.waiting(cache, "medium", "cpu")
    clock.tick(10)
    other = driver.start(cache, "lease", "small", CARD)
    wait_until(lambda: other.done() or cache.stats().waiting > 1)
    was_held_back = not other.done()
    lease.release()
    if was_held_back:
        waiting.result(10).release()
    other.result(10).release()
    waiting.result(10).release()
    assert was_held_back, "leases on the card may overlap for ever"


def test_a_pinned_model_s_copy_is_told_to_be_in_the_way(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    It never leaves by itself, so who needs its room fails rather than waits for ever.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "small")
    cache.pin("small", CARD)
    try:
        waiting = driver.waiting(cache, "medium", "cpu")
        settle(cache)
        was_done = waiting.done()
    finally:
        cache.unpin("small")
    if not was_done:
        waiting.result(10).release()
    assert was_done, "it waited for a pinned model"
    with pytest.raises(ModelTooLarge, match="pinned"):
        waiting.result()


def test_a_request_does_not_wait_for_a_copy_that_was_dropped(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model of the CPU loads into the room of a copy whose model is then asked for.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "small")
    with loader.holding_loads("medium") as gate:
        slow = driver.start(cache, "lease", "medium", "cpu")
        gate.wait_reached()
        settled = driver.waiting(cache, "small", CARD)
        wait_until(settled.done, "the model of the card")
        gate.open()
        slow.result(10).release()
    settled.result(10).release()


def test_copies_that_come_back_together_spare_each_other(
    make_cache: MakeCache,
) -> None:
    """
    Both were charged, so there is room for both.
    """
    cache = make_cache(park=True, ram="5GiB")
    visit(cache, "small")
    visit(cache, "small", device="cuda:1")
    assert host(cache).shell_bytes == 4 * GIB
    cache.lease_many([("small", CARD), ("small", "cuda:1")]).release()
    assert cache.stats().restores == 2


def test_copies_that_come_back_one_by_one_spare_each_other(
    make_cache: MakeCache,
) -> None:
    """
    Likewise on one card.
    """
    cache = make_cache(park=True, ram="5GiB")
    visit(cache, "small")
    cache.lease("small", CARD, "int8", keep_alive=0).release()
    settle(cache)
    assert host(cache).shell_bytes == 4 * GIB
    cache.lease_many([("small", CARD), ("small", CARD, "int8")]).release()
    assert cache.stats().restores == 2


def test_a_copy_that_was_lost_in_a_failed_load_is_not_counted(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, driver: Driver
) -> None:
    """
    A card that ran out of memory twice has cost the copy.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    with loader.holding_loads("base") as gate:
        asked = driver.start(cache, "lease", "base", CARD)
        gate.wait_reached()
        machine.others(CARD, "10.5GiB")
        gate.open()
        with pytest.raises(LoadFailed):
            asked.result(10)
    settle(cache)
    assert kept_copies(loader) == []
    assert host(cache).shell_bytes == loader.kept_bytes() == 0


def test_a_restore_that_is_put_back_invents_no_copy(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, driver: Driver
) -> None:
    """
    Another program came to the card between admission and load: what was charged of
    the copy is a shell again only if it is still there.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    with loader.holding_loads("tiny") as gate:
        busy = driver.start(cache, "lease", "tiny", CARD)
        gate.wait_reached()
        asked = driver.start(cache, "lease", "base", CARD)
        wait_until(lambda: host(cache).copies_bytes)  # admitted, behind tiny
        machine.others(CARD, "9GiB")
        gate.open()
        lease = busy.result(10)
    settle(cache)
    told_bytes, kept_bytes = host(cache).shell_bytes, loader.kept_bytes()
    machine.others(CARD, 0)
    lease.release()
    cache._core.gauges.look_again(cache._core.device(CARD))
    asked.result(10).release()
    assert told_bytes == kept_bytes


def test_a_restore_is_no_promise_to_take_more(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The gauge shows the copy already, so peers need not leave room for it again.
    """
    cache = make_cache(park=True)
    visit(cache, "small")
    with loader.holding_loads("small") as gate:
        asked = driver.start(cache, "lease", "small", CARD)
        gate.wait_reached()
        account = cache._core.account(cache._core.device("cpu"))
        gate.open()
        asked.result(10).release()
    assert account["promised_bytes"] == 0


def test_the_copy_of_a_model_on_a_lost_card_stays_counted(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    A model on a lost card is never freed, and neither is the copy in it.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    with pytest.raises(RuntimeError), cache.lease("base", CARD, keep_alive=0):
        raise RuntimeError(ILLEGAL_ACCESS)
    settle(cache)
    assert machine.held_bytes["cpu"] == host(cache).charged_bytes == GIB


def test_copies_of_models_that_had_left_a_lost_card_give_way_to_nothing(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    They are kept for ever, or gone, but are no shells.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    with pytest.raises(RuntimeError), cache.lease("tiny", CARD):
        raise RuntimeError(ILLEGAL_ACCESS)
    settle(cache)
    assert loader.kept_bytes() == host(cache).shell_bytes == 0


def test_a_large_copy_spares_small_ones(
    make_cache: MakeCache, clock: FakeClock, driver: Driver
) -> None:
    """
    Where the next to leave gives all the room alone, those before it stay.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "tiny", "small")
    for model in ("tiny", "small"):
        driver.lease(cache, model, CARD).release()
        clock.tick(1)
    with driver.lease(cache, "medium", "cpu", timeout_s=5):
        assert {info.key.model for info in cache.models()} == {"tiny", "medium"}


def test_only_as_many_models_leave_as_copies_are_in_the_way(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    A model that leaves for another reason frees its copy's room as well.
    """
    cache = make_cache(park=True, ram="4GiB")
    visit(cache, "tiny", "base")
    cache.lease("tiny", CARD).release()
    cache.lease("base", CARD).release()
    with loader.holding_unloads("base") as gate:
        evicted = driver.start(cache, "evict", "base")
        gate.wait_reached()
        waiting = driver.waiting(cache, "medium", "cpu")
        gate.open()
        evicted.result(10)
    with waiting.result(10):
        models = {info.key.model for info in cache.models()}
    assert models == {"tiny", "medium"}


def test_an_eviction_drops_a_copy_that_is_asked_for_right_after(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    The card is busy, so the request comes before its thread has dropped the copy.
    """
    cache = make_cache(park=True)
    visit(cache, "base")
    with loader.holding_loads("tiny") as gate:
        busy = driver.start(cache, "lease", "tiny", CARD)
        gate.wait_reached()
        driver.call(cache, "evict", "base")
        asked = driver.waiting(cache, "base", CARD)
        gate.open()
        busy.result(10).release()
    asked.result(10).release()
    assert cache.stats().restores == 0


def test_a_copy_in_the_making_is_not_yet_in_the_gauge(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    A reading of the host meanwhile must not find more than there is.
    """
    cache = make_cache(park=True)
    with loader.holding_unloads("small") as gate:
        cache.lease("small", CARD, keep_alive=0).release()
        gate.wait_reached()
        core = cache._core
        core.gauges.observe(core.device("cpu"))
        info, account = host(cache), core.account(core.device("cpu"))
        gate.open()
    settle(cache)
    assert info.charged_bytes == 2 * GIB
    assert info.capacity_bytes == 62 * GIB
    assert account["promised_bytes"] == 2 * GIB


class Meeting(FakeLoader):
    """
    A loader whose unloads of two cards see to their copies at the same time.
    """

    barrier: threading.Barrier | None = None

    def shrink_kept(self, most_bytes: int, but: Collection[ModelKey] = ()) -> None:
        """
        Meet the other one first, if it comes.
        """
        super().shrink_kept(most_bytes, but)
        if self.barrier is not None:
            try:
                self.barrier.wait(0.5)
            except threading.BrokenBarrierError:
                self.barrier = None


def test_two_cards_together_keep_to_the_limit(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    Each would be within it alone.
    """
    meeting = Meeting(machine)
    cache = make_cache(loader=meeting, park="1GiB")
    cache.lease("base", CARD).release()
    cache.lease("base", "cuda:1").release()
    meeting.barrier = threading.Barrier(2)
    core = cache._core
    for name in (CARD, "cuda:1"):
        core.make_room_for_others(core.device(name), GIB)
    settle(cache)
    meeting.barrier = None
    assert machine.peak_bytes["cpu"] <= GIB
    assert host(cache).shell_bytes <= GIB


class Late(FakeLoader):
    """
    A loader that tells one device's thread of the copies that there were before.
    """

    gate: threading.Event | None = None
    reached: threading.Event

    def host_copies(self) -> Mapping[ModelKey, int]:
        """
        Look, and then tell late, on the thread of one card.
        """
        found = dict(super().host_copies())
        is_late = threading.current_thread().name == "whispercache-cuda:1"
        if self.gate is not None and is_late:
            self.reached.set()
            assert self.gate.wait(10)
        return found


def test_one_card_does_not_tell_what_another_one_changed_since(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    What one thread saw before, and notes after, must not be taken for the present.
    """
    late = Late(machine)
    cache = make_cache(loader=late, park=True, ram="4GiB")
    cache.lease("base", CARD).release()
    cache.lease("tiny", "cuda:1", num_workers=2).release()
    late.gate, late.reached = threading.Event(), threading.Event()
    core = cache._core
    core.make_room_for_others(core.device("cuda:1"), GIB)  # leaves no copy
    assert late.reached.wait(10)
    core.make_room_for_others(core.device(CARD), GIB)  # leaves one
    wait_until(lambda: host(cache).shell_bytes == GIB)
    late.gate.set()
    settle(cache)
    late.gate = None
    assert host(cache).shell_bytes == late.kept_bytes() == GIB


def test_a_limit_of_copies_spares_what_else_models_leave(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Tokenizers are no copies of weights.
    """
    loader.shell_size = "16MiB"
    cache = make_cache(park="1GiB")
    visit(cache, "tiny", device="cpu")
    visit(cache, "base")
    assert kept_copies(loader) == ["base"]
    assert "tiny" in {key.model for key in loader.shells}


def test_a_request_for_several_does_not_wait_for_a_copy_of_its_own(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    The copy of a model that it has already fills the host, where the other one goes:
    the first is evicted, and loaded again without a copy.
    """
    cache = make_cache(park=True, ram="3GiB")
    visit(cache, "base")
    cache.lease("base", CARD).release()
    assert host(cache).copies_bytes == GIB
    leases = driver.call(cache, "lease_many", [("medium", "cpu"), ("base", CARD)])
    assert [lease.key.model for lease in leases] == ["medium", "base"]
    assert host(cache).copies_bytes == 0
    leases.release()


def test_pressure_spares_a_copy_that_a_load_will_use(
    make_cache: MakeCache, loader: FakeLoader, driver: Driver
) -> None:
    """
    It is charged to the load that waits for its turn, and so it must still be there.
    """
    loader.shell_size = 1  # something that may be dropped
    cache = make_cache(park=True)
    visit(cache, "base")
    with loader.holding_loads("tiny") as gate:
        busy = driver.start(cache, "lease", "tiny", CARD)
        gate.wait_reached()
        asked = driver.start(cache, "lease", "base", CARD)
        wait_until(lambda: host(cache).copies_bytes)
        core = cache._core
        core.make_room_for_others(core.devices["cpu"], 64 * GIB)
        idle = threading.Event()
        core.devices["cpu"].thread.submit(idle.set)
        assert idle.wait(10)
        kept = kept_copies(loader)
        gate.open()
        busy.result(10).release()
    asked.result(10).release()
    assert kept == ["base"]
    assert cache.stats().restores == 1


def test_a_copy_hides_no_deadlock_on_the_card(
    make_cache: MakeCache, clock: FakeClock
) -> None:
    """
    A leased model is on its card as well as, in part, on the host: both count.
    """
    cache = make_cache(park=True, vram="4GiB")
    visit(cache, "small")
    failures: list[type[BaseException]] = []

    def use() -> None:
        with cache.lease("small", CARD):
            try:
                cache.lease("medium", CARD, timeout_s=5).release()
            except WhisperCacheError as error:
                failures.append(type(error))

    thread = threading.Thread(target=use)
    thread.start()

    def has_failed() -> bool:
        clock.tick(0.1)
        return bool(failures)

    wait_until(has_failed)
    thread.join(10)
    assert failures == [LeaseDeadlock]
