"""
Room for audio: who has it, and what becomes of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from real import SILENCE, micro

from whispercache import LeaseTimeout, ModelCache
from whispercache.engine.naming import ModelSpec
from whispercache.server.engine import Terms
from whispercache.server.local import LocalEngine
from whispercache.server.offers import Offers
from whispercache.server.room import Room
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.server.engine import Segments
    from whispercache.server.offers import Offer


def test_none_takes_the_room_for_which_an_older_one_waits() -> None:
    """
    A long recording has its turn when enough has ended, however many short ones come;
    one that is longer than all goes alone.
    """
    room = Room(10)
    places = [room.enter(each) for each in (4, 50, 1, 1)]
    assert [each.is_had.is_set() for each in places] == [True, False, False, False]
    short, long, *late = places
    short.leave()
    assert long.is_had.is_set()
    assert not any(each.is_had.is_set() for each in late)
    long.leave()
    assert all(each.is_had.is_set() for each in late)


def test_room_is_had_by_priority_and_not_taken_back() -> None:
    """
    Whoever has a model first has the room first, too.
    """
    room = Room(10)
    first = room.enter(6, -2)
    late, usual, soon = (room.enter(6, level) for level in (-1, 0, 1))
    assert first.is_had.is_set()
    for place in (first, soon, usual):
        assert not late.is_had.is_set()
        place.leave()
    assert late.is_had.is_set()
    assert not room.enter(6, 1).is_had.is_set()


def test_who_leaves_makes_room_whether_it_had_any_or_not() -> None:
    """
    And does it once.
    """
    room = Room(10)
    first, second, third = (room.enter(6) for _ in range(3))
    second.leave()
    first.leave()
    first.leave()
    assert third.is_had.is_set()
    assert not room.enter(6).is_had.is_set()


async def begin(
    engine: LocalEngine, offer: Offer, audio_s: float = 6, **terms: float
) -> Segments:
    """
    The segments of a call on some silence, which says that it is *audio_s* long.
    """
    asked = Terms(**{"timeout_s": 30, **terms}, audio_s=audio_s)  # type: ignore[arg-type]
    segments, _ = await engine.transcribe(offer, lambda: SILENCE, {}, asked)
    return segments


async def until(holds: Callable[[], bool]) -> None:
    """
    Lets the loop go on until something holds.
    """
    await asyncio.to_thread(wait_until, holds)


def test_who_waits_for_room_holds_no_model_meanwhile() -> None:
    """
    Another model is had in its place, and it is seen among those that wait.
    """
    specs = [ModelSpec(name, str(micro(f"micro {name}"))) for name in ("a", "b")]
    offers = Offers(specs, "cpu")
    a, b = offers

    async def main(cache: ModelCache) -> None:
        engine = LocalEngine(offers, cache, parallel=2, max_audio_s=10)
        async with engine.running():
            # Its call waits, with the audio in memory and a model that must stay.
            async with await begin(engine, a):
                late = asyncio.create_task(begin(engine, b))
                await until(lambda: bool(engine._elsewhere))
                (waiting,) = (await engine.snapshot()).waiting
                assert waiting.keys[0].model == "b"
                assert cache.stats().leases == 1
                # One without audio, which evicts the other.
                await engine.evict(b, 5)
                assert not late.done()
            async with await late:
                assert cache.stats().leases == 1
            assert not (await engine.snapshot()).waiting
        assert cache.stats().leases == 0

    with ModelCache() as cache:
        asyncio.run(asyncio.wait_for(main(cache), 60))


def test_room_is_waited_for_no_longer_than_a_request_may_wait() -> None:
    """
    The wait is told in whole, and leaves nothing behind.
    """
    offers = Offers([ModelSpec("m", str(micro("micro says hello")))], "cpu")
    (offer,) = offers

    async def main(cache: ModelCache) -> None:
        engine = LocalEngine(offers, cache, parallel=2, max_audio_s=10)
        async with engine.running():
            async with await begin(engine, offer):
                with pytest.raises(LeaseTimeout) as late:
                    await begin(engine, offer, timeout_s=0.2)
                assert late.value.waited_s >= 0.2
                assert not (await engine.snapshot()).waiting
                # The same for a client that leaves.
                task = asyncio.create_task(begin(engine, offer))
                await until(lambda: bool(engine._elsewhere))
                task.cancel()
                await asyncio.wait((task,))
                assert cache.stats().leases == 1
            async with await begin(engine, offer, audio_s=10):
                pass

    with ModelCache() as cache:
        asyncio.run(asyncio.wait_for(main(cache), 60))


def test_room_is_free_after_the_last_segment() -> None:
    """
    However long a client takes to read the answer.
    """
    offers = Offers([ModelSpec("m", str(micro("micro says hello")))], "cpu")
    (offer,) = offers

    async def main(cache: ModelCache) -> None:
        engine = LocalEngine(offers, cache, parallel=2, max_audio_s=10)
        async with engine.running(), await begin(engine, offer) as segments:
            assert [each async for each in segments]
            async with await begin(engine, offer, timeout_s=5):
                pass

    with ModelCache() as cache:
        asyncio.run(asyncio.wait_for(main(cache), 60))


def test_people_do_not_wait_for_the_audio_of_batches() -> None:
    """
    Nor batches for theirs, or they might wait for ever.
    """
    offers = Offers([ModelSpec("m", str(micro("micro says hello")))], "cpu")
    (offer,) = offers

    async def main(cache: ModelCache) -> None:
        engine = LocalEngine(offers, cache, parallel=4, max_audio_s=10)
        async with (
            engine.running(),
            await begin(engine, offer, audio_s=50, priority=-1.0),
            await begin(engine, offer, audio_s=50),
        ):
            assert cache.stats().leases == 2

    with ModelCache() as cache:
        asyncio.run(asyncio.wait_for(main(cache), 60))
