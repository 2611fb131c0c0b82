"""
One method, one signature: for threads, for tasks, and for the cache of the process.
"""

from __future__ import annotations

import inspect
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest

import whispercache
from whispercache import AsyncCachedModel, AsyncModelCache, CachedModel, ModelCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeCache
    from driver import Driver

KEYWORDS = ["tier", "timeout_s", "keep_alive", "fallback", "workload"]
"""
The order of keywords in every signature.
"""


def public(kind: type) -> set[str]:
    """
    The public names of a class.
    """
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(call: Callable[..., object]) -> list[tuple[object, ...]]:
    """
    Name, kind, default and annotation of each parameter, in order; without ``self``.
    """
    found = inspect.signature(call).parameters.values()
    return [
        (each.name, each.kind, each.default, each.annotation)
        for each in found
        if each.name != "self"
    ]


METHODS = sorted(
    name for name in public(ModelCache) if callable(getattr(ModelCache, name))
)


def test_threads_and_tasks_have_the_same_methods() -> None:
    """
    A task's cache also has the one that threads use.
    """
    assert public(AsyncModelCache) - public(ModelCache) == {"cache"}
    assert public(ModelCache) <= public(AsyncModelCache)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_same_from_threads_and_tasks(name: str) -> None:
    """
    Names, order, defaults and types.
    """
    blocking, awaited = getattr(ModelCache, name), getattr(AsyncModelCache, name)
    assert parameters(blocking) == parameters(awaited)


@pytest.mark.parametrize("name", ["detect_language", "lease", "transcribe"])
def test_a_model_takes_the_same_from_threads_and_tasks(name: str) -> None:
    """
    Likewise.
    """
    assert parameters(getattr(CachedModel, name)) == parameters(
        getattr(AsyncCachedModel, name)
    )


def test_get_model_takes_what_the_method_takes() -> None:
    """
    Each keyword is spelled, so that editors show it.
    """
    assert parameters(whispercache.get_model) == parameters(ModelCache.get_model)
    names = [name for name, *_ in parameters(whispercache.get_model)]
    assert {"timeout_s", "keep_alive", "fallback"} < set(names)


@pytest.mark.parametrize("name", METHODS)
def test_keywords_come_in_one_order(name: str) -> None:
    """
    In every method that takes some of them.
    """
    names = [parameter for parameter, *_ in parameters(getattr(ModelCache, name))]
    known = [each for each in names if each in KEYWORDS]
    assert known == [each for each in KEYWORDS if each in names]


@pytest.mark.parametrize(
    "method", ["get_model", "lease", "lease_many", "preload", "pin", "evict", "close"]
)
def test_a_timeout_is_a_duration(
    make_cache: MakeCache, driver: Driver, method: str
) -> None:
    """
    Text will do, wherever a time limit is taken; nonsense is told as for keep_alive.
    """
    cache = make_cache()
    given = {"close": (), "lease_many": (["tiny"], "cpu")}.get(method, ("tiny", "cpu"))
    for nonsense in ("soon", "", "5 s", "-1", float("nan"), True, b"5s"):
        with pytest.raises((TypeError, ValueError), match="timeout_s must be"):
            driver.call(cache, method, *given, timeout_s=nonsense)
    assert not cache.is_closed
    for timeout_s in (
        "5s",
        5,
        1.5,
        Fraction(3, 2),
        np.float32(1.5),
        "1m",
        float("inf"),
        None,
    ):
        result = driver.call(cache, method, *given, timeout_s=timeout_s)
        if method in ("lease", "lease_many"):
            result.release()


def test_both_kinds_of_time_are_refused_in_the_same_words(
    make_cache: MakeCache,
) -> None:
    """
    But for the name of the parameter.
    """
    cache = make_cache()
    errors = []
    for name in ("timeout_s", "keep_alive"):
        with pytest.raises(ValueError, match=name) as caught:
            cache.lease("tiny", "cpu", **{name: "soon"})  # type: ignore[arg-type]
        errors.append(str(caught.value).replace(name, "it"))
    assert errors[0] == errors[1]
