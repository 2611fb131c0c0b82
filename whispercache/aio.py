"""
AsyncModelCache: the same cache, awaited.

It holds no state of its own: tasks and threads share one core, one queue, one set of
books. Waiting for a model takes no thread; disk, downloads and the models' work run on
a pool of threads, so the event loop is never blocked.
"""

from __future__ import annotations

import asyncio
import functools
import os
import tracemalloc
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast

from .cache import (
    CLOSED,
    UNCHANGED,
    Departure,
    ModelCache,
    ModelSource,
    as_request,
    as_requests,
    log_held,
    tell_own,
)
from .core.fallback import Attempts
from .core.threads import caller, current_owner, token_of
from .engine.calls.prepare import prepared, prepared_detection
from .engine.naming import anchored
from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .errors import EvictionTimeout
from .lease import Leases
from .model import Handle, LeasedIterator, call_leased

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
    from types import TracebackType

    from faster_whisper import WhisperModel
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from typing_extensions import ParamSpec, Self, Unpack

    from .cache import CacheOptions, ModelRequest
    from .core.fallback import Terms
    from .core.moves import Leaving
    from .core.resolver import Request
    from .engine.api import AudioInput
    from .engine.calls.languages import Knowledge
    from .engine.sizes.footprint import Workload
    from .events import DeviceInfo, Event, Explanation, ModelInfo, Stats, WaitingInfo
    from .keys import ModelKey
    from .lease import Lease
    from .units import DurationValue, LimitValue

    P = ParamSpec("P")

__all__ = [
    "AsyncCachedModel",
    "AsyncLease",
    "AsyncLeases",
    "AsyncModelCache",
    "AsyncSegments",
]

T = TypeVar("T")

CALL_THREADS = 64
"""
Calls on models that tasks may have in flight at once. A model runs ``num_workers`` of
its calls at a time; the others wait in it, each on its thread.
"""

_END = object()


def _current_task() -> object:
    """
    A token of the running task, as the owner of leases; it does not keep it alive.
    """
    task = asyncio.current_task()
    return current_owner() if task is None else token_of(task)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # Not the loop's own pool: long transcriptions would keep the application out of it.
    return ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="whispercache-call")


if hasattr(os, "register_at_fork"):  # its threads are not in the child
    os.register_at_fork(after_in_child=_pool.cache_clear)


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
        fallback: Sequence[str] | None = None,
        **load_options: object,
    ) -> AsyncCachedModel:
        """
        A model to await, in memory whenever it is used. See `ModelCache.get_model`.
        """
        model = await _in_thread(anchored, model_size_or_path)
        await _in_thread(
            self._cache.get_model,
            model,
            device,
            compute_type,
            **load_options,  # type: ignore[arg-type]
        )
        request = as_request(model, device, compute_type, load_options)
        terms = self._cache._terms(timeout_s, keep_alive, fallback)
        return AsyncCachedModel(self, ModelSource(self._cache, request, terms))

    def lease(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: float | None = None,
        keep_alive: DurationValue | None = None,
        fallback: Sequence[str] | None = None,
        workload: Workload | None = None,
        **load_options: object,
    ) -> AsyncLease:
        """
        The real WhisperModel, held for an ``async with`` block. See `ModelCache.lease`.

        Its calls block: run them in a thread, or use `get_model`, which does.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._cache._terms(timeout_s, keep_alive, fallback)
        return self._lease(request, workload or DEFAULT_WORKLOAD, terms)

    def lease_many(
        self,
        models: Sequence[ModelRequest],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: float | None = None,
        keep_alive: DurationValue | None = None,
        workload: Workload | None = None,
        **load_options: object,
    ) -> AsyncLeases:
        """
        Several models, held together for an ``async with`` block. See
        `ModelCache.lease_many`.
        """
        requests = as_requests(models, device, compute_type, load_options)
        terms = self._cache._terms(timeout_s, keep_alive, ())
        return AsyncLeases(
            self._acquire_many(requests, workload or DEFAULT_WORKLOAD, terms)
        )

    def _lease(self, request: Request, workload: Workload, terms: Terms) -> AsyncLease:
        return AsyncLease(self._acquire(request, workload, terms))

    async def _acquire(
        self, request: Request, workload: Workload, terms: Terms
    ) -> Lease:
        cache = self._cache
        lease = cache._hit(request, workload, terms, _current_task())
        if lease is None:
            lease = await self._climb(request, workload, terms)
        if tracemalloc.is_tracing():
            lease.taken_at = caller()
        return lease

    async def _climb(self, request: Request, workload: Workload, terms: Terms) -> Lease:
        attempts = Attempts(self._cache._core, request, terms)
        for attempt, terms_left in attempts:
            with attempts.judging():
                (lease,) = await self._wait([attempt], workload, terms_left)
                return attempts.succeed(lease)
        raise attempts.failure()

    async def _acquire_many(
        self, requests: Sequence[Request], workload: Workload, terms: Terms
    ) -> Leases:
        leases = Leases(await self._wait(requests, workload, terms))
        if tracemalloc.is_tracing():
            for lease in leases:
                lease.taken_at = caller()
        return leases

    async def _wait(
        self, requests: Sequence[Request], workload: Workload, terms: Terms
    ) -> tuple[Lease, ...]:
        core = self._cache._core
        parts = await _in_thread(self._cache._locate, requests, workload)
        waiter = core.request(
            parts, terms.keep_alive_s, terms.timeout_s, _current_task()
        )
        try:
            return await asyncio.wrap_future(waiter.future)
        except BaseException:
            core.abandon(waiter)
            raise

    async def download(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> None:
        """
        Downloads a model's files, if they are not on this disk. See
        `ModelCache.download`.
        """
        await _in_thread(
            functools.partial(
                self._cache.download,
                model_size_or_path,
                device,
                compute_type,
                **load_options,
            )
        )

    async def knowledge(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> Knowledge | None:
        """
        Returns the languages and tokens of a model. See `ModelCache.knowledge`.
        """
        return await _in_thread(
            functools.partial(
                self._cache.knowledge,
                model_size_or_path,
                device,
                compute_type,
                **load_options,
            )
        )

    def known_key(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> ModelKey | None:
        """
        Returns the key that the last request with these parameters got. See
        `ModelCache.known_key`.
        """
        return self._cache.known_key(
            model_size_or_path, device, compute_type, **load_options
        )

    async def preload(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        tier: str = "device",
        timeout_s: float | None = None,
        **load_options: object,
    ) -> None:
        """
        Load a model now, or read its files. See `ModelCache.preload`.
        """
        if tier != "device":
            place = (model_size_or_path, device, compute_type)
            preload = functools.partial(self._cache.preload, *place, tier=tier)
            await _in_thread(preload, **load_options)
            return
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._cache._terms(timeout_s, None, None)
        async with self._lease(request, DEFAULT_WORKLOAD, terms):
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
        terms = self._cache._terms(timeout_s, None, None)
        lease = await self._lease(request, DEFAULT_WORKLOAD, terms)
        with lease:
            lease.pin()

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
        matching = self._cache._resolver.matching
        matches = matching(model_size_or_path, device, compute_type)
        waits_for = _current_task() if timeout_s is None else None
        leaving = self._cache._core.evict(matches, waits_for)
        return await self._gone(leaving, timeout_s)

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

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        The requests that wait for their models, the oldest first.
        """
        return self._cache.waiting()

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

    @property
    def is_closed(self) -> bool:
        """
        True once the cache was closed. See `ModelCache.is_closed`.
        """
        return self._cache.is_closed

    async def close(self, timeout_s: float | None = 10.0) -> None:
        """
        Close the cache, for threads too. See `ModelCache.close`.
        """
        core = self._cache._core
        leaving = core.close()
        if leaving is not None:
            tell_own(core.end_own((_current_task(),), CLOSED), timeout_s)
            await self._gone(leaving, timeout_s)
            await _in_thread(core.join, timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except EvictionTimeout as held:
            # The error that ends the block tells more than this one.
            if error is None:
                raise
            log_held(held)

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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.__exit__(kind, error, trace)


class AsyncLeases:
    """
    Leases to come on several models: to be awaited, or held for an ``async with``
    block, whose value are the models themselves.
    """

    def __init__(self, acquire: Coroutine[None, None, Leases]) -> None:
        self._acquire = acquire
        self._leases: Leases | None = None

    def __await__(self) -> Generator[None, None, Leases]:
        return self._acquire.__await__()

    async def __aenter__(self) -> tuple[WhisperModel, ...]:
        self._leases = await self
        return tuple(lease.whisper for lease in self._leases)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._leases is not None:
            self._leases.__exit__(kind, error, trace)


class AsyncCachedModel(Handle):
    """
    A `CachedModel` whose calls are awaited. Made by `AsyncModelCache.get_model`.
    """

    def __init__(self, cache: AsyncModelCache, source: ModelSource) -> None:
        self._cache = cache
        self._source = source
        self._served_by: ModelKey | None = None

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
        return self._cache._lease(self._source.request, workload, self._source.terms)

    @property
    def served_by(self) -> ModelKey | None:
        """
        Which model the last call got. See `CachedModel.served_by`.
        """
        return self._served_by

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
        Transcribe; the segments are iterated over with ``async for``.

        Takes and raises what `CachedModel.transcribe` does.
        """
        ready = await _in_thread(
            prepared, self._source, audio, args, options, batch_size
        )
        lease = await self._held(ready.workload)
        call = self._source.transcriber(lease, ready.batch_size)
        result = await _call(lease, call, ready.samples, **ready.options)
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
        ready = await _in_thread(prepared_detection, self._source, audio, args, options)
        lease = await self._held(ready.workload)
        call = lease.whisper.detect_language
        result = await _call(lease, call, ready.samples, **ready.options)
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
        self._items.follow(_current_task())
        if self._step is None:
            self._step = _pool().submit(_next, self._items)
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

    @property
    def key(self) -> ModelKey:
        """
        The model that makes these items. See `LeasedIterator.key`.
        """
        return self._items.key

    def hand_over(self) -> None:
        """
        Say that another task will iterate. See `LeasedIterator.hand_over`.
        """
        self._items.hand_over()

    async def aclose(self) -> None:
        """
        End early and let the model go, once the step in flight is over.
        """
        # Whoever awaits it may be cancelled before a thread is free; it goes on.
        closing = _pool().submit(self._items.close)
        await asyncio.shield(asyncio.wrap_future(closing))
        self._step = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.aclose()


def _next(items: LeasedIterator[T]) -> T | object:
    try:
        return items.step()
    except StopIteration:  # which no future can carry
        return _END


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
            lease.hand_over()
            future.add_done_callback(_close_result)
        raise


def _close_result(future: Future[object]) -> None:
    if future.exception() is None:
        result = future.result()
        first = result[0] if isinstance(result, tuple) and result else result
        if isinstance(first, LeasedIterator):
            first.close()
