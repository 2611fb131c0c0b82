"""
ModelCache: the cache as threads use it.

Each method is a thin step over the shared core. A lease goes from here to
core/resolver.py, which finds the model, and to core/core.py, which decides when it gets
its memory; the invariants of the whole stand at the top of that file. base.py has what
never waits, options.py the parameters, default.py the cache of the process.
"""

from __future__ import annotations

from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from .base import CacheBase, Departure, outranked_by
from .core.fallback import Attempts, Terms, as_ladder
from .core.threads import MonotonicClock, current_owner, current_owners, here
from .engine.naming import anchored
from .engine.sizes.footprint import DEFAULT_WORKLOAD
from .errors import EvictionTimeout, NotDownloaded
from .lease import Leases
from .lifetime import register
from .model import CachedModel
from .options import (
    PATIENCE_S,
    Limits,
    as_request,
    as_requests,
    by_position,
    limits_by_device,
    parse_count,
    parse_park,
    parse_pressure,
    parse_rules,
    parse_switch,
    parse_tier,
    parse_timeout,
    parse_variants,
)
from .planning.priority import parse_priority
from .source import ModelSource

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from .core.entries import Entry
    from .core.evictions import Leaving
    from .core.gauges import Peers
    from .core.resolver import Request, Target
    from .core.threads import Clock
    from .core.waiters import Wanted
    from .devices.memory import MemoryProbe
    from .engine.api import Engine, Loader
    from .engine.calls.languages import Knowledge
    from .engine.sizes.footprint import Workload
    from .events import Explanation
    from .lease import Lease
    from .options import (
        ComputeType,
        DeviceIndex,
        ModelRequest,
        PolicyName,
        Pressure,
        Priority,
        Tier,
    )
    from .planning.policies import Policy
    from .units import DurationValue, LimitValue

# Most seconds to wait for the unload of a model whose files were replaced.
_UNLOAD_S = 2.0


class ModelCache(CacheBase):
    """
    A cache of Whisper models that keeps within the memory that there is.

    Callers name the model they want; the cache decides what is in memory. A model is
    loaded when it is first used and shared by all who use it. It is never unloaded
    while it is in use; it is evicted when it was idle for long enough, or when its
    memory is needed. Memory counts as free only once the unload was confirmed.

    Safe to use from any thread. A context manager that closes on exit.

    Args:
        vram: Limit for each GPU: bytes, ``"10GiB"``, ``"80%"`` or ``0.8`` of the card,
            or ``"auto"`` for what is really free. A mapping sets it card by card
            (``{"cuda:0": "10GiB"}``).
        ram: The same for the host: models on the CPU, loads on their way to a GPU, and
            host copies (*park*).
        max_models: Most models on each device.
        keep_alive: Time that an idle model stays in memory: seconds, ``"5m"``, 0 to
            unload it at once, -1 for ever. It starts when the last lease ends.
        policy: Order of eviction: ``"lru"``, ``"gap"`` (cheapest second of absence per
            byte), or a function of a `planning.policies.Resident` and the time now to a
            score; the lowest is evicted first.
        patience_s: Seconds for which requests for models in memory may pass one that
            waits for memory; after that no new leases are granted on what it needs.
        priority: The turn of requests that name none: ``"interactive"``, or ``"batch"``
            for work that nobody waits for; or a number, the higher the sooner: these
            are 0 and -1. For each level less, a request goes as if it had come a minute
            later. A transcription below 0 by a `CachedModel` gives its memory to those
            above it that wait, between two segments, and goes on afterwards.
        parallel: Most leases on a model at a time, unless a request says otherwise:
            further ones wait for their turn, people before batches. None for any
            number, whose calls a model computes one after the other by itself.
        max_waiting: Most requests that wait; more are refused at once.
        fallback: Alternatives to try, one after the other, where a model cannot be had:
            compute types (``"int8_float16"``), devices (``"cuda:1"``, ``"cpu"``), or
            both (``"cuda:1/int8"``). The lease tells which one it got. None by default.
        pressure: ``"load"`` reads free memory before each load. ``"watch"`` also reads
            it once a second, and evicts idle models before other programs run out.
        coordinate: True to take turns to load with other processes of this user that
            have it set too, to respect each other's reservations, and to evict idle
            models when another process needs the memory.
        coordinate_dir: The directory through which they do, as an absolute path, if it
            is not to be the user's own: for containers, and for several users. One that
            is given turns *coordinate* on.
        park: Keep a copy of the weights of each model that is evicted from a GPU in
            host memory, from which it is reloaded. The copy is made at the first
            eviction, and kept while the model is on the GPU again. True for as much as
            *ram* and free memory allow, or a limit of their own (``"16GiB"``,
            ``"25%"``). Copies give way to anything else on the host and to other
            programs, those of models that are not on a GPU first. False for none. A
            model with several ``num_workers`` is not copied, nor one that `evict` or
            `close` unloads.
        variants: Keep copies of models in the compute type that they are used in, in
            the user's cache directory; they load several times as fast. They are made
            in the background, after the first load. True for 16 GiB at most, or bytes,
            ``"5GiB"``; the least recently used are deleted. False for none, and so
            does the environment variable ``WHISPERCACHE_VARIANTS=off``. Only with the
            usual *loader*.
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
        policy: PolicyName | Policy = "lru",
        patience_s: DurationValue = PATIENCE_S,
        priority: Priority = "interactive",
        parallel: int | None = None,
        max_waiting: int | None = None,
        fallback: Sequence[str] = (),
        pressure: Pressure = "load",
        coordinate: bool = False,
        coordinate_dir: str | os.PathLike[str] | None = None,
        park: bool | LimitValue = False,
        variants: bool | LimitValue = True,
        loader: Engine | None = None,
        probe: MemoryProbe | None = None,
        clock: Clock | None = None,
    ) -> None:
        from .core.core import Core
        from .core.resolver import Resolver

        self._watches: bool = parse_pressure(pressure)
        probe, loader = _usual_parts(probe, loader, parse_variants(variants))
        core = Core(
            loader=loader,
            probe=probe,
            clock=clock or MonotonicClock(),
            rules=parse_rules(policy, keep_alive, patience_s, max_waiting, parallel),
            limit_of=limits_by_device(vram, ram),
            max_models=parse_count(max_models, "max_models"),
            park_limit=parse_park(park),
            make_peers=_makes_peers(
                probe,
                coordinate_dir,
                coordinates=parse_switch(coordinate, "coordinate"),
            ),
        )
        terms = Terms(ladder=as_ladder(fallback), priority=parse_priority(priority))
        super().__init__(core, Resolver(core), Limits(vram, ram), terms)
        self._tend()
        register(self, core, type(self)._after_fork)

    def _tend(self) -> None:
        from .core.gauges import NoPeers

        # A cache that needs no regular look at its devices makes no timer and no file.
        # Host copies are looked after as well: other programs may need their memory.
        known = self._core.gauges.peers
        parks = self._core.copies.limit is not None
        if self._watches or parks or not isinstance(known, NoPeers):
            from .peers.pressure import LedgerPeers, look_after

            peers = known if isinstance(known, LedgerPeers) else None
            look_after(self._core, watches=self._watches, peers=peers)

    def _after_fork(self) -> None:
        # Known requests refer to entries of the parent.
        self._resolver.forget()
        if not self._core.is_closed:
            self._tend()

    # Leases ---------------------------------------------------------------------------

    def get_model(
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
    ) -> CachedModel:
        """
        Returns a model to use like a WhisperModel, in memory whenever it is used.

        Returns at once: the model is loaded by the first call on it, or by `preload`.
        An idle one whose files were replaced since it was loaded is unloaded first.

        Args:
            model_size_or_path: A size (``"large-v3"``), an alias, a repository of the
                model hub, or a directory. A relative path is resolved now.
            device: ``"cpu"``; ``"cuda:N"``; ``"cuda"`` for the GPU where the model is
                already, or else the one with most memory for it; ``"auto"`` for that,
                or the CPU if no GPU can hold it. A ``device_index`` names the GPU, too:
                with ``"auto"`` it is that one or the CPU.
            more: The compute type by position; or what WhisperModel takes there: the
                index of the GPU, or a list of one, and then the compute type and so on.
            compute_type: As for WhisperModel; ``"default"``, ``"auto"`` and ``"int8"``
                mean what CTranslate2 really uses on that device. A mapping has one for
                each kind of device, as in ``{"cuda": "float16", "cpu": "int8"}``.
            timeout_s: Most time that each call on it waits for the model: seconds, or
                text such as ``"30s"``; None for as long as it takes.
            keep_alive: For this model, instead of the cache's.
            priority: Likewise, of each call on it.
            parallel: Likewise.
            fallback: Instead of the cache's.
            load_options: The other parameters of WhisperModel: ``cpu_threads``,
                ``num_workers``, ``download_root``, ``local_files_only``, ``revision``.

        Raises:
            TypeError, ValueError: a parameter is nonsense.
            UnknownModel: there is no such size, and no model in that directory.
            UnsupportedComputeType: the device cannot compute in that type.
            DeviceUnavailable: there is no such device.
            CacheClosed: the cache was closed.
        """
        # A relative path means the same directory after os.chdir().
        model = anchored(model_size_or_path)
        compute_type, load_options = by_position(more, compute_type, load_options)
        request = as_request(model, device, compute_type, load_options)
        terms = self._terms(timeout_s, keep_alive, fallback, priority, parallel)
        source = self._source(request, terms)
        base = self.loader.whisper_class()
        # Those of a loader of a user's own may be anything.
        if base is None:
            return CachedModel(source)
        from .dropin.model import cached_model

        return cached_model(base, source)

    def _source(self, request: Request, terms: Terms) -> ModelSource:
        # A repository of unknown size can only be resolved by a download, which is left
        # to its first use.
        with suppress(NotDownloaded):
            request, target = self._resolved(request, terms)
            if target.is_outdated:
                self._unload_outdated(target.entry)
        return ModelSource(self, request, terms)

    def _resolved(self, request: Request, terms: Terms) -> tuple[Request, Target]:
        """
        Returns the request, or the first of its fallbacks, for which there is a device
        that computes so.
        """
        attempts = Attempts(self._core, request, terms)
        for attempt, _ in attempts:
            with attempts.judging():
                target = self._resolver.resolve(attempt, download=False)
                attempts.succeed(target.entry.key)
                return attempt, target
        raise attempts.failure()

    def _unload_outdated(self, entry: Entry) -> None:
        """
        Unloads a model whose files are others by now, unless it is in use: who names
        it anew means those. Blocks until it is unloaded.
        """
        if entry.is_idle and not entry.pinned:
            leaving = self._core.evict(lambda key: key == entry.key)
            # Somebody may have leased it meanwhile, and goes on with it.
            with suppress(EvictionTimeout):
                self._await_gone(leaving, _UNLOAD_S)

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
    ) -> Lease:
        """
        Returns the real WhisperModel, held in memory for a ``with`` block.

        Takes what `get_model` does. *timeout_s* is for this lease: None waits for as
        long as it takes, 0 takes the model only if it can be had at once. *keep_alive*
        is the time in memory after it, *priority* its turn, and *parallel* the most
        leases on the model with this one, or it waits. *workload* is the work that will
        be done with the model, for the memory that it takes: faster-whisper's defaults
        if None.

        Blocks: until the model is in memory, through a download if it takes one.

        Raises:
            LeaseTimeout: it could not be had within *timeout_s*.
            ModelTooLarge: it can never fit, with these limits and that memory.
            TooManyWaiters: ``max_waiting`` others wait.
            LoadFailed: the download or the load failed.
            LeaseDeadlock: this thread holds leases, and would wait for ever.
            CacheClosed: the cache was closed, before or meanwhile.
            Also what `get_model` raises.
        """
        # `_lease`, spelled out: most requests are hits with nothing special.
        if load_options or type(compute_type) is not str:
            request = as_request(model_size_or_path, device, compute_type, load_options)
        else:
            request = (model_size_or_path, device, compute_type)
        terms = self._usual_terms
        if (
            timeout_s is not None
            or keep_alive is not None
            or fallback is not None
            or priority is not None
            or parallel is not None
        ):
            terms = self._terms(timeout_s, keep_alive, fallback, priority, parallel)
            return self._lease(request, workload or DEFAULT_WORKLOAD, terms)
        workload = workload or DEFAULT_WORKLOAD
        hit = self._core.hit
        lease = hit(request, workload, terms.keep_alive_s, here.owner)
        return self._climb(request, workload, terms) if lease is None else lease

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
    ) -> Leases:
        """
        Returns several models at once, held in memory for a ``with`` block.

        All or nothing: their memory is granted in one step, and nothing is held before,
        so that two callers cannot block each other. Duplicates share a model.

        Takes what `lease` does. *models* are names or paths, or tuples of a name with
        its own device, or with its own device and compute type; *device* and
        *compute_type* are for those that name none, and *workload* is for each.

        Raises:
            ValueError: no models are named.
            ModelTooLarge: together they can never fit; it has the numbers.
            Also what `lease` raises.

        Blocks: until all are in memory.
        """
        requests = as_requests(models, device, compute_type, load_options)
        # Without fallbacks: which of the models should give way would be a guess.
        terms = self._terms(timeout_s, keep_alive, (), priority, parallel)
        parts = self._locate(requests, workload or DEFAULT_WORKLOAD)
        return Leases(self._wait(parts, terms))

    def _lease(self, request: Request, workload: Workload, terms: Terms) -> Lease:
        # A model in memory costs one look-up and one critical section.
        hit: Callable[..., Lease | None] = self._core.hit
        if terms.parallel is not None:
            hit = partial(self._core.hit_below, terms.parallel)
        lease = hit(request, workload, terms.keep_alive_s, here.owner)
        return self._climb(request, workload, terms) if lease is None else lease

    def _climb(self, request: Request, workload: Workload, terms: Terms) -> Lease:
        """
        Returns a lease on the model, or on the first fallback that can be had.
        """
        # Each attempt has the rest of the time. The first error is the one that counts.
        attempts = Attempts(self._core, request, terms)
        for attempt, terms_left in attempts:
            with attempts.judging():
                parts = self._locate([attempt], workload)
                (lease,) = self._wait(parts, terms_left)
                attempts.succeed(lease.key)
                return lease
        raise attempts.failure()

    def _wait(self, parts: Sequence[Wanted], terms: Terms) -> tuple[Lease, ...]:
        core, owner = self._core, current_owner()
        waiter = core.request(
            parts,
            terms.keep_alive_s,
            terms.timeout_s,
            owner,
            priority=terms.priority,
            parallel=terms.parallel,
            resumes=terms.resumes,
        )
        try:
            leases = waiter.future.result()
        except BaseException:
            # Ctrl-C, for one: a grant that is under way goes back to the core.
            core.abandon(waiter)
            raise
        core.trace(leases)
        return leases

    # Models ---------------------------------------------------------------------------

    def download(
        self,
        model_size_or_path: str | os.PathLike[str],
        device: str = "auto",
        compute_type: str = "default",
        **load_options: object,
    ) -> None:
        """
        Downloads a model's files, if they are not on this disk, and checks them.

        Takes what `get_model` does. Nothing is loaded. Callers that want the same model
        share one download.

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

    def preload(
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
        Loads a model now, so that the next call on it need not.

        Takes what `lease` does. With the *tier* ``"page"`` its files are only read,
        into the kernel's page cache: that takes no memory that others could use, and
        the load itself will not wait for the disk. *timeout_s* does not end a read, and
        it takes no *fallback*.

        Raises:
            ValueError: there is no such tier.
            Also what `lease` raises.

        Blocks: as `lease` does, or until the files are read.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, None, fallback)
        if parse_tier(tier) == "page":
            self._read(request)
        else:
            # The lease ends at once, and the model stays for its keep_alive.
            self._lease(request, DEFAULT_WORKLOAD, terms).release()

    def pin(
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
        Loads a model now and keeps it, idle or not, until `unpin`, `evict` or `close`.

        Takes and raises what `lease` does, and blocks as long.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        terms = self._terms(timeout_s, None, fallback)
        lease = self._lease(request, DEFAULT_WORKLOAD, terms)
        # Under the lease, or the model might be evicted before it is pinned.
        with lease:
            lease.pin()

    def evict(
        self,
        model_size_or_path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        compute_type: str | None = None,
        *,
        timeout_s: DurationValue | None = None,
    ) -> int:
        """
        Unloads models now and returns their memory, pinned or not.

        A model that is leased is unloaded as soon as it is idle; until then no new
        lease is granted on it. New requests for it wait, and load it again. Set a time
        limit where the lease may belong to a thread that waits for a model of yours.

        Args:
            model_size_or_path: The model, by any of its names; None for all.
            device: Only on this device.
            compute_type: Only in this type.
            timeout_s: Most time to wait for leases to end and for the unload.

        Returns:
            The number of models that were unloaded; 0 if there was none to evict.

        Raises:
            EvictionTimeout: some stayed; those that are still leased stay as they were.
            LeaseDeadlock: without *timeout_s*, this thread would wait for itself, since
                it holds a lease on one of them.
        """
        wait_s = parse_timeout(timeout_s)
        matches = self._resolver.matching(model_size_or_path, device, compute_type)
        # With a time limit, a wait for a lease of one's own ends by itself.
        waits_for = current_owner() if wait_s is None else None
        return self._await_gone(self._core.evict(matches, waits_for), wait_s)

    def _await_gone(self, leaving: list[Leaving], timeout_s: float | None) -> int:
        departure = Departure(self._core, leaving, timeout_s)
        wait([gone for _, gone in leaving])
        return departure.result()

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
        Returns what a lease on a model would do now: hit, load, evict, wait, or fail.

        Nothing is loaded or evicted. Takes and raises what `get_model` does.
        """
        request = as_request(model_size_or_path, device, compute_type, load_options)
        return self._explain(request, workload or DEFAULT_WORKLOAD)

    def top(self, interval_s: DurationValue = 1.0) -> None:
        """
        Shows the cache live in the terminal, until Ctrl-C. Without a terminal, once.
        Raises TypeError or ValueError if *interval_s* is no time above 0.

        Blocks: call it on a thread of its own where the program does the work. Only a
        program's main thread sees Ctrl-C.
        """
        from .watch.live import Watch
        from .watch.top import watch

        with Watch(self) as seen:
            watch(seen.snapshot, interval_s=interval_s)

    # Closing --------------------------------------------------------------------------

    def close(self, timeout_s: DurationValue | None = 10.0) -> None:
        """
        Refuses new requests, fails those that wait, and unloads all models.

        Segments that this thread began and did not finish end at once, since no other
        could end them; so do those of threads and tasks that have ended, unless they
        were handed over. Iterating on is a RuntimeError. Models in use elsewhere are
        waited for.

        A second call waits again. A model that is still leased after *timeout_s* is
        unloaded when its lease ends. In a signal handler that interrupted the cache
        itself, or a step of segments, this returns before that model is unloaded.

        Args:
            timeout_s: Most time to wait for leases, loads and unloads; None for as long
                as it takes.

        Raises:
            EvictionTimeout: models were still held then; it names them.
            LeaseDeadlock: without *timeout_s*, this thread would wait for itself, since
                it holds a lease and has not said `Lease.hand_over`.
        """
        wait_s = parse_timeout(timeout_s)
        leaving = self._core.close()
        # None if a signal handler interrupted the core itself: a thread closes it then.
        if leaving is None:
            return
        stuck = self._end_own(current_owners(), wait_s)
        # A step that this very call interrupted ends after it, and is not waited for.
        awaited = [(entry, gone) for entry, gone in leaving if entry not in stuck]
        self._await_gone(awaited, wait_s)
        # A device's thread ends after its last model.
        if not stuck:
            self._core.join(wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with outranked_by(error):
            self.close()


def _makes_peers(
    probe: MemoryProbe, directory: str | os.PathLike[str] | None, *, coordinates: bool
) -> Callable[[], Peers]:
    """
    Returns a function that makes what is known of the processes that coordinate.
    """
    if not coordinates and directory is None:
        from .core.gauges import NoPeers

        return NoPeers
    from .peers.pressure import LedgerPeers

    return partial(LedgerPeers, probe, directory)


def _usual_parts(
    probe: MemoryProbe | None, loader: Engine | None, variants_bytes: int | None
) -> tuple[MemoryProbe, Loader]:
    from .engine.adapter import completed

    # Imported when they are needed: a cache on fakes opens no driver's library.
    if probe is None:
        from .devices.probe import SystemProbe

        probe = SystemProbe()
    if loader is None:
        from .engine.loader import FasterWhisperLoader

        loader = FasterWhisperLoader(probe, variants_bytes=variants_bytes)
    return probe, completed(loader)
