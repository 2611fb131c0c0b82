"""
The engine of a server whose models are in its own process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
from starlette.concurrency import run_in_threadpool

from whispercache.async_cache import AsyncModelCache
from whispercache.engine.files import claims_of
from whispercache.engine.naming import canonical_model, short_name
from whispercache.errors import DownloadTimeout, LeaseTimeout, WhisperCacheError
from whispercache.events import WaitingInfo
from whispercache.keys import ModelKey
from whispercache.metrics import CacheCollector
from whispercache.watch.live import Snapshot, Watch, in_words

from .calls import transcribe
from .engine import Phase, nobody
from .loads import Loads
from .logs import FIELDS
from .room import Room

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from prometheus_client.core import Metric
    from typing_extensions import Self

    from whispercache.cache import ModelCache
    from whispercache.engine.calls.languages import Knowledge
    from whispercache.events import Event
    from whispercache.lease import Lease
    from whispercache.results import Breaks

    from .engine import Samples, Segments, Terms
    from .offers import Offer, Offers

_log = logging.getLogger("whispercache")


class LocalEngine:
    """
    An `Engine` over a cache of this process, which is shared and stays open.

    Args:
        offers: The models that it is asked for.
        cache: The cache that they are in.
        parallel: Number of calls on each model that may be at work at once, whatever
            the cache has for that.
        max_audio_s: Seconds of their audio that may be in memory, and as many again of
            batches: people do not wait for the end of those.

    Raises:
        WhisperCacheError: a model on the list does not exist, or its device does not.
    """

    def __init__(
        self,
        offers: Offers,
        cache: ModelCache,
        parallel: int = 1,
        max_audio_s: float = math.inf,
    ) -> None:
        self.cache: AsyncModelCache = AsyncModelCache(cache)
        self._offers = offers
        # Finds names that do not exist, without a download.
        for offer in offers:
            cache.get_model(*offer.place)
        self._watch: Watch | None = None
        self._collector: CacheCollector | None = None
        # Not the loop's own pool, for which the end of the loop waits. Threads are made
        # when they are needed, for downloads one for each model.
        self._callers = ThreadPoolExecutor(
            parallel * len(offers), thread_name_prefix="whispercache-call"
        )
        self._fetchers = ThreadPoolExecutor(
            len(offers), thread_name_prefix="whispercache-fetch"
        )
        self._parallel = parallel
        self._max_audio_s = max_audio_s
        self._renew()

    def _renew(self) -> None:
        """
        Forgets what was of an event loop that has ended.
        """
        self._loads = Loads(self._waited_for_by)
        # Downloads under way, by the name of the model.
        self._fetching: dict[str, asyncio.Future[None]] = {}
        # That of batches is True's.
        self._rooms = {kind: Room(self._max_audio_s) for kind in (False, True)}
        # Requests that wait, and not in the cache: what they want, since when.
        self._elsewhere: dict[object, tuple[Offer, Terms, float]] = {}

    @property
    def is_closed(self) -> bool:
        """
        True once the cache was closed.
        """
        return self.cache.is_closed

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """
        Watches the cache and counts its events in an ``async with`` block.
        """
        self._renew()
        with ExitStack() as stack:
            cache = self.cache.cache
            self._watch = stack.enter_context(Watch(cache, self.name_of))
            self._collector = CacheCollector(cache)
            stack.callback(self._collector.close)
            stack.callback(cache.subscribe(self._loads.note))
            stack.callback(cache.subscribe(self._log))
            yield

    def _log(self, event: Event) -> None:
        kind, name, text = in_words(event, self.name_of)
        # Each load would have three lines.
        if kind not in ("loading", "granted"):
            fields = {"event": kind, "model": name}
            _log.info("%s %s", name, text, extra={FIELDS: fields})

    # What is known of a model -----------------------------------------------------

    def key(self, offer: Offer) -> ModelKey | None:
        """
        Returns a model's key, as far as it is known without a download.
        """
        return self.cache.cache.known_key(*offer.place)

    def name_of(self, key: ModelKey) -> str:
        """
        Returns the clients' name of a model in memory.
        """
        # The first of two names of one model.
        return next(self._names_of(key), short_name(key))

    def _names_of(self, key: ModelKey) -> Iterator[str]:
        for offer in self._offers:
            found = self.key(offer)
            # It may have been on another card before.
            if found is not None and replace(found, device=key.device) == key:
                yield offer.name

    def _waited_for_by(self, key: ModelKey) -> Iterator[str]:
        """
        Yields the names by which clients wait for a load.
        """
        names = list(self._names_of(key))
        yield from names
        if not names:
            # In a type that nobody named: a fallback of what they asked for.
            for offer in self._offers:
                if canonical_model(offer.place[0]) == key.model:
                    yield offer.name

    async def knowledge(self, offer: Offer) -> Knowledge | None:
        """
        Returns what a model's files tell of it. See `Engine.knowledge`.
        """
        # On a thread, since files may be read for it.
        return await run_in_threadpool(self.cache.cache.knowledge, *offer.place)

    async def may_tell_words(self, offer: Offer) -> bool:
        """
        Returns what a model's files tell of the times of words.
        """
        return await run_in_threadpool(self._may_tell_words, offer)

    def _may_tell_words(self, offer: Offer) -> bool:
        key = self.key(offer)
        if key is None:
            return True
        loader = self.cache.cache.loader
        try:
            files = loader.locate(key.model, dict(key.options), download=False)
            return files is None or claims_of(files).tells_words
        except WhisperCacheError:  # which the load will raise as well
            return True

    # Work -------------------------------------------------------------------------

    async def transcribe(
        self,
        offer: Offer,
        samples: Samples,
        options: Mapping[str, object],
        terms: Terms,
        tell: Callable[[Phase], None] = nobody,
    ) -> tuple[Segments, TranscriptionInfo]:
        """
        Begins to transcribe. See `Engine.transcribe`.
        """
        with ExitStack() as entered:
            lease = await self._turn(offer, terms, tell, entered)
            with ExitStack() as held:
                # Until the call has the lease, an error must release it.
                held.callback(lease.release)
                tell("working")
                heard = await run_in_threadpool(samples)
                breaks = None
                if terms.is_batch:
                    breaks = await run_in_threadpool(self._breaks, offer, terms, lease)
                # From now on the call has it, whatever becomes of the request.
                held.pop_all()
            batched = self.cache.cache.loader.batched
            segments, info = await transcribe(
                self._callers, lease, heard, dict(options), batched, breaks=breaks
            )
            return _Placed(segments, entered.pop_all()), info

    async def _turn(
        self,
        offer: Offer,
        terms: Terms,
        tell: Callable[[Phase], None],
        entered: ExitStack,
    ) -> Lease:
        """
        Returns a lease for a call, whose audio may be in memory until *entered* ends.
        """
        began_s = time.monotonic()
        lease = await self._lease(offer, terms, tell, self._parallel)
        place = self._rooms[terms.is_batch].enter(terms.audio_s, terms.level)
        entered.callback(place.leave)
        if place.is_had.is_set():
            return lease
        # Others may need the model meanwhile, perhaps for the audio that is waited for.
        lease.release()
        tell("waiting")
        limit_s = terms.timeout_s
        end_s = None if limit_s is None else limit_s + began_s - time.monotonic()
        with self._waiting_elsewhere(offer, terms), anyio.move_on_after(end_s):
            await place.is_had.wait()
        waited_s = time.monotonic() - began_s
        if not place.is_had.is_set():
            raise LeaseTimeout(offer.name, waited_s)
        left_s = None if limit_s is None else max(0.0, limit_s - waited_s)
        terms = replace(terms, timeout_s=left_s)
        try:
            return await self._lease(offer, terms, tell, self._parallel)
        except LeaseTimeout as late:
            late.waited_s += waited_s
            raise

    def _breaks(self, offer: Offer, terms: Terms, lease: Lease) -> Breaks | None:
        """
        Returns how a batch's call gives its lease back between two segments; None for
        models that cannot.
        """
        model = self.cache.cache.get_model(
            *offer.place,
            keep_alive=terms.keep_alive,
            priority=terms.priority,
            parallel=self._parallel,
        )
        return model.breaks(lease, terms.workload)

    async def load(
        self, offer: Offer, terms: Terms, tell: Callable[[Phase], None] = nobody
    ) -> None:
        """
        Loads a model. See `Engine.load`.
        """
        (await self._lease(offer, terms, tell)).release()

    async def pin(
        self, offer: Offer, terms: Terms, tell: Callable[[Phase], None] = nobody
    ) -> None:
        """
        Loads a model, and keeps it. See `Engine.pin`.
        """
        lease = await self._lease(offer, terms, tell)
        with lease:
            # Under the lease: an idle model could be evicted in between.
            lease.pin()

    async def _lease(
        self,
        offer: Offer,
        terms: Terms,
        tell: Callable[[Phase], None],
        parallel: int | None = None,
    ) -> Lease:
        is_there, limit_s = False, terms.timeout_s
        # The cache's own limit begins once the files are there, and tells more.
        with anyio.move_on_after(None if limit_s is None else limit_s + 0.5):
            # Outside the cache, in which a download would hold a place in the queue.
            if self.key(offer) is None:
                tell("downloading")
                with self._waiting_elsewhere(offer, terms):
                    await self._fetch(offer)
            else:
                await self._fetch(offer)
            is_there = True
            if terms.check is not None:
                terms.check(await self.knowledge(offer))
            tell("waiting")
            with self._loads.told(offer.name, tell):
                return await self.cache.lease(
                    *offer.place,
                    timeout_s=limit_s,
                    keep_alive=terms.keep_alive,
                    workload=terms.workload,
                    priority=terms.priority,
                    parallel=parallel,
                )
        ended = LeaseTimeout if is_there else DownloadTimeout
        raise ended(offer.name, limit_s or 0.0)

    @contextmanager
    def _waiting_elsewhere(self, offer: Offer, terms: Terms) -> Iterator[None]:
        """
        Has a request among those that wait, for the ``with`` block.
        """
        token = object()
        self._elsewhere[token] = offer, terms, time.monotonic()
        try:
            yield
        finally:
            del self._elsewhere[token]

    async def _fetch(self, offer: Offer) -> None:
        """
        Downloads a model's files if they are missing. Requests for the same model share
        one download, on a thread of its own: it may take long, or for ever.
        """
        fetching = self._fetching.get(offer.name)
        # There is no await between this look and the note, so there is one download.
        if fetching is None:
            loop = asyncio.get_running_loop()
            download = self.cache.cache.download
            fetching = loop.run_in_executor(self._fetchers, download, *offer.place)
            self._fetching[offer.name] = fetching
            fetching.add_done_callback(lambda _: self._fetching.pop(offer.name))
        # A request that is cancelled does not end it for the others. What went wrong is
        # told by the lease, which may fall back.
        # Not awaited itself, which would cancel it with the request.
        await asyncio.wait((fetching,))
        fetching.exception()

    async def unpin(self, offer: Offer) -> bool:
        """
        Ends a pin. See `Engine.unpin`.
        """
        key = self.key(offer)
        # Not known yet means that it was never loaded.
        return key is not None and bool(
            self.cache.unpin(key.model, key.device, key.compute_type)
        )

    async def evict(self, offer: Offer, timeout_s: float) -> bool:
        """
        Unloads a model. See `Engine.evict`.
        """
        key = self.key(offer)
        return key is not None and bool(
            await self.cache.evict(
                key.model, key.device, key.compute_type, timeout_s=timeout_s
            )
        )

    # What is seen -----------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """
        Returns the state of the cache, with the requests that wait outside of it: for a
        download, or for room for their audio.
        """
        assert self._watch is not None, "the server is not running"
        found, now_s = self._watch.snapshot(), time.monotonic()
        others = (
            # Its device and type are settled by the cache.
            WaitingInfo(
                (ModelKey(offer.name, "", ""),),
                now_s - since_s,
                terms.level,
            )
            for offer, terms, since_s in self._elsewhere.values()
        )
        return replace(found, waiting=(*others, *found.waiting))

    async def metrics(self) -> Sequence[Metric]:
        """
        Returns the figures of the cache.
        """
        collector = self._collector
        assert collector is not None, "the server is not running"
        return await run_in_threadpool(lambda: list(collector.collect()))


class _Placed:
    """
    Segments of a call, with what is given up after the last one: answers may take long
    to be read.
    """

    def __init__(self, segments: Segments, entered: ExitStack) -> None:
        self._segments = segments
        self._entered = entered

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Segment:
        try:
            return await anext(self._segments)
        except StopAsyncIteration:
            self._entered.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        with self._entered:
            await self._segments.__aexit__(*exception)
