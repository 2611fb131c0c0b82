"""
The path of a request: admit → load → grant → release → unload. One lock.

Invariants, asserted by `Core.check`:

1. Per device, reserved + resident bytes never exceed capacity, loads in flight
   included. (A limit lowered later is met as soon as leases and loads allow.)
2. A leased model is resident; it is never unloaded.
3. At most one load per key is in flight; its waiters share it, its failure reaches all.
4. Finding a model and pinning it are one critical section.
5. Each request ends once: granted, failed, timed out, cancelled or closed; a grant
   offered to one who left comes back.
6. No loader, probe, listener or log handler runs while the lock is held.
7. Memory is credited only after the unload is confirmed; an unload that did not happen
   keeps its bytes charged.

Whatever changes state does so under the lock and appends the slow work that follows to
``_work``, which `Core.changing` performs once the lock is free. `Core._admit_locked`
is the only place that matches waiters to memory, and every arrival, departure, load and
unload ends in it: there is no other notification.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import threading
import traceback
import weakref
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from . import admission
from .admission import Need, Outcome, Pending
from .entries import Device, Entry, State, Waiter
from .errors import (
    CacheClosed,
    DeviceUnavailable,
    LeaseTimeout,
    LoadFailed,
    ModelTooLarge,
    TooManyWaiters,
    WhisperCacheError,
    format_bytes,
)
from .events import (
    EvictionCause,
    ModelEvicted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    Outbox,
    ReleaseUnconfirmed,
)
from .footprint import DEFAULT_WORKLOAD
from .lease import Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .admission import Decision, Demand, Policy, Resident
    from .footprint import Workload
    from .keys import ModelKey
    from .loader import LoadedModel, Loader, Released
    from .memory import MemoryProbe
    from .threads import Clock
    from .units import Limit

    # A model on its way out, and a future that is done when it has left.
    Leaving: TypeAlias = tuple[Entry, Future[None]]

__all__ = ["Core"]

_log = logging.getLogger("whispercache")

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 30.0
"""
Seconds between tries of an unload that did not happen; doubled from first to last.
"""

RETURN_AFTER_S = 1.0
"""
Seconds without another load after which a reload's buffers go back to the system.

Source: where models take turns, faulting those pages in again takes a quarter of a
reload (benchmarks/switch.py).
"""


class Core:
    """
    The state of one cache, shared by its blocking and its awaited face.
    """

    def __init__(
        self,
        *,
        loader: Loader,
        probe: MemoryProbe,
        clock: Clock,
        policy: Policy,
        limit_of: Callable[[str], Limit],
        max_models: int | None,
        keep_alive_s: float,
        patience_s: float,
        max_waiting: int | None,
    ) -> None:
        self.loader = loader
        self.probe = probe
        self.clock = clock
        self.outbox: Outbox = Outbox()
        self._policy = policy
        self._patience_s = patience_s
        self._max_waiting = max_waiting
        self._keep_alive_s = keep_alive_s
        self._lock = threading.Lock()
        # All that follows is guarded by _lock.
        self.limit_of: Callable[[str], Limit] = limit_of
        self.max_models: int | None = max_models
        self.entries: dict[ModelKey, Entry] = {}
        self.devices: dict[str, Device] = {}
        self.queue: list[Waiter] = []
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.leases: int = 0
        self._grants = 0
        self._serials = itertools.count()
        self._work: list[Callable[[], None]] = []
        self._sweep_at_s = math.inf
        self._closed: CacheClosed | None = None
        # Leases that the garbage collector ended, perhaps inside a critical section.
        self._dropped: deque[tuple[Entry, int, float | None]] = deque()

    @property
    def is_closed(self) -> bool:
        """
        Whether new requests are refused.
        """
        return self._closed is not None

    # The lock ------------------------------------------------------------------------

    @contextmanager
    def changing(self) -> Iterator[None]:
        """
        Hold the lock, then do the slow work that follows from what was changed.
        """
        work: list[Callable[[], None]] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    work = self._take_work_locked()
        finally:
            self._perform(work)

    def _take_work_locked(self) -> list[Callable[[], None]]:
        work, self._work = self._work, []
        if self.outbox:
            work.append(self.outbox.deliver)
        return work

    def _perform(self, work: list[Callable[[], None]]) -> None:
        for call in work:
            call()
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self._release_locked(*self._dropped.popleft())
                self._admit_locked()
                more = self._take_work_locked()
            finally:
                self._lock.release()
            for call in more:
                call()

    # Resolve -------------------------------------------------------------------------

    def entry(self, key: ModelKey) -> Entry:
        """
        The books of a model, opened at its first use.

        Raises:
            CacheClosed: the cache was closed.
        """
        with self.changing():
            self._check_open_locked()
            entry = self.entries.get(key)
            if entry is None:
                device, host = (
                    self._device_locked(key.device),
                    self._device_locked("cpu"),
                )
                entry = self.entries[key] = Entry(key, device, host)
            return entry

    def device(self, name: str) -> Device:
        """
        The books of a device, opened at its first use.

        Raises:
            CacheClosed: the cache was closed.
        """
        with self.changing():
            self._check_open_locked()
            return self._device_locked(name)

    def _device_locked(self, name: str) -> Device:
        device = self.devices.get(name)
        if device is None:
            device = Device(name, self.limit_of(name), self.max_models)
            self.devices[name] = device
        return device

    def observe(self, device: Device) -> None:
        """
        Read a device's gauge. Blocks for a system call or two.

        Raises:
            DeviceUnavailable: there is no reading, and no limit to go by either.
        """
        try:
            reading = self.probe.read(device.name)
        except Exception as error:
            # A gauge that fails for a moment must not stop who knows its limit.
            if device.capacity_bytes:
                _log.warning("free memory of %s is unknown: %s", device.name, error)
                return
            if isinstance(error, WhisperCacheError):
                raise
            raise DeviceUnavailable(device.name, _one_line(error)) from error
        with self.changing():
            device.observe(reading)

    def _look_again(self, device: Device) -> None:
        """
        Read the gauge for those who wait, after something of ours has ended.
        """
        try:
            self.observe(device)
        except DeviceUnavailable as error:
            _log.warning("%s", error)
        with self.changing():
            self._admit_locked()

    # Admit ---------------------------------------------------------------------------

    def hit(
        self, entry: Entry, workload: Workload, keep_alive_s: float | None
    ) -> Lease | None:
        """
        A lease on a model that is in memory, if nobody waits; else None.
        """
        self._lock.acquire()
        try:
            if (
                entry.state is not State.RESIDENT
                or self.queue
                or self._closed is not None
                or not entry.is_open_to(None)
            ):
                return None
            workspace_bytes = entry.workspace_of(workload)
            if workspace_bytes is None or not entry.fits(workspace_bytes):
                return None
            self.counts["hits"] += 1
            return self._grant_locked(entry, workspace_bytes, keep_alive_s)
        finally:
            self._lock.release()
            if self._dropped:
                self._perform([])

    def request(
        self,
        entry: Entry,
        workload: Workload,
        keep_alive_s: float | None,
        timeout_s: float | None,
    ) -> Waiter:
        """
        Queue for a lease. The waiter's future tells how it ends.

        The model must have been located for *workload*, and its devices observed.

        Raises:
            CacheClosed: the cache was closed.
            TooManyWaiters: ``max_waiting`` requests wait already.
            LeaseTimeout: *timeout_s* is 0, and the model is not to be had at once.
        """
        waiter = Waiter(entry, workload, keep_alive_s, self.clock.now())
        with self.changing():
            self._check_open_locked()
            waiting = len(self.queue)
            self.counts["hits" if entry.state is State.RESIDENT else "misses"] += 1
            is_full = self._max_waiting is not None and waiting >= self._max_waiting
            never_waits = timeout_s is not None and timeout_s <= 0
            ends_now = (is_full or never_waits) and self._ends_now_locked(waiter)
            if never_waits and not ends_now:
                self.counts["timeouts"] += 1
                raise LeaseTimeout(str(entry.key), 0.0, waiting + 1)
            if is_full and not ends_now:
                raise TooManyWaiters(str(entry.key), waiting)
            self.queue.append(waiter)
            self._admit_locked()
        if timeout_s is not None and not waiter.future.done():
            # The timer outlives the wait, and must not keep a lease from collection.
            expire = partial(self._expire, weakref.ref(waiter.future))
            self.clock.call_at(waiter.since_s + timeout_s, expire)
        return waiter

    def _ends_now_locked(self, waiter: Waiter) -> bool:
        """
        Whether a new request would not wait: its model is there, or can never be.
        """
        decision = self.plan_locked([*self.queue, waiter])[-1]
        return decision.outcome in (Outcome.GRANT, Outcome.NEVER)

    def abandon(self, waiter: Waiter) -> None:
        """
        Forget a request whose caller left; a grant that it was given comes back.
        """
        with self.changing():
            if waiter in self.queue:
                self._leave_locked(waiter)
                self._admit_locked()
        if not waiter.future.cancel():
            waiter.future.add_done_callback(_give_back)

    def _expire(self, future: weakref.ref[Future[Lease]]) -> None:
        with self.changing():
            waiter = next((w for w in self.queue if w.future is future()), None)
            if waiter is None:
                return
            place = self.queue.index(waiter) + 1
            waited_s = self.clock.now() - waiter.since_s
            self.counts["timeouts"] += 1
            error = LeaseTimeout(str(waiter.entry.key), waited_s, place)
            self._fail_locked(waiter, error)
            self._admit_locked()

    def _admit_locked(self) -> None:
        """
        Match waiters to memory, until nothing changes.
        """
        self._shrink_locked()
        before = None
        while self.queue and len(self.queue) != before and self._closed is None:
            before = len(self.queue)
            queue = list(self.queue)
            for waiter, decision in zip(queue, self.plan_locked(queue), strict=True):
                for victim in decision.victims:
                    entry = self.entries[victim.key]
                    self._unload_locked(entry, EvictionCause.CAPACITY)
                for key in decision.drain:
                    self._drain_locked(self.entries[key], waiter)
                for place in decision.overtakes:
                    queue[place].overtaken += 1
                self._carry_out_locked(waiter, decision)
        for device in {waiter.entry.device for waiter in self.queue}:
            # What ended may have left more than the last reading knew of.
            if device.is_stale and not device.is_moving:
                device.is_stale = False
                self._work.append(partial(self._look_again, device))

    def _shrink_locked(self) -> None:
        """
        Unload what is idle where a limit was lowered below what is held.
        """
        for device in self.devices.values():
            if device.is_over_limit:
                idle = self._idle_locked(device.name)
                for victim in admission.shrink(device.room(), idle):
                    entry = self.entries[victim.key]
                    self._unload_locked(entry, EvictionCause.CAPACITY)

    def plan_locked(self, queue: Sequence[Waiter]) -> list[Decision]:
        """
        What should happen to each waiter; nothing is changed.
        """
        now_s = self.clock.now()
        first: dict[ModelKey, Waiter] = {}
        pending = []
        for waiter in queue:
            # Only the first for each model asks for memory; the others share it.
            is_first = first.setdefault(waiter.entry.key, waiter) is waiter
            waited_s = now_s - waiter.since_s
            pending.append(
                waiter.pending(impatient=waited_s >= self._patience_s)
                if is_first
                else Pending(waiter.entry.key, Need.NOTHING)
            )
        rooms = {name: device.room() for name, device in self.devices.items()}
        return admission.plan(pending, rooms, self._idle_locked, self._busy_locked)

    def _idle_locked(self, device: str) -> list[Resident]:
        """
        The models that may leave *device*, the first to leave first.
        """
        return self._ordered(self.devices[device].shelf)

    def _busy_locked(self, device: str) -> list[Resident]:
        """
        The leased models of *device* that may leave once they are idle.
        """
        held = self.devices[device].entries.values()
        return self._ordered(entry for entry in held if entry.leases)

    def _ordered(self, entries: Iterable[Entry]) -> list[Resident]:
        now_s = self.clock.now()
        residents = [entry.resident() for entry in entries if not entry.stays]
        return sorted(residents, key=lambda resident: self._policy(resident, now_s))

    def _carry_out_locked(self, waiter: Waiter, decision: Decision) -> None:
        if decision.outcome is Outcome.LOAD:
            self._start_load_locked(waiter)
        elif decision.outcome is Outcome.GRANT:
            self._serve_locked(waiter.entry)
        elif decision.lacking is not None:
            demand, reachable_bytes = decision.lacking
            error = self.too_large(waiter.entry, demand, reachable_bytes)
            self._fail_locked(waiter, error)

    def too_large(
        self, entry: Entry, demand: Demand, reachable_bytes: int
    ) -> ModelTooLarge:
        """
        Why *demand* can never be met.
        """
        device = self.devices[demand.device]
        room = device.room()
        if demand.models and room.max_models == room.pinned_models:
            reason = f"max_models is {room.max_models}, and all of them are pinned"
        elif demand.n_bytes <= room.ceiling_bytes:
            reason = f"{format_bytes(room.pinned_bytes)} are pinned; unpin a model"
        elif device.limit_bytes is not None and demand.n_bytes > device.limit_bytes:
            reason = "that is the limit; raise it, or choose a smaller model or type"
        else:
            reason = "other programs hold the rest; choose a smaller model or type"
        return ModelTooLarge(
            str(entry.key), device.name, demand.n_bytes, reachable_bytes, reason
        )

    def _drain_locked(self, entry: Entry, waiter: Waiter) -> None:
        """
        Keep new leases on *entry* back until *waiter* is served.
        """
        if entry.drained_for is None:
            entry.drained_for = waiter
            waiter.draining.append(entry)

    def _leave_locked(self, waiter: Waiter) -> None:
        self.queue.remove(waiter)
        for entry in waiter.draining:
            entry.drained_for = None
        waiter.draining.clear()
        # It kept its model from expiring.
        if waiter.entry.is_idle:
            self._sweep_by_locked(waiter.entry.expires_at_s)
        self.seconds["wait_s"] += self.clock.now() - waiter.since_s

    def _fail_locked(self, waiter: Waiter, error: BaseException) -> None:
        self._leave_locked(waiter)
        if waiter.future.set_running_or_notify_cancel():
            self._work.append(partial(waiter.future.set_exception, error))

    # Load ----------------------------------------------------------------------------

    def _start_load_locked(self, waiter: Waiter) -> None:
        entry = waiter.entry
        demand, *on_host = entry.demand(waiter.workload)
        entry.state = State.LOADING
        entry.device.loads_begun += 1
        entry.device.entries[entry.key] = entry
        entry.charge(demand.n_bytes, host_bytes=sum(other.n_bytes for other in on_host))
        self.outbox.append(ModelLoading(entry.key, demand.n_bytes))
        self._on_thread_locked(entry, partial(self._load, entry))

    def _load(self, entry: Entry) -> None:
        """
        Load a model; on its device's thread.
        """
        assert entry.files is not None
        with self.changing():
            quiet_since = None if self.leases else self._grants
        started_s = self.clock.now()
        try:
            loaded = self.loader.load(entry.key, entry.files)
        except BaseException as error:  # or its waiters would wait for ever
            self._failed(entry, error)
            return
        load_s = self.clock.now() - started_s
        with self.changing():
            # Work of others in the process moves what the loader measured.
            is_quiet = quiet_since == self._grants
            self._loaded_locked(entry, loaded, load_s)
            self._admit_locked()
            if loaded.reloaded:
                self._return_later_locked(entry.device)
        if is_quiet and loaded.measured_bytes is not None:
            self.loader.remember(entry.key, entry.files, loaded.measured_bytes)

    def _return_later_locked(self, device: Device) -> None:
        """
        Have what a reload left in the heap returned, unless the next one needs it
        first.
        """
        begun = device.loads_begun

        def return_memory() -> None:
            if device.loads_begun == begun:
                self.loader.return_memory(device.name)

        again = partial(device.thread.submit, return_memory)
        self.clock.call_at(self.clock.now() + RETURN_AFTER_S, again)

    def _loaded_locked(self, entry: Entry, loaded: LoadedModel, load_s: float) -> None:
        # The books keep to the prediction while the model is here, and what was
        # measured corrects the next one: nothing that was admitted can turn out too
        # large.
        weights_bytes = entry.footprints[DEFAULT_WORKLOAD].weights_bytes
        entry.charge(weights_bytes)
        entry.loaded = loaded
        entry.state = State.RESIDENT
        entry.loads += 1
        entry.load_s = load_s
        self.counts["loads"] += 1
        self.counts["reloads"] += loaded.reloaded
        self.seconds["load_s"] += load_s
        measured_bytes = loaded.measured_bytes
        self.outbox.append(
            ModelLoaded(
                entry.key, load_s, weights_bytes, measured_bytes, loaded.reloaded
            )
        )
        # Whoever waited for this load comes first, even if it is to leave meanwhile.
        cause, entry.cause = entry.cause, None
        self._serve_locked(entry)
        entry.cause = cause
        if not entry.leases:
            self._shelve_locked(entry, None)

    def _failed(self, entry: Entry, error: BaseException) -> None:
        reason = _one_line(error)
        # The frames of the traceback hold the half-built model.
        traceback.clear_frames(error.__traceback__)
        try:
            self.loader.return_memory(entry.key.device)
        except Exception:  # nor may this keep them waiting
            _log.exception("memory of %s was not returned", entry.key)
        with self.changing():
            self._absent_locked(entry)
            self.counts["load_failures"] += 1
            self.outbox.append(ModelLoadFailed(entry.key, reason))
            for waiter in [w for w in self.queue if w.entry is entry]:
                self._fail_locked(waiter, _load_error(entry.key, error, reason))
            self._admit_locked()

    # Grant ---------------------------------------------------------------------------

    def _serve_locked(self, entry: Entry) -> None:
        """
        Grant a resident model to its first waiter, and to all who cost no more memory.
        """
        waiters = [waiter for waiter in self.queue if waiter.entry is entry]
        for place, waiter in enumerate(waiters):
            workspace_bytes = entry.footprints[waiter.workload].workspace_bytes
            if not entry.is_open_to(waiter) or not entry.fits(workspace_bytes):
                return
            if place and entry.workspace_with(workspace_bytes) > entry.workspace_bytes:
                return
            self._leave_locked(waiter)
            if waiter.future.set_running_or_notify_cancel():
                lease = self._grant_locked(entry, workspace_bytes, waiter.keep_alive_s)
                self._work.append(partial(waiter.future.set_result, lease))

    def _grant_locked(
        self, entry: Entry, workspace_bytes: int, keep_alive_s: float | None
    ) -> Lease:
        serial = next(self._serials)
        entry.take(serial, workspace_bytes, self.clock.now())
        self.leases += 1
        self._grants += 1
        return Lease(self, entry, serial, keep_alive_s)

    # Release -------------------------------------------------------------------------

    def release(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease. Nothing happens if it has ended.
        """
        work: list[Callable[[], None]] | None = None
        self._lock.acquire()
        try:
            self._release_locked(entry, serial, keep_alive_s)
            if self.queue or entry.device.is_over_limit:
                self._admit_locked()
            if self._work:
                work = self._take_work_locked()
        finally:
            self._lock.release()
            if work or self._dropped:
                self._perform(work or [])

    def drop(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        End a lease from the garbage collector.

        That may run inside a critical section of this very thread, of the cache or of a
        listener, so nothing is done here: the device's thread sees to it, or whoever
        lets go of the lock before.
        """
        self._dropped.append((entry, serial, keep_alive_s))
        entry.device.thread.submit(partial(self._perform, []))

    def _release_locked(
        self, entry: Entry, serial: int, keep_alive_s: float | None
    ) -> None:
        if not entry.give_back(serial):
            return
        self.leases -= 1
        if not entry.leases:
            self._shelve_locked(entry, keep_alive_s)

    def _shelve_locked(self, entry: Entry, keep_alive_s: float | None) -> None:
        """
        Put an idle model on the shelf; the clock of its keep-alive starts.
        """
        if keep_alive_s is None:
            keep_alive_s = self._keep_alive_s
        entry.device.is_stale = True
        entry.last_used_s = self.clock.now()
        entry.expires_at_s = entry.last_used_s + keep_alive_s
        entry.device.shelf[entry] = None
        if entry.cause is not None:
            self._unload_locked(entry, entry.cause)
        elif keep_alive_s <= 0 and self._may_expire_locked(entry):
            self._unload_locked(entry, EvictionCause.EXPIRED)
        else:
            self._sweep_by_locked(entry.expires_at_s)

    def _may_expire_locked(self, entry: Entry) -> bool:
        wanted = any(waiter.entry is entry for waiter in self.queue)
        return not entry.pinned and not wanted

    def _sweep_by_locked(self, at_s: float) -> None:
        """
        Sweep at *at_s*, or earlier.
        """
        if at_s < self._sweep_at_s:
            self._sweep_at_s = at_s
            self.clock.call_at(at_s, partial(self._sweep, at_s))

    def _sweep(self, at_s: float) -> None:
        """
        Unload what has been idle for longer than its keep-alive.
        """
        with self.changing():
            if at_s != self._sweep_at_s:
                return  # an earlier sweep took its place
            now_s = self.clock.now()
            next_s = self._sweep_at_s = math.inf
            for device in self.devices.values():
                for entry in list(device.shelf):
                    if entry.expires_at_s > now_s:
                        next_s = min(next_s, entry.expires_at_s)
                    elif self._may_expire_locked(entry):
                        self._unload_locked(entry, EvictionCause.EXPIRED)
            self._sweep_by_locked(next_s)

    # Unload --------------------------------------------------------------------------

    def evict(self, matches: Callable[[ModelKey], bool]) -> list[Leaving]:
        """
        Unload models as soon as they are idle, pinned or not.

        Each with a future that is done when its leaving was confirmed.
        """
        with self.changing():
            return [
                (entry, self._doom_locked(entry, EvictionCause.EXPLICIT))
                for entry in list(self.entries.values())
                if entry.state is not State.ABSENT and matches(entry.key)
            ]

    def _doom_locked(self, entry: Entry, cause: EvictionCause) -> Future[None]:
        """
        Unload *entry* now if it is idle, else as soon as it is.
        """
        gone: Future[None] = Future()
        gone.add_done_callback(_wake_if_cancelled)
        entry.gone.append(gone)
        if entry.state is not State.UNLOADING:
            entry.cause = cause
            if entry.is_idle:
                self._unload_locked(entry, cause)
        return gone

    def withdraw(self, entry: Entry, gone: Future[None]) -> None:
        """
        Take an eviction back whose caller no longer waits; one under way goes on.
        """
        with self.changing():
            if gone in entry.gone:
                entry.gone.remove(gone)
            # What is left when a cache closes leaves in any case.
            is_wanted = not entry.gone and self._closed is None
            if is_wanted and entry.state is not State.UNLOADING:
                entry.cause = None
            self._admit_locked()

    def pin(self, entry: Entry) -> None:
        """
        Let a model that is held stay when idle.
        """
        with self.changing():
            entry.pinned = True

    def unpin(self, matches: Callable[[ModelKey], bool]) -> int:
        """
        Let models leave when idle, as before `pin`; how many were pinned.
        """
        with self.changing():
            pinned = [e for e in self.entries.values() if e.pinned and matches(e.key)]
            for entry in pinned:
                entry.pinned = False
                if entry.is_idle:
                    self._shelve_locked(entry, None)
            self._admit_locked()
        return len(pinned)

    def _unload_locked(self, entry: Entry, cause: EvictionCause) -> None:
        assert entry.state is State.RESIDENT and not entry.leases, entry.key
        del entry.device.shelf[entry]
        entry.state = State.UNLOADING
        entry.cause = cause
        entry.refusals = 0
        entry.unload_started_s = self.clock.now()
        self._on_thread_locked(entry, partial(self._unload, entry))

    def _unload(self, entry: Entry) -> None:
        """
        Unload a model, and have it confirmed; on its device's thread.
        """
        assert entry.loaded is not None
        with self.changing():
            load_follows = self._load_follows_locked(entry.device)
        try:
            released = self.loader.unload(entry.loaded, load_follows=load_follows)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            self._refused(entry, _one_line(error))
            return
        if not released.confirmed:
            self._refused(entry, released.reason)
            return
        self._unloaded(entry, released)
        with self.changing():
            is_moving = entry.device.is_moving
        if load_follows and not is_moving:  # whoever waited for this room has left
            self.loader.return_memory(entry.key.device)

    def _load_follows_locked(self, device: Device) -> bool:
        """
        Whether somebody waits for room on *device* to load a model.
        """
        return any(
            waiter.entry.device is device and not waiter.entry.is_present
            for waiter in self.queue
        )

    def _unloaded(self, entry: Entry, released: Released) -> None:
        with self.changing():
            assert entry.cause is not None
            self.counts["evictions"] += 1
            unload_s = self.clock.now() - entry.unload_started_s
            self.outbox.append(
                ModelEvicted(
                    entry.key,
                    entry.cause,
                    entry.weights_bytes,
                    released.returned_bytes,
                    unload_s,
                )
            )
            self._absent_locked(entry)
            self._admit_locked()

    def _refused(self, entry: Entry, reason: str) -> None:
        """
        Keep the bytes charged, and try again later.
        """
        with self.changing():
            self.counts["unconfirmed"] += not entry.refusals
            retry_s = min(FIRST_RETRY_S * 2 ** min(entry.refusals, 32), LAST_RETRY_S)
            entry.refusals += 1
            self.outbox.append(
                ReleaseUnconfirmed(entry.key, entry.weights_bytes, retry_s, reason)
            )
            again = partial(entry.device.thread.submit, partial(self._unload, entry))
            self.clock.call_at(self.clock.now() + retry_s, again)

    def _absent_locked(self, entry: Entry) -> None:
        """
        Close the books of a model that is not, or no longer, in memory.
        """
        entry.charge(0)
        entry.device.is_stale = True
        entry.state = State.ABSENT
        entry.loaded = None
        entry.cause = None
        entry.pinned = False
        if entry.drained_for is not None:
            # Or an older request would load it, not get it, and see it leave, for ever.
            entry.drained_for.draining.remove(entry)
            entry.drained_for = None
        del entry.device.entries[entry.key]
        for gone in entry.gone:
            self._work.append(partial(_done, gone))
        entry.gone = []
        self._stop_if_over_locked()

    def _on_thread_locked(self, entry: Entry, call: Callable[[], None]) -> None:
        self._work.append(partial(entry.device.thread.submit, call))

    # Limits, closing -----------------------------------------------------------------

    def resize(self, limit_of: Callable[[str], Limit], max_models: int | None) -> None:
        """
        Set other limits. What is idle and too much leaves now, the rest when idle.
        """
        with self.changing():
            self.limit_of = limit_of
            self.max_models = max_models
            for device in self.devices.values():
                device.max_models = max_models
                device.set_limit(limit_of(device.name))
            self._admit_locked()

    def close(self) -> list[Leaving]:
        """
        Refuse new requests, fail those that wait, unload what is or becomes idle.

        The models in memory, each with a future that is done when it has left.
        """
        with self.changing():
            self._closed = self._closed or CacheClosed()
            for waiter in list(self.queue):
                self._fail_locked(waiter, CacheClosed("the cache was closed meanwhile"))
            leaving = [
                (entry, self._doom_locked(entry, EvictionCause.CLOSED))
                for entry in list(self.entries.values())
                if entry.state is not State.ABSENT
            ]
            self._stop_if_over_locked()
        return leaving

    def join(self, timeout_s: float | None) -> None:
        """
        Wait for the devices' threads to end, after `close`.
        """
        for device in list(self.devices.values()):
            device.thread.join(timeout_s)

    def _stop_if_over_locked(self) -> None:
        """
        Let all threads end once the cache is closed and empty.
        """
        if self._closed is None or any(d.entries for d in self.devices.values()):
            return
        self._work.append(self.clock.close)
        self._work.extend(device.thread.stop for device in self.devices.values())

    def _check_open_locked(self) -> None:
        if self._closed is not None:
            raise CacheClosed(*self._closed.args)

    # Proof ---------------------------------------------------------------------------

    def check(self) -> None:
        """
        Assert the invariants that can be seen from outside a critical section.
        """
        with self.changing():
            for device in self.devices.values():
                self._check_device_locked(device)
            for entry in self.entries.values():
                entry.check()
            held = sum(len(entry.leases) for entry in self.entries.values())
            assert held == self.leases, f"{held} leases held, {self.leases} counted"
            for waiter in self.queue:
                ended = waiter.future.done() and not waiter.future.cancelled()
                assert not ended, f"{waiter} waits and is done"

    def _check_device_locked(self, device: Device) -> None:
        charged_bytes = sum(
            entry.weights_bytes + entry.workspace_bytes
            for entry in device.entries.values()
        ) + sum(e.host_bytes for e in self.entries.values() if e.host is device)
        assert charged_bytes == device.charged_bytes, (
            f"{device.name}: {charged_bytes} B held, {device.charged_bytes} B charged"
        )
        if device.is_over_limit:
            excess = admission.shrink(device.room(), self._idle_locked(device.name))
            assert not excess, f"{device.name} over its limit: {excess} should leave"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _load_error(key: ModelKey, error: BaseException, reason: str) -> BaseException:
    """
    An error for one of several waiters; each gets its own, with its own traceback.
    """
    if isinstance(error, WhisperCacheError):
        own: WhisperCacheError = copy.copy(error)
    else:
        own = LoadFailed(str(key), reason)
    own.__cause__ = error
    return own


def _give_back(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()


def _done(future: Future[None]) -> None:
    with suppress(InvalidStateError):  # cancelled: nobody waits any more
        future.set_result(None)


def _wake_if_cancelled(future: Future[None]) -> None:
    """
    Wake those in `concurrent.futures.wait`, whom cancelling alone does not wake.
    """
    if future.cancelled():
        future.set_running_or_notify_cancel()
