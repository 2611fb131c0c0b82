"""
The gate: whose turn it is with a model, and how a wait for one ends.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from whispercache import CacheClosed, LeaseTimeout, TooManyWaiters
from whispercache.planning.priority import LEVEL_S
from whispercache.server import gate as gate_module
from whispercache.server.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Visitors:
    """
    Tasks at a gate, and the order in which they had their turns.

    Args:
        gate: The gate.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.had_turns: list[str] = []
        self.go: dict[str, asyncio.Event] = {}
        self.between: dict[str, asyncio.Event] = {}

    def come(
        self, who: str, model: str, audio_s: float = 0.0, level: float = 0.0
    ) -> asyncio.Task[None]:
        """
        Returns a task that waits for a turn, and holds it until `go` is set; between
        two segments it is asked for it, if `between` is set.
        """
        self.go[who] = asyncio.Event()
        self.between[who] = asyncio.Event()

        async def visit() -> None:
            async with self.gate.turn(model, 30, audio_s, level) as turn:
                self.had_turns.append(who)
                if level < 0:
                    await self.between[who].wait()
                    await turn.give_way()
                    self.had_turns.append(f"{who} again")
                await self.go[who].wait()

        return asyncio.create_task(visit())

    def waiting(self) -> list[str]:
        """
        Returns the models of those that wait.
        """
        return [each.keys[0].model for each in self.gate.waiting()]


async def settle() -> None:
    """
    Lets all tasks go on as far as they can.
    """
    for _ in range(10):
        await asyncio.sleep(0)


def run(main: Coroutine[Any, Any, None]) -> None:
    """
    Runs *main* to its end, which has to come.
    """
    asyncio.run(asyncio.wait_for(main, 30))


def test_turns_go_by_arrival_and_other_models_pass() -> None:
    """
    Each model has so many at a time; what waits for one keeps no other away.
    """

    async def main() -> None:
        all_ = Visitors(Gate(1, 9, 100))
        tasks = [all_.come(who, who[0]) for who in ("a1", "a2", "a3", "b1")]
        await settle()
        assert all_.had_turns == ["a1", "b1"]
        assert all_.waiting() == ["a", "a"]
        for who in ("a1", "a2", "a3", "b1"):
            all_.go[who].set()
            await settle()
        await asyncio.gather(*tasks)
        assert all_.had_turns == ["a1", "b1", "a2", "a3"]

    run(main())


def test_nothing_takes_the_audio_for_which_an_older_one_waits() -> None:
    """
    A long recording has its turn when enough has ended, however many short ones come;
    one that is longer than the limit goes alone.
    """

    async def main() -> None:
        all_ = Visitors(Gate(9, 9, 10))
        tasks = [
            all_.come("short", "a", 4),
            all_.come("long", "a", 50),
            all_.come("late", "b", 1),
        ]
        await settle()
        assert all_.had_turns == ["short"]
        for who in ("short", "long"):
            all_.go[who].set()
            await settle()
        all_.go["late"].set()
        await asyncio.gather(*tasks)
        assert all_.had_turns == ["short", "long", "late"]

    run(main())


def test_whatever_ends_a_wait_gives_its_place_to_the_next() -> None:
    """
    A cancelled task, also in the moment in which it got its turn.
    """

    async def main() -> None:
        all_ = Visitors(Gate(1, 9, 100))
        first, second, third = (all_.come(who, "a") for who in ("1", "2", "3"))
        await settle()
        all_.go["1"].set()
        await first
        second.cancel()  # it has its turn, and does not know yet
        all_.go["3"].set()
        await third
        assert second.cancelled()
        assert not all_.waiting()
        async with all_.gate.turn("a", 0):
            pass

    run(main())


def test_a_wait_has_an_end() -> None:
    """
    By time, with the place in the queue; by the number of others; and with the gate.
    """

    async def main() -> None:
        gate = Gate(1, 1, 100)
        async with AsyncExitStack() as held:
            await held.enter_async_context(gate.turn("a", 1))
            with pytest.raises(LeaseTimeout) as late:
                await held.enter_async_context(gate.turn("a", 0))
            assert late.value.position == 1
            waiting = asyncio.create_task(
                held.enter_async_context(gate.turn("a", 30)),
            )
            await settle()
            with pytest.raises(TooManyWaiters):
                gate.check("a")
            with pytest.raises(TooManyWaiters):
                await held.enter_async_context(gate.turn("a", 30))
            gate.check("b")  # is free
            gate.close()
            with pytest.raises(CacheClosed):
                await waiting
            with pytest.raises(CacheClosed):
                gate.check("b")

    run(main())


def test_the_urgent_pass_batches_and_are_given_the_turn_of_one_between_segments() -> (
    None
):
    """
    A batch that gives way goes on before those that have not begun, and its audio,
    which is in memory, is counted once.
    """

    async def main() -> None:
        all_ = Visitors(Gate(1, 9, 10))
        tasks = [all_.come(who, "a", 8, -1.0) for who in ("film", "other film")]
        await settle()
        tasks.append(all_.come("sentence", "a", 1))
        await settle()
        assert all_.had_turns == ["film"]
        assert [each.priority for each in all_.gate.waiting()] == [0.0, -1.0]
        all_.between["film"].set()
        await settle()
        assert all_.had_turns == ["film", "sentence"]
        assert [each.priority for each in all_.gate.waiting()] == [-1.0, -1.0]
        all_.go["sentence"].set()
        await settle()
        assert all_.had_turns == ["film", "sentence", "film again"]
        for who in ("other film", "film"):
            all_.between[who].set()
            all_.go[who].set()
        await asyncio.gather(*tasks)
        assert all_.had_turns[3:] == ["other film", "other film again"]
        assert not all_.gate._audio_s

    run(main())


def test_a_batch_goes_before_the_urgent_once_it_has_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    And then it keeps its turn for a while.
    """
    now_s = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0])
    monkeypatch.setattr(gate_module, "time", clock)

    async def main() -> None:
        all_ = Visitors(Gate(1, 9, 100))
        tasks = [all_.come("first", "a"), all_.come("film", "a", level=-1.0)]
        await settle()
        now_s[0] += LEVEL_S + 1
        tasks.append(all_.come("late", "a"))
        await settle()
        all_.go["first"].set()
        all_.between["film"].set()
        await settle()
        assert all_.had_turns == ["first", "film", "film again"]
        for go in all_.go.values():
            go.set()
        await asyncio.gather(*tasks)
        assert all_.had_turns[-1] == "late"

    run(main())


def test_a_batch_that_gave_way_goes_on_when_the_server_shuts_down() -> None:
    """
    It has begun, as others that are at work; the urgent one that waits is refused.
    """

    async def main() -> None:
        all_ = Visitors(Gate(1, 9, 100))
        film = all_.come("film", "a", level=-1.0)
        await settle()
        first, second = all_.come("first", "a"), all_.come("second", "a")
        await settle()
        all_.between["film"].set()
        await settle()
        assert all_.had_turns == ["film", "first"]
        all_.gate.close()
        all_.go["film"].set()
        await film
        assert all_.had_turns == ["film", "first", "film again"]
        with pytest.raises(CacheClosed):
            await second
        all_.go["first"].set()
        await first

    run(main())


def test_a_batch_that_gave_way_can_be_cancelled() -> None:
    """
    Its audio is no longer counted, and its place is free.
    """

    async def main() -> None:
        all_ = Visitors(Gate(1, 9, 10))
        film = all_.come("film", "a", 9, -1.0)
        await settle()
        sentence = all_.come("sentence", "a", 1)
        all_.between["film"].set()
        await settle()
        film.cancel()
        await settle()
        assert film.cancelled()
        assert not all_.waiting()
        all_.go["sentence"].set()
        await sentence
        assert not all_.gate._audio_s

    run(main())
