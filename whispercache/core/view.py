"""
The state of a cache as values: what the planner, placement and deadlock detection see.

Everything here needs the lock and changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from whispercache.planning import planner
from whispercache.planning.placement import Candidate
from whispercache.planning.policies import is_lru
from whispercache.planning.room import Room

from . import demands
from .entries import State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from whispercache.keys import ModelKey
    from whispercache.planning.policies import Policy, Resident

    from .device import Device
    from .entries import Entry
    from .state import CacheState
    from .waiters import Waiter


# What devices hold --------------------------------------------------------------------


def room(state: CacheState, device: Device) -> Room:
    """
    Returns a device's memory as the planner sees it, with host copies of models that
    are on other devices.
    """
    budget = device.budget
    found = Room(
        capacity_bytes=budget.capacity_bytes,
        ceiling_bytes=budget.ceiling_bytes,
        charged_bytes=budget.charged_bytes,
        coming_bytes=device.coming.n_bytes,
        pinned_bytes=device.staying.n_bytes,
        max_models=device.max_models,
        models=len(device.entries),
        coming_models=device.coming.models,
        pinned_models=device.staying.models,
        idle_bytes=device.idle_bytes,
        idle_models=len(device.shelf),
    )
    for entry in state.copies_on(device):
        if entry.stays:
            found.pinned_bytes += entry.copy_bytes
        if entry.state is State.UNLOADING:
            # Kept or dropped, it is no longer charged once the model is unloaded.
            found.coming_bytes += entry.copy_bytes
        elif entry.is_idle and not entry.stays:
            found.idle_bytes += entry.copy_bytes
            found.idle_models += 1
    return found


def may_help(state: CacheState, device: Device) -> bool:
    """
    Returns True if a request might be helped by the memory of *device* as it is now.
    """
    outlook, budget = device.outlook, device.budget
    left_bytes = budget.capacity_bytes - budget.charged_bytes
    reach_bytes = left_bytes + device.coming.n_bytes + device.idle_bytes
    if left_bytes >= outlook.free_bytes or reach_bytes >= outlook.reach_bytes:
        return True
    # Hardly any device has copies of others, or a number of models as its limit.
    if device.max_models is None and not budget.copies_bytes:
        return False
    now = room(state, device)
    return (
        now.reach_bytes >= outlook.reach_bytes
        or now.free_models >= outlook.free_models
        or now.reach_models >= outlook.reach_models
    )


def least_level(state: CacheState) -> float:
    """
    Returns the lowest level of the leases that can be given back; infinity if there are
    none.
    """
    # Mostly there are none, and each walk asks.
    levels = (level for entry in state.yielding for level in entry.yielding.values())
    return min(levels, default=math.inf)


def ordered(entries: Iterable[Entry], policy: Policy, now_s: float) -> list[Resident]:
    """
    Returns those of *entries* that are not pinned, the first to evict first.
    """
    found = [entry.resident() for entry in entries if not entry.stays]
    return sorted(found, key=lambda resident: policy(resident, now_s))


class Shelves:
    """
    What could be evicted, the first to go first, as of one moment.

    Each has the models of a device, and then those of cards with a host copy there, as
    what their copies free.
    """

    def __init__(self, state: CacheState, policy: Policy, now_s: float) -> None:
        self._state = state
        self._policy = policy
        self._now_s = now_s
        # Sorted at most once, however many requests ask.
        self._sorted: dict[tuple[str, bool], list[Resident]] = {}

    def idle(self, name: str) -> Iterable[Resident]:
        """
        Returns the idle models, which can be evicted now.
        """
        device = self._state.devices[name]
        # The shelf is in that order already, and mostly few have to go.
        if is_lru(self._policy) and not device.budget.copies_bytes:
            return (entry.resident() for entry in device.shelf if not entry.stays)
        return self._look(device, idle=True)

    def busy(self, name: str) -> Iterable[Resident]:
        """
        Returns the leased and spared models, which can be evicted once they are idle.
        """
        return self._look(self._state.devices[name], idle=False)

    def _look(self, device: Device, *, idle: bool) -> list[Resident]:
        key = device.name, idle
        if key not in self._sorted:
            self._sorted[key] = list(self._all(device, idle=idle))
        return self._sorted[key]

    def _all(self, device: Device, *, idle: bool) -> Iterator[Resident]:
        # In the order of release; the policy may have another one.
        leased = [entry for entry in device.entries.values() if entry.leases]
        own = device.shelf if idle else [*leased, *device.spared]
        copied = [
            entry
            for entry in self._state.copies_on(device)
            if (entry.is_idle if idle else entry.leases)
        ]
        yield from ordered(own, self._policy, self._now_s)
        for one in ordered(copied, self._policy, self._now_s):
            copy_bytes = self._state.entries[one.key].copy_bytes
            yield replace(one, device=device.name, weights_bytes=copy_bytes)


def candidate(
    state: CacheState, key: ModelKey, needed_bytes: int, beside: Collection[Entry]
) -> Candidate:
    """
    Returns the device of *key* as a place for that model *beside* others of the same
    request.
    """
    device = state.devices[key.device]
    entry = state.entries.get(key)
    is_there = entry is not None and (
        entry in beside
        or (entry.state in (State.LOADING, State.RESIDENT) and entry.cause is None)
    )
    own = [other for other in beside if other.device is device]
    coming = [other for other in own if other.state is State.ABSENT]
    coming_bytes = sum(other.footprint.total_bytes for other in coming)
    staying = [e for e in own if e.is_present and not e.stays]
    staying_bytes = sum(other.weights_bytes for other in staying)
    idle = [e for e in beside if e in device.shelf]
    idle_bytes = device.idle_bytes - sum(other.weights_bytes for other in idle)
    found = room(state, device)
    # Host copies do not matter here: a candidate is a card.
    can_come = found.reachable_models() > len(coming) + len(staying)
    reachable_bytes = found.reachable_bytes() - coming_bytes - staying_bytes
    return Candidate(
        key.device,
        needed_bytes,
        free_bytes=device.budget.left_bytes - coming_bytes,
        idle_bytes=idle_bytes,
        ceiling_bytes=reachable_bytes if can_come else 0,
        free_models=found.free_models - len(coming),
        idle_models=len(device.shelf) - len(idle),
        is_there=is_there,
        leases=0 if entry is None else len(entry.leases),
        has_copy=entry is not None and entry.parked_bytes > 0,
    )


# What the last walk along the line tells ----------------------------------------------


def is_known(state: CacheState) -> bool:
    """
    Returns True if nothing but what bounds tell has changed since then.
    """
    return all(device.outlook.is_known for device in state.devices.values())


def waits_in_vain(state: CacheState, waiter: Waiter, now_s: float) -> bool:
    """
    Returns True if it is known that the youngest request has to wait.
    """
    line = state.queue
    # What was found holds no longer once one may have lost its patience.
    if waiter.is_group or not is_known(state) or now_s >= state.impatient_at_s:
        return False
    [entry] = waiter.entries
    if entry.state is State.RESIDENT:
        return not entry.is_open_to(waiter)
    if entry.state is not State.ABSENT:
        return True
    cohort = line.cohort_of(entry)
    if cohort is None or line.first(entry) is not waiter:
        # Unless it lends the load that it shares its own priority.
        return cohort is not None and cohort.stopped_in == state.rounds
    return cohort.stopped_in == state.rounds and cohort.stopped_at <= waiter.turn


def is_stuck(state: CacheState, waiter: Waiter) -> bool:
    """
    Returns True if it is known that a request takes nothing from others.
    """
    line = state.queue
    # It holds memory, or leases back, or has barred others.
    if waiter.is_group or waiter.draining or waiter.overtaken >= planner.MAX_OVERTAKES:
        return False
    [entry] = waiter.entries
    if entry.state is not State.ABSENT or line.first(entry) is not waiter:
        # Others wait for the same load.
        return not waiter.passes and entry.state is not State.RESIDENT
    cohort = line.cohort_of(entry)
    return (
        len(entry.waiting) == 1
        and cohort is not None
        and cohort.stopped_in == state.rounds
        and cohort.stopped_at <= waiter.turn
    )


def is_draining(entry: Entry) -> bool:
    """
    Returns True if a request that lost its patience waits for memory where *entry* is,
    or its copy.
    """
    if entry.device.outlook.is_draining:
        return True
    return entry.host.outlook.is_draining and entry.copy_bytes > 0


# What others are told -----------------------------------------------------------------


def is_used(state: CacheState, device: Device) -> bool:
    """
    Returns True if anything is on *device*, or waited for.
    """
    held = device.entries or device.kept_bytes or device.budget.copies_bytes
    return bool(held) or any(
        device in (waited_for, state.devices.get("cpu"))
        for waited_for in state.queue.devices
    )


def account(state: CacheState, device: Device) -> dict[str, int]:
    """
    Returns what other processes should know of *device*: the fields of
    `peers.ledger.Account`.
    """
    held = [
        entry
        for entry in device.entries.values()
        if entry.state in (State.RESIDENT, State.UNLOADING)
    ]
    held_bytes = sum(entry.weights_bytes for entry in held)
    pinned_bytes = sum(entry.weights_bytes for entry in held if entry.stays)
    idle_bytes = device.idle_bytes
    return {
        "promised_bytes": device.budget.to_come_bytes,
        # What may be given up.
        "held_bytes": held_bytes - pinned_bytes + device.kept_bytes,
        "idle_bytes": idle_bytes + device.kept_bytes,
        "wanted_bytes": _wanted_bytes(state, device, idle_bytes),
    }


def _wanted_bytes(state: CacheState, device: Device, idle_bytes: int) -> int:
    """
    Returns what the oldest request lacks there that only other programs can give.
    """
    budget = device.budget
    for waiter in state.queue:
        for demand in demands.pending(waiter, impatient=False).demands:
            if demand.device != device.name:
                continue
            after_bytes = budget.charged_bytes - idle_bytes + demand.n_bytes
            if budget.limit_bytes is None or after_bytes <= budget.limit_bytes:
                return max(0, demand.n_bytes - idle_bytes)
    return 0
