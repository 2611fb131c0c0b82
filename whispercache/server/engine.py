"""
The seam between routes and models: what a server asks of whatever computes for it.

Routes know an `Engine` and nothing behind it. `LocalEngine` has a cache in this
process; `whispercache.ray` has them in others, so what passes here can be pickled, but
for *samples* and *tell*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from whispercache.planning.priority import INTERACTIVE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import TypeAlias

    import numpy as np
    from faster_whisper.transcribe import Segment, TranscriptionInfo
    from numpy.typing import NDArray
    from prometheus_client.core import Metric
    from typing_extensions import Self

    from whispercache.engine.calls.languages import Knowledge
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.watch.live import Snapshot

    from .offers import Offer

    # float32 (samples,), mono, 16 kHz, in ±1. Blocks, so it is called on a thread.
    Samples: TypeAlias = Callable[[], NDArray[np.float32]]

# What becomes of a call: its model's files are downloaded, others are served or room
# is made, it is loaded; then it computes.
Phase = Literal["downloading", "waiting", "loading", "working"]


def nobody(_phase: Phase) -> None:
    """
    Tells the phase of a call to nobody.
    """


@dataclass(frozen=True, slots=True)
class Terms:
    """
    The terms on which a model is wanted.

    Attributes:
        timeout_s: Seconds to wait for it, a download included; without limit if None.
        keep_alive: How long it stays when idle; as the cache says if None.
        workload: The work that it is for, for which memory is reserved.
        check: Called with what is known of the model once its files are there, and
            before it is loaded; what it raises ends the request. It may be pickled, and
            called where the files are.
        priority: Its turn, as for `ModelCache.lease`. Below the usual one, segments
            give their model and its memory to others, and go on afterwards.
        audio_s: Seconds of audio, for which there must be room in memory.
    """

    timeout_s: float | None = None
    keep_alive: str | None = None
    workload: Workload | None = None
    check: Callable[[Knowledge | None], None] | None = None
    priority: float | None = None
    audio_s: float = 0.0

    @property
    def level(self) -> float:
        """
        The priority; the usual one if none is named.
        """
        return INTERACTIVE if self.priority is None else self.priority

    @property
    def is_batch(self) -> bool:
        """
        True if it waits for others.
        """
        return self.level < INTERACTIVE


class Segments(Protocol):
    """
    Segments that are computed while they are iterated over, in one task. Their model is
    held until they are exhausted or closed.
    """

    def __aiter__(self) -> AsyncIterator[Segment]: ...
    async def __anext__(self) -> Segment: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exception: object) -> None: ...


class Engine(Protocol):
    """
    The models of a server, wherever they are. Its methods are for tasks of one event
    loop, and work while it is `running`.

    Methods that take an `Offer` raise a WhisperCacheError if its model cannot be had.
    """

    @property
    def is_closed(self) -> bool:
        """
        True once it takes no more work, for ever.
        """

    def running(self) -> AbstractAsyncContextManager[None]:
        """
        Runs what it needs in an ``async with`` block. It may run again afterwards.
        """

    async def knowledge(self, offer: Offer) -> Knowledge | None:
        """
        Returns the languages that a model has tokens for; None if only a download would
        tell.
        """

    async def may_tell_words(self, offer: Offer) -> bool:
        """
        True unless a model's files name no attention heads for the times of words.
        """

    async def transcribe(
        self,
        offer: Offer,
        samples: Samples,
        options: Mapping[str, object],
        terms: Terms,
        tell: Callable[[Phase], None] = nobody,
    ) -> tuple[Segments, TranscriptionInfo]:
        """
        Begins to transcribe, with a model that is downloaded and loaded if need be.

        A cancelled call that has begun is over when the model is.

        Args:
            offer: The model.
            samples: Returns the audio, once the model is there.
            options: Further parameters of ``WhisperModel.transcribe``; with
                *batch_size*, of the batched pipeline. Of *languages*, a list of codes,
                the likeliest is taken.
            terms: How long it may take to begin, among others.
            tell: Called with each phase as it begins, on any thread.

        Raises:
            DownloadTimeout: the model's files were not there in time.
            LeaseTimeout: the model was not, the download included.
        """

    async def load(
        self, offer: Offer, terms: Terms, tell: Callable[[Phase], None] = nobody
    ) -> None:
        """
        Loads a model, and waits until it is in memory. Raises what `transcribe` does.
        """

    async def pin(
        self, offer: Offer, terms: Terms, tell: Callable[[Phase], None] = nobody
    ) -> None:
        """
        Loads a model and keeps it, idle or not. Raises what `transcribe` does.
        """

    async def unpin(self, offer: Offer) -> bool:
        """
        Ends a pin, and returns False if there was no such model in memory.
        """

    async def evict(self, offer: Offer, timeout_s: float) -> bool:
        """
        Unloads a model, once it is idle, and returns False if it was not in memory.
        Raises an EvictionTimeout.
        """

    async def snapshot(self) -> Snapshot:
        """
        Returns what is in memory, what waits for it, and the last events.
        """

    async def metrics(self) -> Sequence[Metric]:
        """
        Returns the figures of the caches, for Prometheus.
        """
