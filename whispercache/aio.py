"""
Awaited models and their segments: the work of `CachedModel` and `LeasedIterator` on a
pool of threads, so that the event loop is never blocked.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .core.threads import current_owner, here, token_of
from .engine.calls.prepare import prepared, prepared_detection
from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .model import Handle
from .results import LeasedIterator, call_in_parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from typing_extensions import ParamSpec, Self

    from .async_cache import AsyncLease, AsyncModelCache
    from .engine.api import AudioInput
    from .engine.sizes.footprint import Workload
    from .keys import ModelKey
    from .lease import Lease
    from .results import Breaks
    from .source import ModelSource

    P = ParamSpec("P")

T = TypeVar("T")

# Most calls on models that tasks have in flight at once. A model runs ``num_workers``
# of its calls at a time; the others wait in it, each on its thread.
CALL_THREADS = 64

# The end of segments, for futures: they cannot carry a StopIteration.
_END = object()


def current_task() -> object:
    """
    Returns a token of the running task, as the owner of leases, without keeping it.
    """
    task = asyncio.current_task()
    return current_owner() if task is None else token_of(task)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Not the loop's own pool: long transcriptions would keep the application out of it.
    return ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="whispercache-call")


@functools.cache
def _stopped() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="whispercache-stopped")


if hasattr(os, "register_at_fork"):  # their threads are not in the child
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_stopped.cache_clear)


async def in_thread(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """
    Returns what *call* returns on a thread: what would block the event loop.
    """
    bound = functools.partial(call, *args, **options)
    return await asyncio.get_running_loop().run_in_executor(_pool(), bound)


class AsyncCachedModel(Handle):
    """
    A `CachedModel` whose calls are awaited. Made by `AsyncModelCache.get_model`.
    """

    def __init__(self, cache: AsyncModelCache, source: ModelSource) -> None:
        super().__init__(source)
        self._cache = cache

    def lease(self) -> AsyncLease:
        """
        Returns the real model, held for an ``async with`` block.
        """
        return self._hold(DEFAULT_WORKLOAD)

    def _hold(self, workload: Workload) -> AsyncLease:
        return self._cache._lease(self._source.request, workload, self._source.terms)

    async def _held(self, workload: Workload) -> Lease:
        lease = await self._hold(workload)
        self._served_by = lease.key
        return lease

    async def transcribe(
        self,
        audio: AudioInput,
        *args: object,
        batch_size: int | None = None,
        **options: object,
    ) -> tuple[AsyncSegments[Segment], TranscriptionInfo]:
        """
        Transcribes; the segments are iterated over with ``async for``.

        Takes and raises what `CachedModel.transcribe` does.
        """
        # Audio is decoded before the lease, so that the model does not wait for it.
        ready = await in_thread(
            prepared, self._source, audio, args, options, batch_size
        )
        lease = await self._held(ready.workload)
        breaks = self._source.breaks(lease, ready.workload)
        call = self._source.transcriber(lease, ready.batch_size)
        result = await _call_in_parts(
            breaks, lease, call, ready.samples, **ready.options
        )
        segments, info = cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]", result
        )
        return AsyncSegments(segments), info

    async def detect_language(
        self, audio: AudioInput | None = None, *args: object, **options: object
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """
        Detects the language. Takes and raises what `CachedModel.detect_language` does.
        """
        ready = await in_thread(prepared_detection, self._source, audio, args, options)
        lease = await self._held(ready.workload)
        call = lease.whisper.detect_language
        result = await _call(lease, call, ready.samples, **ready.options)
        return cast("tuple[str, float, list[tuple[str, float]]]", result)


class AsyncSegments(AsyncIterator[T]):
    """
    Lazy segments that hold their model until they are exhausted, closed or collected.

    If a task is cancelled while it waits for the next one, that one is not lost: the
    step in flight goes on, and the next ``__anext__`` returns what it found.
    """

    def __init__(self, items: LeasedIterator[T]) -> None:
        self._items = items
        self._step: Future[object] | None = None

    async def __anext__(self) -> T:
        self._items.follow(current_task())
        # The step of a task that was cancelled may be in flight: its item is the next.
        if self._step is None:
            self._step = _begin_step(self._items)
        step = asyncio.wrap_future(self._step)
        try:
            item = await asyncio.shield(step)
        except asyncio.CancelledError:
            # Kept: the step goes on, and its item is the next one. Should it fail, that
            # is told by the next one, too; asyncio would log that none had read it.
            step.add_done_callback(_read)
            raise
        except BaseException:
            self._step = None
            raise
        self._step = None
        if item is _END:
            raise StopAsyncIteration
        return cast("T", item)

    @property
    def key(self) -> ModelKey:
        """
        The model that computes these items. See `LeasedIterator.key`.
        """
        return self._items.key

    def hand_over(self) -> None:
        """
        Notes that another task will iterate. See `LeasedIterator.hand_over`.
        """
        self._items.hand_over()

    async def aclose(self) -> None:
        """
        Ends early and releases the model, once the step in flight is over.
        """
        # Shielded: a task that is cancelled before a thread is free closes them still.
        # On a thread, since a step in flight may take seconds.
        closing = _pool().submit(self._items.close)
        await asyncio.shield(asyncio.wrap_future(closing))
        self._step = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()


def _read(step: asyncio.Future[object]) -> None:
    if not step.cancelled():
        step.exception()


def _begin_step(items: LeasedIterator[T]) -> Future[object]:
    if items.claim():
        return _pool().submit(_next, items)
    # It gave its model back, and may wait for it: not on a thread that another one
    # needs to get on, or all might wait for ever.
    return _stopped().submit(_next_as, items, current_task())


def _next_as(items: LeasedIterator[T], owner: object) -> T | object:
    """
    Returns the next item, for whose model *owner* may have to wait.
    """
    before, here.owner = here.owner, cast("Any", owner)
    try:
        return _next(items)
    finally:
        here.owner = before


def _next(items: LeasedIterator[T]) -> T | object:
    try:
        return items.step()
    except StopIteration:
        return _END


async def _call(
    lease: Lease, call: Callable[..., object], *args: object, **options: object
) -> object:
    """
    Awaits `call_leased` on a thread; the model is held until that ends, cancelled or
    not.
    """
    return await _call_in_parts(None, lease, call, *args, **options)


async def _call_in_parts(
    breaks: Breaks | None,
    lease: Lease,
    call: Callable[..., object],
    /,
    *args: object,
    **options: object,
) -> object:
    """
    Awaits `call_in_parts` likewise.
    """
    # If the loop ends with this call in flight, its lease is no leak to be warned of.
    lease.owned = True
    bound = functools.partial(call_in_parts, breaks, lease, call, *args, **options)
    future = _pool().submit(bound)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if future.cancelled():  # before a thread was free for it
            lease.release()
        else:
            # A call that runs cannot be stopped, and its task is about to end.
            lease.hand_over()
            future.add_done_callback(_close_result)
        raise


def _close_result(future: Future[object]) -> None:
    if future.exception() is None:
        result = future.result()
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, LeasedIterator):
            first.close()
