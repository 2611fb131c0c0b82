"""
What only tasks can do: be cancelled, share a loop, and have several loops.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from whispercache import AsyncModelCache, LeaseTimeout, LoadFailed
from whispercache.planning import planner as admission
from whispercache.testing import check, settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    import numpy as np
    from conftest import MakeCache
    from numpy.typing import NDArray

    from whispercache import Lease, ModelCache
    from whispercache.testing import FakeClock, FakeLoader

AUDIO = cast("NDArray[np.float32]", "audio")


async def until(condition: Callable[[], object]) -> None:
    """
    Lets other tasks run until *condition* holds.
    """
    await asyncio.get_running_loop().run_in_executor(None, wait_until, condition)


async def waiting(
    cache: AsyncModelCache, *args: Any, **options: Any
) -> asyncio.Task[Lease]:
    """
    A task that asks for a lease, and is in the queue.
    """
    before = cache.stats().waiting

    async def ask() -> Lease:
        return await cache.lease(*args, **options)

    task = asyncio.create_task(ask())
    await until(lambda: cache.stats().waiting > before or task.done())
    return task


def run(main: Coroutine[Any, Any, None]) -> None:
    """
    Run a test's coroutine; a hang is a failure.
    """
    asyncio.run(asyncio.wait_for(main, 20))


def test_a_block_holds_the_model(make_cache: MakeCache) -> None:
    """
    The value of ``async with`` is the real model.
    """
    cache = AsyncModelCache(make_cache())

    async def main() -> None:
        async with cache.lease("base", "cuda:0") as whisper:
            assert whisper.detect_language()[0] == "en"
            assert cache.stats().leases == 1
        assert cache.stats().leases == 0

    run(main())


def test_a_block_that_never_began_ends_quietly(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Its error is that of the lease.
    """
    cache = AsyncModelCache(make_cache())
    loader.fail_loads["base"] = [RuntimeError("broken")]

    async def main() -> None:
        lease = cache.lease("base", "cuda:0")
        with pytest.raises(LoadFailed):
            await lease.__aenter__()
        await lease.__aexit__(None, None, None)

    run(main())


def test_a_task_cancelled_in_the_queue_leaves_it(
    make_cache: MakeCache, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Those behind it move up; its load is not wasted.
    """
    monkeypatch.setattr(admission, "MAX_OVERTAKES", 0)
    cache = AsyncModelCache(make_cache(vram="4GiB"))

    async def main() -> None:
        held = await cache.lease("small", "cuda:0")
        stuck = await waiting(cache, "medium", "cuda:0")
        behind = await waiting(cache, "base", "cuda:0")
        assert not behind.done()
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        (await behind).release()
        held.release()
        assert cache.stats().waiting == 0

    run(main())
    assert loader.loads == {"small": 1, "base": 1}


def test_a_task_cancelled_after_its_grant_gives_it_back(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    The lease was granted, and the task never saw it.
    """
    inner = make_cache()
    cache = AsyncModelCache(inner)

    async def main() -> None:
        with loader.holding_loads("base") as gate:
            task = await waiting(cache, "base", "cuda:0")
            gate.open()
            # The loop stands still meanwhile, so that the task cannot see the grant.
            wait_until(lambda: inner.stats().leases == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cache.stats().leases == 0

    run(main())


def test_a_task_cancelled_when_its_wait_is_over_gives_the_lease_back(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Between the end of the wait and the task's next step.
    """
    cache = AsyncModelCache(make_cache())

    async def main() -> None:
        with loader.holding_loads("base") as gate:
            task = await waiting(cache, "base", "cuda:0")
            gate.open()
            wait_until(lambda: cache.stats().leases == 1)
        await asyncio.sleep(0)
        assert task._fut_waiter.done()  # type: ignore[attr-defined]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cache.stats().leases == 0

    run(main())


def test_the_loop_turns_while_a_load_is_held(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    Loads, unloads, and waits for them take nothing from other tasks.
    """
    cache = AsyncModelCache(make_cache())

    async def turns() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    async def main() -> None:
        with loader.holding_loads("base") as gate:
            task = await waiting(cache, "base", "cuda:0")
            await turns()
            assert not task.done()
            gate.open()
        (await task).release()
        with loader.holding_unloads("base") as gate:
            evicting = asyncio.create_task(cache.evict("base"))
            await until(gate.reached.is_set)
            await turns()
            assert not evicting.done()
            gate.open()
        assert await evicting == 1

    run(main())


def test_two_loops_and_a_thread_share_one_cache(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    It was made before any loop ran, and one load serves all.
    """
    inner = make_cache()
    cache = AsyncModelCache(inner)
    leases: list[Lease] = []

    async def ask() -> None:
        leases.append(await cache.lease("base", "cuda:0"))

    def ask_as_thread() -> None:
        leases.append(inner.lease("base", "cuda:0"))

    with loader.holding_loads("base") as gate:
        threads = [
            threading.Thread(target=lambda: asyncio.run(ask())),
            threading.Thread(target=lambda: asyncio.run(ask())),
            threading.Thread(target=ask_as_thread),
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: inner.stats().waiting == 3)
        gate.open()
        for thread in threads:
            thread.join(10)
    assert loader.loads == {"base": 1}
    assert inner.stats().leases == 3
    for lease in leases:
        lease.release()


def test_a_loop_that_ended_with_a_waiting_task_strands_nothing(
    make_cache: MakeCache, loader: FakeLoader
) -> None:
    """
    The grant to a task that will never run is released when the task is collected.
    """
    inner = make_cache()

    def strand() -> None:
        loop = asyncio.new_event_loop()
        asking = AsyncModelCache(inner).lease("base", "cuda:0")
        task = loop.create_task(asking._acquire)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        while not inner.stats().waiting:
            loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    with loader.holding_loads("base"):
        strand()
        gc.collect()
        assert inner.stats().waiting == 1
    settle(inner)
    gc.collect()
    settle(inner)
    assert inner.stats().leases == 0
    assert inner.stats().loads == 1


def test_eviction_cancelled_is_eviction_taken_back(make_cache: MakeCache) -> None:
    """
    The model stays, as after a timeout.
    """
    cache = AsyncModelCache(make_cache())

    async def main() -> None:
        held = await cache.lease("base", "cuda:0")
        evicting = asyncio.create_task(cache.evict("base"))
        await asyncio.sleep(0)
        asked = await waiting(cache, "base", "cuda:0")
        evicting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await evicting
        (await asked).release()
        held.release()
        assert [info.state for info in cache.models()] == ["resident"]
        assert await cache.evict("medium") == 0

    run(main())


def test_closing_on_exit_raises_only_where_nothing_else_did(
    make_cache: MakeCache, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The error that ends the block is the one that its reader wants.
    """

    async def main(inner: ModelCache, error: Exception | None) -> None:
        cache = AsyncModelCache(inner)
        lease = None

        async def tick() -> None:
            await until(lambda: inner._core.is_closed and clock._calls)
            clock.tick(10)

        ticking = asyncio.create_task(tick())
        try:
            async with cache:
                lease = await cache.lease("base", "cuda:0")
                if error:
                    raise error
        finally:
            await ticking
            assert lease is not None
            lease.release()
            # Its end makes the clock forget all calls, those of a next cache too.
            settle(inner)

    with pytest.raises(LeaseTimeout):
        run(main(make_cache(), None))
    with pytest.raises(KeyError):
        run(main(make_cache(), KeyError("first")))
    assert "closing: base/cuda:0/float16 was not unloaded" in caplog.text


def test_the_same_words_do_the_same(make_cache: MakeCache) -> None:
    """
    Methods that do not wait are not awaited.
    """
    inner = make_cache()
    cache = AsyncModelCache(inner)
    heard: list[object] = []
    cancel = cache.subscribe(heard.append)

    async def main() -> None:
        await cache.preload("tiny", "cuda:0")
        await cache.pin("base", "cuda:0")
        assert (await cache.explain("base", "cuda:0")).outcome == "hit"
        cache.resize(max_models=3)
        assert cache.unpin("base") == 1
        assert cache.devices() == inner.devices()
        assert cache.models() == inner.models()
        assert cache.stats() == inner.stats()
        assert cache.waiting() == inner.waiting() == ()
        assert cache.cache is inner
        await cache.close()

    run(main())
    assert len(heard) == 8
    cancel()
    assert repr(cache) == "<AsyncModelCache closed | no models | 0 waiting>"
    with pytest.raises(TypeError, match="not both"):
        AsyncModelCache(inner, max_models=1)
    AsyncModelCache(max_models=1).cache.close()


# Models -------------------------------------------------------------------------------


async def open_segments(cache: AsyncModelCache) -> Any:
    """
    A transcription that has just begun.
    """
    model = await cache.get_model("base", "cuda:0", keep_alive=0)
    segments, info = await model.transcribe(AUDIO, language="de")
    assert info == {"language": "de", "audio": AUDIO}
    return segments


def test_segments_hold_their_model_until_they_are_exhausted(
    make_cache: MakeCache,
) -> None:
    """
    Then it is evicted, as its keep-alive says.
    """
    inner = make_cache()

    async def main() -> None:
        segments = await open_segments(AsyncModelCache(inner))
        assert inner.stats().leases == 1
        texts = [segment.text async for segment in segments]
        assert texts == ["base/cuda:0/float16"] * 3
        assert inner.stats().leases == 0
        with pytest.raises(StopAsyncIteration):
            await segments.__anext__()

    run(main())
    settle(inner)
    assert not inner.models()


def test_segments_may_be_closed_early(make_cache: MakeCache) -> None:
    """
    By hand, or by a block.
    """
    inner = make_cache()

    async def main() -> None:
        async with await open_segments(AsyncModelCache(inner)) as segments:
            await segments.__anext__()
            assert inner.stats().leases == 1
        assert inner.stats().leases == 0
        with pytest.raises(StopAsyncIteration):
            await segments.__anext__()

    run(main())


class Stepwise:
    """
    An audio whose segments come one by one, each when it is let.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()


def step_by_step(
    loader: FakeLoader, monkeypatch: pytest.MonkeyPatch, steps: Stepwise
) -> None:
    """
    Makes the fake's segments wait for *steps*.
    """
    from whispercache.testing import FakeWhisper

    speak = FakeWhisper._speak

    def slowly(self: FakeWhisper) -> Any:
        for segment in speak(self):
            steps.reached.set()
            assert steps.go.wait(10)
            if steps.go.is_set() and segment.start == 1 and loader.missing:
                raise RuntimeError("the card fell off")
            yield segment

    monkeypatch.setattr(FakeWhisper, "_speak", slowly)


def test_a_cancelled_step_loses_nothing(
    make_cache: MakeCache, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The next step returns the item of the one in flight.
    """
    steps = Stepwise()
    step_by_step(loader, monkeypatch, steps)
    inner = make_cache()

    async def main() -> None:
        segments = await open_segments(AsyncModelCache(inner))
        task = asyncio.create_task(segments.__anext__())
        await until(steps.reached.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert inner.stats().leases == 1
        steps.go.set()
        starts = [segment.start async for segment in segments]
        assert starts == [0, 1, 2]

    run(main())


def test_a_step_that_fails_ends_the_segments(
    make_cache: MakeCache, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The error is told, and told again; the model is let go.
    """
    steps = Stepwise()
    steps.go.set()
    step_by_step(loader, monkeypatch, steps)
    inner = make_cache()

    async def main() -> None:
        segments = await open_segments(AsyncModelCache(inner))
        loader.missing.add("nothing")
        assert (await segments.__anext__()).start == 0
        for told in ("the card fell off", "ended early: RuntimeError: the card"):
            with pytest.raises(RuntimeError, match=told):
                await segments.__anext__()
        assert inner.stats().leases == 0

    run(main())


def held_call(monkeypatch: pytest.MonkeyPatch, name: str) -> Stepwise:
    """
    Makes a method of the fake wait for a signal.
    """
    from whispercache.testing import FakeWhisper

    steps = Stepwise()
    method = getattr(FakeWhisper, name)

    def slowly(self: FakeWhisper, *args: object, **options: object) -> Any:
        steps.reached.set()
        assert steps.go.wait(10)
        self._check()
        return method(self, *args, **options)

    monkeypatch.setattr(FakeWhisper, name, slowly)
    return steps


@pytest.mark.parametrize("word", ["transcribe", "detect_language"])
def test_a_cancelled_call_holds_its_model_until_its_thread_ended(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """
    The model is still at work, although its task is gone.
    """
    steps = held_call(monkeypatch, word)
    inner = make_cache()
    cache = AsyncModelCache(inner)

    async def main() -> None:
        model = await cache.get_model("base", "cuda:0")
        task = asyncio.ensure_future(cast("Awaitable[object]", call(model)))
        await until(steps.reached.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert inner.stats().leases == 1
        evicting = asyncio.create_task(cache.evict("base"))
        await asyncio.sleep(0)
        assert not evicting.done()
        steps.go.set()
        assert await evicting == 1

    def call(model: Any) -> object:
        return getattr(model, word)(AUDIO)

    run(main())


def test_a_call_cancelled_before_its_thread_began_gives_its_lease_back(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    All threads are taken; nothing was called.
    """
    from concurrent.futures import ThreadPoolExecutor

    from whispercache import aio

    inner = make_cache()
    one = ThreadPoolExecutor(1)
    monkeypatch.setattr(aio, "_pool", lambda: one)

    async def main() -> None:
        model = await AsyncModelCache(inner).get_model("base", "cuda:0")
        async with model.lease() as whisper:
            fake = cast("Any", whisper)
        go = threading.Event()
        one.submit(go.wait, 10)
        task = asyncio.ensure_future(
            aio._call(await model.lease(), fake.detect_language)
        )
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        assert inner.stats().leases == 0
        assert fake.calls == 0

    run(main())
    one.shutdown()


def test_a_close_cancelled_before_its_thread_began_goes_on(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As a web framework does when its client hangs up: the lease ends all the same.
    """
    from concurrent.futures import ThreadPoolExecutor

    from whispercache import aio

    inner = make_cache()
    one = ThreadPoolExecutor(1)
    monkeypatch.setattr(aio, "_pool", lambda: one)

    async def main() -> None:
        segments = await open_segments(AsyncModelCache(inner))
        await segments.__anext__()
        go = threading.Event()
        one.submit(go.wait, 10)
        task = asyncio.ensure_future(segments.aclose())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert inner.stats().leases == 1
        go.set()
        await until(lambda: not inner.stats().leases)

    run(main())
    one.shutdown()


def test_a_call_that_fails_lets_its_model_go(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Even if the task was cancelled meanwhile.
    """
    from whispercache.testing import FakeWhisper

    inner = make_cache()
    reached, go = threading.Event(), threading.Event()

    def fail(self: FakeWhisper, *_args: object, **_options: object) -> object:
        reached.set()
        assert go.wait(10)
        raise RuntimeError(f"{self.key} fell off")

    monkeypatch.setattr(FakeWhisper, "detect_language", fail)

    async def main() -> None:
        model = await AsyncModelCache(inner).get_model("base", "cuda:0")
        cancelled = asyncio.create_task(model.detect_language())
        await until(reached.is_set)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        go.set()
        with pytest.raises(RuntimeError, match="fell off"):
            await model.detect_language()
        await until(lambda: not inner.stats().leases)

    run(main())


def test_a_model_may_be_batched(make_cache: MakeCache) -> None:
    """
    The batched pipeline is told its batch.
    """
    inner = make_cache()

    async def main() -> None:
        model = await AsyncModelCache(inner).get_model("base", "cuda:0", timeout_s=5)
        assert repr(model) == "<AsyncCachedModel base/cuda:0/float16>"
        assert str(model.key) == "base/cuda:0/float16"
        segments, info = await model.transcribe(AUDIO, batch_size=4)
        assert cast("Any", info)["batch_size"] == 4
        await segments.aclose()

    run(main())


def test_segments_that_are_dropped_let_their_model_go(make_cache: MakeCache) -> None:
    """
    Without a warning: objects that Python collects need no close.
    """
    inner = make_cache()

    async def main() -> None:
        segments = await open_segments(AsyncModelCache(inner))
        await segments.__anext__()
        del segments
        gc.collect()
        settle(inner)
        assert inner.stats().leases == 0

    run(main())
    check(inner)


def test_a_view_ends_when_its_task_is_cancelled(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its thread is told by the way that it knows: as if Ctrl-C had been pressed.
    """
    cache = AsyncModelCache(make_cache())
    seen, ended = threading.Event(), threading.Event()

    def watch(source: Callable[[], object], *, interval_s: float) -> None:
        assert interval_s == 0.5
        try:
            while True:
                source()
                seen.set()
        except KeyboardInterrupt:
            ended.set()

    monkeypatch.setattr("whispercache.watch.top.watch", watch)

    async def main() -> None:
        task = asyncio.create_task(cache.top(0.5))
        await until(seen.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert ended.wait(10)
