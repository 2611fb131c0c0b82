"""
A round: one walk of the planner along the line, past those requests that matter.

Most requests are as stuck as an older one that is alike: they are not looked at. What
it costs depends on the number of cohorts, and on what happens, not on how many wait.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, NamedTuple

from whispercache.planning.planner import Need, Outcome, Pending, Walk

from . import demands, view
from .device import Outlook
from .entries import State
from .line import FIRST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from whispercache.keys import ModelKey
    from whispercache.planning.planner import Decision
    from whispercache.planning.priority import Turn

    from .agenda import Rules
    from .device import Device
    from .line import Cohort
    from .state import CacheState
    from .waiters import Waiter


class Found(NamedTuple):
    """
    A decision that changes something.

    Attributes:
        waiter: The request.
        decision: What happens to it.
        passed: The stuck requests that its load passes.
    """

    waiter: Waiter
    decision: Decision
    passed: tuple[Waiter, ...] = ()


class Round:
    """
    One walk along the line. Nothing is changed by it.

    Args:
        state: The line, and what is in memory.
        rules: What is decided by.
        now_s: Monotonic seconds.
        trusts: What the last walk found holds but for what was charged or idle.

    Attributes:
        found: All that should happen.
        stopped: The cohorts whose members wait, with the turn of the first that does.
        impatient_since_s: When the oldest stuck request was made that has patience
            left.
    """

    def __init__(
        self, state: CacheState, rules: Rules, now_s: float, *, trusts: bool
    ) -> None:
        self._state = state
        self._line = state.queue
        self._now_s = now_s
        self._patience_s = rules.patience_s
        look = view.Shelves(state, rules.policy, now_s)
        rooms = {name: view.room(state, each) for name, each in state.devices.items()}
        self._walk: Walk[Turn] = Walk(rooms, look.idle, look.busy)
        # All that can be had without the end of a lease, before anything is promised.
        self._reach_bytes = {name: room.reach_bytes for name, room in rooms.items()}
        self._trusts = trusts
        # Cohorts that are not shown: they are stuck as they were.
        self._asleep: list[Cohort] = []
        # Below this no lease can be asked for.
        self._least_level = view.least_level(state)
        # What is to be shown, by its turn; a cohort shows one after the other.
        self._heap: list[tuple[Turn, Waiter, Cohort | None]] = []
        # What was, with those that it speaks for.
        self._seen: dict[Turn, tuple[Waiter, Cohort | None]] = {}
        # Cohorts with a stuck one: younger ones may drain more once anything changes.
        self._stuck: list[Cohort] = []
        self._draining: set[str] = set()
        self.stopped: dict[Cohort, Turn] = {}
        self.found: list[Found] = []
        self.impatient_since_s: float = math.inf

    # The walk -------------------------------------------------------------------------

    def run(self) -> list[Found]:
        """
        Returns all that should happen, in the order of the line.
        """
        self._begin()
        while self._heap:
            self._decide(*heapq.heappop(self._heap))
        return self.found

    def _begin(self) -> None:
        """
        Finds what is to be shown first.
        """
        line = self._line
        for waiter in line.groups:
            self._show(waiter)
        for entry in line.copied:
            if (first := line.first(entry)) is not None:
                self._show(first)
        for entry in line.resident:
            workloads = set()
            for waiter in line.open_waiters(entry):
                # Those for the same work are alike, the oldest speaks for them.
                workload = waiter.wanted[0].workload
                if workload not in workloads:
                    workloads.add(workload)
                    self._show(waiter)
        for cohort in line.cohorts.values():
            if not self._sleeps(cohort):
                self._show_next(cohort, FIRST)

    def _sleeps(self, cohort: Cohort) -> bool:
        """
        Returns True if a cohort is stuck as it was before, so that the planner need not
        see it: it wants more bytes than all that could be had without the end of a
        lease.
        """
        was_stopped = cohort.stopped_in == self._state.rounds
        first = cohort.after(FIRST)
        if first is None or not was_stopped or not self._trusts:
            return False
        # Some of these would bar others, drain models, or be held, not stuck.
        if cohort.worn or self._drains(first, cohort) or self._line.groups:
            return False
        demand = cohort.demands[0]
        more_bytes = demand.n_bytes - self._reach_bytes[demand.device]
        if more_bytes <= 0:
            return False
        self._asleep.append(cohort)
        self.stopped[cohort] = first.turn
        self.impatient_since_s = min(self.impatient_since_s, first.since_s)
        margin = self._walk.margins[demand.device]
        margin.reach_bytes = min(margin.reach_bytes, more_bytes)
        return True

    def decide_on(self, waiter: Waiter) -> Decision:
        """
        Returns the decision on a request that is not in the line, as if it joined now,
        and gives it the turn that it would have.
        """
        self._begin()
        waiter.turn = self._line.next_turn(waiter)
        while self._heap and self._heap[0][0] < waiter.turn:
            self._decide(*heapq.heappop(self._heap))
        return self._walk.decide(waiter.turn, self._pending(waiter, None))

    def _show(self, waiter: Waiter, cohort: Cohort | None = None) -> None:
        heapq.heappush(self._heap, (waiter.turn, waiter, cohort))

    def _show_next(self, cohort: Cohort, turn: Turn) -> None:
        if (waiter := cohort.after(turn)) is not None:
            self._show(waiter, cohort)

    def _decide(self, turn: Turn, waiter: Waiter, cohort: Cohort | None) -> None:
        # Shown twice, as one that is worn and as one that is impatient.
        if turn in self._seen:
            return
        self._seen[turn] = waiter, cohort
        pending = self._pending(waiter, cohort)
        decision = self._walk.decide(turn, pending)
        if decision.outcome is Outcome.STUCK:
            self._note_patience(pending, waiter)
        passed: tuple[Waiter, ...] = ()
        if decision.outcome is Outcome.LOAD:
            passed = tuple(self._passed(turn, decision, pending))
        if not decision.waits or decision.victims or decision.drain:
            self.found.append(Found(waiter, decision, passed))
        if cohort is not None:
            self._go_on(turn, cohort, decision.outcome)
        # What younger ones would drain may be another now.
        speaks_for_itself = cohort is None or decision.outcome is not Outcome.STUCK
        if self._stuck and speaks_for_itself:
            for stuck in self._stuck:
                after = stuck.after(turn)
                if after is not None and self._drains(after, stuck):
                    self._show(after, stuck)

    def _go_on(self, turn: Turn, cohort: Cohort, outcome: Outcome) -> None:
        """
        Shows the next of a cohort, unless all younger ones wait as this one does.
        """
        if outcome is Outcome.STUCK:
            self.stopped.setdefault(cohort, turn)
            self._stuck.append(cohort)
            # But one that was overtaken too often bars others.
            if (worn := cohort.worn_after(turn)) is not None:
                self._show(worn, cohort)
        elif outcome is Outcome.BARRED:
            self.stopped.setdefault(cohort, turn)
        else:
            self._show_next(cohort, turn)

    def _pending(self, waiter: Waiter, cohort: Cohort | None) -> Pending:
        line, is_impatient = self._line, self._is_impatient(waiter)
        entry = waiter.wanted[0].entry
        if cohort is not None:
            return Pending(
                (entry.key,),
                Need.LOAD,
                cohort.demands,
                overtaken=waiter.overtaken,
                impatient=is_impatient,
                passes=cohort.passes,
                shares=entry.num_workers > 1,
                asks_below=self._asks_below(cohort.priority),
            )
        level, passes = waiter.priority, False
        if entry.state is State.ABSENT and not waiter.is_group:
            # Only the oldest asks for its load; the others share it.
            first = line.first(entry)
            if first is not None and first.turn < waiter.turn:
                return Pending((entry.key,), Need.NOTHING)
            level, passes = max(level, line.priority(entry)), line.passes(entry)
        asks_below = self._asks_below(level)
        return demands.pending(
            waiter, impatient=is_impatient, passes=passes, asks_below=asks_below
        )

    def _asks_below(self, level: float) -> float:
        return level if level > self._least_level else -math.inf

    def _note_patience(self, stuck: Pending, waiter: Waiter) -> None:
        if stuck.impatient or stuck.asks_below > -math.inf:
            self._draining.update(demand.device for demand in stuck.demands)
        if not stuck.impatient:
            self.impatient_since_s = min(self.impatient_since_s, waiter.since_s)

    def _is_impatient(self, waiter: Waiter) -> bool:
        # Summed as the time is at which it is looked at again, to the last bit.
        return waiter.since_s + self._patience_s <= self._now_s

    def _drains(self, waiter: Waiter, cohort: Cohort) -> bool:
        """
        Returns True if a stuck request of a cohort may keep new leases back.
        """
        return self._is_impatient(waiter) or cohort.priority > self._least_level

    def _passed(
        self, end: Turn, decision: Decision, pending: Pending
    ) -> Iterator[Waiter]:
        """
        Returns all that the load of the request with the turn *end* passes.
        """
        seen: set[Turn] = set()
        for turn in decision.overtakes:
            for waiter in self._alike(turn, end):
                if waiter.turn not in seen:
                    seen.add(waiter.turn)
                    yield waiter
        devices = {demand.device for demand in pending.demands}
        for cohort in self._asleep:
            if any(demand.device in devices for demand in cohort.demands):
                yield from self._members(cohort, FIRST, end)

    def _alike(self, turn: Turn, end: Turn) -> Iterable[Waiter]:
        """
        Returns the stuck request with that *turn*, and those older than *end* that it
        spoke for.
        """
        waiter, cohort = self._seen[turn]
        if cohort is not None:
            return self._members(cohort, turn, end)
        entry, workload = waiter.wanted[0].entry, waiter.wanted[0].workload
        if waiter.is_group or entry.state is not State.RESIDENT:
            return (waiter,)
        return [
            other
            for other in self._line.open_waiters(entry)
            if turn <= other.turn < end and other.wanted[0].workload == workload
        ]

    def _members(self, cohort: Cohort, first: Turn, end: Turn) -> Iterable[Waiter]:
        """
        Returns the stuck requests of a cohort from *first* on that are older than
        *end*.
        """
        # Those younger than the one that bars them were not stuck but barred.
        if not cohort.passes:
            barred = self._walk.barred
            bars = [barred.get(demand.device) for demand in cohort.demands]
            # Up to and including the one that bars.
            end = min([end, *((bar[0], bar[1] + 1) for bar in bars if bar is not None)])
        return cohort.between(first, end)

    @property
    def moves_models(self) -> bool:
        """
        True if a load or an unload was found.
        """
        return any(
            each.decision.outcome is Outcome.LOAD or each.decision.victims
            for each in self.found
        )

    # What it leaves behind ------------------------------------------------------------

    @property
    def chosen(self) -> set[ModelKey]:
        """
        The models that something was decided on: hits on them wait their turn.
        """
        return self._walk.chosen

    def outlook(self, device: Device) -> Outlook:
        """
        Returns what would help the requests that wait for memory of a device. To be
        asked once all that was found is done.
        """
        name = device.name
        walk = self._walk
        if not any(name in seen for seen in (walk.margins, walk.promised_bytes)):
            return Outlook()
        margin = walk.margins[name]
        room = view.room(self._state, device)
        return Outlook(
            room.free_bytes + margin.free_bytes,
            room.free_models + margin.free_models,
            room.reach_bytes + margin.reach_bytes,
            room.reach_models + margin.reach_models,
            walk.promised_bytes[name],
            name in self._draining,
        )
