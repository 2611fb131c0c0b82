"""
The engine of a server, as its routes use it.
"""

from __future__ import annotations

import asyncio
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from caches import cache_of, opened
from real import SILENCE, micro

from whispercache.engine.calls.languages import Knowledge
from whispercache.engine.naming import ModelSpec
from whispercache.server.asked import Asked
from whispercache.server.engine import Terms
from whispercache.server.errors import ApiError
from whispercache.server.local import LocalEngine
from whispercache.server.offers import Offers

if TYPE_CHECKING:
    from whispercache import ModelCache, ModelKey
    from whispercache.server.offers import Offer

cache = cache_of()


def engine_of(cache: ModelCache) -> tuple[LocalEngine, Offer]:
    """
    An engine, and what it offers.
    """
    offers = Offers([ModelSpec("m", str(micro("micro says hello")))], "cpu")
    return LocalEngine(offers, cache, threads=1), next(iter(offers))


def test_a_model_is_held_as_long_as_its_segments_are(cache: ModelCache) -> None:
    """
    And each phase of the call is told as it begins.
    """
    engine, offer = engine_of(cache)
    told: list[tuple[str, int]] = []

    async def main() -> None:
        async with engine.running():
            segments, info = await engine.transcribe(
                offer,
                lambda: SILENCE,
                {},
                Terms(5),
                lambda phase: told.append((phase, cache.stats().leases)),
            )
            assert info.duration > 0
            async with segments:
                assert cache.stats().leases == 1
                assert (await anext(aiter(segments))).text == " micro says hello"
            assert cache.stats().leases == 0

    asyncio.run(main())
    assert told[0] == ("waiting", 0)
    assert ("loading", 0) in told
    assert told[-1] == ("working", 1)


def test_a_fallback_is_loaded_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    In whatever type it comes.
    """
    with opened(fallback=["int8"]) as cache:
        engine, offer = engine_of(cache)
        kind: Any = type(cache.loader)
        load, told = kind.load, []

        def failing(loader: Any, key: ModelKey, *args: Any) -> Any:
            if key.compute_type == "float32":
                raise RuntimeError("of this type alone")
            told.append("load")
            return load(loader, key, *args)

        async def main() -> None:
            async with engine.running():
                await engine.load(offer, Terms(5), told.append)

        monkeypatch.setattr(kind, "load", failing)
        asyncio.run(main())
        assert cache.stats().fallbacks == 1
    # Of the type that was asked for, then of the other.
    assert told == ["waiting", "loading", "waiting", "loading", "load", "waiting"]


@pytest.mark.parametrize("fault", ["check", "samples"])
def test_what_fails_before_the_call_holds_nothing(
    cache: ModelCache, fault: str
) -> None:
    """
    A model that is refused is not even loaded.
    """
    engine, offer = engine_of(cache)

    def fail(*_: object) -> None:
        raise ValueError(fault)

    async def main() -> None:
        is_check = fault == "check"
        samples = (lambda: SILENCE) if is_check else fail
        terms = Terms(5, check=fail if is_check else None)
        with pytest.raises(ValueError, match=fault):
            await engine.transcribe(offer, samples, {}, terms)  # type: ignore[arg-type]

    asyncio.run(main())
    assert (cache.stats().loads, cache.stats().leases) == (fault == "samples", 0)


def test_what_an_engine_elsewhere_refuses_is_told_the_same() -> None:
    """
    A check, and what it raises, may have come from another process.
    """
    asked = Asked(language="de")
    known = Knowledge(51864, is_multilingual=False, languages=("en",))
    check = pickle.loads(pickle.dumps(Terms(check=partial(asked.check_model, "m"))))
    assert check.check is not None
    with pytest.raises(ApiError) as refused:
        check.check(known)
    again = pickle.loads(pickle.dumps(refused.value))
    assert again.response().body == refused.value.response().body
    assert again.status == 400


def test_a_model_is_loaded_pinned_and_unloaded(cache: ModelCache) -> None:
    """
    By the names that clients use.
    """
    engine, offer = engine_of(cache)

    async def main() -> None:
        async with engine.running():
            assert not await engine.unpin(offer)
            await engine.pin(offer, Terms())
            (seen,) = (await engine.snapshot()).models
            assert (seen.key.model, seen.pinned) == ("m", True)
            names = {metric.name for metric in await engine.metrics()}
            assert "whispercache_loads" in names
            assert await engine.unpin(offer)
            assert await engine.evict(offer, 5)
            assert not await engine.evict(offer, 5)
            await engine.load(offer, Terms(keep_alive="1h"))
            (seen,) = (await engine.snapshot()).models
            assert (seen.loads, seen.leases, seen.pinned) == (2, 0, False)
            assert seen.expires_in_s is not None

    asyncio.run(main())
