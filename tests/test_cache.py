"""
The words of a cache besides those of leases: files, keys, languages, and its end.
"""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from whispercache import CacheClosed, LoadFailed, ModelKey

if TYPE_CHECKING:
    from conftest import MakeCache
    from driver import Driver

    from whispercache.testing import FakeLoader, FakeMachine


@pytest.mark.parametrize(
    ("parameter", "value", "said"),
    [
        # Each was taken, and limited nothing, or turned on what it said no to.
        ("vram", {"cuda": "1GiB"}, "vram is for cards such as 'cuda:0', not 'cuda'"),
        ("vram", {"gpu0": "1GiB"}, "vram is for cards such as 'cuda:0', not 'gpu0'"),
        ("vram", {0: "1GiB"}, "vram is for cards such as 'cuda:0', not 0"),
        ("vram", ["1GiB"], "vram must be a number or text, not list"),
        ("coordinate", "off", "coordinate must be True or False, not 'off'"),
    ],
)
def test_parameters_that_would_do_nothing_are_refused(
    make_cache: MakeCache, parameter: str, value: Any, said: str
) -> None:
    """
    By their names.
    """
    with pytest.raises((TypeError, ValueError), match=f"^{said}$"):
        make_cache(**{parameter: value})


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_cache_is_not_copied(make_cache: MakeCache, take: Any) -> None:
    """
    Its locks would say so, in words that name no cache; a shallow copy would share it.
    """
    with pytest.raises(TypeError, match="ModelCache cannot be pickled or copied"):
        take(make_cache())


def test_a_download_loads_nothing(
    make_cache: MakeCache, driver: Driver, loader: FakeLoader
) -> None:
    """
    It is made once, and the first lease needs no other.
    """
    loader.missing.add("tiny")
    cache = make_cache()
    driver.call(cache, "download", "tiny", "cpu")
    driver.call(cache, "download", "tiny", "cpu")
    assert loader.downloads["tiny"] == 1
    assert not cache.models()
    driver.call(cache, "preload", "tiny", "cpu")
    assert loader.downloads["tiny"] == 1


def test_a_download_that_fails_is_told(
    make_cache: MakeCache,
    driver: Driver,
    loader: FakeLoader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    With the error that a lease would raise.
    """

    def fail(*_args: object, **_options: object) -> None:
        raise LoadFailed("tiny", "no network")

    cache = make_cache()
    monkeypatch.setattr(type(loader), "locate", fail)
    with pytest.raises(LoadFailed, match="no network"):
        driver.call(cache, "download", "tiny", "cpu")


def test_a_key_is_known_once_it_was_asked_for(make_cache: MakeCache) -> None:
    """
    By the very parameters of that request.
    """
    cache = make_cache()
    assert cache.known_key("large", "cpu", "int8") is None
    cache.get_model("large", "cpu", "int8")
    assert cache.known_key("large", "cpu", "int8") == ModelKey(
        "large-v3", "cpu", "int8_float32"
    )
    assert cache.known_key("large", "cpu") is None


def test_languages_are_known_without_a_download(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Those of a known size by its name; of any other repository not before it is here.
    """
    cache = make_cache()
    known = driver.call(cache, "knowledge", "tiny.en")
    assert known.languages == ("en",)
    assert "yue" in cache.knowledge("large-v3").languages  # type: ignore[union-attr]


def test_a_lease_can_pin_its_model(make_cache: MakeCache, driver: Driver) -> None:
    """
    It stays when the lease has ended; a lease that has ended pins nothing.
    """
    cache = make_cache(keep_alive=0)
    lease = driver.call(cache, "lease", "tiny", "cpu")
    lease.pin()
    lease.release()
    (model,) = cache.models()
    assert model.pinned
    with pytest.raises(RuntimeError, match="was released"):
        lease.pin()
    assert cache.unpin("tiny") == 1


def test_a_cache_says_that_it_is_closed(make_cache: MakeCache, driver: Driver) -> None:
    """
    From the first moment of its closing on.
    """
    cache = make_cache()
    assert not cache.is_closed
    driver.call(cache, "close")
    assert cache.is_closed
    with pytest.raises(CacheClosed):
        cache.get_model("tiny", "cpu")


def test_a_cache_tells_what_it_was_given(
    make_cache: MakeCache, loader: FakeLoader, machine: FakeMachine
) -> None:
    """
    Its loader and its probe, for code that needs the same ones.
    """
    cache = make_cache()
    assert cache.loader is loader
    assert cache.probe is machine
