"""
The line: an event costs the requests that it can help, not all that wait.

What it touches is counted, since times tell nothing on a busy machine.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from whispercache import LeaseTimeout, ModelCache
from whispercache.core import demands
from whispercache.core.entries import Entry
from whispercache.core.waiters import Wanted
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.planning.planner import Walk
from whispercache.testing import FakeClock, FakeLoader, FakeMachine, check, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from whispercache import Lease
    from whispercache.core.waiters import Waiter

CARD = "cuda:0"
MIB = 1024**2
WAITING = 1000
SIZES = (100, 200, 300, 400)


class Busy:
    """
    A card that one large model fills, ten small ones beside it, and those who wait for
    the room of the large one.
    """

    def __init__(self, *, alike: bool, policy: str = "lru") -> None:
        sizes = {"large": 1000 * MIB}
        sizes |= {f"bench/small-{n}": 10 * MIB for n in range(10)}
        sizes |= {f"bench/wanted-{n}": SIZES[n % 4] * MIB for n in range(WAITING + 1)}
        machine = FakeMachine({"cpu": "64GiB", CARD: "64GiB"})
        self.clock = FakeClock()
        self.cache = ModelCache(
            loader=FakeLoader(machine, sizes=sizes, workspace_bytes=MIB),
            probe=machine,
            clock=self.clock,
            vram="1170MiB",
            policy=policy,  # type: ignore[arg-type]
            patience_s=1e9,
        )
        self.large = self.cache.lease("large", CARD)
        # They are held, so that none may go for those who wait.
        self.small = [self.lease(f"bench/small-{n}") for n in range(10)]
        self._alike = alike
        self.waiters = [self.ask(n) for n in range(WAITING)]

    def lease(self, name: str) -> Lease:
        """
        Leases a model on the card.
        """
        return self.cache.lease(name, CARD)

    def ask(self, number: int, timeout_s: float | None = 60.0) -> Waiter:
        """
        Makes a request for one of the wanted models.
        """
        name = f"bench/wanted-{number % 4 if self._alike else number}"
        self.cache.preload(name, CARD, tier="page")  # it is located
        key = self.cache.known_key(name, CARD)
        assert key is not None
        wanted = Wanted(self.cache._core.entry(key), DEFAULT_WORKLOAD)
        return self.cache._core.request([wanted], None, timeout_s, object())

    def close(self) -> None:
        """
        Ends all leases and requests, and the cache.
        """
        self.large.release()
        for lease in self.small:
            lease.release()
        for waiter in self.waiters:
            if waiter.future.done() and waiter.future.exception() is None:
                waiter.future.result()[0].release()
            else:
                self.cache._core.abandon(waiter)
        settle(self.cache)
        check(self.cache)
        self.cache.close()


@pytest.fixture(params=[False, True], ids=["own models", "four models"])
def busy(request: pytest.FixtureRequest) -> Iterator[Busy]:
    """
    A thousand wait.
    """
    world = Busy(alike=request.param)
    yield world
    world.close()


class Touched(Counter[str]):
    """
    How often requests and models were looked at.
    """

    def of(self, event: Callable[[], object]) -> Counter[str]:
        """
        Returns what one event touches.
        """
        self.clear()
        event()
        return Counter(self)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Touched:
    """
    Counts decisions on requests, their demands, and models that might be evicted.
    """
    counts = Touched()
    for what, owner, name in (
        ("decisions", Walk, "decide"),
        ("demands", demands, "demands"),
        ("models", Entry, "resident"),
    ):
        monkeypatch.setattr(owner, name, _counted(counts, what, getattr(owner, name)))
    return counts


def _counted(counts: Counter[str], what: str, call: Callable[..., Any]) -> Any:
    def count(*args: Any, **kwargs: Any) -> Any:
        counts[what] += 1
        return call(*args, **kwargs)

    return count


def test_a_hit_touches_nobody_who_waits(busy: Busy, touched: Touched) -> None:
    """
    Nor does its end.
    """
    assert touched.of(lambda: busy.lease("bench/small-0").release()) == {}


def test_a_request_touches_itself_alone(busy: Busy, touched: Touched) -> None:
    """
    It has to wait like those before it, and may leave again.
    """
    leave = busy.cache._core.abandon
    found = touched.of(lambda: leave(busy.ask(WAITING)))
    assert found["decisions"] == found["models"] == 0
    assert found["demands"] <= 1


def test_time_outs_touch_each_once(busy: Busy, touched: Touched) -> None:
    """
    However many come at once.
    """
    found = touched.of(lambda: busy.clock.tick(61))
    for waiter in busy.waiters:
        with pytest.raises(LeaseTimeout):
            waiter.future.result(10)
    assert found["decisions"] <= len(SIZES)
    assert found["demands"] <= WAITING


@pytest.mark.parametrize("policy", ["lru", "gap"])
def test_serving_one_touches_few_others(policy: str, touched: Touched) -> None:
    """
    A thousand are served one after the other in the room of the large model.
    """
    busy = Busy(alike=False, policy=policy)

    def serve() -> None:
        busy.large.release()
        for waiter in busy.waiters:
            waiter.future.result(60)[0].release()

    found = touched.of(serve)
    # For each: as many walks as it has releases, loads and unloads, past the oldest of
    # each size.
    assert found["decisions"] <= 5 * len(SIZES) * WAITING
    assert found["demands"] <= 5 * WAITING
    # Of the models in memory, a dozen, the policy is asked at most once for each walk.
    assert found["models"] <= 5 * 12 * WAITING
    busy.close()


def test_a_resident_crowd_is_not_looked_at(touched: Touched) -> None:
    """
    To evict the first of two thousand idle models takes a look at that one.
    """
    machine = FakeMachine({"cpu": "64GiB", CARD: "64GiB"})
    cache = ModelCache(
        loader=FakeLoader(machine, default_size=MIB, workspace_bytes=0),
        probe=machine,
        vram="2000MiB",
    )
    for number in range(2000):
        cache.preload(f"bench/idle-{number}", CARD)
    found = touched.of(lambda: cache.preload("bench/one-more", CARD))
    assert found["models"] <= 10
    assert cache.known_key("bench/idle-0", CARD) not in {
        info.key for info in cache.models()
    }
    cache.close()
