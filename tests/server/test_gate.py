"""
The gate: who is let in, and how the waits end of those that have not begun.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from whispercache import CacheClosed, TooManyWaiters
from whispercache.server.engine import nobody
from whispercache.server.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from whispercache.server.gate import Visit


def run(main: Coroutine[Any, Any, None]) -> None:
    """
    Runs *main* to its end, which has to come.
    """
    asyncio.run(asyncio.wait_for(main, 30))


def test_so_many_are_let_in_for_each_model_and_so_many_more_for_all() -> None:
    """
    A queue for one model keeps nobody away from another one.
    """
    gate = Gate(parallel=2, max_waiting=1)
    with ExitStack() as visits:
        for _ in range(2):
            visits.enter_context(gate.visit("a"))
        assert gate.waiting == 0
        third = visits.enter_context(ExitStack())
        third.enter_context(gate.visit("a"))
        assert gate.waiting == 1
        with pytest.raises(TooManyWaiters) as refused, gate.visit("a"):
            pass
        assert refused.value.waiting == 1
        for _ in range(2):
            visits.enter_context(gate.visit("b"))
        with pytest.raises(TooManyWaiters), gate.visit("b"):
            pass
        third.close()
        visits.enter_context(gate.visit("b"))
        assert gate.waiting == 1
    assert gate.waiting == 0


def test_without_a_queue_a_model_that_is_free_may_be_had() -> None:
    """
    Whatever ends a visit, the next one may come.
    """
    gate = Gate(parallel=1, max_waiting=0)

    def fail() -> None:
        with gate.visit("a"):
            with pytest.raises(TooManyWaiters), gate.visit("a"):
                pass
            raise RuntimeError("mine")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            fail()


def test_a_gate_that_is_closed_ends_the_waits_of_those_that_have_not_begun() -> None:
    """
    Be they at the model, or on the way there; what has begun goes on.
    """

    async def main() -> None:
        gate, go = Gate(9, 9), asyncio.Event()
        ended: list[str] = []

        async def call(visit: Visit, who: str) -> None:
            if who == "at work":
                visit.teller(nobody)("working")
            with visit.waiting():
                await go.wait()
            ended.append(who)

        with ExitStack() as visits:
            at_work, waits, decodes = (
                visits.enter_context(gate.visit("a")) for _ in range(3)
            )
            begun = asyncio.create_task(call(at_work, "at work"))
            waiting = asyncio.create_task(call(waits, "waits"))
            await asyncio.sleep(0)
            gate.close()
            with pytest.raises(CacheClosed):
                await waiting
            with pytest.raises(CacheClosed):
                await call(decodes, "decodes")
            with pytest.raises(CacheClosed), gate.visit("a"):
                pass
            go.set()
            await begun
        assert ended == ["at work"]

    run(main())


def test_phases_are_passed_on_and_the_last_one_noted() -> None:
    """
    To be loaded is no work yet.
    """
    told: list[str] = []
    with Gate(1, 1).visit("a") as visit:
        tell = visit.teller(told.append)
        for phase in ("waiting", "loading"):
            tell(phase)
            assert not visit.has_begun
        tell("working")
        assert visit.has_begun
    assert told == ["waiting", "loading", "working"]


def test_who_is_cancelled_while_it_waits_is_not_told_of_a_gate() -> None:
    """
    Its client has left.
    """

    async def main() -> None:
        gate = Gate(1, 1)

        async def call() -> None:
            with gate.visit("a") as visit, visit.waiting():
                await asyncio.Event().wait()

        task = asyncio.create_task(call())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with gate.visit("a"):
            assert gate.waiting == 0

    run(main())
