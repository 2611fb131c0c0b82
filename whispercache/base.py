"""
Base: the part of a cache that is the same for threads and tasks, since it never waits.

`ModelCache` and `AsyncModelCache` add what waits. They share one core, so nothing here
belongs to one of the two.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .core.fallback import Terms, as_ladder
from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .errors import EvictionTimeout, LeaseDeadlock
from .options import (
    UNCHANGED,
    Unchanged,
    as_request,
    limits_by_device,
    parse_count,
    parse_timeout,
)
from .planning.priority import INTERACTIVE, parse_priority
from .units import parse_duration

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from .cache import ModelCache
    from .core.core import Core
    from .core.entries import Entry
    from .core.evictions import Leaving
    from .core.resolver import Request, Resolver, Target
    from .core.waiters import Wanted
    from .devices.memory import MemoryProbe
    from .engine.api import AudioInput, LoadedModel, Loader
    from .engine.calls.languages import Knowledge
    from .engine.files import ModelFiles
    from .engine.sizes.footprint import Workload
    from .events import DeviceInfo, Event, Explanation, ModelInfo, Stats, WaitingInfo
    from .keys import ModelKey
    from .lease import Lease
    from .model import Breaks
    from .options import Limits, Priority
    from .planning.deadlock import Owner
    from .units import DurationValue, LimitValue

_log = logging.getLogger("whispercache")


class CacheBase:
    """
    A cache without the methods that wait. The core is shared by all caches on it.
    """

    def __init__(
        self, core: Core, resolver: Resolver, limits: Limits, usual_terms: Terms
    ) -> None:
        self._core = core
        self._resolver = resolver
        self._limits = limits
        self._usual_terms = usual_terms

    # Requests -------------------------------------------------------------------------

    def _terms(
        self,
        timeout_s: DurationValue | None,
        keep_alive: DurationValue | None,
        fallback: Sequence[str] | None,
        priority: Priority | None = None,
        parallel: int | None = None,
    ) -> Terms:
        usual = self._usual_terms
        # One object for the usual case, which every hit passes.
        if (
            timeout_s is None
            and keep_alive is None
            and fallback is None
            and priority is None
            and parallel is None
        ):
            return usual
        return Terms(
            parse_timeout(timeout_s),
            None if keep_alive is None else parse_duration(keep_alive, "keep_alive"),
            usual.ladder if fallback is None else as_ladder(fallback),
            usual.priority if priority is None else parse_priority(priority),
            parse_count(parallel, "parallel"),
        )

    def _locate(self, requests: Sequence[Request], workload: Workload) -> list[Wanted]:
        """
        Returns the models of *requests*, with their files on this disk.

        Blocks: for downloads, so tasks call it on a thread.
        """
        from .core.waiters import Wanted

        order = list(range(len(requests)))
        if len(requests) > 1:
            # All are resolved before the first download, so that nonsense costs none.
            # The one with the least choice of a device is placed first.
            alone = [self._resolver.resolve(request) for request in requests]
            order.sort(key=lambda n: self._resolver.least_choice(alone[n]))
        targets: dict[int, Target] = {}
        for n in order:
            target = self._resolver.resolve(requests[n], beside=targets.values())
            self._resolver.locate(target, workload)
            targets[n] = target
        return [Wanted(targets[n].entry, workload) for n in range(len(requests))]

    def _read(self, request: Request) -> None:
        self._resolver.read(self._resolver.resolve(request))

    def _explain(self, request: Request, workload: Workload) -> Explanation:
        from .core import snapshots

        target = self._resolver.resolve(request, download=False)
        self._resolver.locate(target, workload, download=False)
        return snapshots.explain(self._core, target.entry, workload)

    def known_key(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> ModelKey | None:
        """
        Returns the key that the last request with these parameters got.

        None before the first one. Never touches the disk; `ModelCache.get_model` has
        the parameters.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        # A server asks for each model of each snapshot, so this is one look-up.
        entry = self._resolver.known(request)
        return None if entry is None else entry.key

    def unpin(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
    ) -> int:
        """
        Lets pinned models be evicted again; the parameters are those of `evict`.

        Returns:
            The number of models that were pinned.
        """
        matching = self._resolver.matching
        return self._core.unpin(matching(model_size_or_path, device, compute_type))

    # Limits ---------------------------------------------------------------------------

    def resize(
        self,
        *,
        vram: LimitValue | Mapping[str, LimitValue] | Unchanged = UNCHANGED,
        ram: LimitValue | Unchanged = UNCHANGED,
        max_models: int | Unchanged | None = UNCHANGED,
    ) -> None:
        """
        Sets other limits. A limit that is not given stays.

        Idle models beyond the new limits are evicted, leased ones once they are idle.
        Returns without waiting for that.

        Raises:
            TypeError, ValueError: a limit is nonsense; none was changed.
        """
        limits = self._limits
        vram = limits.vram if isinstance(vram, Unchanged) else vram
        ram = limits.ram if isinstance(ram, Unchanged) else ram
        # All is parsed before anything is changed.
        limit_of = limits_by_device(vram, ram)
        if isinstance(max_models, Unchanged):
            max_models = self._core.state.max_models
        else:
            max_models = parse_count(max_models, "max_models")
        limits.vram, limits.ram = vram, ram
        self._core.resize(limit_of, max_models)

    # Reports --------------------------------------------------------------------------

    def stats(self) -> Stats:
        """
        Returns the counters since the cache was made.
        """
        # Here and below: only programs that ask for reports import them.
        from .core import snapshots

        return snapshots.stats(self._core)

    def models(self) -> tuple[ModelInfo, ...]:
        """
        Returns the models that are in memory, or being loaded or unloaded.
        """
        from .core import snapshots

        return snapshots.models(self._core)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """
        Returns the devices that were used, and the memory that the cache holds there.
        """
        from .core import snapshots

        return snapshots.devices(self._core)

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        Returns the requests that wait for their models, the oldest first.
        """
        from .core import snapshots

        return snapshots.waiting(self._core)

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """
        Calls *listener* with each `Event` from now on, in order.

        It runs on the thread that made the event, often a device's loader: it should be
        quick, and must not wait for this cache. Errors that it raises are logged.

        Returns:
            A function that ends the subscription.
        """
        return self._core.outbox.subscribe(listener)

    @property
    def loader(self) -> Loader:
        """
        The loader of the models, as given to the constructor or the usual one.
        """
        return self._core.loader

    @property
    def probe(self) -> MemoryProbe:
        """
        The reader of the devices' memory, as given to the constructor or the usual one.
        """
        return self._core.probe

    @property
    def is_closed(self) -> bool:
        """
        True once the cache was closed: new requests are refused.
        """
        return self._core.is_closed

    def __repr__(self) -> str:
        from .core import snapshots

        return snapshots.describe(self._core, type(self).__name__)

    # Closing --------------------------------------------------------------------------

    def _end_own(
        self, owners: tuple[Owner, ...], timeout_s: float | None
    ) -> set[Entry]:
        # Segments of the thread or task that closes, and of those that have ended.
        held, interrupted = self._core.end_own(owners, "the cache was closed")
        if held and timeout_s is None:
            raise LeaseDeadlock("the end of the cache", held, own=True)
        return interrupted


@contextmanager
def outranked_by(error: BaseException | None) -> Iterator[None]:
    """
    Only logs the models that are still held, where *error* ends the cache's block.
    """
    try:
        yield
    except EvictionTimeout as held:
        # The error that ends the block tells more than this one.
        if error is None:
            raise
        _log.warning("closing: %s", held)


class Departure:
    """
    The unloading of some models, as one caller waits for it.
    """

    def __init__(
        self, core: Core, leaving: list[Leaving], timeout_s: float | None
    ) -> None:
        self._core = core
        self._leaving = leaving
        self._started_s = core.clock.now()
        # On the cache's own clock, which tests tick.
        if timeout_s is not None and leaving:
            core.clock.call_at(self._started_s + timeout_s, self.give_up)

    def give_up(self) -> None:
        """
        Stops waiting. Unloads that have begun go on.
        """
        for _, gone in self._leaving:
            gone.cancel()

    def result(self) -> int:
        """
        Returns the number of models that were unloaded, once all futures are done.

        Raises:
            EvictionTimeout: some were not, in time.
        """
        stayed = [(entry, gone) for entry, gone in self._leaving if gone.cancelled()]
        # Those whose unload has not begun may be leased again, unless another caller
        # waits for it as well.
        for entry, gone in stayed:
            self._core.withdraw(entry, gone)
        if stayed:
            names = ", ".join(str(entry.key) for entry, _ in stayed)
            waited_s = self._core.clock.now() - self._started_s
            raise EvictionTimeout(names, waited_s)
        return len(self._leaving)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """
    The source of a `CachedModel`: one model of a cache, and the terms of its leases.

    A `Callee`, too, for the preparation of calls.
    """

    cache: ModelCache
    request: Request
    terms: Terms

    def __str__(self) -> str:
        # The key only if it is known already: printing a model must not download it.
        entry = self.cache._resolver.known(self.request)
        return str(self.request[0] if entry is None else entry.key)

    @property
    def key(self) -> ModelKey:
        return self.cache._resolver.entry(self.request).key

    def lease(self, workload: Workload) -> Lease:
        return self.cache._lease(self.request, workload, self.terms)

    def resumed(self, key: ModelKey) -> ModelSource:
        """
        Returns the source for the second half of a call on *key*: the same model, for
        which it waits as long as it takes.
        """
        source = self.pinned_to(key)
        terms = replace(source.terms, timeout_s=None, resumes=True)
        return replace(source, terms=terms)

    def breaks(self, lease: Lease, workload: Workload) -> Breaks | None:
        """
        Returns how a call with *lease* gives it back between two segments; None where
        it does not.
        """
        from .engine.views import seat_of
        from .model import Breaks

        if self.terms.priority >= INTERACTIVE:
            return None
        seat = seat_of(lease.whisper)
        if seat is None:
            return None
        return Breaks(
            self.terms.priority, seat, lambda key: self.resumed(key).lease(workload)
        )

    def transcriber(
        self, lease: Lease, batch_size: int | None
    ) -> Callable[..., object]:
        # Of the lease's own view, where each call's parameters stay.
        if batch_size is None:
            return lease.whisper.transcribe  # type: ignore[no-any-return]
        batched = self.cache.loader.batched(lease.whisper)
        return partial(batched, batch_size=batch_size)

    def lasting(self) -> ModelSource:
        """
        Returns the source for calls that go on with results of each other: the model
        stays long enough for that, whatever its keep-alive is.
        """
        from .core.entries import SPARED_S

        keep_alive_s = self.terms.keep_alive_s
        if keep_alive_s is None:
            keep_alive_s = self.cache._core.rules.keep_alive_s
        if keep_alive_s >= SPARED_S:
            return self
        return replace(self, terms=replace(self.terms, keep_alive_s=SPARED_S))

    def pinned_to(self, key: ModelKey) -> ModelSource:
        """
        Returns the source of just *key*, which a request of this one got.
        """
        name, _, _, *options = self.request
        # What follows the device in the request is for that one.
        pairs = [each for each in options if each[0] != "device_index"]
        request = (name, key.device, key.compute_type, *pairs)
        return replace(self, request=request, terms=replace(self.terms, ladder=()))

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        # Each call does: without the property.
        return self.cache._core.loader.decode_audio(audio)

    def signatures(self) -> Mapping[str, Signature]:
        return self.cache.loader.signatures()

    def knowledge(self) -> Knowledge | None:
        # Each call asks, mostly for a model in memory.
        entry = self.cache._core.requests.get(self.request)
        loaded = None if entry is None else entry.loaded
        if loaded is not None and loaded.knowledge is not None:
            return loaded.knowledge
        return self.cache._resolver.knowledge(self.request, download=True)

    def files(self) -> ModelFiles:
        return self.cache._resolver.files(self.request)

    def initialize(self, whisper: WhisperModel, model: object) -> tuple[int, ...]:
        """
        Sets the attributes of a WhisperModel, without loading it; see `Loader`. May
        download. Returns the stamp of the files that they are of.
        """
        from .engine.files import stamp_of

        resolver = self.cache._resolver
        target = resolver.resolve(self.request)
        resolver.locate(target, DEFAULT_WORKLOAD)
        files = target.entry.files
        assert files is not None
        original = files.original or files
        # As they are now: those of what is in memory may be others.
        stamp = original.stamp and stamp_of(original.directory)
        self.cache.loader.initialize(whisper, files, model)
        return stamp

    def resident(self) -> LoadedModel | None:
        """
        Returns the model if it is in memory, where it may not stay.
        """
        entry = self.cache._resolver.known(self.request)
        return None if entry is None else entry.loaded

    def catch_up(self) -> None:
        """
        Has what the garbage collector ended on this thread end now.
        """
        self.cache._core.lock.catch_up()

    def let_go(self) -> None:
        """
        Has the model unloaded if nobody uses it, without waiting for that.
        """
        entry = self.cache._resolver.known(self.request)
        if entry is not None and entry.is_idle and not entry.pinned:
            self.cache._core.evict(lambda key: key == entry.key)
