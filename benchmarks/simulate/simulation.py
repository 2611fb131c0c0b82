"""
A cache in virtual time: the real scheduler, over a clock that jumps to each event.

Loads, unloads and calls take the seconds that the models say; what the scheduler asks
for is done when its time has come. No threads, no models, no waiting.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from pieces import CARD, NOTHING, Copies, Disk, Report
from plain import PlainScheduler

from whispercache.core import effects
from whispercache.core.agenda import Agenda, Rules
from whispercache.core.device import Device
from whispercache.core.endings import Endings
from whispercache.core.entries import Entry, State
from whispercache.core.evictions import Evictions
from whispercache.core.held_leases import HeldLeases
from whispercache.core.reports import Reports
from whispercache.core.scheduler import Scheduler
from whispercache.core.state import CacheState, Kept
from whispercache.core.ticks import Ticks
from whispercache.core.waiters import Waiter, Wanted
from whispercache.engine.api import LoadedModel, Released
from whispercache.engine.files import ModelFiles
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD, Footprint
from whispercache.events import EvictionCause
from whispercache.planning import planner
from whispercache.planning.planner import Decision, Outcome
from whispercache.units import Limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from faster_whisper import WhisperModel
    from pieces import Host, Model, Strategy
    from traces import Request

    from whispercache.core.effects import Effect
    from whispercache.core.lock import Outbox
    from whispercache.core.threads import DeviceThread
    from whispercache.lease import Lease
    from whispercache.lease import _Lessor as Lessor
    from whispercache.planning.planner import Pending, Planner
    from whispercache.planning.policies import Resident
    from whispercache.planning.room import Room

__all__ = ["Simulation", "StrictFifo"]

_FILES = ModelFiles("", "float16")
_CONFIRMED = Released(confirmed=True)
_NOTHING_KEPT = Kept(0, 0, {})
# Leases end by the clock here; only a test that ends before it does drops some.
_LESSOR = cast("Lessor[Entry]", SimpleNamespace(drop=lambda *_: None))


class Asked:
    """
    What is known of a request besides its place in the queue.
    """

    __slots__ = ("caller", "left_s", "resumes", "since_s", "spec")

    def __init__(
        self, spec: Request, since_s: float, caller: Iterator[Request] | None
    ) -> None:
        self.spec = spec
        self.since_s = since_s
        self.caller = caller
        # What is left to do once it has a lease, and if it had one before.
        self.left_s = spec.service_s
        self.resumes = False


class Simulation:
    """
    One card, its cache and its callers.

    Args:
        models: Those that may be asked for.
        capacity_bytes: What may be charged on the card.
        strategy: How the cache decides.
        host: What the host lends it.

    Raises:
        ValueError: a model never fits.
    """

    plain_class = PlainScheduler

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
        self._reads_ahead = strategy.reads_ahead
        self._state = _state(capacity_bytes)
        self._device = self._state.devices[CARD]
        self._entries = [_entry(self._state, model) for model in models]
        self._model = dict(zip(self._entries, models, strict=True))
        self._began_s: dict[Entry, float] = {}
        self._wanted = [(Wanted(entry, DEFAULT_WORKLOAD),) for entry in self._entries]
        rules = Rules(
            policy=strategy.policy,
            keep_alive_s=strategy.keep_alive_s,
            patience_s=strategy.patience_s,
        )
        self._noted: list[Effect] = []
        agenda = Agenda(self._state, rules, lambda: self._now_s, self._noted.append)
        evictions = Evictions(agenda)
        if strategy.plan is None:
            self._scheduler = Scheduler(agenda, evictions, _LESSOR)
        else:
            self._scheduler = self.plain_class(
                agenda, evictions, _LESSOR, strategy.plan
            )
        self._held = HeldLeases(agenda, self._scheduler)
        self._ticks = Ticks(agenda, evictions, self._scheduler)
        self._reports = Reports(agenda, evictions, self._scheduler)
        self._asked: dict[object, Asked] = {}  # by the future of a request
        self._copies = Copies(host.ram_bytes)
        self._disk = Disk(host.page_bytes)
        self._disk.fill(models[place] for place in host.preloaded)
        # What the card's one thread has to do: serial, how long it takes, what follows.
        self._work: deque[tuple[int, Callable[[], float], Callable[[], None]]] = deque()
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = itertools.count()
        self._counts: Counter[str] = Counter()
        self._load_s = 0.0
        self._waits_s: list[float] = []
        self._longest_s = [0.0] * len(models)
        self._waits_by_model: list[list[float]] = [[] for _ in models]
        self._ends_by_model = [0.0] * len(models)

    # Time -----------------------------------------------------------------------------

    def run(
        self,
        requests: Iterable[Request] = (),
        callers: Iterable[Iterable[Request]] = (),
    ) -> Report:
        """
        Serves *requests*, which come when they come, and *callers*, each of whom asks
        for nothing before it was served.
        """
        self._come(iter(requests))
        for caller in callers:
            self._ask(iter(caller))
        events = self._events
        while events:
            self._now_s, _, call = heapq.heappop(events)
            call()
        waiting = len(self._state.queue)
        assert not waiting, f"{waiting} requests are waited for, for ever"
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
            peak_bytes=self._device.budget.peak_bytes,
            end_s=self._now_s,
            waits_by_model=self._waits_by_model,
            ends_by_model=self._ends_by_model,
            stops=self._counts["stops"],
        )

    def _at(self, when_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._serials), call))

    def _on_thread(self, begin: Callable[[], float], done: Callable[[], None]) -> None:
        """
        Keeps the card's one thread busy, after all that it has to do already.

        How long it will be, *begin* says when its turn comes.
        """
        # Of what happens at the same time, first comes what was first asked for.
        self._work.append((next(self._serials), begin, done))
        if len(self._work) == 1:
            self._begin()

    def _begin(self) -> None:
        serial, begin, _ = self._work[0]
        busy_s = begin()
        self._load_s += busy_s
        heapq.heappush(self._events, (self._now_s + busy_s, serial, self._end))

    def _end(self) -> None:
        *_, done = self._work.popleft()
        if self._work:
            self._begin()
        done()

    # Requests -------------------------------------------------------------------------

    def _come(self, requests: Iterator[Request]) -> None:
        """
        Waits for the next of *requests*.
        """
        for request in requests:
            self._at(request.at_s, partial(self._arrive, request, requests))
            return

    def _arrive(self, request: Request, others: Iterator[Request]) -> None:
        self._come(others)
        self._request(request, None)

    def _ask(self, caller: Iterator[Request]) -> None:
        """
        Lets *caller* ask again.
        """
        for request in caller:
            at_s = max(request.at_s, self._now_s)
            self._at(at_s, partial(self._request, request, caller))
            return

    def _request(self, request: Request, caller: Iterator[Request] | None) -> None:
        entry = self._entries[request.model]
        self._counts["requests"] += 1
        self._counts["hits"] += entry.state is State.RESIDENT
        self._want(entry, Asked(request, self._now_s, caller))
        self._perform()

    def _want(self, entry: Entry, asked: Asked) -> None:
        lease = self._scheduler.hit(entry, DEFAULT_WORKLOAD, None, None)
        if lease is not None:
            self._grant(asked, lease)
        else:
            if self._reads_ahead and entry.state in {State.ABSENT, State.UNLOADING}:
                self._disk.ask(self._model[entry], self._now_s)
            waiter = Waiter(
                self._wanted[asked.spec.model],
                None,
                self._now_s,
                None,
                priority=asked.spec.priority,
                resumes=asked.resumes,
            )
            self._asked[waiter.future] = asked
            self._scheduler.enqueue(waiter, None)

    def _grant(self, asked: Asked, lease: Lease) -> None:
        """
        Has a lease, and ends it when its work is done.
        """
        lease.owned = True  # no warning if a test ends before it does
        spec = asked.spec
        if not asked.resumes:
            self._counts["served"] += 1
            wait_s = self._now_s - asked.since_s
            self._waits_by_model[spec.model].append(wait_s)
        if spec.segment_s < math.inf:
            level = math.inf if getattr(lease, "is_firm", False) else spec.priority
            self._held.offer(lease._entry, lease._serial, level)
        self._work_on(lease, asked)

    def _work_on(self, lease: Lease, asked: Asked) -> None:
        """
        Works until the lease can be given back, or the work is done.
        """
        work_s = min(asked.left_s, asked.spec.segment_s)
        asked.left_s -= work_s
        self._at(self._now_s + work_s, partial(self._stop, lease, asked))

    def _stop(self, lease: Lease, asked: Asked) -> None:
        entry, serial = lease._entry, lease._serial
        level, is_over = asked.spec.priority, asked.left_s <= 0
        if not is_over and not self._held.is_asked(entry, serial, level):
            self._work_on(lease, asked)
            return
        self._scheduler.release(entry, serial, None)
        self._perform()
        if not is_over:
            self._counts["stops"] += 1
            asked.resumes = True
            self._want(entry, asked)
            self._perform()
            return
        self._ends_by_model[asked.spec.model] = self._now_s
        if asked.caller is not None:
            self._ask(asked.caller)

    # Effects --------------------------------------------------------------------------

    def _perform(self) -> None:
        """
        Does what the scheduler noted, as the core would.
        """
        # To carry one out may be the reason for another one.
        while self._noted:
            effect = self._noted.pop(0)
            match effect:
                case effects.Settle(future, (lease,), None):
                    self._settle(self._asked.pop(future), lease)
                case effects.StartLoad(entry):
                    self._load(entry)
                case effects.StartUnload(entry):
                    self._unload(entry)
                case effects.WakeAt(at_s):
                    self._at(at_s, partial(self._tick, at_s))
                case effects.LookAgain() | effects.AskBack():
                    pass  # the gauge would tell nothing new; holders look by themselves
                case _:
                    raise AssertionError(effect)

    def _tick(self, at_s: float) -> None:
        self._ticks.tick(at_s)
        self._perform()

    def _settle(self, asked: Asked, lease: Lease) -> None:
        wait_s = self._now_s - asked.since_s
        if asked.resumes:
            self._grant(asked, lease)
            return
        self._waits_s.append(wait_s)
        place = asked.spec.model
        self._longest_s[place] = max(self._longest_s[place], wait_s)
        self._grant(asked, lease)

    def _load(self, entry: Entry) -> None:
        budget = self._device.budget
        assert budget.charged_bytes <= budget.capacity_bytes, budget.charged_bytes
        is_copied = self._copies.use(self._model[entry])
        self._counts["loads"] += 1
        self._counts["restores"] += is_copied
        begin = partial(self._begin_load, entry, is_copied=is_copied)
        self._on_thread(begin, partial(self._loaded, entry))

    def _begin_load(self, entry: Entry, *, is_copied: bool) -> float:
        self._began_s[entry] = self._now_s
        model = self._model[entry]
        return model.restore_s if is_copied else self._disk.load_s(model, self._now_s)

    def _loaded(self, entry: Entry) -> None:
        # Only its facts matter to the scheduler; there is no model.
        no_model = cast("WhisperModel", None)
        loaded = LoadedModel(
            entry.key,
            _FILES,
            no_model,
            compute_type=entry.key.compute_type,
            is_multilingual=True,
            supported_languages=(),
        )
        load_s = self._now_s - self._began_s.pop(entry)
        self._reports.loaded(entry, loaded, load_s, _NOTHING_KEPT)
        self._perform()

    def _unload(self, entry: Entry) -> None:
        self._counts["swaps"] += entry.cause is EvictionCause.CAPACITY
        wanted = {self._model[e] for w in self._state.queue for e in w.entries}
        resident = {
            model for e, model in self._model.items() if e.state is State.RESIDENT
        }
        model = self._model[entry]
        is_copied = self._copies.keep(model, wanted, resident)
        copy_s = model.restore_s if is_copied else 0.0
        self._on_thread(lambda: copy_s, partial(self._unloaded, entry))

    def _unloaded(self, entry: Entry) -> None:
        self._reports.unloaded(entry, _CONFIRMED, _NOTHING_KEPT)
        self._perform()


class StrictEndings(Endings):
    """
    Endings by which no request passes another, be its model in memory or not.
    """

    def serve(self, entry: Entry, first: Waiter | None = None) -> None:
        """
        Serves the oldest request, and then the next, while they want that model.
        """
        queue = self._state.queue
        while (oldest := next(iter(queue), None)) is not None:
            if not oldest.wants(entry) or first not in (None, oldest):
                return
            self._serve(entry, [oldest])
            if oldest in queue:
                return
            first = None


class StrictScheduler(PlainScheduler):
    """
    A scheduler that serves the oldest request, and then the next.
    """

    def __init__(
        self,
        agenda: Agenda,
        evictions: Evictions,
        lessor: Lessor[Entry],
        plan: Planner = planner.plan,
    ) -> None:
        super().__init__(agenda, evictions, lessor, plan)
        self.endings = StrictEndings(agenda, evictions, self._grant)


def only_the_oldest(
    queue: Sequence[Pending],
    rooms: Mapping[str, Room],
    idle: Callable[[str], Iterable[Resident]],
    busy: Callable[[str], Iterable[Resident]],
) -> list[Decision]:
    """
    Returns the real decision for the oldest request; the others wait.
    """
    [first] = planner.plan(queue[:1], rooms, idle, busy)
    return [first, *(Decision(Outcome.HELD) for _ in queue[1:])]


class StrictFifo(Simulation):
    """
    The same, but the first in the queue is served before all others.
    """

    plain_class = StrictScheduler

    def __init__(
        self, models: Sequence[Model], capacity_bytes: int, strategy: Strategy
    ) -> None:
        strict = replace(strategy, plan=only_the_oldest)
        super().__init__(models, capacity_bytes, strict)


def _state(capacity_bytes: int) -> CacheState:
    """
    Returns the state of a cache with one card, before its first request.
    """
    no_events = cast("Outbox", deque(maxlen=0))
    limits = {CARD: Limit(n_bytes=capacity_bytes), "cpu": Limit(n_bytes=0)}
    state = CacheState(limits.__getitem__, None, no_events)
    no_thread = cast("DeviceThread", None)
    for name, limit in limits.items():
        state.devices[name] = Device(name, limit, None, no_thread)
    return state


def _entry(state: CacheState, model: Model) -> Entry:
    """
    Returns a model that is known and not in memory.
    """
    entry = Entry(model.key, state.devices[CARD], state.devices["cpu"])
    footprint = Footprint(
        model.weights_bytes,
        model.workspace_bytes,
        loading_bytes=0,
        host_loading_bytes=0,
    )
    entry.locate(_FILES, {DEFAULT_WORKLOAD: footprint})
    state.entries[model.key] = entry
    return entry
