"""
Breaks: batches give their model to more urgent requests between two segments, and go on
afterwards as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from caches import cache_of
from faster_whisper import BatchedInferencePipeline
from real import at_once, clip, decode_audio, micro, micro_copy, model_of, packaged

from whispercache import (
    AsyncModelCache,
    CacheClosed,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    UnknownModel,
)
from whispercache.model import CachedModel
from whispercache.source import ModelSource
from whispercache.testing import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from faster_whisper.transcribe import Segment

    from whispercache import Lease, Workload

OPTIONS: list[Any] = [
    {"word_timestamps": True},
    {"batch_size": 1},
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (
            {},
            {"vad_filter": True, "beam_size": 1},
            {"language": "en", "without_timestamps": True},
            {"condition_on_previous_text": False, "chunk_length": 5},
            {"clip_timestamps": "0,4,6,20", "word_timestamps": True},
            {"initial_prompt": "A talk.", "hallucination_silence_threshold": 1.0},
            {"batch_size": 1, "word_timestamps": True, "without_timestamps": False},
        )
    ),
]
FILM = np.zeros(150 * 16_000, np.float32)
"""
A silent film. A micro model says its text once for each half minute of it.
"""

cache = cache_of(variants=False, max_models=1)


@pytest.fixture
def urgent(cache: ModelCache, tmp_path: Path) -> Callable[[], None]:
    """
    Somebody who wants another model at once, for a moment.
    """
    other = micro_copy(tmp_path / "urgent", "hello")

    def ask() -> None:
        cache.lease(str(other), "cpu", timeout_s=60, cpu_threads=1).release()

    return ask


def talk() -> np.ndarray[Any, np.dtype[np.float32]]:
    """
    Speech in several windows.
    """
    said = [decode_audio(clip(name)) for name in ("en-harbour-long", "en-weather")]
    return np.concatenate([said[0], np.zeros(8000, np.float32), said[1]])


def plain(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """
    All that segments say.
    """
    return [asdict(each) for each in segments]


# The text stays the same --------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_that_is_stopped_after_each_segment_says_the_same(
    cache: ModelCache, urgent: Callable[[], None], options: dict[str, Any]
) -> None:
    """
    Whatever its options are, with words and without, in batches and not; but for what
    Whisper draws by chance, where it raises the temperature.
    """
    directory = packaged("tiny.en")
    options = {"temperature": 0.0, **options}
    expected, _ = model_of(cache, directory).transcribe(talk(), **options)
    said = plain(expected)
    assert len(said) > 1
    batch = model_of(cache, directory, priority="batch")
    segments, _ = batch.transcribe(talk(), **options)
    found = []
    for segment in segments:
        found.append(asdict(segment))
        urgent()
    assert found == said


def test_a_batch_whose_files_are_replaced_ends(
    cache: ModelCache, urgent: Callable[[], None], tmp_path: Path
) -> None:
    """
    Its tokenizer would turn the tokens of other weights into wrong words.
    """
    directory = micro_copy(tmp_path / "mine", "first")
    batch = model_of(cache, directory, priority="batch")
    segments, _ = batch.transcribe(FILM)
    assert next(segments).text == " first"
    micro_copy(directory, "second")
    urgent()
    with pytest.raises(LoadFailed, match="replaced in the middle of a batch"):
        list(segments)
    assert next(batch.transcribe(FILM)[0]).text == " second"


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("kind", ["drop-in", "pipeline", "plain"])
def test_each_way_to_a_model_knows_breaks(
    cache: ModelCache, urgent: Callable[[], None], kind: str, batch_size: int | None
) -> None:
    """
    The model of get_model(), faster-whisper's own pipeline around it, and the handle
    that loaders of a user's own have.
    """
    options: dict[str, Any] = {}
    batch: Any = model_of(cache, micro(), priority=-1)
    if kind == "plain":
        batch = CachedModel(batch._source)
    if batch_size is not None:
        clips = [{"start": at_s, "end": at_s + 30} for at_s in range(0, 150, 30)]
        options = {"clip_timestamps": clips, "batch_size": batch_size}
    elif kind == "pipeline":
        return
    if kind == "pipeline":
        batch = BatchedInferencePipeline(batch)
    loads = cache.stats().loads
    segments, _ = batch.transcribe(FILM, language="en", **options)
    found = []
    for segment in segments:
        found.append(segment.text)
        urgent()
    assert len(found) == 5
    assert len(set(found)) == 1
    # The batch's model and the urgent one in turn, but for the end of the batch.
    assert cache.stats().loads == loads + 2 * len(found)


def test_the_awaited_model_knows_breaks(
    cache: ModelCache, urgent: Callable[[], None]
) -> None:
    """
    Its segments wait on a thread of their own, and their task holds the lease.
    """

    async def main() -> None:
        shared = AsyncModelCache(cache)
        batch = await shared.get_model(micro(), "cpu", cpu_threads=1, priority="batch")
        segments, _ = await batch.transcribe(FILM, language="en")
        found = []
        async for segment in segments:
            found.append(segment.text)
            await asyncio.to_thread(urgent)
        assert len(found) == 5
        # As many as there are threads for calls, all of which wait for one model.
        many = [await batch.transcribe(FILM, language="en") for _ in range(3)]
        held = await asyncio.to_thread(urgent_lease, cache)
        steps = [asyncio.ensure_future(anext(each)) for each, _ in many]
        await asyncio.to_thread(
            wait_until, lambda: len(cache.waiting()) == len(many), "all of them"
        )
        assert {each.priority for each in cache.waiting()} == {-1.0}
        held.release()
        assert len({(await step).text for step in steps}) == 1
        for each, _ in many:
            await each.aclose()

    def urgent_lease(cache: ModelCache) -> Any:
        return cache.lease(micro("micro b"), "cpu", timeout_s=60, cpu_threads=1)

    asyncio.run(main())


# Who asks whom ------------------------------------------------------------------------


def test_a_batch_at_work_is_asked_by_another_thread(
    cache: ModelCache, urgent: Callable[[], None]
) -> None:
    """
    And by none of its own priority.
    """
    batch = model_of(cache, micro(), priority="batch")
    other = model_of(cache, micro("micro b"), priority="batch", timeout_s=0.3)
    segments, _ = batch.transcribe(FILM, language="en")
    next(segments)
    with pytest.raises(LeaseTimeout):
        at_once([lambda: other.transcribe(FILM, language="en")])
    asking = threading.Thread(target=urgent)
    asking.start()
    assert len(list(segments)) == 4
    asking.join(60)
    assert not asking.is_alive()
    assert cache.stats().timeouts == 1


def test_who_holds_other_models_is_not_asked_within_a_step(cache: ModelCache) -> None:
    """
    It would wait for one while it holds another, which may be a deadlock.
    """
    cache.resize(max_models=2)
    first, _ = model_of(cache, micro(), priority=-1).transcribe(FILM, language="en")
    second, _ = model_of(cache, micro("micro b"), priority=-1).transcribe(
        FILM, language="en"
    )
    next(first)
    next(second)
    third = partial(cache.lease, micro("micro c"), "cpu", timeout_s=0.3)
    with pytest.raises(LeaseTimeout):
        at_once([third])
    assert cache.stats().leases == 2
    first.close()
    at_once([lambda: third().release()])
    assert len(list(second)) == 4


# The end of what was stopped ----------------------------------------------------------


@pytest.fixture
def stopped(cache: ModelCache, urgent: Callable[[], None]) -> Iterator[Any]:
    """
    Segments that gave their lease back after the first one.
    """
    batch = model_of(cache, micro(), priority="batch")
    segments, _ = batch.transcribe(FILM, language="en")
    next(segments)
    urgent()
    assert cache.stats().leases == 0
    return segments


def test_stopped_segments_can_be_closed_and_dropped(stopped: Any) -> None:
    """
    They hold nothing.
    """
    stopped.close()
    assert list(stopped) == []
    stopped.close()


@pytest.mark.parametrize("moment", ["before it waits", "while it waits"])
def test_stopped_segments_are_closed_while_a_step_wants_their_model(
    cache: ModelCache, stopped: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """
    At once, though it is not to be had, whoever is said to go on with them.
    """
    is_asking, has_looked = threading.Event(), threading.Event()
    lease, give_up = ModelSource.lease, cache._core.give_up

    def asked_late(source: ModelSource, workload: Workload) -> Lease:
        is_asking.set()
        if moment == "before it waits":
            assert has_looked.wait(30)
        return lease(source, workload)

    def given_up(owner: object) -> bool:
        try:
            return give_up(owner)
        finally:
            has_looked.set()

    monkeypatch.setattr(ModelSource, "lease", asked_late)
    monkeypatch.setattr(cache._core, "give_up", given_up)
    with ThreadPoolExecutor(2) as pool, cache.lease(micro("micro b"), "cpu"):
        step = pool.submit(next, stopped)
        assert is_asking.wait(30)
        if moment == "while it waits":
            wait_until(lambda: len(cache.waiting()) == 1)
        stopped.hand_over()
        pool.submit(stopped.close).result(30)
        with pytest.raises(CancelledError):
            step.result(30)
        assert not cache.waiting()


def test_a_task_that_leaves_a_stopped_batch_leaves_no_trace_in_the_log(
    cache: ModelCache, urgent: Callable[[], None]
) -> None:
    """
    The step that it waited for fails, and nobody is there to be told.
    """
    logged: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: logged.append(context))
        shared = AsyncModelCache(cache)
        batch = await shared.get_model(micro(), "cpu", cpu_threads=1, priority="batch")
        segments, _ = await batch.transcribe(FILM, language="en")
        await anext(segments)
        await asyncio.to_thread(urgent)
        with await shared.lease(micro("micro b"), "cpu"):
            step = asyncio.ensure_future(anext(segments))
            await asyncio.to_thread(wait_until, lambda: len(cache.waiting()) == 1)
            step.cancel()
            await asyncio.wait((step,))
            await segments.aclose()
            await asyncio.sleep(0)
            gc.collect()

    asyncio.run(main())
    assert not logged


def test_stopped_segments_of_a_closed_cache_say_so(
    cache: ModelCache,
    stopped: Any,
) -> None:
    """
    At the next one that needs the model.
    """
    cache.close()
    with pytest.raises(CacheClosed):
        next(stopped)
    with pytest.raises(RuntimeError, match="ended early"):
        next(stopped)


def test_a_batch_whose_files_went_says_so(
    cache: ModelCache, tmp_path: Path, urgent: Callable[[], None]
) -> None:
    """
    While its model was unloaded; nothing is left of it.
    """
    directory = micro_copy(tmp_path / "film", "film")
    batch = model_of(cache, directory, priority="batch")
    segments, _ = batch.transcribe(FILM, language="en")
    next(segments)
    urgent()
    (directory / "model.bin").unlink()
    with pytest.raises(UnknownModel):
        list(segments)


def test_a_model_is_evicted_while_its_batch_is_stopped(
    cache: ModelCache,
    stopped: Any,
) -> None:
    """
    And is loaded again for it.
    """
    cache.evict()
    assert not cache.models()
    assert len(list(stopped)) == 4
    evicted = cache.stats().evictions
    assert evicted >= 2
