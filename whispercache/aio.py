"""
AsyncModelCache: the same cache, awaited.

It holds no state of its own: tasks and threads share one core, one queue, one set of
books. Waiting for a model takes no thread; disk, downloads and the models' work run on
a pool of threads, so the event loop is never blocked.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast

from .cache import UNCHANGED, Departure, ModelCache, ModelSource, as_request, as_seconds
from .footprint import DEFAULT_WORKLOAD
from .model import LeasedIterator, call_leased, workload_of
from .resolve import matcher

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Generator, Mapping
    from types import TracebackType

    from faster_whisper import WhisperModel
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from typing_extensions import ParamSpec, Self, Unpack

    from .cache import CacheOptions
    from .core import Leaving
    from .events import DeviceInfo, Event, Explanation, ModelInfo, Stats
    from .footprint import Workload
    from .keys import ModelKey
    from .lease import Lease
    from .loader import AudioInput
    from .resolve import Request
    from .units import DurationValue, LimitValue

    P = ParamSpec("P")

__all__ = ["AsyncCachedModel", "AsyncLease", "AsyncModelCache", "AsyncSegments"]

T = TypeVar("T")

CALL_THREADS = 64
"""
Calls on models that tasks may have in flight at once. A model runs ``num_workers`` of
its calls at a time; the others wait in it, each on its thread.
"""

_END = object()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Not the loop's own pool: long transcriptions would keep the application out of it.
    return ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="whispercache-call")


async def _in_thread(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    bound = functools.partial(call, *args, **options)
    return await asyncio.get_running_loop().run_in_executor(_pool(), bound)


class AsyncModelCache:
    """
    A `ModelCache` for tasks, with the same words.

    Args:
        cache: A cache to share with threads; a new one if None.
        options: The parameters of a new `ModelCache`.
    """

    def __init__(
        self, cache: ModelCache | None = None, **options: Unpack[CacheOptions]
    ) -> None:
        if cache is not None and options:
            raise TypeError("give a cache, or the parameters of a new one; not both")
        self._cache = cache or ModelCache(**options)

    @property
    def cache(self) -> ModelCache:
        """
        The same cache, for threads.
        """
        return self._cache

    async def get_model(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        keep_alive: DurationValue | None = None,
        timeout_s: float | None = None,
        **load_options: object,
    ) -> AsyncCachedModel:
        """
        A model to await, in memory whenever it is used. See `ModelCache.get_model`.
        """
        await _in_thread(
            self._cache.get_model,
            model_size_or_path,
            device,
            compute_type,
            **load_options,  # type: ignore[arg-type]
        )
        request = as_request(model_size_or_path, device, compute_type, load_options)
        keep_alive_s = as_seconds(keep_alive)
        source = ModelSource(self._cache, request, keep_alive_s, timeout_s)
        return AsyncCachedModel(self, source)

    def lease(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: float | None = None,
        keep_alive: DurationValue | None = None,
        workload: Workload | None = None,
        **load_options: object,
    ) -> AsyncLease:
        """
        The real WhisperModel, held for an ``async with`` block. See `ModelCache.lease`.

        Its calls block: run them in a thread, or use `get_model`, which does.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        return self._lease(
            request, workload or DEFAULT_WORKLOAD, as_seconds(keep_alive), timeout_s
        )

    def _lease(
        self,
        request: Request,
        workload: Workload,
        keep_alive_s: float | None,
        timeout_s: float | None,
    ) -> AsyncLease:
        acquire = self._acquire(request, workload, keep_alive_s, timeout_s)
        return AsyncLease(acquire)

    async def _acquire(
        self,
        request: Request,
        workload: Workload,
        keep_alive_s: float | None,
        timeout_s: float | None,
    ) -> Lease:
        core, resolver = self._cache._core, self._cache._resolver
        lease = self._cache._hit(request, workload, keep_alive_s)
        if lease is not None:
            return lease
        target = await _in_thread(resolver.resolve, request)
        await _in_thread(resolver.locate, target, workload)
        waiter = core.request(target.entry, workload, keep_alive_s, timeout_s)
        try:
            return await asyncio.wrap_future(waiter.future)
        except BaseException:
            core.abandon(waiter)
            raise

    async def preload(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: float | None = None,
        **load_options: object,
    ) -> None:
        """
        Load a model now. See `ModelCache.preload`.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        async with self._lease(request, DEFAULT_WORKLOAD, None, timeout_s):
            pass

    async def pin(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: float | None = None,
        **load_options: object,
    ) -> None:
        """
        Load a model now and keep it, idle or not. See `ModelCache.pin`.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        lease = await self._lease(request, DEFAULT_WORKLOAD, None, timeout_s)
        with lease:
            self._cache._core.pin(lease._entry)

    def unpin(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
    ) -> int:
        """
        Let pinned models leave again; how many were. See `ModelCache.unpin`.
        """
        return self._cache.unpin(model_size_or_path, device, compute_type)

    async def evict(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """
        Unload models now; how many left. See `ModelCache.evict`.
        """
        matches = matcher(model_size_or_path, device, compute_type)
        return await self._gone(self._cache._core.evict(matches), timeout_s)

    async def _gone(self, leaving: list[Leaving], timeout_s: float | None) -> int:
        departure = Departure(self._cache._core, leaving, timeout_s)
        try:
            if leaving:
                await asyncio.wait([asyncio.wrap_future(gone) for _, gone in leaving])
        except asyncio.CancelledError:
            departure.give_up()
            for entry, gone in leaving:
                self._cache._core.withdraw(entry, gone)
            raise
        return departure.result()

    def resize(
        self,
        *,
        vram: LimitValue | Mapping[str, LimitValue] = UNCHANGED,
        ram: LimitValue = UNCHANGED,
        max_models: int | None = cast("int", UNCHANGED),
    ) -> None:
        """
        Set other limits. See `ModelCache.resize`.
        """
        self._cache.resize(vram=vram, ram=ram, max_models=max_models)

    def stats(self) -> Stats:
        """
        Counters since the cache was made.
        """
        return self._cache.stats()

    def models(self) -> tuple[ModelInfo, ...]:
        """
        The models in memory, or on their way in or out.
        """
        return self._cache.models()

    def devices(self) -> tuple[DeviceInfo, ...]:
        """
        The devices that were used, and what the cache holds of them.
        """
        return self._cache.devices()

    async def explain(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        workload: Workload | None = None,
        **load_options: object,
    ) -> Explanation:
        """
        What a lease on a model would do now. See `ModelCache.explain`.
        """
        return await _in_thread(
            functools.partial(
                self._cache.explain,
                model_size_or_path,
                device,
                compute_type,
                workload=workload,
                **load_options,
            )
        )

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """
        Call *listener* with each event, on any thread. See `ModelCache.subscribe`.
        """
        return self._cache.subscribe(listener)

    async def close(self, timeout_s: float | None = 10.0) -> None:
        """
        Close the cache, for threads too. See `ModelCache.close`.
        """
        await self._gone(self._cache._core.close(), timeout_s)
        await _in_thread(self._cache.close, timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _in_thread(self._cache.__exit__, kind, error, trace)

    def __repr__(self) -> str:
        return repr(self._cache).replace("<ModelCache", "<AsyncModelCache", 1)


class AsyncLease:
    """
    A lease to come: to be awaited, or held for an ``async with`` block.
    """

    def __init__(self, acquire: Coroutine[None, None, Lease]) -> None:
        self._acquire = acquire
        self._lease: Lease | None = None

    def __await__(self) -> Generator[None, None, Lease]:
        return self._acquire.__await__()

    async def __aenter__(self) -> WhisperModel:
        self._lease = await self
        return self._lease.whisper

    async def __aexit__(self, *_exception: object) -> None:
        if self._lease is not None:
            self._lease.release()


class AsyncCachedModel:
    """
    A `CachedModel` whose calls are awaited. Made by `AsyncModelCache.get_model`.
    """

    def __init__(self, cache: AsyncModelCache, source: ModelSource) -> None:
        self._cache = cache
        self._source = source

    @property
    def key(self) -> ModelKey:
        """
        Which model this is: canonical name, device, effective compute type.
        """
        return self._source.key

    def lease(self) -> AsyncLease:
        """
        The real model, held for an ``async with`` block.
        """
        return self._hold(DEFAULT_WORKLOAD)

    def _hold(self, workload: Workload) -> AsyncLease:
        source = self._source
        return self._cache._lease(
            source.request, workload, source.keep_alive_s, source.timeout_s
        )

    async def transcribe(
        self,
        audio: AudioInput,
        *args: object,
        batch_size: int | None = None,
        **options: object,
    ) -> tuple[AsyncSegments[Segment], TranscriptionInfo]:
        """
        Transcribe; the segments are iterated over with ``async for``.

        Takes and raises what `CachedModel.transcribe` does.
        """
        samples = await _in_thread(self._source.decode_audio, audio)
        lease = await self._hold(workload_of(options, batch_size))
        call = self._source.transcriber(lease, batch_size)
        result = await _call(lease, call, samples, *args, **options)
        segments, info = cast(
            "tuple[LeasedIterator[Segment], TranscriptionInfo]", result
        )
        return AsyncSegments(segments), info

    async def detect_language(
        self, audio: AudioInput | None = None, *args: object, **options: object
    ) -> tuple[str, float, list[tuple[str, float]]]:
        """
        The language spoken. Takes and raises what `CachedModel.detect_language` does.
        """
        samples = None
        if audio is not None:
            samples = await _in_thread(self._source.decode_audio, audio)
        lease = await self._hold(DEFAULT_WORKLOAD)
        call = lease.whisper.detect_language
        result = await _call(lease, call, samples, *args, **options)
        return cast("tuple[str, float, list[tuple[str, float]]]", result)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._source}>"


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
        if self._step is None:
            self._step = _pool().submit(next, self._items, _END)
        try:
            item = await asyncio.shield(asyncio.wrap_future(self._step))
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._step = None
            raise
        self._step = None
        if item is _END:
            raise StopAsyncIteration
        return cast("T", item)

    async def aclose(self) -> None:
        """
        End early and let the model go, once the step in flight is over.
        """
        await _in_thread(self._items.close)
        self._step = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()


async def _call(
    lease: Lease, call: Callable[..., object], *args: object, **options: object
) -> object:
    """
    `call_leased` on a thread; the model is held until that ends, cancelled or not.
    """
    lease.owned = True
    bound = functools.partial(call_leased, lease, call, *args, **options)
    future = _pool().submit(bound)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if future.cancelled():  # before a thread was free for it
            lease.release()
        else:
            future.add_done_callback(_close_result)
        raise


def _close_result(future: Future[object]) -> None:
    if future.exception() is None:
        result = future.result()
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, LeasedIterator):
            first.close()
