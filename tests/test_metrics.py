"""
Metrics: what a Prometheus server reads is what the cache did.
"""

from __future__ import annotations

import gc
import re
import threading
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from driver import ThreadDriver
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families as parse
from real import SILENCE, at_once, child, micro, model_of, text_of

from whispercache import (
    AsyncModelCache,
    EvictionCause,
    LeaseDeadlock,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    TooManyWaiters,
)
from whispercache.base import CacheBase
from whispercache.metrics import BUCKETS_S, CacheCollector
from whispercache.peers.pressure import WATCH_S
from whispercache.testing import FakeLoader, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from conftest import MakeCache
    from prometheus_client import Metric

    from whispercache.testing import FakeClock, FakeMachine

GIB = 1024**3
MIB = 1024**2


@dataclass
class World:
    """
    A cache on the fakes, and its metrics.
    """

    cache: ModelCache
    loader: FakeLoader
    machine: FakeMachine
    clock: FakeClock
    registry: CollectorRegistry

    def read(self, name: str, **labels: str) -> float | None:
        """
        A sample of this cache, as a Prometheus server reads it.
        """
        return read(self.registry, name, cache="default", **labels)


@pytest.fixture
def world(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine, clock: FakeClock
) -> World:
    """
    A cache that may use 6 GiB of a card, and looks at it every second.
    """
    cache = make_cache(vram="6GiB", keep_alive=60, pressure="watch")
    registry = CollectorRegistry()
    registry.register(CacheCollector(cache))
    return World(cache, loader, machine, clock, registry)


@pytest.fixture
def driver() -> ThreadDriver:
    """
    Calls on threads.
    """
    return ThreadDriver()


def read(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """
    The value of a sample in the text of a registry; None if it is not there.
    """
    for family in parse(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name == f"whispercache_{name}" and sample.labels == labels:
                return sample.value
    return None


def strictly(registry: CollectorRegistry) -> tuple[str, list[Metric]]:
    """
    The page of a registry in the format of OpenMetrics, and what its parser makes of
    it; that one raises where Prometheus' own would be lenient.
    """
    write: Callable[[CollectorRegistry], bytes] = exposition.generate_latest
    read: Callable[[str], Iterable[Metric]] = parser.text_string_to_metric_families
    page = write(registry).decode()
    return page, list(read(page))


# Counters -----------------------------------------------------------------------------


def _be_hit(world: World) -> None:
    world.cache.preload("tiny", "cuda:0")
    world.cache.preload("tiny", "cuda:0")


def _miss(world: World) -> None:
    world.cache.preload("base", "cuda:0")


def _fail_to_load(world: World) -> None:
    world.loader.fail_loads["base"] = [RuntimeError("no luck")]
    with pytest.raises(LoadFailed):
        world.cache.preload("base", "cuda:0")


def _run_out_of_time(world: World) -> None:
    with pytest.raises(LeaseTimeout):
        world.cache.preload("base", "cuda:0", timeout_s=0)


def _find_the_queue_full(world: World) -> None:
    core = world.cache._core
    core.rules = replace(core.rules, max_waiting=0)
    core._put_together(core.state, core.clock, core.gauges.peers)
    with pytest.raises(TooManyWaiters):
        world.cache.preload("base", "cuda:0")


def _deadlock(world: World) -> None:
    def hold_one_and_ask_for_another() -> None:
        with world.cache.lease("large-v3", "cuda:0"), pytest.raises(LeaseDeadlock):
            world.cache.lease("base", "cuda:0")

    def let_time_pass() -> None:
        wait_until(lambda: world.cache.stats().leases and world.cache.stats().waiting)
        world.clock.tick(0.1)

    at_once([hold_one_and_ask_for_another, let_time_pass])


def _fall_back(world: World) -> None:
    world.cache.resize(vram="1GiB")
    world.cache.lease("small", "cuda:0", fallback=["cpu"]).release()


def _refuse_an_unload(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.loader.refuse_unloads = 1
    world.clock.tick(60)
    settle(world.cache)


@pytest.mark.parametrize(
    ("counter", "act", "value"),
    [
        ("requests", _be_hit, 2),
        ("hits", _be_hit, 1),
        ("misses", _miss, 1),
        ("loads", _miss, 1),
        ("load_failures", _fail_to_load, 1),
        ("timeouts", _run_out_of_time, 1),
        ("refused", _find_the_queue_full, 1),
        ("deadlocks", _deadlock, 1),
        ("fallbacks", _fall_back, 1),
        ("unconfirmed_unloads", _refuse_an_unload, 1),
    ],
)
def test_a_counter_goes_up_by_what_it_counts(
    world: World, counter: str, act: Callable[[World], None], value: int
) -> None:
    """
    From a 0 that is there from the start, so that a rate can be taken of the first one.
    """
    assert world.read(f"{counter}_total") == 0
    act(world)
    assert world.read(f"{counter}_total") == value


def _be_evicted_for_room(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.cache.preload("large-v3", "cuda:0")


def _expire(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.clock.tick(60)
    settle(world.cache)


def _be_evicted_by_hand(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.cache.evict("base")


def _be_closed(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.cache.close()


def _give_way_to_others(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.machine.others("cuda:0", "9.5GiB")
    world.clock.tick(WATCH_S)
    settle(world.cache)


def _make_room_for_a_retry(world: World) -> None:
    world.cache.preload("base", "cuda:0")
    world.loader.fail_loads["small"] = [
        RuntimeError("CUDA failed with error out of memory")
    ]
    world.cache.preload("small", "cuda:0")


@pytest.mark.parametrize(
    ("cause", "act"),
    [
        (EvictionCause.CAPACITY, _be_evicted_for_room),
        (EvictionCause.EXPIRED, _expire),
        (EvictionCause.EXPLICIT, _be_evicted_by_hand),
        (EvictionCause.CLOSED, _be_closed),
        (EvictionCause.PRESSURE, _give_way_to_others),
        (EvictionCause.OUT_OF_MEMORY, _make_room_for_a_retry),
    ],
)
def test_evictions_are_counted_by_cause(
    world: World, cause: EvictionCause, act: Callable[[World], None]
) -> None:
    """
    Each cause is there from the start, and goes up alone.
    """

    def evictions() -> dict[str, float | None]:
        return {
            other.value: world.read("evictions_total", cause=other.value)
            for other in EvictionCause
        }

    assert set(evictions().values()) == {0}
    act(world)
    assert evictions() == {other.value: int(other is cause) for other in EvictionCause}


def test_counters_are_of_the_whole_life_of_the_cache(world: World) -> None:
    """
    As far as the cache counts itself; what is counted from events begins with `add`.
    """
    _be_evicted_by_hand(world)
    late = CollectorRegistry()
    late.register(CacheCollector(world.cache))
    told = {
        name: read(late, name, cache="default")
        for name in ("requests_total", "loads_total", "load_seconds_count")
    }
    assert told == {"requests_total": 1, "loads_total": 1, "load_seconds_count": 0}
    assert read(late, "evictions_total", cache="default", cause="explicit") == 0


# Histograms ---------------------------------------------------------------------------


def histogram(world: World, name: str) -> tuple[dict[float, int], float]:
    """
    Buckets of one of the histograms that hold anything, not cumulated; and the sum.
    """
    found: dict[float, int] = {}
    before = 0
    for bound in (*map(str, BUCKETS_S), "+Inf"):
        upto = world.read(f"{name}_seconds_bucket", le=bound)
        assert upto is not None
        if upto > before:
            found[float(bound)] = int(upto) - before
        before = int(upto)
    assert world.read(f"{name}_seconds_count") == before
    total_s = world.read(f"{name}_seconds_sum")
    assert total_s is not None
    return found, total_s


def test_load_seconds_fall_into_buckets(world: World) -> None:
    """
    A bound belongs to its bucket; what is longer than all of them is counted too.
    """
    world.loader.clock = world.clock
    for model, load_s in (("tiny", 0.25), ("base", 0.26), ("small", 130.0)):
        world.loader.load_s = load_s
        world.cache.preload(model, "cuda:0")
    buckets, sum_s = histogram(world, "load")
    assert buckets == {0.25: 1, 0.5: 1, float("inf"): 1}
    assert sum_s == pytest.approx(130.51)


def test_wait_seconds_count_those_who_waited(
    world: World, driver: ThreadDriver
) -> None:
    """
    From the request to the lease; a hit is none of them.
    """
    lease = driver.lease(world.cache, "large-v3", "cuda:0")
    driver.lease(world.cache, "large-v3", "cuda:0").release()
    assert histogram(world, "wait") == ({0.01: 1}, 0)
    asked = driver.waiting(world.cache, "base", "cuda:0")
    world.clock.tick(7)
    lease.release()
    asked.result(10).release()
    assert histogram(world, "wait") == ({0.01: 1, 10: 1}, 7)


# Gauges -------------------------------------------------------------------------------


def test_leases_and_the_queue_are_told(world: World, driver: ThreadDriver) -> None:
    """
    Those that are held, in all and by model, and those that wait.
    """
    labels = {"model": "large-v3", "device": "cuda:0", "compute_type": "float16"}
    leases = [world.cache.lease("large-v3", "cuda:0") for _ in range(2)]
    asked = driver.waiting(world.cache, "base", "cuda:0")
    assert world.read("leases") == 2
    assert world.read("model_leases", **labels) == 2
    assert world.read("waiting_requests") == 1
    for lease in leases:
        lease.release()
    asked.result(10).release()
    assert (world.read("leases"), world.read("waiting_requests")) == (0, 0)
    assert world.read("model_leases", **labels) is None  # it had to leave


def test_bytes_are_told_by_device(world: World) -> None:
    """
    Models count as resident without the room for their work; the limit and the peak
    stay when they leave.
    """

    def told() -> dict[str, float | None]:
        names = ("resident", "charged", "peak", "capacity", "limit")
        return {
            name: world.read(f"device_{name}_bytes", device="cuda:0") for name in names
        }

    assert set(told().values()) == {None}
    world.loader.workspace_bytes = 100 * MIB
    with world.cache.lease("small", "cuda:0"):
        assert told() == {
            "resident": 2 * GIB,
            "charged": 2 * GIB + 100 * MIB,
            "peak": 2 * GIB + 100 * MIB,
            "capacity": 6 * GIB,
            "limit": 6 * GIB,
        }
    world.cache.evict()
    world.cache.resize(vram="4GiB")
    assert told() == {
        "resident": 0,
        "charged": 0,
        "peak": 2 * GIB + 100 * MIB,
        "capacity": 4 * GIB,
        "limit": 4 * GIB,
    }


def test_a_device_without_a_limit_tells_none(world: World) -> None:
    """
    Rather than a number that would look like one.
    """
    world.cache.preload("tiny", "cpu")
    assert world.read("device_capacity_bytes", device="cpu")
    assert world.read("device_limit_bytes", device="cpu") is None


def test_models_that_share_their_labels_share_a_series(
    world: World, tmp_path: Path
) -> None:
    """
    They differ in an option, or in the directory that theirs is in; two samples of one
    series would make the whole page unreadable.
    """
    paths = [tmp_path / parent / "mine" for parent in ("one", "two")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "model.bin").touch()
        world.cache.preload(path, "cuda:0")
    world.cache.preload("base", "cuda:0")
    with world.cache.lease("base", "cuda:0", num_workers=2):
        for model, leases in (("mine", 0), ("base", 1)):
            labels = {"model": model, "device": "cuda:0", "compute_type": "float16"}
            assert world.read("model_bytes", **labels) == 2 * GIB
            assert world.read("model_leases", **labels) == leases
    assert str(tmp_path) not in generate_latest(world.registry).decode()


# The page -----------------------------------------------------------------------------


def test_the_page_follows_the_rules_of_prometheus(world: World) -> None:
    """
    Counters end in ``_total``, units are base units and come last, every metric has
    its help, and the strict parser of OpenMetrics takes it all.
    """
    world.cache.preload("base", "cuda:0")
    page, families = strictly(world.registry)
    assert len(families) == len({family.name for family in families}) > 20
    for family in families:
        assert re.fullmatch(r"whispercache(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")
        unit = family.name.rpartition("_")[2]
        assert (unit == "seconds") == (family.type == "histogram")
        for sample in family.samples:
            assert sample.labels["cache"] == "default"
            assert sample.name.endswith("_total") == (family.type == "counter")
    assert not re.search(r"_(ms|mib|gib|percent|s)[_ {]", page)


def test_to_register_asks_no_cache(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Not even in a registry that would collect to learn the names; all are described.
    """
    described = {family.name for family in CacheCollector(world.cache).describe()}
    assert described == {family.name for family in world.registry.collect()}
    for method in ("stats", "models", "devices"):
        monkeypatch.delattr(CacheBase, method)
    CollectorRegistry(auto_describe=True).register(CacheCollector(world.cache))


def test_a_part_of_the_page_can_be_asked_for(world: World) -> None:
    """
    By the names of samples, as ``/metrics?name[]=…`` does.
    """
    names = ["whispercache_hits_total", "whispercache_leases"]
    part = world.registry.restricted_registry(names)
    assert sorted(family.name for family in part.collect()) == [
        "whispercache_hits",
        "whispercache_leases",
    ]


def test_a_scrape_waits_for_no_load(world: World, driver: ThreadDriver) -> None:
    """
    It tells of the load instead: charged, not yet resident.
    """
    with world.loader.holding_loads("base") as gate:
        asked = driver.start(world.cache, "lease", "base", "cuda:0")
        gate.wait_reached()
        assert world.read("waiting_requests") == 1
        assert world.read("device_charged_bytes", device="cuda:0") == GIB
        assert world.read("device_resident_bytes", device="cuda:0") == 0
    asked.result(10).release()
    assert world.read("device_resident_bytes", device="cuda:0") == GIB


def test_scrapes_while_much_happens_are_consistent(world: World) -> None:
    """
    Each one parses, counters never fall, and a histogram's buckets add up to its count.
    """
    over = threading.Event()

    def work(model: str) -> None:
        for _ in range(100):
            world.cache.preload(model, "cuda:0")

    def work_all() -> None:
        try:
            at_once([lambda: work("large-v3"), lambda: work("medium")])
        finally:
            over.set()

    def scrape() -> None:
        before = 0.0
        while not over.is_set():
            families = parse(generate_latest(world.registry).decode())
            told = {
                (sample.name, sample.labels.get("le")): sample.value
                for family in families
                for sample in family.samples
                if sample.name.startswith("whispercache_load")
            }
            count = told["whispercache_load_seconds_count", None]
            assert told["whispercache_load_seconds_bucket", "+Inf"] == count >= before
            before = count

    at_once([work_all, scrape, scrape])
    assert world.read("loads_total") == world.read("load_seconds_count")


# Several caches, and their ends -------------------------------------------------------


def test_several_caches_share_a_registry(
    make_cache: MakeCache, machine: FakeMachine
) -> None:
    """
    With one collector, each under its own name, tasks' caches too; a second collector
    would print each name twice, and is refused by the registry.
    """
    one, other = make_cache(), make_cache(loader=FakeLoader(machine))
    registry = CollectorRegistry()
    collector = CacheCollector(one, name="one")
    remove = collector.add(AsyncModelCache(other), name="other")
    registry.register(collector)
    other.preload("base", "cuda:0")
    assert read(registry, "loads_total", cache="one") == 0
    assert read(registry, "loads_total", cache="other") == 1
    strictly(registry)

    with pytest.raises(ValueError, match="named 'one' already"):
        collector.add(other, name="one")
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(CacheCollector(other, name="third"))

    remove()
    assert read(registry, "loads_total", cache="other") is None
    assert read(registry, "loads_total", cache="one") == 0
    collector.add(other, name="other")


def test_a_closed_collector_hears_nothing_more(make_cache: MakeCache) -> None:
    """
    Nor does the cache, which goes on, hold anything of it.
    """
    cache = make_cache()
    collector = CacheCollector(cache)
    counts = collector._watched[0]
    assert cache._core.outbox._listeners
    collector.close()
    assert not cache._core.outbox._listeners
    cache.preload("base", "cuda:0")
    assert sum(counts.load_s.counts) == 0
    assert not any(family.samples for family in collector.collect())


def test_a_closed_cache_tells_its_last_figures(world: World) -> None:
    """
    So that the last scrape sees how it ended.
    """
    _be_closed(world)
    assert world.read("loads_total") == 1
    assert world.read("device_charged_bytes", device="cuda:0") == 0
    assert world.read("evictions_total", cause="closed") == 1


def test_a_registry_keeps_no_cache_alive(machine: FakeMachine) -> None:
    """
    A cache that is not referred to is collected; its series end, its name is free.
    """
    cache = ModelCache(loader=FakeLoader(machine), probe=machine)
    collector = CacheCollector(cache)
    registry = CollectorRegistry()
    registry.register(collector)
    cache.preload("base", "cuda:0")
    cache.close()
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert read(registry, "loads_total", cache="default") is None
    with ModelCache(loader=FakeLoader(machine), probe=machine) as following:
        collector.add(following, name="default")
        assert read(registry, "loads_total", cache="default") == 0


# For real -----------------------------------------------------------------------------


def test_a_real_model_is_told_of() -> None:
    """
    Its bytes, its seconds, and that its weights alone were read the second time.
    """
    with ModelCache(ram="1GiB") as cache:
        registry = CollectorRegistry()
        registry.register(CacheCollector(cache, name="real"))
        model = model_of(cache, micro())
        segments, _ = model.transcribe(SILENCE, language="en")
        labels = {
            "cache": "real",
            "model": micro().name,
            "device": "cpu",
            "compute_type": model.key.compute_type,
        }
        with segments:
            assert read(registry, "model_leases", **labels) == 1
            text_of(segments)
        assert read(registry, "model_leases", **labels) == 0
        assert (read(registry, "model_bytes", **labels) or 0) > 0
        cache.evict()
        model.transcribe(SILENCE, language="en")[0].close()
        assert read(registry, "loads_total", cache="real") == 2
        assert read(registry, "reloads_total", cache="real") == 1
        assert read(registry, "load_seconds_count", cache="real") == 2
        sum_s = read(registry, "load_seconds_sum", cache="real")
        assert sum_s == pytest.approx(cache.stats().load_s)


@pytest.mark.process
def test_without_prometheus_client_the_extra_is_named() -> None:
    """
    In one line; and the rest of the package needs none of it.
    """
    done = child(
        """
        import sys
        sys.modules["prometheus_client"] = None
        import whispercache
        try:
            import whispercache.metrics
        except ImportError as missing:
            print(missing)
        """.replace("\n        ", "\n")
    )
    assert done.stderr == ""
    assert "pip install 'whispercache[metrics]'" in done.stdout
    assert done.stdout.count("\n") == 1
