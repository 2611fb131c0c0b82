"""
Moves: models on their way into memory and out of it, on their device's own thread.

A load that finds too little memory evicts what is idle and is tried once more; an
unload that did not happen keeps its bytes charged and is tried again; an error that
leaves a device unusable ends all that wait for it.
"""

from __future__ import annotations

import copy
import logging
import threading
import traceback
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from whispercache.devices.faults import Fault, classify
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.errors import LoadFailed, WhisperCacheError, format_bytes
from whispercache.events import (
    DeviceLost,
    DeviceWarmedUp,
    DeviceWarmingUp,
    EvictionCause,
    ModelEvicted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelStillReferenced,
    ReleaseUnconfirmed,
)

from . import books
from .books import LAST_COOL_DOWN_S, lost, one_line
from .budget import Use
from .entries import Device, Entry, State
from .parking import Parking

if TYPE_CHECKING:
    from whispercache.devices.memory import MemoryReading
    from whispercache.engine.api import LoadedModel, Released
    from whispercache.keys import ModelKey

    from .entries import Waiter

    # A model on its way out, and a future that is done when it has left.
    Leaving: TypeAlias = tuple[Entry, Future[None]]

__all__ = ["Moves"]

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


SLOW_WARM_UP_S = 2.0
"""
Seconds after which whoever waits for a device's first model is told why.

Source: a context and cuBLAS take less; compiling takes 20 to 30 (FACTS, CUDA memory 9).
"""


class Moves(Parking):
    """
    Loads and unloads. What they are for is decided in `core.Core`.
    """

    _grants: int = 0  # leases granted so far

    def _serve_locked(self, entry: Entry) -> None:
        """
        Grant a model that has come to those who wait for it.
        """
        raise NotImplementedError

    def _shelve_locked(self, entry: Entry, keep_alive_s: float | None) -> None:
        """
        Put an idle model on the shelf.
        """
        raise NotImplementedError

    def _fail_locked(self, waiter: Waiter, error: BaseException) -> None:
        """
        End a request with an error.
        """
        raise NotImplementedError

    def _let_go_locked(self, waiter: Waiter) -> None:
        """
        End the leases that a request for several models holds so far.
        """
        raise NotImplementedError

    def account(self, device: Device) -> dict[str, int]:
        """
        What other processes should know of *device*.
        """
        raise NotImplementedError

    def _stop_if_over_locked(self) -> None:
        """
        Let all threads end once the cache is closed and empty.
        """
        raise NotImplementedError

    # Load ----------------------------------------------------------------------------

    def _start_load_locked(self, entry: Entry, n_bytes: int, host_bytes: int) -> None:
        entry.state = State.LOADING
        entry.restores = 0 < entry.parked_bytes <= host_bytes
        if entry.restores:  # it is held already, and no longer gives way
            entry.host.shell_bytes -= entry.parked_bytes
            entry.host.budget.set(entry, Use.COPY, entry.parked_bytes)
            host_bytes -= entry.parked_bytes
        entry.device.loads_begun += 1
        entry.device.entries[entry.key] = entry
        entry.device.budget.set(entry, Use.RESERVED, n_bytes)
        entry.host.budget.set(entry, Use.STAGING, host_bytes)
        self._on_thread_locked(entry, partial(self._load, entry))

    def _load(self, entry: Entry) -> None:
        """
        Load a model; on its device's thread.
        """
        try:
            self._load_in_turn(entry)
        except BaseException as error:  # or its waiters would wait for ever
            if entry.state is not State.LOADING:
                raise
            self._failed(entry, error, Fault.OTHER, "")
        self._tell_peers(entry.device)

    def _load_in_turn(self, entry: Entry) -> None:
        peers, name = self.peers, entry.device.name
        if self._has_other_files(entry) or self._lost_its_copy(entry):
            return
        self._shrink_shells(entry.host, but=entry.key)
        with nullcontext() if peers is None else peers.turn(name):
            self._tell_peers(entry.device)
            if (reading := self._shortage(entry)) is not None:
                self._put_back(entry, reading)
                return
            with self.changing():
                quiet_since = None if self.leases else self._grants
                self.outbox.append(ModelLoading(entry.key, entry.weights_bytes))
            done = self._try_to_load(entry)
        if done is None:
            return
        loaded, load_s = done
        shells = self._shells()
        with self.changing():
            # Work of others in the process moves what the loader measured.
            is_quiet = quiet_since == self._grants
            entry.device.budget.restart_work()
            self._loaded_locked(entry, loaded, load_s)
            self._note_shells_locked(entry.host, *shells)
            self._admit_locked()
            if loaded.reloaded:
                self._return_later_locked(entry.device)
        if is_quiet and loaded.measured_bytes is not None:
            self.loader.remember(entry.key, loaded.files, loaded.measured_bytes)
        self.loader.follow_up(loaded)

    def _has_other_files(self, entry: Entry) -> bool:
        """
        Whether others are to be read than those that its memory was reserved for: a
        variant came, or went, while the load waited. Then it is admitted anew.
        """
        assert entry.files is not None
        files = self.loader.choose(entry.key, entry.files)
        if files == entry.files:
            return False
        footprints = {
            workload: self.loader.footprint(entry.key, files, workload)
            for workload in entry.footprints
        }
        with self.changing():
            self._take_back_locked(entry)
            entry.located(files, footprints)
            self._admit_locked()
        return True

    def _lost_its_copy(self, entry: Entry) -> bool:
        """
        Whether the copy has gone that its weights were to come from. Then it is
        admitted anew: to read them takes more of the host.
        """
        is_parked = entry.key in self.loader.parked()
        if not entry.restores and is_parked:  # the host had no room for it to stay
            self.loader.forget(entry.key)
        if not entry.restores or is_parked:
            return False
        shells = self._shells()
        with self.changing():
            self._take_back_locked(entry)
            self._note_shells_locked(entry.host, *shells)
            self._admit_locked()
        return True

    def _tell_peers(self, device: Device) -> None:
        """
        Let other processes know of a load before it takes its memory, or after.
        """
        if self.peers is not None and not self._is_over:
            self.peers.publish(device.name, self.account(device))

    def _shortage(self, entry: Entry) -> MemoryReading | None:
        """
        The gauge, if it no longer shows room for what is charged: other programs may
        have come since. None if it does, or cannot be read.
        """
        device, reading = entry.device, None
        for _ in "12":
            if reading is not None:
                if device is entry.host:  # on a card they are not in the way
                    self._shrink_shells(device, 0)  # its own, too
                # What an unload left in the heap for this load.
                self.loader.return_memory(device.name)
            try:
                reading = self.probe.read(device.name)
            except Exception as error:  # `observe` told it; the limit has to do
                _log.debug("free memory of %s is unknown: %s", device.name, error)
                return None
            promised_bytes = (
                0 if self.peers is None else self.peers.promised_bytes(device.name)
            )
            with self.changing():
                if device.budget.has_room(reading, promised_bytes):
                    return None
        return reading

    def _put_back(self, entry: Entry, reading: MemoryReading) -> None:
        """
        Take a load back that has not begun; whoever waits for it waits again.
        """
        with self.changing():
            self._take_back_locked(entry)
        # On its thread, so nothing moves, whatever is on its way.
        self.take_reading(entry.device, reading, is_still=True)
        with self.changing():
            self._admit_locked()

    def _take_back_locked(self, entry: Entry) -> None:
        """
        Close the books of a load that has not begun; whoever waits for it waits again.
        """
        for budget in entry.budgets:
            budget.clear(entry)
        self._absent_locked(entry)
        for waiter in self.queue:
            if waiter.held is not None and waiter.wants(entry):
                self._let_go_locked(waiter)

    def _try_to_load(self, entry: Entry) -> tuple[LoadedModel, float] | None:
        """
        Load, and the seconds of that; if memory runs out, evict what is idle and try
        once more.
        """
        assert entry.files is not None
        tried = ""
        while True:
            try:
                self._warm_up(entry)
                started_s = self.clock.now()
                loaded = self.loader.load(entry.key, entry.files)
                return loaded, self.clock.now() - started_s
            except BaseException as error:  # or its waiters would wait for ever
                # The frames of the traceback hold the half-built model.
                traceback.clear_frames(error.__traceback__)
                fault = self._fault(entry.device, error, entry.weights_bytes)
                if fault is Fault.OTHER and self._has_other_files(entry):
                    return None
                if fault is not Fault.OUT_OF_MEMORY or tried:
                    self._failed(entry, error, fault, tried)
                    return None
            evicted = self._make_room(entry.device)
            names = ", ".join(map(str, evicted)) or "nothing, as nothing was idle"
            tried = f"; tried twice, and evicted in between: {names}"

    def _warm_up(self, entry: Entry) -> None:
        """
        Have a device do once what would else count for its first model, and say so.
        """
        device, reason = entry.device, self.loader.warm_up_needed(entry.key)
        if not reason:
            return
        with self.changing():
            self.outbox.append(DeviceWarmingUp(entry.key, device.name, reason))
        is_over = threading.Event()

        def tell() -> None:
            if not is_over.is_set():
                _log.warning("%s is warming up: %s", device.name, reason)

        started_s = self.clock.now()
        self.clock.call_at(started_s + SLOW_WARM_UP_S, tell)
        try:
            floor_bytes = self.loader.warm_up(entry.key)
        finally:
            is_over.set()
        warm_up_s = self.clock.now() - started_s
        with self.changing():
            if floor_bytes is not None:
                device.budget.floor_bytes = floor_bytes
            warmed_up = DeviceWarmedUp(entry.key, device.name, warm_up_s, floor_bytes)
            self.outbox.append(warmed_up)

    def _fault(self, device: Device, error: BaseException, needed_bytes: int) -> Fault:
        """
        What an error means; the gauge settles what its wording leaves open.
        """
        fault = classify(error)
        if fault is Fault.STICKY and device.name == "cpu":
            return Fault.OTHER  # somebody else's, that passed by
        if fault is not Fault.PERHAPS_OUT_OF_MEMORY:
            return fault
        try:
            reading = self.probe.read(device.name)
        except Exception as unread:
            _log.warning("free memory of %s is unknown: %s", device.name, unread)
            return Fault.OTHER
        is_short = reading.free_bytes < needed_bytes
        return Fault.OUT_OF_MEMORY if is_short else Fault.OTHER

    def _make_room(self, device: Device) -> list[ModelKey]:
        """
        Unload all that is idle, at once; on the device's thread.
        """
        with self.changing():
            idle = [entry for entry in device.shelf if not entry.stays]
            for entry in idle:
                self._leave_memory_locked(entry, EvictionCause.OUT_OF_MEMORY)
        for entry in idle:
            self._unload(entry)
        if device.name == "cpu":
            self._shrink_shells(device, 0)
        self.loader.return_memory(device.name)
        return [entry.key for entry in idle if not entry.is_present]

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
        entry.device.budget.move(entry, Use.RESERVED, Use.WEIGHTS)
        entry.device.budget.set(entry, Use.WEIGHTS, weights_bytes)
        entry.host.budget.set(entry, Use.STAGING, 0)
        entry.host.budget.set(entry, Use.COPY, loaded.copy_bytes)
        entry.loaded = loaded
        entry.state = State.RESIDENT
        entry.loads += 1
        entry.load_s = load_s
        entry.failures = 0
        self.counts["loads"] += 1
        self.counts["reloads"] += loaded.reloaded
        self.counts["restores"] += loaded.restored
        self.seconds["load_s"] += load_s
        measured_bytes = loaded.measured_bytes
        self.outbox.append(
            ModelLoaded(
                entry.key,
                load_s,
                weights_bytes,
                measured_bytes,
                loaded.reloaded,
                from_variant=loaded.files.original is not None,
                restored=loaded.restored,
            )
        )
        # Whoever waited for this load comes first, even if it is to leave meanwhile.
        cause, entry.cause = entry.cause, None
        self._serve_locked(entry)
        entry.cause = cause
        if not entry.leases:
            self._shelve_locked(entry, None)

    def _failed(
        self, entry: Entry, error: BaseException, fault: Fault, tried: str
    ) -> None:
        reason = one_line(error) + tried
        try:
            self.loader.return_memory(entry.key.device)
        except Exception:  # nor may this keep them waiting
            _log.exception("memory of %s was not returned", entry.key)
        shells = self._shells()
        with self.changing():
            for budget in entry.budgets:
                budget.clear(entry)
            self._absent_locked(entry)
            self._note_shells_locked(entry.host, *shells)
            entry.failures += 1
            entry.failure = reason
            if entry.failures > 1:
                doublings = min(entry.failures - 2, 32)
                pause_s = min(books.FIRST_COOL_DOWN_S * 2**doublings, LAST_COOL_DOWN_S)
                entry.retry_at_s = self.clock.now() + pause_s
            self.counts["load_failures"] += 1
            self.outbox.append(ModelLoadFailed(entry.key, reason))
            for waiter in [w for w in self.queue if w.wants(entry)]:
                self._fail_locked(waiter, _load_error(entry.key, error, reason))
            if fault is Fault.STICKY:
                self._lose_locked(entry, error)
            self._admit_locked()

    def _lose_locked(self, entry: Entry, error: BaseException) -> None:
        """
        Give a device up whose CUDA context is broken.
        """
        device = entry.device
        if device.sick is not None:
            return
        device.sick = one_line(error)
        self._work.append(partial(self._lost, device, entry.host))
        self.outbox.append(DeviceLost(entry.key, device.name, device.sick))
        for waiter in list(self.queue):
            if any(wanted.device is device for wanted in waiter.entries):
                self._fail_locked(waiter, lost(device))

    def _lost(self, device: Device, host: Device) -> None:
        """
        Keep what models of a lost device left on the host, which gives way no more.
        """
        parked = self.loader.parked()
        kept_bytes = sum(n for key, n in parked.items() if key.device == device.name)
        self.loader.lost(device.name)
        shells = self._shells()
        with self.changing():
            host.budget.set(device, Use.LOST, kept_bytes)
            self._note_shells_locked(host, *shells)

    # Unload --------------------------------------------------------------------------

    def _unload_locked(self, entry: Entry, cause: EvictionCause) -> None:
        self._leave_memory_locked(entry, cause)
        self._on_thread_locked(entry, partial(self._unload, entry))

    def _leave_memory_locked(self, entry: Entry, cause: EvictionCause) -> None:
        assert entry.state is State.RESIDENT and not entry.leases, entry.key
        del entry.device.shelf[entry]
        entry.state = State.UNLOADING
        entry.cause = cause
        entry.refusals = 0
        entry.unload_started_s = self.clock.now()

    def _unload(self, entry: Entry) -> None:
        """
        Unload a model, and have it confirmed; on its device's thread.
        """
        assert entry.loaded is not None
        with self.changing():
            if entry.device.sick is not None:
                self._write_off_locked(entry)
                return
            load_follows = self._load_follows_locked(entry.device)
        try:
            parks = self._may_park(entry)
            released = self.loader.unload(
                entry.loaded, load_follows=load_follows, parks=parks
            )
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            self.blame(entry, error)
            self._refused(entry, one_line(error))
            return
        if not released.confirmed:
            self._refused(entry, released.reason)
            return
        self._unloaded(entry, released)
        self._tell_peers(entry.device)
        with self.changing():
            is_moving = entry.device.is_moving
        if load_follows and not is_moving:  # whoever waited for this room has left
            self.loader.return_memory(entry.key.device)

    def _load_follows_locked(self, device: Device) -> bool:
        """
        Whether somebody waits for room on *device* to load a model.
        """
        return any(
            entry.device is device and not entry.is_present
            for waiter in self.queue
            for entry in waiter.entries
        )

    def _unloaded(self, entry: Entry, released: Released) -> None:
        if entry.drops_copy:  # somebody asked for that while it was leaving
            self.loader.forget(entry.key)
        device, shells = entry.device, self._shells()
        with self.changing():
            assert entry.cause is not None
            work_bytes = device.budget.restart_work()
            present = device.entries.values()
            weights_bytes = sum(other.weights_bytes for other in present)
            self.counts["evictions"] += 1
            unload_s = self.clock.now() - entry.unload_started_s
            unreturned_bytes = min(released.unreturned_bytes, entry.weights_bytes)
            self.outbox.append(
                ModelEvicted(
                    entry.key,
                    entry.cause,
                    entry.weights_bytes - unreturned_bytes,
                    released.returned_bytes,
                    unload_s,
                    unreturned_bytes,
                    parked=entry.key in shells[2],
                )
            )
            if released.references:
                self.outbox.append(ModelStillReferenced(entry.key, released.references))
            self._note_shells_locked(entry.host, *shells)
            drops_copy = entry.drops_copy
            for budget in entry.budgets:
                budget.clear(entry)
            self._absent_locked(entry)
            if drops_copy and entry.parked_bytes:  # asked for at the last moment
                entry.parked_bytes = 0
                self._on_thread_locked(entry, partial(self._forget, entry))
            device.budget.keep(unreturned_bytes, released.used_bytes)
            self._admit_locked()
        if released.peak_bytes is not None and work_bytes:
            measured_bytes = released.peak_bytes - weights_bytes
            self.loader.remember_work(device.name, work_bytes, measured_bytes)

    def _refused(self, entry: Entry, reason: str) -> None:
        """
        Keep the bytes charged, and try again later.
        """
        with self.changing():
            if entry.device.sick is not None:
                self._write_off_locked(entry)
                return
            self.counts["unconfirmed"] += not entry.refusals
            retry_s = min(FIRST_RETRY_S * 2 ** min(entry.refusals, 32), LAST_RETRY_S)
            entry.refusals += 1
            self.outbox.append(
                ReleaseUnconfirmed(entry.key, entry.weights_bytes, retry_s, reason)
            )
            again = partial(entry.device.thread.submit, partial(self._unload, entry))
            self.clock.call_at(self.clock.now() + retry_s, again)

    def _write_off_locked(self, entry: Entry) -> None:
        """
        Close the books of a model on a lost device; its bytes stay charged for good.
        """
        lost_bytes = entry.weights_bytes
        told = "%s of %s stay on %s until the process ends"
        of_what = format_bytes(lost_bytes), entry.key, entry.device.name
        self._work.append(partial(_log.warning, told, *of_what))
        if entry.loaded is not None:
            self._work.append(partial(self.loader.abandon, entry.loaded))
        entry.device.budget.move(entry, Use.WEIGHTS, Use.LOST)
        entry.host.budget.move(entry, Use.COPY, Use.LOST)  # it is in the model
        entry.host.budget.set(entry, Use.STAGING, 0)
        self._absent_locked(entry)
        self._admit_locked()

    def _absent_locked(self, entry: Entry) -> None:
        """
        Close the books of a model that is not, or no longer, in memory.
        """
        if entry.state is State.LOADING and entry.restores:  # a shell as before
            entry.host.shell_bytes += entry.parked_bytes  # if it still is one
        entry.restores = entry.drops_copy = False
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

    # Errors of calls -----------------------------------------------------------------

    def blame(self, entry: Entry, error: BaseException) -> None:
        """
        See whether an error means that the device is of no more use.
        """
        if self._fault(entry.device, error, 0) is Fault.STICKY:
            with self.changing():
                self._lose_locked(entry, error)
                self._admit_locked()

    def recover(self, entry: Entry, error: BaseException) -> bool:
        """
        See what an error in the use of a leased model means, and make room if it ran
        out of memory.

        Blocks: while idle models of its device leave.

        Returns:
            Whether something left, so that the call may succeed now.
        """
        device = entry.device
        fault = self._fault(device, error, entry.workspace_bytes)
        if fault is Fault.STICKY:
            self.blame(entry, error)
        if fault is not Fault.OUT_OF_MEMORY or device.thread.is_current():
            return False
        evicted: Future[list[ModelKey]] = Future()

        def make_room() -> None:
            try:
                evicted.set_result(self._make_room(device))
            except BaseException as failure:
                evicted.set_exception(failure)
                raise

        with self.changing():
            if self._closed is not None:  # its thread may have ended
                return False
            self._on_thread_locked(entry, make_room)
        return bool(evicted.result())


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


def _done(future: Future[None]) -> None:
    with suppress(InvalidStateError):  # cancelled: nobody waits any more
        future.set_result(None)
