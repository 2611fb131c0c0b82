"""
Leaving a cache with segments that were begun and not finished.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest
from real import SILENCE, micro

from whispercache import AsyncModelCache, LeaseDeadlock, LeaseTimeout, ModelCache
from whispercache.core.threads import current_owner, current_owners, has_ended, token_of
from whispercache.testing import FakeSegment, FakeWhisper, Gate, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from conftest import MakeCache
    from driver import Driver

    from whispercache.testing import FakeClock

AUDIO = cast("Any", "audio")
PATIENCE_S = 30.0
ENDED = "it ended early: the cache was closed"


class Face:
    """
    A cache as a thread sees it, or a task: the same words, awaited in any case.
    """

    def __init__(self, cache: ModelCache, *, is_async: bool) -> None:
        self.inner = cache
        self.cache: Any = AsyncModelCache(cache) if is_async else cache
        self._next = "__anext__" if is_async else "__next__"
        self._close = "aclose" if is_async else "close"
        self._exit = "__aexit__" if is_async else "__exit__"

    async def call(
        self, thing: object, word: str, *args: object, **more: object
    ) -> Any:
        """
        Call a method, and await what is to be awaited.
        """
        result = getattr(thing, word)(*args, **more)
        return await result if inspect.isawaitable(result) else result

    async def begin(self, **options: object) -> tuple[Any, Any]:
        """
        Transcribe; nothing is iterated over yet.
        """
        model = await self.call(self.cache, "get_model", "base", "cuda:0")
        return cast(
            "tuple[Any, Any]", await self.call(model, "transcribe", AUDIO, **options)
        )

    async def next(self, segments: object) -> Any:
        """
        The next segment.
        """
        return await self.call(segments, self._next)

    async def end(self, segments: object) -> None:
        """
        Close segments.
        """
        await self.call(segments, self._close)

    async def leave(self, error: BaseException | None = None) -> None:
        """
        Leave the block of the cache.
        """
        await self.call(
            self.cache, self._exit, None if error is None else type(error), error, None
        )

    async def close(self, *args: object) -> None:
        """
        Close it by its own word.
        """
        await self.call(self.cache, "close", *args)


def at_once(coroutine: Any) -> Any:
    """
    The result of a coroutine that never waits, without an event loop.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class Scene:
    """
    Runs scenarios from beginning to end, on one thread or in one task.
    """

    def __init__(self, cache: ModelCache, *, is_async: bool) -> None:
        self.face = Face(cache, is_async=is_async)
        self._run = asyncio.run if is_async else at_once

    def start(self, scenario: Callable[[Face], Awaitable[Any]]) -> Future[Any]:
        """
        Begin one, on a thread of its own.
        """
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(self._run(cast("Any", scenario(self.face))))
            except BaseException as error:  # noqa: BLE001 - the future tells it
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def play(self, scenario: Callable[[Face], Awaitable[Any]]) -> Any:
        """
        Run one. The clock stands still: whoever waits for a timeout, waits for ever.
        """
        return self.start(scenario).result(PATIENCE_S)


@pytest.fixture(params=[False, True], ids=["threads", "tasks"])
def scene(request: pytest.FixtureRequest, make_cache: MakeCache) -> Scene:
    """
    A thread that does all, then a task.
    """
    return Scene(make_cache(), is_async=request.param)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """
    Holds each second segment of the fakes.
    """
    made = Gate()

    def speak(whisper: FakeWhisper) -> Iterator[FakeSegment]:
        yield FakeSegment(str(whisper.key), 0)
        made.pass_through()
        yield FakeSegment(str(whisper.key), 1)
        yield FakeSegment(str(whisper.key), 2)

    monkeypatch.setattr(FakeWhisper, "_speak", speak)
    yield made
    made.open()


async def ends_early(face: Face, segments: object) -> None:
    """
    See that whoever goes on is told why there is no more.
    """
    for _ in "12":
        with pytest.raises(RuntimeError, match=ENDED):
            await face.next(segments)


# What the closing thread or task left idle --------------------------------------------


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}], ids=["plain", "batched"])
@pytest.mark.parametrize("word", ["leave", "close"])
@pytest.mark.parametrize("heard", [0, 1])
def test_segments_end_with_the_cache(
    scene: Scene, heard: int, word: str, options: dict[str, int]
) -> None:
    """
    After `info` alone, and after a break, which leaves no more behind.
    """

    async def scenario(face: Face) -> None:
        segments, info = await face.begin(**options)
        assert info["language"] == "en"
        for _ in range(heard):
            await face.next(segments)
        await getattr(face, word)()
        assert not face.inner.models()
        assert face.inner.stats().leases == 0
        await ends_early(face, segments)
        await face.close()
        await face.end(segments)

    scene.play(scenario)


def test_an_error_in_the_loop_is_the_one_that_is_raised(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Its traceback holds the segments; they end all the same, and nothing is logged.
    """

    async def loop(face: Face) -> None:
        segments, _ = await face.begin()
        await face.next(segments)
        raise KeyError("first")

    async def scenario(face: Face) -> None:
        try:
            await loop(face)
        except KeyError as error:
            await face.leave(error)
            raise

    with pytest.raises(KeyError) as caught:
        scene.play(scenario)
    assert not scene.face.inner.models()
    held = [frame.frame.f_locals.get("segments") for frame in caught.traceback]
    segments = next(filter(None, held))
    with pytest.raises(RuntimeError, match=ENDED):
        scene.play(lambda face: face.next(segments))
    assert "closing" not in caplog.text


@pytest.mark.parametrize("is_in_step", [False, True])
def test_ctrl_c_in_the_loop(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch, *, is_in_step: bool
) -> None:
    """
    Between two segments, or while one is made.
    """
    cache = make_cache()

    def speak(whisper: FakeWhisper) -> Iterator[FakeSegment]:
        yield FakeSegment(str(whisper.key))
        if is_in_step:
            os.kill(os.getpid(), signal.SIGINT)
        yield FakeSegment(str(whisper.key), 1)

    monkeypatch.setattr(FakeWhisper, "_speak", speak)
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)

    def loop() -> None:
        for _ in segments:
            if not is_in_step:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), cache:
        loop()
    assert not cache.models()
    told = "KeyboardInterrupt" if is_in_step else "the cache was closed"
    with pytest.raises(RuntimeError, match=f"it ended early: {told}"):
        next(segments)


def test_what_is_made_of_segments_ends_too(make_cache: MakeCache) -> None:
    """
    A slice, an expression, a generator that has the cache's block in itself.
    """
    cache = make_cache()
    model = cache.get_model("base", "cuda:0")
    sliced = itertools.islice(model.transcribe(AUDIO)[0], 2)
    texts = (segment.text for segment in model.transcribe(AUDIO)[0])
    assert next(texts) == "base/cuda:0/float16"
    cache.close()
    for wrapped in (sliced, texts):
        with pytest.raises(RuntimeError, match=ENDED):
            next(cast("Any", wrapped))

    def lines(other: ModelCache) -> Iterator[str]:
        with other:
            for segment in other.get_model("base", "cuda:0").transcribe(AUDIO)[0]:
                yield segment.text

    other = make_cache()
    spoken = lines(other)
    next(spoken)
    cast("Any", spoken).close()
    assert not other.models()


def test_a_cache_may_be_closed_in_the_loop_itself(scene: Scene) -> None:
    """
    The loop ends with an error, not as if all had been heard.
    """

    async def scenario(face: Face) -> None:
        segments, _ = await face.begin()
        await face.next(segments)
        await face.close()
        await ends_early(face, segments)

    scene.play(scenario)


def test_segments_that_are_over_say_so_as_before(scene: Scene) -> None:
    """
    Those that were heard to the end, and those that were closed, just have no more.
    """

    async def scenario(face: Face) -> None:
        done, _ = await face.begin()
        closed, _ = await face.begin()
        for _ in range(3):
            await face.next(done)
        stop = (StopIteration, StopAsyncIteration, RuntimeError)
        with pytest.raises(stop) as caught:
            await face.call(done, face._next)
        assert "ended early" not in str(caught.value)
        await face.end(closed)
        await face.close()
        for each in (done, closed):
            with pytest.raises(stop) as caught:
                await face.call(each, face._next)
            assert "ended early" not in str(caught.value)

    scene.play(scenario)


def test_real_segments_end_with_the_cache() -> None:
    """
    Plain and batched, of a real model.
    """
    with ModelCache(ram="1GiB", variants=False) as cache:
        model = cache.get_model(micro(), "cpu", "float32", cpu_threads=1)
        plain, info = model.transcribe(SILENCE, language="en")
        clips = [{"start": 0.0, "end": 0.5}]
        batched, _ = model.transcribe(
            SILENCE, language="en", batch_size=2, clip_timestamps=clips
        )
        assert info.language == "en"
    assert not cache.models()
    for segments in (plain, batched):
        with pytest.raises(RuntimeError, match=ENDED):
            next(segments)


# What others have ---------------------------------------------------------------------


def test_segments_in_use_by_another_are_waited_for(
    make_cache: MakeCache, driver: Driver
) -> None:
    """
    Begun here, iterated over there: they end when they are heard.
    """
    cache = make_cache()
    segments, _ = driver.call_on(
        driver.call(cache, "get_model", "base", "cuda:0"), "transcribe", AUDIO
    )
    step = "__next__" if hasattr(segments, "__next__") else "__anext__"
    user = Follower(segments, step)
    assert user.step().start == 0
    closing = driver.start(cache, "close")
    wait_until(lambda: cache._core.is_closed)
    assert user.step().start == 1
    assert user.step().start == 2
    assert not closing.done()
    user.end()
    closing.result(PATIENCE_S)
    assert not cache.models()


class Follower:
    """
    Somebody who iterates, on one thread or in one task, a step at a time.
    """

    def __init__(self, segments: Any, step: str) -> None:
        self._segments = segments
        self._step = step
        self._asked: Any = threading.Semaphore(0)
        self._answers: list[Future[Any]] = []
        self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._step == "__next__":
            at_once(self._work())
        else:
            asyncio.run(self._work())

    async def _work(self) -> None:
        done = 0
        while True:
            self._asked.acquire()
            if self._is_over:
                word = "close" if self._step == "__next__" else "aclose"
            else:
                word = self._step
            result = getattr(self._segments, word)()
            if inspect.isawaitable(result):
                result = await result
            self._answers[done].set_result(result)
            done += 1
            if self._is_over:
                return

    def step(self) -> Any:
        """
        Go on to the next one.
        """
        self._answers.append(Future())
        self._asked.release()
        return self._answers[-1].result(PATIENCE_S)

    def end(self) -> None:
        """
        Close them.
        """
        self._is_over = True
        self.step()
        self._thread.join(PATIENCE_S)


def test_tasks_hand_segments_over(make_cache: MakeCache) -> None:
    """
    The task that closes the cache waits for the one that will iterate.
    """
    cache = make_cache()

    async def main() -> list[float]:
        both = AsyncModelCache(cache)
        model = await both.get_model("base", "cuda:0")
        segments, _ = await model.transcribe(AUDIO)
        segments.hand_over()
        closing = asyncio.create_task(both.close())
        await asyncio.sleep(0)
        assert cache._core.is_closed
        heard = [segment.start async for segment in segments]
        await closing
        return heard

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE_S)) == [0, 1, 2]


def test_segments_that_were_handed_over_are_waited_for(make_cache: MakeCache) -> None:
    """
    Though nobody has begun to iterate yet.
    """
    cache = make_cache()
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)
    segments.hand_over()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(cache.close)
        wait_until(lambda: cache._core.is_closed)
        assert [segment.start for segment in segments] == [0, 1, 2]
        closing.result(PATIENCE_S)
    assert not cache.models()


def test_segments_that_were_handed_over_and_lie_idle(
    make_cache: MakeCache, clock: FakeClock
) -> None:
    """
    They are still their new owner's when the wait for them is over.
    """
    cache = make_cache()
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)
    segments.hand_over()

    def tick() -> None:
        wait_until(lambda: clock._calls)
        clock.tick(10)

    with ThreadPoolExecutor(1) as pool:
        ticking = pool.submit(tick)
        with pytest.raises(LeaseTimeout):
            cache.close()
        ticking.result(PATIENCE_S)
    assert next(segments).start == 0
    segments.close()


def test_a_step_in_flight_is_waited_for(make_cache: MakeCache, gate: Gate) -> None:
    """
    That of a task that no longer awaits it: the item is not lost, and then they end.
    """
    cache = make_cache()

    async def main() -> None:
        both = AsyncModelCache(cache)
        model = await both.get_model("base", "cuda:0")
        segments, _ = await model.transcribe(AUDIO)
        await anext(segments)
        stepping = asyncio.current_task()
        assert stepping is not None
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            gate.wait_reached()
            loop.call_soon_threadsafe(stepping.cancel)

        waiting = loop.run_in_executor(None, cancel)
        with pytest.raises(asyncio.CancelledError):
            await anext(segments)
        await waiting

        def open_when_closed() -> None:
            wait_until(lambda: cache._core.is_closed)
            wait_until(lambda: segments._items._ending)
            assert cache.models()
            gate.open()

        opening = loop.run_in_executor(None, open_when_closed)
        await both.close()
        await opening
        assert not cache.models()
        assert (await anext(segments)).start == 1
        with pytest.raises(RuntimeError, match=ENDED):
            await anext(segments)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_cancelled_call_is_waited_for(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It goes on for nobody; its task, which closes the cache, does not wait for itself.
    """
    gate = Gate()

    def detect(_whisper: FakeWhisper, *_args: object) -> tuple[str, float, list[Any]]:
        gate.pass_through()
        return "en", 1.0, []

    monkeypatch.setattr(FakeWhisper, "detect_language", detect)
    cache = make_cache()

    async def main() -> None:
        both = AsyncModelCache(cache)
        model = await both.get_model("base", "cuda:0")
        calling = asyncio.current_task()
        assert calling is not None
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            gate.wait_reached()
            loop.call_soon_threadsafe(calling.cancel)

        waiting = loop.run_in_executor(None, cancel)
        with pytest.raises(asyncio.CancelledError):
            await model.detect_language(AUDIO)
        await waiting
        closing = asyncio.create_task(both.close(None))
        await asyncio.sleep(0)
        gate.open()
        await closing

    asyncio.run(main())
    assert not cache.models()


# What those began who are gone --------------------------------------------------------


def test_segments_of_threads_that_have_ended(make_cache: MakeCache) -> None:
    """
    As a pool of threads leaves them, where only the info is of interest.
    """
    cache = make_cache()
    model = cache.get_model("base", "cuda:0")
    with cache:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: model.transcribe(AUDIO), range(4)))
        assert {info["language"] for _, info in cast("Any", found)} == {"en"}
    assert not cache.models()
    with pytest.raises(RuntimeError, match=ENDED):
        next(found[0][0])


def test_segments_of_tasks_that_have_ended(make_cache: MakeCache) -> None:
    """
    As `asyncio.gather` leaves them; and those of an event loop that is over.
    """
    cache = make_cache()

    async def main() -> list[Any]:
        model = await AsyncModelCache(cache).get_model("base", "cuda:0")
        found = await asyncio.gather(*(model.transcribe(AUDIO) for _ in range(3)))
        return [segments for segments, _ in found]

    async def closing() -> None:
        async with AsyncModelCache(cache):
            await main()

    asyncio.run(asyncio.wait_for(closing(), PATIENCE_S))
    assert not cache.models()
    cache = make_cache()
    with cache:
        kept = asyncio.run(main())
    assert not cache.models()
    assert len(kept) == 3


def test_an_error_in_a_task_leaves_no_segments(make_cache: MakeCache) -> None:
    """
    It holds them, and is raised where they were begun by another task.
    """
    cache = make_cache()

    async def work(both: AsyncModelCache) -> None:
        model = await both.get_model("base", "cuda:0")
        segments, _ = await model.transcribe(AUDIO)
        await anext(segments)
        raise KeyError("work")

    async def main() -> None:
        async with AsyncModelCache(cache) as both:
            await asyncio.gather(work(both), work(both))

    with pytest.raises(KeyError, match="work"):
        asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert not cache.models()


def test_segments_that_pass_from_hand_to_hand(
    make_cache: MakeCache, clock: FakeClock
) -> None:
    """
    Each step on a thread, or in a task, of its own: that the last one is over does not
    mean that nobody goes on.
    """
    cache = make_cache()
    segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)

    def step() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: next(segments)).result(PATIENCE_S)

    assert step().start == 0
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(cache.close)
        wait_until(lambda: clock._calls)
        assert step().start == 1
        assert step().start == 2
        segments.close()
        closing.result(PATIENCE_S)


# Two faces of one cache, signals, leases ----------------------------------------------


def test_the_blocking_word_knows_the_task_that_says_it(make_cache: MakeCache) -> None:
    """
    Segments of a task end where it leaves the block of the cache for threads.
    """
    cache = make_cache()

    async def main() -> Any:
        with cache:
            model = await AsyncModelCache(cache).get_model("base", "cuda:0")
            segments, _ = await model.transcribe(AUDIO)
            await anext(segments)
        return segments

    segments = asyncio.run(main())
    assert not cache.models()
    with pytest.raises(RuntimeError, match=ENDED):
        asyncio.run(anext(segments))


def test_closing_in_a_signal_handler_that_interrupted_a_step(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The step ends after the handler, so that does not wait for it; then they end.
    """
    cache = make_cache()
    handled: list[int] = []

    def speak(whisper: FakeWhisper) -> Iterator[FakeSegment]:
        os.kill(os.getpid(), signal.SIGUSR1)
        whisper._check()
        yield FakeSegment(str(whisper.key), 7)
        yield FakeSegment(str(whisper.key), 8)

    def handle(*_: object) -> None:
        cache.close()
        handled.append(len(cache.models()))

    monkeypatch.setattr(FakeWhisper, "_speak", speak)
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        segments, _ = cache.get_model("base", "cuda:0").transcribe(AUDIO)
        assert next(segments).start == 7
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [1]
    wait_until(lambda: not cache.models())
    with pytest.raises(RuntimeError, match=ENDED):
        next(segments)


def test_whoever_would_wait_for_his_own_lease_for_ever_is_told(scene: Scene) -> None:
    """
    As by `evict`; the cache is closed all the same.
    """

    async def scenario(face: Face) -> None:
        lease = await face.call(face.cache, "lease", "base", "cuda:0")
        segments, _ = await face.begin()
        with pytest.raises(
            LeaseDeadlock, match=r"on base/cuda:0/float16 that only its"
        ):
            await face.close(None)
        await ends_early(face, segments)
        assert face.inner._core.is_closed
        assert lease.whisper
        lease.hand_over()
        lease.release()
        await face.close(None)
        assert not face.inner.models()

    scene.play(scenario)


def test_evicting_segments_of_ones_own_is_refused_as_before(scene: Scene) -> None:
    """
    Nothing is ended that its owner may go on with.
    """

    async def scenario(face: Face) -> None:
        segments, _ = await face.begin()
        with pytest.raises(LeaseDeadlock, match="the eviction of base"):
            await face.call(face.cache, "evict", "base")
        assert (await face.next(segments)).start == 0
        await face.end(segments)

    scene.play(scenario)


# Tokens -------------------------------------------------------------------------------


def test_tokens_tell_whether_their_owner_is_over() -> None:
    """
    Of threads, and of tasks; nothing is known of what was handed to anybody.
    """
    assert not has_ended(None)
    assert not has_ended("somebody")
    assert not has_ended(current_owner())
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(current_owner).result()
        assert not has_ended(theirs)
        assert theirs != current_owner()
    assert has_ended(theirs)
    assert len({theirs, current_owner()}) == 2

    async def main() -> tuple[object, ...]:
        mine = current_owners()
        assert len(mine) == 2
        assert mine[1] == token_of(cast("Any", asyncio.current_task()))
        assert not any(map(has_ended, mine))
        return mine

    assert current_owners() == (current_owner(),)
    assert [has_ended(owner) for owner in asyncio.run(main())] == [False, True]
