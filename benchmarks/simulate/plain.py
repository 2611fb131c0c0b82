"""
A scheduler that shows the planner the whole queue at each event.

It decides as the real one does, only at the cost of all that wait. For rules that are
compared to the real ones, which look at a queue as a whole, and for the test that the
real one misses nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from whispercache.core import demands, view
from whispercache.core.device import Outlook
from whispercache.core.round import Found
from whispercache.core.scheduler import Scheduler
from whispercache.planning import planner
from whispercache.planning.planner import Need, Pending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whispercache.core.agenda import Agenda, Rules
    from whispercache.core.device import Device
    from whispercache.core.entries import Entry
    from whispercache.core.evictions import Evictions
    from whispercache.core.state import CacheState
    from whispercache.core.waiters import Waiter
    from whispercache.keys import ModelKey
    from whispercache.lease import _Lessor as Lessor
    from whispercache.planning.planner import Decision, Planner


def queue_of(
    waiters: Sequence[Waiter], now_s: float, patience_s: float, least_level: float
) -> list[Pending]:
    """
    Returns *waiters* as a planner sees them, impatient if older than their patience,
    and asking for leases if above that level.
    """
    first: dict[ModelKey, int] = {}
    found: list[Pending] = []
    for place, waiter in enumerate(waiters):
        level = waiter.priority
        asks_below = level if level > least_level else -math.inf
        one = demands.pending(
            waiter,
            impatient=waiter.since_s + patience_s <= now_s,
            asks_below=asks_below,
        )
        if one.need is Need.LOAD and not waiter.is_group:
            # Only the first asks for its load; the others share it.
            asks = first.setdefault(one.keys[0], place)
            if asks != place:
                # Or the load that it shares would wait where it must not.
                if one.passes:
                    found[asks] = replace(found[asks], passes=True)
                level = max(found[asks].asks_below, asks_below)
                found[asks] = replace(found[asks], asks_below=level)
                one = Pending(one.keys, Need.NOTHING)
        found.append(one)
    return found


class PlainRound:
    """
    One plan for the whole queue, as `whispercache.core.round.Round` has one.
    """

    def __init__(
        self, state: CacheState, rules: Rules, now_s: float, plan: Planner
    ) -> None:
        self._state = state
        self._plan = plan
        self._now_s = now_s
        self._patience_s = rules.patience_s
        self._look = view.Shelves(state, rules.policy, now_s)
        self.chosen: set[ModelKey] = set()
        self.stopped: dict[object, int] = {}
        self.impatient_since_s = math.inf
        self.moves_models = True

    def plan(self, waiters: Sequence[Waiter]) -> list[Decision]:
        """
        Returns the decision on each request.
        """
        devices = self._state.devices
        rooms = {name: view.room(self._state, each) for name, each in devices.items()}
        least_level = view.least_level(self._state)
        pending = queue_of(waiters, self._now_s, self._patience_s, least_level)
        return self._plan(pending, rooms, self._look.idle, self._look.busy)

    def run(self) -> list[Found]:
        """
        Returns all that should happen, in the order of the queue.
        """
        waiters = list(self._state.queue)
        return [
            Found(waiter, each, tuple(waiters[place] for place in each.overtakes))
            for waiter, each in zip(waiters, self.plan(waiters), strict=True)
            if not each.waits or each.victims or each.drain
        ]

    def decide_on(self, waiter: Waiter) -> Decision:
        """
        Returns the decision on a request that is not in the queue.
        """
        waiter.turn = self._state.queue.next_turn(waiter)
        waiters = sorted([*self._state.queue, waiter], key=lambda each: each.turn)
        return self.plan(waiters)[waiters.index(waiter)]

    def outlook(self, device: Device) -> Outlook:
        """
        Returns that anything may help.
        """
        del device
        return Outlook(free_bytes=-math.inf)


class PlainScheduler(Scheduler):
    """
    The scheduler with a planner that is asked about all that wait, at each event.
    """

    def __init__(
        self,
        agenda: Agenda,
        evictions: Evictions,
        lessor: Lessor[Entry],
        plan: Planner = planner.plan,
    ) -> None:
        super().__init__(agenda, evictions, lessor)
        self._plan = plan

    def _round(self, *, trusts: bool) -> PlainRound:  # type: ignore[override]
        del trusts
        return PlainRound(self._state, self._rules, self._now(), self._plan)


def undone(state: CacheState, rules: Rules, now_s: float) -> list[str]:
    """
    Returns what a plan of the whole queue would do that the scheduler did not.
    """
    waiters = list(state.queue)
    plain = PlainRound(state, rules, now_s, planner.plan)
    found = []
    for waiter, decision in zip(waiters, plain.plan(waiters), strict=True):
        drains = [
            key
            for key in decision.drain
            if (entry := state.entries[key]).drained_for is None
            or entry.asked_by < waiter.priority
        ]
        if not decision.waits or decision.victims or drains:
            found.append(f"{waiter}: {decision.outcome}, {decision.victims}, {drains}")
    return found
