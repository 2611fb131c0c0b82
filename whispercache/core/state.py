"""
The state of a cache: its models, devices, queue and counts. Plain data.

All of it is guarded by the cache's one lock. Nothing here waits, loads or calls out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .budget import Use
from .device import Tally
from .entries import Entry, State
from .line import Line
from .reminders import Reminders

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Set as AbstractSet

    from whispercache.errors import CacheClosed
    from whispercache.keys import ModelKey
    from whispercache.units import Limit

    from .device import Device
    from .lock import Outbox


@dataclass(frozen=True, slots=True)
class Kept:
    """
    A look at what unloaded models keep on the host.

    Attributes:
        serial: Tells which of two looks is the newer one.
        n_bytes: Bytes of kept tokenizers and host copies together.
        copies: Bytes of each host copy.
    """

    serial: int
    n_bytes: int
    copies: Mapping[ModelKey, int]


@dataclass(eq=False, repr=False)
class CacheState:
    """
    Everything that a cache knows.

    Attributes:
        limit_of: The limit of each device, by its name.
        max_models: Most models on each device; None for any number.
        outbox: Events that were not told yet.
        entries: Every model that was asked for.
        devices: Every device that was used.
        queue: The requests that wait, the oldest first.
        chosen: Models that something was decided on for them: other requests for these
            wait their turn.
        impatient_at_s: When the next of them may lose its patience.
        rounds: How often the line was walked along.
        reminders: What is to be looked at when.
        counts: Counters of `Stats`; without hits that never were in the queue.
        load_s: Seconds of all loads together.
        wait_s: Seconds that all requests waited together.
        grants: How many leases were ever granted; the serial number of the last one.
        queue_grants: How many of them to requests that came through the queue.
        closed: Why new requests are refused; None while they are not.
        copied: The models that have a host copy while they are not in memory.
        yielding: The models with leases that may be given back early.
        spared: The models with results in use, for which they are needed again.
        timers_s: When `Ticks.tick` will be called, the next time last. An earlier
            time is added before the others, which stay: a clock forgets no call.
        unset_s: Those of them that the clock may not know of yet.
        wake_at_s: The next of them.
        deadlocks_at_s: When it looks for deadlocks next.
        check_s: How long it took to look for them last.
    """

    limit_of: Callable[[str], Limit]
    max_models: int | None
    outbox: Outbox
    entries: dict[ModelKey, Entry] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    queue: Line = field(default_factory=Line)
    chosen: AbstractSet[ModelKey] = frozenset()
    impatient_at_s: float = math.inf
    rounds: int = 0
    reminders: Reminders = field(default_factory=Reminders)
    counts: Counter[str] = field(default_factory=Counter)
    load_s: float = 0.0
    wait_s: float = 0.0
    grants: int = 0
    queue_grants: int = 0
    closed: CacheClosed | None = None
    copied: frozenset[Entry] = frozenset()
    yielding: set[Entry] = field(default_factory=set)
    spared: set[Entry] = field(default_factory=set)
    timers_s: list[float] = field(default_factory=list)
    unset_s: set[float] = field(default_factory=set)
    wake_at_s: float = math.inf  # each release asks
    deadlocks_at_s: float = math.inf
    check_s: float = 0.0
    _last_look: int = -1

    @property
    def leases(self) -> int:
        """
        How many are held. Seldom asked for, so hits do not count them.
        """
        devices = self.devices.values()
        return sum(len(e.leases) for each in devices for e in each.entries.values())

    @property
    def hits(self) -> int:
        """
        How many requests found their model in memory.
        """
        return self.counts["hits"] + self.grants - self.queue_grants

    @property
    def is_over(self) -> bool:
        """
        True if it is closed and holds nothing any more.
        """
        return self.closed is not None and not any(
            device.entries for device in self.devices.values()
        )

    def check_open(self) -> None:
        """
        Raises:
            CacheClosed: the cache was closed.
        """
        if self.closed is not None:
            # A new one each time: errors keep the frames through which they went.
            raise type(self.closed)(*self.closed.args)

    def add_timer(self, at_s: float) -> None:
        """
        Notes that `Ticks.tick` will be called at *at_s*, earlier than ever so far.
        """
        self.timers_s.append(at_s)
        self.unset_s.add(at_s)
        self.wake_at_s = at_s

    def end_timers(self, until_s: float) -> None:
        """
        Forgets the calls that were due by then.
        """
        while self.timers_s and self.timers_s[-1] <= until_s:
            self.unset_s.discard(self.timers_s.pop())
        self.wake_at_s = self.timers_s[-1] if self.timers_s else math.inf

    def end_spare(self, entry: Entry) -> None:
        """
        Forgets that results of a model are in use, for which it is needed again.
        """
        entry.spares = 0
        self.spared.remove(entry)
        entry.spare(is_spared=False)

    def copies_on(self, device: Device) -> list[Entry]:
        """
        Returns the models of cards whose host copies are charged on *device*.
        """
        # Its budget may charge a lost device for copies, too.
        return [
            holder
            for holder in device.budget.holders(Use.COPY)
            if isinstance(holder, Entry)
        ]

    def note_kept(self, host: Device, kept: Kept) -> None:
        """
        Takes in a look at what unloaded models keep, unless a newer one was.
        """
        # Two devices' threads look at the same time, and the older look may come last.
        if kept.serial < self._last_look:
            return
        self._last_look = kept.serial
        for entry in self.copied:
            entry.parked_bytes = 0
            entry.device.moved.add(entry)
        known = (self.entries.get(key) for key in kept.copies)
        self.copied = frozenset(entry for entry in known if entry is not None)
        kept_bytes = kept.n_bytes
        for entry in self.copied:
            entry.device.moved.add(entry)
            if entry.state is not State.RESIDENT:
                entry.parked_bytes = kept.copies[entry.key]
            if entry.claims_copy:
                kept_bytes -= entry.parked_bytes  # charged to the load
        host.kept_bytes = kept_bytes

    def forget_threads(self) -> None:
        """
        Forgets all that other threads held or waited for, in a child without them.
        """
        self.queue = Line()
        self.reminders = Reminders()
        self.outbox = self.outbox.copy()
        self.timers_s.clear()
        self.unset_s.clear()
        self.wake_at_s = self.deadlocks_at_s = math.inf
        # Their holders were threads of the parent.
        for entry in self.entries.values():
            entry.waiting.clear()
            entry.leases.clear()
            entry.unusual.clear()
            entry.yielding.clear()
        self.yielding.clear()

    def check(self) -> None:
        """
        Asserts the invariants that can be seen from outside a critical section.
        """
        timers_s = self.timers_s
        assert timers_s == sorted(set(timers_s), reverse=True), timers_s
        assert self.wake_at_s == min(timers_s, default=math.inf), timers_s
        for entry in self.entries.values():
            entry.check()
            assert bool(entry.yielding) == (entry in self.yielding), entry.key
        for device in self.devices.values():
            device.budget.check()
            self._check_sums(device)
        self.queue.check(self.entries.values())
        for waiter in self.queue:
            ended = waiter.future.done() and not waiter.future.cancelled()
            assert not ended, f"{waiter} waits and is done"
            for lease in (waiter.held or {}).values():
                assert not lease.is_released, f"{waiter} lost {lease}"

    def _check_sums(self, device: Device) -> None:
        held = device.entries.values()
        idle_bytes = sum(entry.weights_bytes for entry in device.shelf)
        told = f"{device.name}: {device.idle_bytes} B idle, not {idle_bytes}"
        assert device.idle_bytes == idle_bytes, told
        for tally, ones in (
            (device.coming, [e for e in held if e.state is State.UNLOADING]),
            (device.staying, [e for e in held if e.stays]),
        ):
            counted = Tally(len(ones), sum(entry.weights_bytes for entry in ones))
            assert tally == counted, f"{device.name}: {tally}, not {counted}"
