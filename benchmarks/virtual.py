"""
A cache in virtual time: the real planner over a clock that jumps from event to event.

It does what `whispercache.core.core` does with `whispercache.planning.planner`, step by
step, for one card: a request finds its model in memory and nobody waiting, or it
queues; what `plan` says is carried out; the card's one thread loads and unloads in
order; leases end when their work is done. No threads, no models, no time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING

from pieces import CARD, NOTHING, Copies, Disk, Entry, Report, State, Waiter

from whispercache.planning.planner import Demand, Need, Outcome, Pending, Room
from whispercache.planning.policies import next_gap_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pieces import Host, Model, Strategy
    from traces import Request

    from whispercache.planning.planner import Decision
    from whispercache.planning.policies import Resident

__all__ = ["Simulation", "StrictFifo"]


class Simulation:
    """
    One card, its cache and its callers.

    All leases of a model need the same room, together as much as one. So those who wait
    for it are served together, and only the first of them asks.

    Args:
        models: Those that may be asked for.
        capacity_bytes: What may be charged on the card.
        strategy: How the cache decides.
        host: What the host lends it.

    Raises:
        ValueError: a model never fits.
    """

    def __init__(
        self,
        models: Sequence[Model],
        capacity_bytes: int,
        strategy: Strategy,
        host: Host = NOTHING,
    ) -> None:
        largest_bytes = max(m.weights_bytes + m.workspace_bytes for m in models)
        if largest_bytes > capacity_bytes:
            raise ValueError(f"{largest_bytes} B do not fit into {capacity_bytes} B")
        self._strategy = strategy
        self._capacity_bytes = capacity_bytes
        self._entries = [Entry(model, place) for place, model in enumerate(models)]
        self._by_key = {entry.model.key: entry for entry in self._entries}
        self._present: dict[Entry, None] = {}  # all that are not absent
        self._shelf: dict[Entry, None] = {}  # idle, in the order of release
        # Those that wait, by model, in the order in which each first came.
        self._queue: dict[Entry, list[Waiter]] = {}
        self._copies = Copies(host.ram_bytes)
        self._disk = Disk(host.page_bytes)
        self._disk.fill(self._entries[place] for place in host.preloaded)
        self._charged_bytes = 0
        # What the card's one thread has to do: serial, how long it takes, what follows.
        self._jobs: deque[tuple[int, Callable[[], float], Callable[[], None]]] = deque()
        self._sweep_at_s = math.inf
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = itertools.count()
        self._counts: Counter[str] = Counter()
        self._load_s = 0.0
        self._peak_bytes = 0
        self._waits_s: list[float] = []
        self._longest_s = [0.0] * len(models)

    # Time ----------------------------------------------------------------------------

    def run(
        self,
        requests: Iterable[Request] = (),
        callers: Iterable[Iterable[Request]] = (),
    ) -> Report:
        """
        Serve *requests*, which come when they come, and *callers*, each of whom asks
        for nothing before it was served.
        """
        self._come(iter(requests))
        for caller in callers:
            self._ask(iter(caller))
        events = self._events
        while events:
            self._now_s, _, call = heapq.heappop(events)
            call()
        assert not self._queue, f"{len(self._queue)} models are waited for, for ever"
        assert self._counts["served"] == self._counts["requests"]
        self._waits_s.sort()
        return Report(
            requests=self._counts["requests"],
            hits=self._counts["hits"],
            loads=self._counts["loads"],
            restores=self._counts["restores"],
            swaps=self._counts["swaps"],
            load_s=self._load_s,
            waits_s=self._waits_s,
            longest_s=self._longest_s,
            peak_bytes=self._peak_bytes,
            end_s=self._now_s,
        )

    def _at(self, when_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._serials), call))

    def _on_thread(self, begin: Callable[[], float], done: Callable[[], None]) -> None:
        """
        Keep the card's one thread busy, after all that it has to do already.

        How long it will be, *begin* says when its turn comes.
        """
        # Of what happens at the same time, first comes what was first asked for.
        self._jobs.append((next(self._serials), begin, done))
        if len(self._jobs) == 1:
            self._begin()

    def _begin(self) -> None:
        serial, begin, _ = self._jobs[0]
        busy_s = begin()
        self._load_s += busy_s
        heapq.heappush(self._events, (self._now_s + busy_s, serial, self._end))

    def _end(self) -> None:
        *_, done = self._jobs.popleft()
        if self._jobs:
            self._begin()
        done()

    # Requests ------------------------------------------------------------------------

    def _come(self, requests: Iterator[Request]) -> None:
        """
        Wait for the next of *requests*.
        """
        for request in requests:
            self._at(request.at_s, partial(self._arrive, request, requests))
            return

    def _arrive(self, request: Request, others: Iterator[Request]) -> None:
        self._come(others)
        self._request(request, None)

    def _ask(self, caller: Iterator[Request]) -> None:
        """
        Let *caller* ask again.
        """
        for request in caller:
            at_s = max(request.at_s, self._now_s)
            self._at(at_s, partial(self._request, request, caller))
            return

    def _request(self, request: Request, caller: Iterator[Request] | None) -> None:
        entry = self._entries[request.model]
        self._counts["requests"] += 1
        is_hit = entry.state is State.RESIDENT
        self._counts["hits"] += is_hit
        waiter = Waiter(entry, self._now_s, request.service_s, caller)
        if is_hit and not self._queue and self._is_open(entry) and self._fits(entry):
            self._grant(waiter)
            return
        self._enqueue(waiter)
        self._admit()

    def _enqueue(self, waiter: Waiter) -> None:
        entry = waiter.entry
        self._queue.setdefault(entry, []).append(waiter)
        is_on_disk = entry.state in {State.ABSENT, State.UNLOADING}
        if is_on_disk and self._strategy.reads_ahead:
            self._disk.ask(entry, self._now_s)

    # Admit ---------------------------------------------------------------------------

    def _admit(self) -> None:
        """
        Match those who wait to memory, until nothing changes.
        """
        before = None
        while self._queue and len(self._queue) != before:
            before = len(self._queue)
            firsts = [waiters[0] for waiters in self._queue.values()]
            pending = [self._pending(waiter) for waiter in firsts]
            rooms = {CARD: self._room()}
            decisions = self._strategy.plan(pending, rooms, self._idle, self._busy)
            for waiter, decision in zip(firsts, decisions, strict=True):
                for place in decision.overtakes:
                    firsts[place].overtaken += 1
                for key in decision.drain:
                    self._drain(self._by_key[key], waiter)
                self._carry_out(waiter, decision)

    def _carry_out(self, waiter: Waiter, decision: Decision) -> None:
        for victim in decision.victims:
            self._unload(self._by_key[victim.key])
            self._counts["swaps"] += 1
        if decision.outcome is Outcome.LOAD:
            self._load(waiter.entry)
        elif decision.outcome is Outcome.GRANT:
            self._serve(waiter.entry)

    def _pending(self, waiter: Waiter) -> Pending:
        entry, model = waiter.entry, waiter.entry.model
        keys = (model.key,)
        if entry.state is State.ABSENT:
            need = Need.LOAD
            n_bytes = model.weights_bytes + model.workspace_bytes
            demand = Demand(CARD, n_bytes, models=1)
        elif self._is_open(entry):
            need = Need.WORKSPACE
            n_bytes = 0 if entry.leases else model.workspace_bytes
            demand = Demand(CARD, n_bytes, own_bytes=model.weights_bytes, own_models=1)
        else:
            return Pending(keys, Need.NOTHING)
        impatient = self._now_s - waiter.since_s >= self._strategy.patience_s
        return Pending(keys, need, (demand,), waiter.overtaken, impatient)

    def _room(self) -> Room:
        coming = [e for e in self._present if e.state is State.UNLOADING]
        return Room(
            capacity_bytes=self._capacity_bytes,
            ceiling_bytes=self._capacity_bytes,
            charged_bytes=self._charged_bytes,
            coming_bytes=sum(entry.model.weights_bytes for entry in coming),
            models=len(self._present),
            coming_models=len(coming),
        )

    def _idle(self, _device: str) -> list[Resident]:
        return self._ordered(self._shelf)

    def _busy(self, _device: str) -> list[Resident]:
        return self._ordered(entry for entry in self._present if entry.leases)

    def _ordered(self, entries: Iterable[Entry]) -> list[Resident]:
        policy, now_s = self._strategy.policy, self._now_s
        residents = [entry.resident() for entry in entries]
        return sorted(residents, key=lambda resident: policy(resident, now_s))

    def _drain(self, entry: Entry, waiter: Waiter) -> None:
        if entry.drained_for is None:
            entry.drained_for = waiter
            waiter.draining.append(entry)

    def _is_open(self, entry: Entry) -> bool:
        return entry.state is State.RESIDENT and entry.drained_for is None

    def _fits(self, entry: Entry) -> bool:
        more_bytes = 0 if entry.leases else entry.model.workspace_bytes
        return self._charged_bytes + more_bytes <= self._capacity_bytes

    def _charge(self, n_bytes: int) -> None:
        self._charged_bytes += n_bytes
        if self._charged_bytes > self._peak_bytes:
            self._peak_bytes = self._charged_bytes
            assert self._peak_bytes <= self._capacity_bytes, self._peak_bytes

    # Load, grant ---------------------------------------------------------------------

    def _load(self, entry: Entry) -> None:
        model = entry.model
        entry.state = State.LOADING
        self._present[entry] = None
        self._charge(model.weights_bytes + model.workspace_bytes)
        is_copied = self._copies.use(entry)
        self._counts["loads"] += 1
        self._counts["restores"] += is_copied
        begin = partial(self._begin_load, entry, is_copied=is_copied)
        self._on_thread(begin, partial(self._loaded, entry))

    def _begin_load(self, entry: Entry, *, is_copied: bool) -> float:
        if is_copied:
            entry.load_s = entry.model.restore_s
        else:
            entry.load_s = self._disk.load_s(entry, self._now_s)
        entry.seen = None
        return entry.load_s

    def _loaded(self, entry: Entry) -> None:
        self._charge(-entry.model.workspace_bytes)
        entry.state = State.RESIDENT
        self._serve(entry)
        self._admit()

    def _serve(self, entry: Entry) -> None:
        """
        Grant a model to all who wait for it; they share the room of its work.
        """
        if self._is_open(entry) and self._fits(entry):
            for waiter in self._queue.pop(entry):
                self._leave(waiter)
                self._grant(waiter)

    def _leave(self, waiter: Waiter) -> None:
        for entry in waiter.draining:
            entry.drained_for = None
        wait_s = self._now_s - waiter.since_s
        self._waits_s.append(wait_s)
        place = waiter.entry.place
        self._longest_s[place] = max(self._longest_s[place], wait_s)

    def _grant(self, waiter: Waiter) -> None:
        entry = waiter.entry
        if not entry.leases:
            self._shelf.pop(entry, None)
            if entry.last_used_s is not None:
                since_s = self._now_s - entry.last_used_s
                entry.gap_s = next_gap_s(entry.gap_s, since_s)
                entry.seen = None
            self._charge(entry.model.workspace_bytes)
        entry.leases += 1
        self._counts["served"] += 1
        end_s = self._now_s + waiter.service_s
        self._at(end_s, partial(self._release, entry, waiter.caller))

    # Release, unload -----------------------------------------------------------------

    def _release(self, entry: Entry, caller: Iterator[Request] | None) -> None:
        entry.leases -= 1
        if not entry.leases:
            self._charge(-entry.model.workspace_bytes)
            entry.last_used_s = self._now_s
            entry.seen = None
            self._shelf[entry] = None
            entry.expires_at_s = self._now_s + self._strategy.keep_alive_s
            self._sweep_by(entry.expires_at_s)
        if self._queue:
            self._admit()
        if caller is not None:
            self._ask(caller)

    def _sweep_by(self, at_s: float) -> None:
        if at_s < self._sweep_at_s:
            self._sweep_at_s = at_s
            self._at(at_s, partial(self._sweep, at_s))

    def _sweep(self, at_s: float) -> None:
        """
        Unload what has been idle for longer than its keep-alive.
        """
        if at_s != self._sweep_at_s:
            return  # an earlier one took its place
        next_s = self._sweep_at_s = math.inf
        for entry in list(self._shelf):
            if entry.expires_at_s > at_s:
                next_s = min(next_s, entry.expires_at_s)
            elif entry not in self._queue:
                self._unload(entry)
        self._sweep_by(next_s)

    def _unload(self, entry: Entry) -> None:
        del self._shelf[entry]
        entry.state = State.UNLOADING
        is_copied = self._copies.keep(entry, self._queue)
        copy_s = entry.model.restore_s if is_copied else 0.0
        self._on_thread(lambda: copy_s, partial(self._unloaded, entry))

    def _unloaded(self, entry: Entry) -> None:
        self._charge(-entry.model.weights_bytes)
        entry.state = State.ABSENT
        del self._present[entry]
        if entry.drained_for is not None:
            entry.drained_for.draining.remove(entry)
            entry.drained_for = None
        self._admit()


class StrictFifo(Simulation):
    """
    The same, but nobody passes anybody: the first in the queue is served before all
    others, be their models in memory or not.
    """

    def __init__(
        self, models: Sequence[Model], capacity_bytes: int, strategy: Strategy
    ) -> None:
        super().__init__(models, capacity_bytes, strategy)
        self._line: deque[Waiter] = deque()

    def _enqueue(self, waiter: Waiter) -> None:
        super()._enqueue(waiter)
        self._line.append(waiter)

    def _admit(self) -> None:
        while self._line:
            waiter = self._line[0]
            entry = waiter.entry
            if entry.state is not State.RESIDENT or not self._fits(entry):
                self._make_room(waiter)
                return
            self._line.popleft()
            waiters = self._queue[entry]
            waiters.remove(waiter)
            if not waiters:
                del self._queue[entry]
            self._leave(waiter)
            self._grant(waiter)

    def _make_room(self, waiter: Waiter) -> None:
        rooms = {CARD: self._room()}
        pending = [self._pending(waiter)]
        [decision] = self._strategy.plan(pending, rooms, self._idle, self._busy)
        self._carry_out(waiter, decision)

    def _serve(self, entry: Entry) -> None:
        """
        Nothing: `_admit` serves whoever is first.
        """
