"""
Base: the part of a cache that is the same for threads and tasks, since it never waits.

`ModelCache` and `AsyncModelCache` add what waits. They share one core, so nothing here
belongs to one of the two.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from .core.fallback import Terms, as_ladder
from .errors import EvictionTimeout, LeaseDeadlock
from .options import (
    UNCHANGED,
    Unchanged,
    as_request,
    limits_by_device,
    parse_count,
    parse_timeout,
)
from .planning.priority import parse_priority
from .units import parse_duration

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .core.core import Core
    from .core.entries import Entry
    from .core.evictions import Leaving
    from .core.resolver import Request, Resolver, Target
    from .core.waiters import Wanted
    from .devices.memory import MemoryProbe
    from .engine.api import Loader
    from .engine.sizes.footprint import Workload
    from .events import DeviceInfo, Event, Explanation, ModelInfo, Stats, WaitingInfo
    from .keys import ModelKey
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

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: its models are in "
            "the memory of this process. Make one in the other process"
        )

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
