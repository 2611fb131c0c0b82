"""
Fixtures for all tests: fakes, and caches that are checked and closed afterwards.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

# However pytest is started: docs/gpu.md does so without this project's settings.
sys.path.insert(0, str(Path(__file__).parent / "support"))

import processes
import pytest
from clustered import Nodes, running_nodes
from driver import DRIVERS
from fakes import FakeGpus, build_drivers
from hypothesis import HealthCheck, settings
from surroundings import move_to
from tenants import Tenants

from whispercache import ModelCache
from whispercache.devices.host import user_cache
from whispercache.testing import FakeClock, FakeLoader, FakeMachine, check, settle

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from driver import Driver
    from typing_extensions import Unpack

    from whispercache.options import CacheOptions

# Examples that take long on a busy machine are no failures.
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    """
    Give this process, and all that it starts, a home of its own.
    """
    home = Path(tempfile.mkdtemp(prefix="whispercache-home-"))
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    move_to(home)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """
    Tell a test that starts a process, itself or by its fixtures, without a mark.
    """
    is_marked = any(item.get_closest_marker(mark) for mark in processes.MARKS)
    with nullcontext() if is_marked else processes.forbidden():
        return (yield)


class MakeCache(Protocol):
    """
    Makes a cache on the fakes; with the parameters of a `ModelCache`.
    """

    def __call__(self, **options: Unpack[CacheOptions]) -> ModelCache:
        """
        Make one.
        """


@pytest.fixture(autouse=True, scope="session")
def _heeds_ctrl_c() -> None:
    """
    A shell's background jobs ignore Ctrl-C, and so would the programs under test.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _has_learned_nothing() -> None:
    """
    What loads of earlier tests measured would correct the predictions of this one.
    """
    (user_cache() / "footprints.json").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    The fake NVIDIA drivers, compiled once.
    """
    return build_drivers(tmp_path_factory.mktemp("drivers"))


@pytest.fixture
def gpus(drivers: Path, tmp_path: Path) -> FakeGpus:
    """
    A machine whose GPUs the test describes, for child processes.
    """
    return FakeGpus(tmp_path, drivers)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """
    A Ray cluster of two nodes.
    """
    pytest.importorskip("ray.serve", reason="this needs the extra [ray]")
    with running_nodes() as nodes:
        yield nodes


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """
    Threads, then tasks.
    """
    made = DRIVERS[request.param]()
    yield made
    made.close()


@pytest.fixture
def machine() -> FakeMachine:
    """
    A host, and two cards of which a cache may use 10 GiB and 6 GiB.
    """
    return FakeMachine({"cpu": "64GiB", "cuda:0": "10.5GiB", "cuda:1": "6.5GiB"})


@pytest.fixture
def loader(machine: FakeMachine) -> FakeLoader:
    """
    Models of 1 GiB; small takes 2 GiB, medium 3 GiB, large-v3 6 GiB.
    """
    sizes = {"small": "2GiB", "medium": "3GiB", "large-v3": "6GiB"}
    return FakeLoader(machine, sizes=sizes)


@pytest.fixture
def clock() -> FakeClock:
    """
    A clock that stands still until it is ticked.
    """
    return FakeClock()


@pytest.fixture
def make_cache(
    machine: FakeMachine, loader: FakeLoader, clock: FakeClock
) -> Iterator[MakeCache]:
    """
    Makes caches on the fakes. Each is checked and closed when the test is over.
    """
    caches: list[ModelCache] = []

    def make(**options: Unpack[CacheOptions]) -> ModelCache:
        given: CacheOptions = {"loader": loader, "probe": machine, "clock": clock}
        given.update(options)
        caches.append(ModelCache(**given))
        return caches[-1]

    yield make
    for cache in caches:
        check(cache)
        close_all(cache, clock)
    assert not machine.held_bytes - loader.abandoned_bytes, machine.held_bytes


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    A runtime directory of the test's own, with the ledgers in it.
    """
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "whispercache"


@pytest.fixture
def tenants(machine: FakeMachine, clock: FakeClock, runtime: Path) -> Iterator[Tenants]:
    """
    Two of them, closed afterwards.
    """
    del runtime
    made = Tenants(machine, clock)
    yield made
    for cache in made.caches:
        check(cache)
        close_all(cache, clock)
    assert not any(machine.held_bytes.values())


def close_all(cache: ModelCache, clock: FakeClock) -> None:
    """
    Close a cache whose leases have ended, however often unloads are refused.
    """
    core = cache._core
    core.close()
    for _ in range(20):
        settle(cache)
        if not cache.models():
            break
        clock.tick(60)
    assert not cache.models(), f"leases leaked: {cache!r}"
    core.join(10)
    core.check()
