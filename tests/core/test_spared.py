"""
A model whose result is in use is the last to leave, for a short while.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from whispercache.core.entries import SPARED_S
from whispercache.testing import settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeCache
    from driver import Driver

    from whispercache import ModelCache
    from whispercache.testing import FakeClock


@pytest.fixture
def cache(make_cache: MakeCache) -> ModelCache:
    """
    A cache with room for one model.
    """
    return make_cache(max_models=1)


def spared(cache: ModelCache, name: str = "tiny") -> Callable[[], None]:
    """
    Uses a model of which a result stays in use; returns what ends that.
    """
    lease = cache.lease(name, "cpu")
    end = lease.spare()
    lease.release()
    return end


def there(cache: ModelCache) -> list[str]:
    """
    The models in memory.
    """
    return [info.key.model for info in cache.models()]


def test_others_wait_until_the_time_is_over(
    cache: ModelCache, driver: Driver, clock: FakeClock
) -> None:
    """
    Then it leaves as any other; hits on it are granted meanwhile.
    """
    end = spared(cache)
    other = driver.waiting(cache, "base", "cpu")
    settle(cache)
    assert not other.done()
    assert there(cache) == ["tiny"]
    # The time begins anew with each use.
    clock.tick(SPARED_S * 0.9)
    cache.lease("tiny", "cpu").release()
    clock.tick(SPARED_S * 0.9)
    settle(cache)
    assert not other.done()
    clock.tick(SPARED_S * 0.2)
    other.result(30).release()
    assert there(cache) == ["base"]
    end()
    settle(cache)
    assert not cache._core.state.spared


def test_others_come_as_soon_as_the_result_is_gone(
    cache: ModelCache, driver: Driver
) -> None:
    """
    The last of several.
    """
    ends = [spared(cache), spared(cache)]
    other = driver.waiting(cache, "base", "cpu")
    ends[0]()
    settle(cache)
    assert not other.done()
    ends[1]()
    other.result(30).release()
    assert there(cache) == ["base"]
    # Once more does no harm.
    ends[1]()
    settle(cache)
    end = spared(cache)
    assert cache._core.state.spared
    end()
    wait_until(lambda: not cache._core.state.spared)


def test_its_own_user_waits_for_nothing(cache: ModelCache) -> None:
    """
    Who goes on to another model, gave this one up.
    """
    end = spared(cache)
    cache.lease("base", "cpu").release()
    assert there(cache) == ["base"]
    end()
    settle(cache)
    end = spared(cache)
    # The same model is no other one.
    cache.lease("base", "cpu").release()
    cache.lease("tiny", "cpu").release()
    cache.evict()
    end()
    settle(cache)


def test_other_models_leave_before_it(make_cache: MakeCache, driver: Driver) -> None:
    """
    Whichever was used last.
    """
    cache = make_cache(max_models=2)
    end = spared(cache, "tiny")
    cache.lease("base", "cpu").release()
    driver.lease(cache, "small", "cpu").release()
    assert sorted(there(cache)) == ["small", "tiny"]
    end()


@pytest.mark.parametrize("way", ["evict", "close"])
def test_it_leaves_at_once_by_name(cache: ModelCache, way: str) -> None:
    """
    It is a preference among those that others could have evicted.
    """
    end = spared(cache)
    cache.close() if way == "close" else cache.evict("tiny")
    assert there(cache) == []
    end()


def test_who_is_impatient_has_it_drained(
    make_cache: MakeCache, driver: Driver, clock: FakeClock
) -> None:
    """
    So that a thread which goes on and on does not keep others out.
    """
    cache = make_cache(max_models=1, patience_s=2 * SPARED_S)
    ends = [spared(cache)]
    other = driver.waiting(cache, "base", "cpu")
    for _ in range(3):
        clock.tick(SPARED_S * 0.9)
        own = driver.start(cache, "lease", "tiny", "cpu")
        wait_until(lambda own=own: own.done() or cache.stats().waiting > 1)  # type: ignore[misc]
        if not own.done():
            break
        own.result().release()
    assert not own.done()
    clock.tick(SPARED_S)
    other.result(30).release()
    own.result(30).release()
    for end in ends:
        end()
