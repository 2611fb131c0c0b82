"""
Source: where a `CachedModel` gets its leases from, and all else that it asks a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .planning.priority import INTERACTIVE
from .results import Breaks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from inspect import Signature

    import numpy as np
    from faster_whisper import WhisperModel
    from numpy.typing import NDArray

    from .cache import ModelCache
    from .core.fallback import Terms
    from .core.resolver import Request
    from .engine.api import AudioInput, LoadedModel
    from .engine.calls.languages import Knowledge
    from .engine.files import ModelFiles
    from .engine.sizes.footprint import Workload
    from .keys import ModelKey
    from .lease import Lease
    from .planning.deadlock import Owner


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

        if self.terms.priority >= INTERACTIVE:
            return None
        seat = seat_of(lease.whisper)
        if seat is None:
            return None
        return Breaks(
            self.terms.priority,
            seat,
            lambda key: self.resumed(key).lease(workload),
            self.give_up,
        )

    def give_up(self, owner: Owner) -> bool:
        """
        Forgets what an owner waits for to go on with a call; False if it waits for
        nothing.
        """
        return self.cache._core.give_up(owner)

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
