"""
The core of a cache: puts its parts together, performs effects, closes, survives a fork.

Invariants, asserted by `Core.check` after every test; each has one home:

1. Per device, what is charged never exceeds capacity, loads in flight included. A limit
   lowered later is met as soon as leases and loads allow. (budget)
2. A leased model is resident; it is never unloaded. (entries)
3. At most one load per key is in flight; its waiters share it and its failure.
   (entries)
4. Finding a model and leasing it are one critical section. (hits, scheduler)
5. Each request ends once: granted, failed, timed out, cancelled or closed; a grant
   offered to a caller that left is given back. (effects.Settle)
6. No loader, probe, listener or log handler runs while the lock is held. (setup.cfg)
7. Memory is credited only after the unload is confirmed; an unload that did nothing
   keeps its bytes charged. (`Budget.clear` has three callers)
8. A request for several models gets their memory in one step, and holds none before.
   (scheduler)

The path of a request: `request` → scheduler (decides) → effects (values) → loads, on a
device's thread → scheduler → lease. That of a hit: `hits` → lease.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from concurrent.futures import InvalidStateError
from contextlib import ExitStack, suppress
from functools import partial
from tracemalloc import is_tracing
from typing import TYPE_CHECKING

from whispercache.errors import CacheForked, format_bytes
from whispercache.planning.priority import INTERACTIVE

from . import effects, view
from .agenda import Agenda
from .device import Device
from .entries import Entry, State
from .evictions import Evictions
from .gauges import Base, Gauges, NoPeers
from .held_leases import HeldLeases
from .hits import Hits
from .host_copies import HostCopies
from .loads import Loads
from .lock import Outbox, StateLock
from .reports import Reports
from .scheduler import Scheduler
from .state import CacheState
from .threads import DeviceThread, MonotonicClock, caller, has_ended
from .ticks import Ticks
from .unloads import Unloads
from .waiters import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from whispercache.devices.memory import MemoryProbe
    from whispercache.engine.api import Loader
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import ModelKey
    from whispercache.lease import Holder, Lease
    from whispercache.planning.deadlock import Owner
    from whispercache.units import Limit

    from .agenda import Rules
    from .effects import Effect
    from .evictions import Leaving
    from .gauges import Peers
    from .line import Line
    from .resolver import Request
    from .threads import Clock
    from .waiters import Wanted

_log = logging.getLogger("whispercache")

SIGNAL_S = 1.0
"""
Seconds after which `Core.close` takes the lock for one that its own thread holds, under
the signal handler that calls it. Critical sections take microseconds.
"""


class Core:
    """
    The core of one cache, shared by its blocking and its awaited face.

    Args:
        loader: Loads and unloads models.
        probe: Reads the memory of devices.
        clock: Tells the time, and calls at a later time.
        rules: The parameters of the decisions.
        limit_of: The limit of each device, by its name.
        max_models: Most models on each device; None for any number.
        park_limit: Most bytes of host copies; None for no copies.
        make_peers: Makes what is known of other processes; again in a forked child.
    """

    def __init__(
        self,
        *,
        loader: Loader,
        probe: MemoryProbe,
        clock: Clock,
        rules: Rules,
        limit_of: Callable[[str], Limit],
        max_models: int | None,
        park_limit: Limit | None = None,
        make_peers: Callable[[], Peers] = NoPeers,
    ) -> None:
        self.loader: Loader = loader
        self.probe: MemoryProbe = probe
        self.rules: Rules = rules
        self._park_limit = park_limit
        self._make_peers = make_peers
        # What the resolver knows. Every hit asks, so it is a plain dict that makes no
        # system call, and starts anew when it is full.
        # Source: benchmarks/hit_path.py; a look-up takes 0.03 µs, and 0.1 to 0.2 in the
        # bounded maps of cachetools.
        self.requests: dict[Request, Entry] = {}
        # Serial numbers. Callers that hold segments keep them alive, not the cache. Not
        # a WeakValueDictionary, of which each call would run five functions.
        self._holders: dict[weakref.ref[Holder], int] = {}
        state = CacheState(limit_of, max_models, Outbox())
        self._put_together(state, clock, make_peers())

    def _put_together(self, state: CacheState, clock: Clock, peers: Peers) -> None:
        self.state: CacheState = state
        self.entries: dict[ModelKey, Entry] = state.entries
        self.devices: dict[str, Device] = state.devices
        self.queue: Line = state.queue
        self.outbox: Outbox = state.outbox
        self.clock: Clock = clock
        lock = StateLock(self._perform)
        self.lock: StateLock = lock
        agenda = Agenda(state, self.rules, clock.now, lock.note)
        evictions = Evictions(agenda)
        self._evictions = evictions
        self.scheduler: Scheduler = Scheduler(agenda, evictions, self)
        self._held = HeldLeases(agenda, self.scheduler)
        self._ticks = Ticks(agenda, evictions, self.scheduler)
        hits = Hits(lock, agenda, self.scheduler, self, self.requests)
        # Each call in between would be felt.
        self.hit: Callable[[Request, Workload, float | None, Owner], Lease | None] = (
            # Where leases are counted, the scheduler does it.
            hits.hit if self.rules.parallel is None else _no_hit
        )
        self.release: Callable[[Entry, int, float | None], None] = hits.release
        reports = Reports(agenda, evictions, self.scheduler)
        self.gauges: Gauges = Gauges(lock, state, reports, self.probe, peers)
        base = Base(
            lock, state, self.scheduler, evictions, reports, self.loader, self.gauges
        )
        self.copies: HostCopies = HostCopies(base, self._park_limit)
        self._unloads = Unloads(base, self.copies)
        self._loads = Loads(base, self.copies, self._unloads, clock)

    # Effects --------------------------------------------------------------------------

    def _perform(self, noted: list[Effect]) -> None:
        """
        Performs effects in their order, then tells the events so far.
        """
        # One that fails in between, as Ctrl-C makes it, must not keep others waiting.
        for place, effect in enumerate(noted):
            try:
                self._perform_one(effect)
            except BaseException:
                self._make_sure_of(effect)
                self._perform(noted[place + 1 :])
                raise
        if self.state.outbox:
            self.state.outbox.deliver()

    def _make_sure_of(self, effect: Effect) -> None:
        """
        Performs what others wait for again, unless it is known to be done.
        """
        match effect:
            # Each may be done twice: a device's thread sees that it is done.
            case (
                effects.StartLoad()
                | effects.StartUnload()
                | effects.DropCopy()
                | effects.ShrinkKept()
                | effects.Gone()
            ):
                self._perform_one(effect)
            case effects.Settle(future) if not future.done():
                effect.settle()

    def _perform_one(self, effect: Effect) -> None:
        match effect:
            # What touches models and copies is left to the threads of their devices.
            case effects.StartLoad(entry):
                entry.device.thread.submit(partial(self._loads.load, entry))
            case effects.StartUnload(entry):
                entry.device.thread.submit(partial(self._unloads.unload, entry))
            case effects.DropCopy(entry):
                entry.device.thread.submit(partial(self.copies.drop, entry))
            case effects.ShrinkKept(host, most_bytes):
                host.thread.submit(partial(self.copies.shrink, host, most_bytes))
            case effects.AskBack(serials):
                # In one step: holders come and go without the lock.
                refs = [r for r, s in list(self._holders.items()) if s in serials]
                for holder in filter(None, (ref() for ref in refs)):
                    holder.give_way()
            case _:
                self._perform_at_once(effect)

    def _perform_at_once(self, effect: Effect) -> None:
        match effect:
            case effects.Settle():
                effect.settle()
            case effects.Gone(future):
                with suppress(InvalidStateError):  # cancelled: its caller left
                    future.set_result(None)
            case effects.LookAgain(device):
                self.gauges.look_again(device)
            case effects.WakeAt(at_s):
                self.clock.call_at(at_s, partial(self._tick, at_s))
                self.state.unset_s.discard(at_s)  # in one step, so without the lock
            case effects.KeepLost(device, host):
                self.copies.keep_lost(device, host)
            case effects.WriteOff(entry, loaded, lost_bytes):
                told = "%s of %s stay on %s until the process ends"
                of_what = format_bytes(lost_bytes), entry.key, entry.device.name
                _log.warning(told, *of_what)
                if loaded is not None:
                    self.loader.abandon(loaded)
            case effects.Stop():
                self._stop()

    def _tick(self, at_s: float) -> None:
        with self.lock.changing():
            self._ticks.tick(at_s)

    def _stop(self) -> None:
        # From the last to the first; all of it is done, whatever fails in between.
        with ExitStack() as rest:
            # Each thread ends after all that it was given before.
            for device in self.devices.values():
                rest.callback(device.thread.stop)
            rest.callback(self.gauges.peers.close)
            host = self.devices.get("cpu")
            if host is not None and host.kept_bytes:
                shrink = partial(self.copies.shrink, host, 0)
                rest.callback(host.thread.submit, shrink)
            # No timer may fire into what ends here.
            rest.callback(self.clock.close)

    # State ----------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """
        True if new requests are refused.
        """
        return self.state.closed is not None

    def changing(self) -> AbstractContextManager[None]:
        """
        Holds the lock, then performs the effects that were noted.
        """
        return self.lock.changing()

    def entry(self, key: ModelKey) -> Entry:
        """
        Returns a model, known from now on.

        Raises:
            CacheClosed: the cache was closed.
        """
        with self.changing():
            self.state.check_open()
            entry = self.entries.get(key)
            if entry is None:
                # A card's models take some of the host too: both are known from now on.
                device = self._device(key.device)
                entry = self.entries[key] = Entry(key, device, self._device("cpu"))
            return entry

    def device(self, name: str) -> Device:
        """
        Returns a device, known from now on.

        Raises:
            CacheClosed: the cache was closed.
        """
        with self.changing():
            self.state.check_open()
            return self._device(name)

    def _device(self, name: str) -> Device:
        device = self.devices.get(name)
        if device is None:
            limit, max_models = self.state.limit_of(name), self.state.max_models
            device = Device(name, limit, max_models, DeviceThread(name))
            self.devices[name] = device
        return device

    def all_devices(self) -> list[Device]:
        """
        Returns the devices that were used so far.
        """
        with self.changing():
            return list(self.devices.values())

    def uses(self, device: Device) -> bool:
        """
        Returns True if anything is on *device*, or waited for.
        """
        with self.changing():
            return view.is_used(self.state, device)

    def account(self, device: Device) -> dict[str, int]:
        """
        Returns what other processes should know of *device*.
        """
        with self.changing():
            return view.account(self.state, device)

    # Requests -------------------------------------------------------------------------

    def hit_below(
        self,
        parallel: int,
        request: Request,
        workload: Workload,
        keep_alive_s: float | None,
        owner: Owner,
    ) -> Lease | None:
        """
        Does what `hit` does for a request that allows so many leases on its model.
        """
        try:
            entry = self.requests[request]
        # As for a hit, the resolver says what is wrong, or finds out.
        except (KeyError, TypeError):
            return None
        with self.changing():
            if len(entry.leases) >= parallel:
                return None
            lease = self.scheduler.hit(entry, workload, keep_alive_s, owner)
        if lease is not None:
            self.trace((lease,))
        return lease

    def trace(self, leases: tuple[Lease, ...]) -> None:
        """
        Notes where leases were taken, for the warning if they are never released, while
        tracemalloc traces.
        """
        if is_tracing():
            for lease in leases:
                lease.taken_at = caller()

    def request(
        self,
        wanted: Sequence[Wanted],
        keep_alive_s: float | None,
        timeout_s: float | None,
        owner: Owner,
        *,
        priority: float = INTERACTIVE,
        parallel: int | None = None,
        resumes: bool = False,
    ) -> Waiter:
        """
        Queues a request for leases on all of *wanted*. Its future tells how it ends.

        The models must have been located for their workloads, and their devices
        observed.

        Raises:
            CacheClosed, DeviceUnavailable, LoadFailed, TooManyWaiters, LeaseTimeout:
                see `Scheduler.enqueue`.
        """
        waiter = Waiter(
            tuple(wanted),
            keep_alive_s,
            self.clock.now(),
            owner,
            priority=priority,
            parallel=self.rules.parallel if parallel is None else parallel,
            resumes=resumes,
        )
        try:
            with self.changing():
                self.scheduler.enqueue(waiter, timeout_s)
        except BaseException:  # Ctrl-C while effects were performed: its caller is gone
            self.abandon(waiter)
            raise
        if waiter.waits:
            self._read_ahead(waiter)
        return waiter

    def _read_ahead(self, waiter: Waiter) -> None:
        """
        Has what is wanted read from the disk while others are unloaded for it.
        """
        try:
            for entry in set(waiter.entries):
                if entry.files is not None and entry.state is State.ABSENT:
                    self.loader.read_ahead(entry.files)
        except BaseException:  # Ctrl-C again
            self.abandon(waiter)
            raise

    def abandon(self, waiter: Waiter) -> None:
        """
        Forgets a request whose caller left; a grant that it was given is given back.
        """
        with self.changing():
            if self.scheduler.abandon(waiter):
                self.scheduler.admit()
        # Too late to cancel: it was granted, or will be in a moment.
        if not waiter.future.cancel():
            waiter.future.add_done_callback(_give_back)

    def give_up(self, owner: Owner) -> bool:
        """
        Forgets the requests of *owner* that would go on with a call, and returns False
        if there are none.
        """
        with self.changing():
            found = [each for each in self.queue.owners.get(owner, ()) if each.resumes]
        for waiter in found:
            self.abandon(waiter)
        return bool(found)

    # Leases ---------------------------------------------------------------------------

    def give_back(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        Ends a lease that was asked for, for a while.
        """
        with self.changing():
            self.scheduler.give_back(entry, serial, keep_alive_s)

    def drop(self, entry: Entry, serial: int, keep_alive_s: float | None) -> None:
        """
        Ends a lease from the garbage collector.

        That may run inside a critical section of this very thread, of the cache or of a
        listener, so nothing is done here. The device's thread does it, or a thread that
        lets go of the lock before.
        """
        self.lock.later(partial(self.scheduler.release, entry, serial, keep_alive_s))
        entry.device.thread.submit(self.lock.catch_up)

    def offer(self, entry: Entry, serial: int, level: float) -> None:
        """
        Notes that a lease is given back early if a request above *level* asks.
        """
        with self.changing():
            self._held.offer(entry, serial, level)

    def is_asked(self, entry: Entry, serial: int, level: float) -> bool:
        """
        Returns True if a lease is to be given back for a request above *level*.
        """
        # Each segment asks, so the lock is only taken where it matters.
        if entry.asked_by <= level:
            return False
        with self.changing():
            return self._held.is_asked(entry, serial, level)

    def spare(self, entry: Entry, serial: int) -> Callable[[], None]:
        """
        Has a leased model be the last to leave once it is idle, for a short while, for
        it will be needed again; see `entries.SPARED_S`.

        Returns:
            A function that ends this early, and may be called by the garbage collector.
        """
        with self.changing():
            self._held.spare(entry, serial)

        # As in `drop`.
        def end() -> None:
            self.lock.later(partial(self._held.unspare, entry))
            entry.device.thread.submit(self.lock.catch_up)

        return end

    def hand_over(self, entry: Entry, serial: int, owner: Owner) -> None:
        """
        Notes that another thread or task will end a lease.
        """
        with self.changing():
            self._held.hand_over(entry, serial, owner)

    def entrust(self, serial: int, holder: Holder) -> None:
        """
        Notes what holds a lease for a caller.
        """
        # One step, without the lock: nothing is decided by it, and each call pays.
        self._holders[weakref.ref(holder, self._holders.pop)] = serial

    def blame(self, entry: Entry, error: BaseException) -> None:
        """
        Gives the device of *entry* up if *error* left it unusable.
        """
        self._unloads.blame(entry, error)

    def recover(self, entry: Entry, error: BaseException) -> bool:
        """
        Makes room after a leased model ran out of memory, and returns True if it did.
        """
        return self._unloads.recover(entry, error)

    # Evictions, limits ----------------------------------------------------------------

    def evict(
        self, matches: Callable[[ModelKey], bool], waits_for: Owner = None
    ) -> list[Leaving]:
        """
        Unloads models as soon as they are idle, pinned or not.

        Each with a future that is done when its unload was confirmed.

        Raises:
            LeaseDeadlock: *waits_for*, who will wait for them, holds leases on some.
        """
        self.lock.catch_up()  # what was dropped on the way here is held no more
        with self.changing():
            return self._evictions.evict(matches, waits_for)

    def withdraw(self, entry: Entry, gone: Future[None]) -> None:
        """
        Takes back an eviction whose caller left; an unload under way goes on.
        """
        with self.changing():
            self._evictions.withdraw(entry, gone)
            self.scheduler.admit()

    def pin(self, entry: Entry) -> None:
        """
        Keeps a model that is held in memory when it is idle.
        """
        with self.changing():
            entry.pin(is_pinned=True)
            self.scheduler.settle(entry.device)  # it is out of reach from now on

    def unpin(self, matches: Callable[[ModelKey], bool]) -> int:
        """
        Lets pinned models be evicted, and returns how many those were.
        """
        with self.changing():
            count = self._evictions.unpin(matches)
            self.scheduler.admit()
            return count

    def make_room_for_others(self, device: Device, n_bytes: int) -> None:
        """
        Unloads idle models until *n_bytes* are free that were not, or nothing is idle.
        """
        with self.changing():
            self._evictions.make_room_for_others(device, n_bytes)
            self.scheduler.admit()

    def drop_copies(self, n_bytes: int) -> None:
        """
        Drops host copies until *n_bytes* of them are gone.
        """
        with self.changing():
            if (host := self.devices.get("cpu")) is not None:
                self._evictions.drop_copies(host, n_bytes)

    def resize(self, limit_of: Callable[[str], Limit], max_models: int | None) -> None:
        """
        Sets other limits. What is too much is unloaded now if idle, else later.
        """
        with self.changing():
            self.scheduler.resize(limit_of, max_models)

    # Life -----------------------------------------------------------------------------

    def close(self) -> list[Leaving] | None:
        """
        Refuses new requests, fails those that wait, unloads what is or becomes idle.

        Returns:
            The models in memory, each with a future that is done when its unload was
            confirmed. None if this is called in a signal handler that interrupted this
            very thread in a critical section: it is done soon after the handler ended.
        """
        if isinstance(self.state.closed, CacheForked):
            return []
        # A handler that waits for a lock of its own thread would wait for ever.
        if not self.lock.mutex.acquire(timeout=SIGNAL_S):
            threading.Thread(target=self.close, name="whispercache-close").start()
            return None
        self.lock.mutex.release()
        with self.changing():
            return self.scheduler.close()

    def end_own(
        self, owners: Collection[Owner], why: str
    ) -> tuple[tuple[str, ...], set[Entry]]:
        """
        Ends what *owners*, who will wait, would wait for in vain: iterators of theirs,
        and those that never had other owners than threads and tasks that are over. A
        step in flight on another thread is not interrupted.

        Returns:
            The models on which they still hold leases, which only they could end; and
            those at work for a step that a signal handler interrupted, in which the
            cache is closed: it goes on, and ends, after that.
        """
        # In one step: holders come and go without the lock.
        holders = {serial: ref() for ref, serial in list(self._holders.items())}
        with self.changing():
            found = [
                (entry, serial, owner, holders.get(serial))
                for entry in self.entries.values()
                for serial, owner in entry.leases.items()
                if owner in owners or has_ended(owner)
            ]
        # Without the lock: to end an iterator takes its own lock, and releases a lease.
        stuck = {
            entry
            for entry, _, owner, holder in found
            if holder is not None
            and (owner in owners or not holder.has_moved)
            and not holder.end(why, owner)
        }
        # What the garbage collector ended meanwhile was given back with the lock.
        held = {
            str(entry.key)
            for entry, serial, owner, holder in found
            if holder is None and owner in owners and serial in entry.leases
        }
        return tuple(sorted(held)), stuck

    def quiesce(self, timeout_s: float) -> None:
        """
        Lets no calls begin any more on models that are leased, and waits for those in
        flight, at the interpreter's end.
        """
        with self.changing():
            busy = [entry.loaded for entry in self.entries.values() if entry.leases]
        for loaded in busy:
            if loaded is not None and not self.loader.quiesce(loaded, timeout_s):
                _log.warning("%s is still at work at the end", loaded.key)

    def join(self, timeout_s: float | None) -> None:
        """
        Waits for the devices' threads to end, after `close`.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for device in list(self.devices.values()):
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            device.thread.join(left_s)

    def forked(self, *, gpu_in_use: bool) -> None:
        """
        Starts afresh in a child that was forked, where the threads are gone, and what
        they held is as they left it. Nothing of the parent is touched.

        A cache that had loaded something is of no more use, nor is any once the parent
        has opened the GPU's driver, which does not work in a child.
        """
        old = self.state
        was_used = old.counts["loads"] > 0 or any(
            entry.is_present for entry in old.entries.values()
        )
        # The parent's models are not the child's to free.
        self.loader.forked([e.loaded for e in old.entries.values() if e.loaded])
        if was_used or gpu_in_use:
            old.forget_threads()
            old.closed = CacheForked()
            self._put_together(old, MonotonicClock(), NoPeers())
            return
        new = CacheState(old.limit_of, old.max_models, old.outbox.copy())
        # Requests that failed before the fork are still counted.
        new.counts, new.load_s, new.wait_s = old.counts, old.load_s, old.wait_s
        new.counts["hits"] = old.hits
        self._put_together(new, MonotonicClock(), self._make_peers())

    # Proof ----------------------------------------------------------------------------

    def check(self) -> None:
        """
        Asserts the invariants.
        """
        with self.changing():
            self.scheduler.check()


def _no_hit(
    _request: Request, _workload: Workload, _keep_alive_s: float | None, _owner: Owner
) -> None:
    """
    Leaves every request to the scheduler.
    """


def _give_back(future: Future[tuple[Lease, ...]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for lease in future.result():
            lease.release()
