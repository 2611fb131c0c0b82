"""
ModelCache: the cache as threads use it.

The words a caller needs, each a thin step over the shared core (core.py), which has the
path of a request and the invariants.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import weakref
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypedDict, cast

from .core.fallback import Attempts, Terms, as_ladder
from .core.threads import MonotonicClock, caller, current_owner, current_owners
from .engine.naming import anchored
from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .errors import EvictionTimeout, LeaseDeadlock, NotDownloaded
from .keys import frozen_compute_type
from .lease import Leases
from .model import CachedModel
from .units import Limit, parse_duration, parse_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from inspect import Signature
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from .core.core import Core, Own
    from .core.entries import Part
    from .core.moves import Leaving
    from .core.resolver import Request, Target
    from .core.threads import Clock
    from .devices.memory import MemoryProbe
    from .engine.api import AudioInput, Engine
    from .engine.calls.languages import Knowledge
    from .engine.sizes.footprint import Workload
    from .events import DeviceInfo, Event, Explanation, ModelInfo, Stats, WaitingInfo
    from .keys import ModelKey
    from .lease import Lease
    from .planning.deadlock import Owner
    from .planning.planner import Policy
    from .units import DurationValue, LimitValue

    # A name or path; or with its own device, and perhaps its own compute type.
    ModelName: TypeAlias = str | os.PathLike[str]
    ModelRequest: TypeAlias = (
        ModelName
        | tuple[ModelName]
        | tuple[ModelName, str]
        | tuple[ModelName, str, str]
    )

__all__ = ["ModelCache", "default_cache", "get_model"]

_log = logging.getLogger("whispercache")

EXIT_S = 10.0
"""
Most seconds that the end of the interpreter waits for loads, unloads and calls.
"""

PATIENCE_S = 5.0
"""
Seconds for which hits may pass a request that waits for memory.
"""

CLOSED = "the cache was closed"
"""
Why segments end early when a cache is closed.
"""

PRESSURES = ("load", "watch")
TIERS = ("device", "page")

VARIANTS_VARIABLE = "WHISPERCACHE_VARIANTS"
"""
Environment variable that turns variants off, for programs whose code one cannot change.
"""

_OFF = ("off", "0", "no", "none", "false")

DEFAULT_VARIANTS_BYTES = 16 * 1024**3
"""
Most bytes that variants take on disk, unless a limit is given: ten of large-v3 in int8.
"""

UNCHANGED = cast("LimitValue", object())
# A core outlives a cache that was forgotten while a lease is out.
_caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()
_cores: weakref.WeakSet[Core] = weakref.WeakSet()


class CacheOptions(TypedDict, total=False):
    """
    The parameters of a `ModelCache`.
    """

    vram: LimitValue | Mapping[str, LimitValue]
    ram: LimitValue
    max_models: int | None
    keep_alive: DurationValue
    policy: str | Policy
    patience_s: float
    max_waiting: int | None
    fallback: Sequence[str]
    pressure: str
    coordinate: bool
    park: bool | LimitValue
    variants: bool | LimitValue
    loader: Engine | None
    probe: MemoryProbe | None
    clock: Clock | None


class ModelCache:
    """
    A cache of Whisper models that keeps within the memory that there is.

    Callers name the model they want; the cache decides what is in memory. A model is
    loaded when it is first used, shared by all who use it, never taken from one who
    does, and leaves when it was idle for long enough or its room is needed. Memory
    counts as free only once the unload was confirmed.

    Safe to use from any thread. A context manager that closes on exit.

    Args:
        vram: Limit for each GPU: bytes, ``"10GiB"``, ``"80%"`` or ``0.8`` of the card,
            or ``"auto"`` for what is really free. A mapping sets it card by card
            (``{"cuda:0": "10GiB"}``).
        ram: The same for the host: models on the CPU, loads on their way to a GPU, and
            copies of weights (*park*).
        max_models: At most so many models on each device.
        keep_alive: How long an idle model stays: seconds, ``"5m"``, 0 to unload at
            once, -1 for ever. The clock starts when its last lease ends.
        policy: Who leaves first: ``"lru"``, ``"gap"`` (cheapest second of absence per
            byte), or a function of an `admission.Resident` and the time now to a score;
            the lowest leaves first.
        patience_s: Seconds for which requests for models in memory may pass one that
            waits for room; after that no new leases are granted on what it needs.
        max_waiting: At most so many requests wait; more are refused at once.
        fallback: What to try, one after the other, where a model cannot be had: compute
            types (``"int8_float16"``), devices (``"cuda:1"``, ``"cpu"``), or both
            (``"cuda:1/int8"``). The lease says what it got. Nothing by default.
        pressure: ``"load"`` reads free memory before each load. ``"watch"`` also reads
            it once a second, and lets idle models leave before other programs run out.
        coordinate: Take turns to load with other processes of this user that have it
            set too, keep out of each other's reservations, and let idle models leave
            when another process needs the room.
        park: Keep a copy of the weights of each model that leaves a GPU in host memory,
            so that it comes back from there: made when it first leaves, kept while it
            is back. True for as much as *ram* and free memory leave, or a limit of
            their own (``"16GiB"``, ``"25%"``). They make room for anything else on the
            host, the copies of models that are not on a GPU first, and go when other
            programs run short. False for none. A model with several ``num_workers`` is
            not copied, nor one that `evict` or `close` sends away.
        variants: Keep copies of models in the compute type that they are used in, in
            the user's cache directory; they load several times as fast. They are made
            in the background, after the first load. True for 16 GiB at most, or bytes,
            ``"5GiB"``; the least recently used leave. False for none, and so does the
            environment variable ``WHISPERCACHE_VARIANTS=off``. Only with the usual
            *loader*.
        loader: Loads the models; a fake in tests, or one of your own, for which three
            methods are enough (see `whispercache.engine.api`).
        probe: Reads the memory of the devices; likewise.
        clock: Tells the time; likewise. The cache closes it.

    Raises:
        TypeError, ValueError: a limit or a time is nonsense.
        OSError: there is no directory in which to coordinate.
    """

    def __init__(
        self,
        *,
        vram: LimitValue | Mapping[str, LimitValue] = "auto",
        ram: LimitValue = "auto",
        max_models: int | None = None,
        keep_alive: DurationValue = "5m",
        policy: str | Policy = "lru",
        patience_s: float = PATIENCE_S,
        max_waiting: int | None = None,
        fallback: Sequence[str] = (),
        pressure: str = "load",
        coordinate: bool = False,
        park: bool | LimitValue = False,
        variants: bool | LimitValue = True,
        loader: Engine | None = None,
        probe: MemoryProbe | None = None,
        clock: Clock | None = None,
    ) -> None:
        # Whoever imports the package and makes no cache does not wait for the rest.
        from tracemalloc import is_tracing

        from .core.core import Core
        from .core.resolver import Resolver
        from .devices.memory import SystemProbe
        from .engine.adapter import completed
        from .engine.loader import FasterWhisperLoader
        from .planning.planner import POLICIES

        if isinstance(policy, str) and policy not in POLICIES:
            raise ValueError(
                f"policy must be one of {', '.join(POLICIES)}, or a function"
            )
        if not patience_s >= 0:
            raise ValueError(
                f"patience_s must be 0 or more seconds, not {patience_s!r}"
            )
        if pressure not in PRESSURES:
            raise ValueError(f"pressure must be one of {', '.join(PRESSURES)}")
        variants_bytes = _variants_bytes(variants)
        probe = probe or SystemProbe()
        self._limits = (vram, ram)
        self._usual_terms = Terms(ladder=as_ladder(fallback))
        self._is_tracing: Callable[[], bool] = is_tracing
        self._core = Core(
            loader=completed(
                loader or FasterWhisperLoader(probe, variants_bytes=variants_bytes)
            ),
            probe=probe,
            clock=clock or MonotonicClock(),
            policy=POLICIES[policy] if isinstance(policy, str) else policy,
            limit_of=_limits(vram, ram),
            max_models=_count("max_models", max_models),
            keep_alive_s=parse_duration(keep_alive, "keep_alive"),
            patience_s=patience_s,
            max_waiting=_count("max_waiting", max_waiting),
        )
        self._core.park_limit = _park_limit(park)
        self._resolver = Resolver(self._core)
        self._coordinate = coordinate
        self._pressure = pressure
        self._tend()
        _caches.add(self)
        _cores.add(self._core)

    def _tend(self) -> None:
        """
        Look after the devices now and then, if that was asked for.
        """
        watches = self._pressure == "watch"
        if self._coordinate or watches or self._core.park_limit is not None:
            from .peers.pressure import LedgerPeers, look_after

            peers = LedgerPeers(self._core.probe) if self._coordinate else None
            self._core.peers = peers
            look_after(self._core, watches=watches, peers=peers)

    def _forked(self) -> None:
        """
        Start afresh in a child that was forked, if the core is still of use.
        """
        self._resolver.forget()
        if not self._core.is_closed:
            self._tend()

    # Models ---------------------------------------------------------------------------

    def get_model(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        keep_alive: DurationValue | None = None,
        timeout_s: float | None = None,
        fallback: Sequence[str] | None = None,
        **load_options: object,
    ) -> CachedModel:
        """
        A model to use like a WhisperModel, in memory whenever it is used.

        Returns at once: the model is loaded by the first call on it, or by `preload`.

        Args:
            model_size_or_path: A size (``"large-v3"``), an alias, a repository of the
                model hub, or a directory; a relative one is that of now.
            device: ``"cpu"``; ``"cuda:N"``; ``"cuda"`` for the GPU where the model is
                already, or else the one with most room for it; ``"auto"`` for that, or
                the CPU if no GPU can hold it. A ``device_index`` names the GPU, too.
            compute_type: As for WhisperModel; ``"default"``, ``"auto"`` and ``"int8"``
                mean what CTranslate2 really uses on that device. A mapping has one for
                each kind of device, as in ``{"cuda": "float16", "cpu": "int8"}``.
            keep_alive: For this model, instead of the cache's.
            timeout_s: Most seconds that each call on it waits for the model.
            fallback: Instead of the cache's.
            load_options: The other parameters of WhisperModel: ``cpu_threads``,
                ``num_workers``, ``download_root``, ``local_files_only``, ``revision``.

        Raises:
            TypeError, ValueError: a parameter is nonsense.
            UnknownModel: no such size, and no model in that directory.
            UnsupportedComputeType: the device cannot compute in that type.
            DeviceUnavailable: there is no such device.
            CacheClosed: the cache was closed.
        """
        model = anchored(model_size_or_path)
        request = as_request(model, device, compute_type, load_options)
        # A repository of unknown size is looked at when it is used: that downloads it.
        with suppress(NotDownloaded):
            self._resolver.resolve(request, download=False)
        terms = self._terms(timeout_s, keep_alive, fallback)
        return CachedModel(ModelSource(self, request, terms))

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
    ) -> Lease:
        """
        The real WhisperModel, held in memory for a ``with`` block.

        Args:
            model_size_or_path: As for `get_model`, like the following.
            device: See there.
            compute_type: See there.
            timeout_s: Most seconds to wait; None for as long as it takes, 0 to have the
                model only if it can be had at once.
            keep_alive: Once this lease ends, instead of the cache's.
            fallback: Instead of the cache's.
            workload: What will be done with the model, for the memory of that work;
                faster-whisper's defaults if None.
            load_options: See there.

        Blocks: until the model is in memory, through a download if it takes one.

        Raises:
            LeaseTimeout: not within *timeout_s*.
            ModelTooLarge: never, with these limits and that memory.
            TooManyWaiters: ``max_waiting`` others wait.
            LoadFailed: the download or the load failed.
            LeaseDeadlock: this thread holds leases, and would wait for ever.
            CacheClosed: the cache was closed, before or meanwhile.
            Also what `get_model` raises.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, keep_alive, fallback)
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
    ) -> Leases:
        """
        Several models at once, held in memory for a ``with`` block.

        All or nothing: their memory is granted in one step, and nothing is held before,
        so that two callers cannot block each other. Duplicates share a model.

        Args:
            models: Names or paths, as for `get_model`; or tuples of a name with its own
                device, or with its own device and compute type.
            device: For those that say none.
            compute_type: Likewise.
            timeout_s: As for `lease`, like the following.
            keep_alive: See there.
            workload: What will be done with each of the models.
            load_options: For all of them.

        Raises:
            ValueError: no models are named.
            ModelTooLarge: together they can never fit; it has the numbers.
            Also what `lease` raises.

        Blocks: until all are in memory.
        """
        requests = as_requests(models, device, compute_type, load_options)
        terms = self._terms(timeout_s, keep_alive, ())
        parts = self._locate(requests, workload or DEFAULT_WORKLOAD)
        leases = Leases(self._wait(parts, terms))
        if self._is_tracing():
            for lease in leases:
                lease.taken_at = caller()
        return leases

    def _terms(
        self,
        timeout_s: float | None,
        keep_alive: DurationValue | None,
        fallback: Sequence[str] | None,
    ) -> Terms:
        if timeout_s is None and keep_alive is None and fallback is None:
            return self._usual_terms
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("timeout_s must be seconds or None, not NaN")
        usual = self._usual_terms.ladder
        ladder = usual if fallback is None else as_ladder(fallback)
        return Terms(timeout_s, as_seconds(keep_alive), ladder)

    def _lease(self, request: Request, workload: Workload, terms: Terms) -> Lease:
        lease = self._hit(request, workload, terms, current_owner())
        if lease is None:
            lease = self._climb(request, workload, terms)
        if self._is_tracing():
            lease.taken_at = caller()
        return lease

    def _hit(
        self, request: Request, workload: Workload, terms: Terms, owner: Owner
    ) -> Lease | None:
        entry = self._resolver.known(request)
        if entry is None:
            return None
        return self._core.hit(entry, workload, terms.keep_alive_s, owner)

    def _climb(self, request: Request, workload: Workload, terms: Terms) -> Lease:
        """
        The model, or the first of its fallbacks that can be had.
        """
        attempts = Attempts(self._core, request, terms)
        for attempt, terms_left in attempts:
            with attempts.judging():
                parts = self._locate([attempt], workload)
                (lease,) = self._wait(parts, terms_left)
                return attempts.succeed(lease)
        raise attempts.failure()

    def _locate(self, requests: Sequence[Request], workload: Workload) -> list[Part]:
        from .core.entries import Part

        order = list(range(len(requests)))
        if len(requests) > 1:
            # Nonsense is told before others are downloaded; and whatever has the least
            # choice of a device is placed first.
            alone = [self._resolver.resolve(request) for request in requests]
            order.sort(key=lambda n: self._resolver.least_choice(alone[n]))
        targets: dict[int, Target] = {}
        for n in order:
            target = self._resolver.resolve(requests[n], beside=targets.values())
            self._resolver.locate(target, workload)
            targets[n] = target
        return [Part(targets[n].entry, workload) for n in range(len(requests))]

    def _wait(self, parts: Sequence[Part], terms: Terms) -> tuple[Lease, ...]:
        core, owner = self._core, current_owner()
        waiter = core.request(parts, terms.keep_alive_s, terms.timeout_s, owner)
        try:
            return waiter.future.result()
        except BaseException:
            core.abandon(waiter)
            raise

    def download(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> None:
        """
        Downloads a model's files, if they are not on this disk, and checks them.

        Nothing is loaded. Callers that want the same model share one download.

        Args:
            model_size_or_path: As for `get_model`, like the following.
            device: See there.
            compute_type: See there.
            load_options: See there.

        Blocks: until the files are there.

        Raises:
            LoadFailed: the files cannot be downloaded; `CorruptModel` if they are
                broken.
            Also what `get_model` raises.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        self._locate([request], DEFAULT_WORKLOAD)

    def knowledge(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> Knowledge | None:
        """
        Returns the languages and tokens of a model, as its files tell them.

        None where only a download would tell. The parameters are those of `get_model`.

        Blocks: for some system calls; not for a model in memory.

        Raises:
            UnknownModel: there is no such size, and no model in that directory.
            LoadFailed: the files are gone; `CorruptModel` if they are broken.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        return self._resolver.knowledge(request, download=False)

    def known_key(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> ModelKey | None:
        """
        Returns the key that the last request with these parameters got.

        None before the first one. Never touches the disk; `get_model` has the
        parameters.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        entry = self._resolver.known(request)
        return None if entry is None else entry.key

    def preload(
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
        Load a model now, so that the next call on it need not.

        Args:
            model_size_or_path: As for `get_model`, like the following.
            device: See there.
            compute_type: See there.
            tier: ``"device"``; or ``"page"`` to read its files only, into the kernel's
                page cache, which takes no memory that anybody else could use: the load
                itself will not wait for the disk.
            timeout_s: As for `lease`. It does not end a read.
            load_options: As for `get_model`.

        Raises:
            ValueError: no such tier.
            Also what `lease` raises.

        Blocks: as `lease` does, or until the files are read.
        """
        if tier not in TIERS:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, not {tier!r}")
        if tier == "page":
            request = as_request(model_size_or_path, device, compute_type, load_options)
            target = self._resolver.resolve(request)
            self._resolver.read(target)
            return
        self.lease(
            model_size_or_path,
            device,
            compute_type,
            timeout_s=timeout_s,
            **load_options,  # type: ignore[arg-type]
        ).release()

    def pin(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        timeout_s: float | None = None,
        **load_options: object,
    ) -> None:
        """
        Load a model now and keep it, idle or not, until `unpin`, `evict` or `close`.

        Blocks, and raises, as `lease` does.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, None, None)
        lease = self._lease(request, DEFAULT_WORKLOAD, terms)
        with lease:
            lease.pin()

    def unpin(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
    ) -> int:
        """
        Let pinned models leave again; the parameters are those of `evict`.

        Returns:
            How many were pinned.
        """
        matching = self._resolver.matching
        return self._core.unpin(matching(model_size_or_path, device, compute_type))

    def evict(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """
        Unload models now and return their memory, pinned or not.

        A model that is leased leaves as soon as it is idle; until then no new lease is
        granted on it. New requests for it wait, and load it again. Set a time limit
        where the lease may belong to somebody who waits for a model of yours.

        Args:
            model_size_or_path: The model, by any of its names; None for all.
            device: Only on this device.
            compute_type: Only in this type.
            timeout_s: Most seconds to wait for leases to end and for the unload.

        Returns:
            How many left; 0 if there was none to evict.

        Raises:
            EvictionTimeout: some stayed; those that are still leased stay as they were.
            LeaseDeadlock: without *timeout_s*, this thread would wait for itself, since
                it holds a lease on one of them.
        """
        matches = self._resolver.matching(model_size_or_path, device, compute_type)
        waits_for = current_owner() if timeout_s is None else None
        return self._await_gone(self._core.evict(matches, waits_for), timeout_s)

    def _await_gone(self, leaving: list[Leaving], timeout_s: float | None) -> int:
        until = Departure(self._core, leaving, timeout_s)
        wait([gone for _, gone in leaving])
        return until.result()

    # Limits ---------------------------------------------------------------------------

    def resize(
        self,
        *,
        vram: LimitValue | Mapping[str, LimitValue] = UNCHANGED,
        ram: LimitValue = UNCHANGED,
        max_models: int | None = cast("int", UNCHANGED),
    ) -> None:
        """
        Set other limits; what is not given stays.

        Idle models that are too much begin to leave at once, leased ones when they are
        idle. Returns without waiting for that.

        Raises:
            TypeError, ValueError: a limit is nonsense; none was changed.
        """
        old_vram, old_ram = self._limits
        limits = (
            old_vram if vram is UNCHANGED else vram,
            old_ram if ram is UNCHANGED else ram,
        )
        limit_of = _limits(*limits)
        unchanged = cast("object", max_models) is UNCHANGED
        count = self._core.max_models if unchanged else _count("max_models", max_models)
        self._limits = limits
        self._core.resize(limit_of, count)

    # Report ---------------------------------------------------------------------------

    def stats(self) -> Stats:
        """
        Counters since the cache was made.
        """
        from .core import snapshots

        return snapshots.stats(self._core)

    def models(self) -> tuple[ModelInfo, ...]:
        """
        The models in memory, or on their way in or out.
        """
        from .core import snapshots

        return snapshots.models(self._core)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """
        The devices that were used, and what the cache holds of them.
        """
        from .core import snapshots

        return snapshots.devices(self._core)

    def waiting(self) -> tuple[WaitingInfo, ...]:
        """
        The requests that wait for their models, the oldest first.
        """
        from .core import snapshots

        return snapshots.waiting(self._core)

    def explain(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        *,
        workload: Workload | None = None,
        **load_options: object,
    ) -> Explanation:
        """
        What a lease on a model would do now: hit, load, evict which, wait, or fail.

        Nothing is loaded or evicted. Takes and raises what `get_model` does.
        """
        from .core import snapshots

        request = as_request(model_size_or_path, device, compute_type, load_options)
        workload = workload or DEFAULT_WORKLOAD
        target = self._resolver.resolve(request, download=False)
        self._resolver.locate(target, workload, download=False)
        return snapshots.explain(self._core, target.entry, workload)

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """
        Call *listener* with each `Event` from now on, in order.

        It runs on whatever thread made the event, often a device's loader: it should be
        quick, and must not wait for this cache. What it raises is logged.

        Returns:
            A function that ends the subscription.
        """
        return self._core.outbox.subscribe(listener)

    def top(self, interval_s: float = 1.0) -> None:
        """
        Show all that live in the terminal, until Ctrl-C. Without a terminal, once.

        Blocks: call it on a thread of its own where the program does the work. Only a
        program's main thread sees Ctrl-C.
        """
        from .watch.live import Watch
        from .watch.top import watch

        with Watch(self) as seen:
            watch(seen.snapshot, interval_s=interval_s)

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

    # Closing --------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """
        True once `close` was called: new requests are refused.
        """
        return self._core.is_closed

    def close(self, timeout_s: float | None = 10.0) -> None:
        """
        Refuse new requests, fail those that wait, and unload all models.

        Segments that this thread began and did not finish end at once, since nobody
        else could end them; so do those of threads and tasks that have ended, unless
        they were handed over. To go on with them is a RuntimeError. What others work
        with is waited for.

        A second call waits again. A model that is still leased after *timeout_s* leaves
        when its lease ends. In a signal handler that interrupted the cache itself, or a
        step of segments, this returns before that has left.

        Args:
            timeout_s: Most seconds to wait for leases, loads and unloads; None for
                ever.

        Raises:
            EvictionTimeout: models were still held then; it names them.
            LeaseDeadlock: without *timeout_s*, this thread would wait for itself, since
                it holds a lease and has not said `Lease.hand_over`.
        """
        leaving = self._core.close()
        if leaving is None:
            return
        own = self._core.end_own(current_owners(), CLOSED)
        tell_own(own, timeout_s)
        awaited = [(entry, gone) for entry, gone in leaving if entry not in own.stuck]
        self._await_gone(awaited, timeout_s)
        if not own.stuck:
            self._core.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except EvictionTimeout as held:
            # The error that ends the block tells more than this one.
            if error is None:
                raise
            log_held(held)

    def __repr__(self) -> str:
        from .core import snapshots

        return snapshots.describe(self._core, type(self).__name__)


def tell_own(own: Own, timeout_s: float | None) -> None:
    """
    Refuses to let whoever closes a cache wait for himself, and for ever.

    Raises:
        LeaseDeadlock: he would.
    """
    if own.held and timeout_s is None:
        raise LeaseDeadlock("the end of the cache", own.held, own=True)


def log_held(held: Exception) -> None:
    """
    Say what is still held where another error is raised.
    """
    _log.warning("closing: %s", held)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """
    One model of a cache, for its `CachedModel`.
    """

    cache: ModelCache
    request: Request
    terms: Terms

    def __str__(self) -> str:
        # Not the key if that is not known yet: to print a model must not download it.
        entry = self.cache._resolver.known(self.request)
        return str(self.request[0] if entry is None else entry.key)

    @property
    def key(self) -> ModelKey:
        return self.cache._resolver.entry(self.request).key

    def lease(self, workload: Workload) -> Lease:
        return self.cache._lease(self.request, workload, self.terms)

    def transcriber(
        self, lease: Lease, batch_size: int | None
    ) -> Callable[..., object]:
        if batch_size is None:
            return lease.whisper.transcribe  # type: ignore[no-any-return]
        batched = self.cache._core.loader.batched(lease.whisper)
        return partial(batched, batch_size=batch_size)

    def decode_audio(self, audio: AudioInput) -> NDArray[np.float32]:
        return self.cache._core.loader.decode_audio(audio)

    def signatures(self) -> Mapping[str, Signature]:
        return self.cache._core.loader.signatures()

    def knowledge(self) -> Knowledge | None:
        return self.cache._resolver.knowledge(self.request, download=True)


# The process-wide cache ---------------------------------------------------------------

_default_lock = threading.Lock()
_default: ModelCache | None = None


def default_cache() -> ModelCache:
    """
    The cache of the whole process, made at its first use with default limits.

    Closed when the interpreter exits. After a `ModelCache.close` the next call makes a
    new one.
    """
    global _default
    with _default_lock:
        if _default is None or _default.is_closed:
            _default = ModelCache()
        return _default


def get_model(
    model_size_or_path: str | os.PathLike[str],
    device: str = "auto",
    compute_type: str = "default",
    **load_options: object,
) -> CachedModel:
    """
    A model of the process-wide cache: the drop-in for an ``lru_cache`` of models.

    Takes, returns and raises what `ModelCache.get_model` does.
    """
    return default_cache().get_model(
        model_size_or_path,
        device,
        compute_type,
        **load_options,  # type: ignore[arg-type]
    )


@atexit.register
def _close_all() -> None:
    """
    Unload before the interpreter goes: destructors that run later can hang or crash.

    Leases are not waited for. What is on its way is, and so are calls in flight: a
    thread that comes back from CTranslate2 to an interpreter that has ended aborts the
    process.
    """
    for core in list(_cores):
        leaving = core.close() or []
        wait([gone for entry, gone in leaving if not entry.leases], EXIT_S)
        if core._is_over:  # what models left behind goes, too
            core.join(EXIT_S)
        core.quiesce(EXIT_S)


def _after_fork() -> None:
    """
    See to all caches, in the child.
    """
    global _default_lock
    _default_lock = threading.Lock()
    cores = list(_cores)
    if cores:
        from .devices import cuda
    for core in cores:
        core.forked(gpu_in_use=cuda.is_open())
    for cache in list(_caches):
        cache._forked()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)


# What was asked for -------------------------------------------------------------------


def as_request(
    model: str | os.PathLike[str],
    device: str,
    compute_type: str,
    load_options: dict[str, object],
) -> Request:
    if type(compute_type) is not str:  # each hit comes by here
        compute_type = cast("str", frozen_compute_type(compute_type))
    if not load_options:
        return (model, device, compute_type)
    return (model, device, compute_type, *sorted(load_options.items()))


def as_requests(
    models: Sequence[ModelRequest],
    device: str,
    compute_type: str,
    load_options: dict[str, object],
) -> list[Request]:
    if isinstance(models, (str, os.PathLike)):
        raise TypeError(f"models must be a list of models, not {models!r}")
    requests = []
    for model in models:
        named: tuple[ModelName, ...] = (
            tuple(model) if isinstance(model, (tuple, list)) else (model,)
        )
        defaults = (device, compute_type)
        if not 1 <= len(named) <= len(defaults) + 1:
            raise ValueError(f"{model!r} must be (model, device, compute_type)")
        own = cast("tuple[str, ...]", named[1:])
        where, kind = own + defaults[len(own) :]
        requests.append(as_request(named[0], where, kind, load_options))
    if not requests:
        raise ValueError("lease_many takes at least one model")
    return requests


def as_seconds(keep_alive: DurationValue | None) -> float | None:
    return None if keep_alive is None else parse_duration(keep_alive, "keep_alive")


def _limits(
    vram: LimitValue | Mapping[str, LimitValue], ram: LimitValue
) -> Callable[[str], Limit]:
    host = parse_limit(ram, "ram")
    if isinstance(vram, (str, int, float)) or vram is None:
        card = parse_limit(vram, "vram")
        return lambda device: host if device == "cpu" else card
    cards = {
        name: parse_limit(value, f"vram[{name!r}]") for name, value in vram.items()
    }
    return lambda device: host if device == "cpu" else cards.get(device, Limit())


def _park_limit(value: bool | LimitValue) -> Limit | None:  # noqa: FBT001 - checked
    """
    Most bytes for copies on the host; None for no copies at all.
    """
    if value is False or value is None:
        return None
    return Limit() if value is True else parse_limit(value, "park")


def _variants_bytes(value: bool | LimitValue) -> int | None:  # noqa: FBT001 - checked
    """
    Most bytes for variants; None for none at all.
    """
    variable = os.environ.get(VARIANTS_VARIABLE, "").lower()
    if value is False or value is None or variable in _OFF:
        return None
    limit = Limit() if value is True else parse_limit(value, "variants")
    if limit.fraction is not None:
        raise ValueError(
            f"variants must be bytes, such as '5GiB', or False, not {value!r}"
        )
    return limit.n_bytes or DEFAULT_VARIANTS_BYTES


def _count(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number or None, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value


class Departure:
    """
    The leaving of some models, as somebody waits for it.
    """

    def __init__(
        self, core: Core, leaving: list[Leaving], timeout_s: float | None
    ) -> None:
        self._core = core
        self._leaving = leaving
        self._started_s = core.clock.now()
        if timeout_s is not None and leaving:
            core.clock.call_at(self._started_s + timeout_s, self.give_up)

    def give_up(self) -> None:
        """
        Let those who have not left stay, as far as they are not on their way.
        """
        for _, gone in self._leaving:
            gone.cancel()

    def result(self) -> int:
        """
        How many left, once all futures are done.

        Raises:
            EvictionTimeout: some did not.
        """
        stayed = [(entry, gone) for entry, gone in self._leaving if gone.cancelled()]
        for entry, gone in stayed:
            self._core.withdraw(entry, gone)
        if stayed:
            names = ", ".join(str(entry.key) for entry, _ in stayed)
            waited_s = self._core.clock.now() - self._started_s
            raise EvictionTimeout(names, waited_s)
        return len(self._leaving)
