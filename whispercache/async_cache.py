"""
AsyncModelCache: the same cache, awaited.

Tasks and threads share one core and one queue; nothing here has a state of its own.
Waiting for a model takes no thread.
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from .aio import AsyncCachedModel, current_task, in_thread
from .base import CacheBase, Departure, outranked_by
from .cache import ModelCache
from .core.fallback import Attempts
from .engine.naming import anchored
from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .lease import Lease, Leases
from .options import as_request, as_requests, by_position, parse_tier, parse_timeout

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Generator, Sequence
    from types import TracebackType

    from faster_whisper import WhisperModel
    from typing_extensions import Self, Unpack

    from .core.evictions import Leaving
    from .core.fallback import Terms
    from .core.resolver import Request
    from .engine.calls.languages import Knowledge
    from .engine.sizes.footprint import Workload
    from .events import Explanation
    from .options import (
        CacheOptions,
        ComputeType,
        DeviceIndex,
        ModelRequest,
        Priority,
        Tier,
    )
    from .units import DurationValue
    from .watch.live import Snapshot

Held = TypeVar("Held", bound="Lease | Leases")


class _Grant(Generic[Held]):
    def __init__(self, acquire: Coroutine[None, None, Held]) -> None:
        self._acquire = acquire
        self._held: Held | None = None

    def __await__(self) -> Generator[None, None, Held]:
        return self._acquire.__await__()

    async def _granted(self) -> Held:
        # Kept for the end of the block, unlike a lease that is awaited.
        self._held = await self
        return self._held

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._held is not None:
            self._held.__exit__(kind, error, trace)


class AsyncLease(_Grant[Lease]):
    """
    A lease that is still to be granted: await it, or hold it for an ``async with``.
    """

    async def __aenter__(self) -> WhisperModel:
        return (await self._granted()).__enter__()


class AsyncLeases(_Grant[Leases]):
    """
    Leases on several models that are still to be granted: await them, or hold them for
    an ``async with`` block, whose value are the models themselves.
    """

    async def __aenter__(self) -> tuple[WhisperModel, ...]:
        return (await self._granted()).__enter__()


class AsyncModelCache(CacheBase):
    """
    A `ModelCache` for tasks, with the same methods. Parameters, results and errors are
    those of `ModelCache`'s, where they are documented.

    Args:
        cache: A cache to share with threads; a new one if None.
        options: The parameters of a new `ModelCache`.
    """

    def __init__(
        self, cache: ModelCache | None = None, **options: Unpack[CacheOptions]
    ) -> None:
        if cache is not None and options:
            raise TypeError("give a cache, or the parameters of a new one; not both")
        # Kept alive: without it, a fork would not reach what the two share.
        self._cache: ModelCache = cache or ModelCache(**options)
        shared = self._cache
        terms = shared._usual_terms
        super().__init__(shared._core, shared._resolver, shared._limits, terms)

    @property
    def cache(self) -> ModelCache:
        """
        The same cache, for threads.
        """
        return self._cache

    # Leases ---------------------------------------------------------------------------

    async def get_model(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        *more: ComputeType | DeviceIndex,
        compute_type: ComputeType = "default",
        timeout_s: DurationValue | None = None,
        keep_alive: DurationValue | None = None,
        priority: Priority | None = None,
        parallel: int | None = None,
        fallback: Sequence[str] | None = None,
        **load_options: object,
    ) -> AsyncCachedModel:
        """
        Returns a model to await, in memory whenever it is used.
        """
        # Both touch the disk.
        model = await in_thread(anchored, model_size_or_path)
        compute_type, load_options = by_position(more, compute_type, load_options)
        request = as_request(model, device, compute_type, load_options)
        terms = self._terms(timeout_s, keep_alive, fallback, priority, parallel)
        source = await in_thread(self._cache._source, request, terms)
        return AsyncCachedModel(self, source)

    def lease(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: DurationValue | None = None,
        keep_alive: DurationValue | None = None,
        priority: Priority | None = None,
        parallel: int | None = None,
        fallback: Sequence[str] | None = None,
        workload: Workload | None = None,
        **load_options: object,
    ) -> AsyncLease:
        """
        Returns the real WhisperModel, held for an ``async with`` block.

        Its calls block: run them in a thread, or use `get_model`, which does.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, keep_alive, fallback, priority, parallel)
        return self._lease(request, workload or DEFAULT_WORKLOAD, terms)

    def lease_many(
        self,
        models: Sequence[ModelRequest],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: DurationValue | None = None,
        keep_alive: DurationValue | None = None,
        priority: Priority | None = None,
        parallel: int | None = None,
        workload: Workload | None = None,
        **load_options: object,
    ) -> AsyncLeases:
        """
        Returns several models, held together for an ``async with`` block.
        """
        requests = as_requests(models, device, compute_type, load_options)
        terms = self._terms(timeout_s, keep_alive, (), priority, parallel)
        return AsyncLeases(
            self._acquire_many(requests, workload or DEFAULT_WORKLOAD, terms)
        )

    def _lease(self, request: Request, workload: Workload, terms: Terms) -> AsyncLease:
        return AsyncLease(self._acquire(request, workload, terms))

    async def _acquire(
        self, request: Request, workload: Workload, terms: Terms
    ) -> Lease:
        # Without a thread: a model in memory is had within microseconds.
        hit: Callable[..., Lease | None] = self._core.hit
        if terms.parallel is not None:
            hit = partial(self._core.hit_below, terms.parallel)
        lease = hit(request, workload, terms.keep_alive_s, current_task())
        return await self._climb(request, workload, terms) if lease is None else lease

    async def _climb(self, request: Request, workload: Workload, terms: Terms) -> Lease:
        attempts = Attempts(self._core, request, terms)
        for attempt, terms_left in attempts:
            with attempts.judging():
                (lease,) = await self._wait([attempt], workload, terms_left)
                attempts.succeed(lease.key)
                return lease
        raise attempts.failure()

    async def _acquire_many(
        self, requests: Sequence[Request], workload: Workload, terms: Terms
    ) -> Leases:
        return Leases(await self._wait(requests, workload, terms))

    async def _wait(
        self, requests: Sequence[Request], workload: Workload, terms: Terms
    ) -> tuple[Lease, ...]:
        core = self._core
        parts = await in_thread(self._locate, requests, workload)
        task = current_task()
        waiter = core.request(
            parts,
            terms.keep_alive_s,
            terms.timeout_s,
            task,
            priority=terms.priority,
            parallel=terms.parallel,
            resumes=terms.resumes,
        )
        try:
            leases = await asyncio.wrap_future(waiter.future)
        except BaseException:
            # A task may be cancelled in the moment of its grant, which then goes back.
            core.abandon(waiter)
            raise
        core.trace(leases)
        return leases

    # Models ---------------------------------------------------------------------------

    async def download(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> None:
        """
        Downloads a model's files, if they are not on this disk.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        await in_thread(self._locate, [request], DEFAULT_WORKLOAD)

    async def knowledge(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> Knowledge | None:
        """
        Returns the languages and tokens of a model.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        return await in_thread(self._resolver.knowledge, request, download=False)

    async def preload(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        tier: Tier = "device",
        timeout_s: DurationValue | None = None,
        fallback: Sequence[str] | None = None,
        **load_options: object,
    ) -> None:
        """
        Loads a model now, or reads its files.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, None, fallback)
        if parse_tier(tier) == "page":
            await in_thread(self._read, request)
            return
        # Not `ModelCache.preload` on a thread: its wait would hold one.
        async with self._lease(request, DEFAULT_WORKLOAD, terms):
            pass

    async def pin(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: DurationValue | None = None,
        fallback: Sequence[str] | None = None,
        **load_options: object,
    ) -> None:
        """
        Loads a model now and keeps it, idle or not.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, None, fallback)
        lease = await self._lease(request, DEFAULT_WORKLOAD, terms)
        # Under the lease, or the model might be evicted before it is pinned.
        with lease:
            lease.pin()

    async def evict(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
        *,
        timeout_s: DurationValue | None = None,
    ) -> int:
        """
        Unloads models now; returns their number.
        """
        wait_s = parse_timeout(timeout_s)
        matches = self._resolver.matching(model_size_or_path, device, compute_type)
        waits_for = current_task() if wait_s is None else None
        return await self._await_gone(self._core.evict(matches, waits_for), wait_s)

    async def _await_gone(self, leaving: list[Leaving], timeout_s: float | None) -> int:
        departure = Departure(self._core, leaving, timeout_s)
        try:
            # asyncio.wait() takes no empty list.
            if leaving:
                await asyncio.wait([asyncio.wrap_future(gone) for _, gone in leaving])
        except asyncio.CancelledError:
            # A task that is gone evicts nothing: what has not begun is taken back.
            departure.give_up()
            for entry, gone in leaving:
                self._core.withdraw(entry, gone)
            raise
        return departure.result()

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
        Returns what a lease on a model would do now.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        return await in_thread(self._explain, request, workload or DEFAULT_WORKLOAD)

    async def top(self, interval_s: DurationValue = 1.0) -> None:
        """
        Shows the cache live in the terminal, until it is cancelled. Raises TypeError or
        ValueError if *interval_s* is no time above 0.
        """
        from .watch.live import Watch
        from .watch.top import watch

        is_over = threading.Event()
        with Watch(self) as seen:

            def snapshot() -> Snapshot:
                # A thread cannot be cancelled. This is the end that the view knows.
                if is_over.is_set():
                    raise KeyboardInterrupt
                return seen.snapshot()

            try:
                await in_thread(watch, snapshot, interval_s=interval_s)
            finally:
                is_over.set()

    # Closing --------------------------------------------------------------------------

    async def close(self, timeout_s: DurationValue | None = 10.0) -> None:
        """
        Closes the cache, for threads too.
        """
        wait_s = parse_timeout(timeout_s)
        leaving = self._core.close()
        if leaving is not None:
            # Only the task's own segments: its loop's thread runs other tasks, too.
            self._end_own((current_task(),), wait_s)
            await self._await_gone(leaving, wait_s)
            await in_thread(self._core.join, wait_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with outranked_by(error):
            await self.close()
