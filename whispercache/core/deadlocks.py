"""
Deadlocks, as the state of a cache shows them: what `planning.deadlock` is asked about.

Everything here needs the lock and changes nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.planning.deadlock import Ceiling, Claim, Hold, Model, System

from .demands import reservations
from .entries import State

if TYPE_CHECKING:
    from .entries import Entry
    from .state import CacheState
    from .waiters import Waiter


def suspects(state: CacheState) -> list[Waiter]:
    """
    Returns the requests whose owners hold leases; without any there is no deadlock.
    """
    line = state.queue
    # One that was granted all of its memory only waits for loads.
    waiting = [
        waiter
        for owner in line.suspects
        for waiter in line.owners[owner]
        if waiter.held is None
    ]
    return sorted(waiting, key=lambda waiter: waiter.serial)


def victim_of_deadlock(state: CacheState) -> Waiter | None:
    """
    Returns the request that completed a deadlock, if there is one.
    """
    system, waiters = _system(state)
    found = system.culprit()
    return None if found is None else waiters[found]


def detained(state: CacheState) -> list[Waiter]:
    """
    Returns the requests whose owners hold leases that block another request, the
    youngest first; see `System.detained`.
    """
    system, waiters = _system(state)
    return [waiters[claim] for claim in system.detained()]


def _system(state: CacheState) -> tuple[System, dict[Claim, Waiter]]:
    waiters = {_claim(waiter): waiter for waiter in state.queue if waiter.held is None}
    return System(list(waiters), _holds(state), _ceilings(state)), waiters


def _leased(state: CacheState) -> list[Entry]:
    devices = state.devices.values()
    return [e for each in devices for e in each.entries.values() if e.leases]


def _model(entry: Entry, weights_bytes: int) -> Model:
    return Model(entry.key, entry.device.name, weights_bytes, entry.num_workers)


def _claim(waiter: Waiter) -> Claim:
    """
    Returns what a request wants. A load's peak counts beside what stays, like any other
    bytes.
    """
    parts = tuple(
        (
            _model(each.entry, each.footprint.weights_bytes),
            each.footprint.workspace_bytes,
        )
        for each in waiter.wanted
    )
    loading: dict[str, int] = {}
    for entry, (n_bytes, host_bytes) in reservations(waiter.wanted).items():
        own = [each.footprint for each in waiter.wanted if each.entry is entry]
        work_bytes = max(each.workspace_bytes for each in own)
        kept_bytes = own[0].weights_bytes + work_bytes * min(
            len(own), entry.num_workers
        )
        for device, extra_bytes in (
            (entry.device.name, n_bytes - kept_bytes),
            (entry.host.name, host_bytes),
        ):
            if extra_bytes > 0:
                loading[device] = loading.get(device, 0) + extra_bytes
    # Who holds one of them may have another lease on it.
    is_among = any(waiter.owner in e.leases.values() for e in waiter.entries)
    parallel = None if is_among else waiter.parallel
    return Claim(waiter.owner, waiter.since_s, parts, loading, parallel)


def _holds(state: CacheState) -> list[Hold]:
    leased = _leased(state)
    return [
        Hold(
            owner, _model(entry, entry.weights_bytes), entry.workspace_of_lease(serial)
        )
        for entry in leased
        for serial, owner in entry.leases.items()
    ] + [
        # Its copy on the host stays as long as the lease.
        Hold(owner, Model(entry.key, entry.host.name, entry.copy_bytes, 1), 0)
        for entry in leased
        if entry.copy_bytes
        for owner in entry.leases.values()
    ]


def _ceilings(state: CacheState) -> dict[str, Ceiling]:
    # One that is being unloaded is on its way out, pinned or not.
    there = (State.RESIDENT, State.LOADING)
    found = {}
    for name, device in state.devices.items():
        limit_bytes = device.budget.limit_bytes
        pinned = [e for e in device.entries.values() if e.stays and e.state in there]
        found[name] = Ceiling(
            math.inf if limit_bytes is None else limit_bytes,
            device.max_models,
            tuple(_model(entry, entry.weights_bytes) for entry in pinned),
            device.budget.most_bytes,
        )
    return found
