"""
The state of a cache as values: what the planner, placement and deadlock detection see.

Everything here needs the lock and changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from whispercache.planning import deadlock
from whispercache.planning.deadlock import Ceiling, Claim, Hold, Model
from whispercache.planning.placement import Candidate
from whispercache.planning.planner import Demand, Need, Pending, Room

from .entries import State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from whispercache.keys import ModelKey
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.policies import Policy, Resident

    from .device import Device
    from .entries import Entry, Waiter, Wanted
    from .state import CacheState


# What requests want -------------------------------------------------------------------


def reservations(wanted: Sequence[Wanted]) -> dict[Entry, tuple[int, int]]:
    """
    Returns what to reserve for each absent model of *wanted* until it is loaded: bytes
    on its device, and bytes on the host.

    Loads on one device come one after the other, in this order, so the last carries
    what the largest of them takes at its peak beyond what stays.
    """
    absent: dict[Entry, list[Wanted]] = {}
    for each in wanted:
        if each.entry.state is not State.RESIDENT:
            absent.setdefault(each.entry, []).append(each)
    reserved: dict[Entry, tuple[int, int]] = {}
    last: dict[Device, Entry] = {}
    extra_bytes: dict[Device, int] = {}
    host_bytes: dict[Device, int] = {}
    copies_bytes = 0
    for entry, parts in absent.items():
        device, footprints = entry.device, [each.footprint for each in parts]
        work_bytes = max(each.workspace_bytes for each in footprints)
        kept_bytes = footprints[0].weights_bytes + entry.workspace_with(
            work_bytes, len(footprints)
        )
        peak_bytes = max(each.total_bytes for each in footprints)
        on_host = max(each.host_loading_bytes for each in footprints)
        reserved[entry] = kept_bytes, 0
        last[device] = entry
        extra_bytes[device] = max(extra_bytes.get(device, 0), peak_bytes - kept_bytes)
        # What the copies of the others of this request will be charged is not left.
        left_bytes = entry.host.budget.left_bytes - copies_bytes
        if 0 < entry.parked_bytes <= left_bytes:
            # It is there already, and stays there beside the weights.
            reserved[entry] = kept_bytes, entry.parked_bytes
            copies_bytes += entry.parked_bytes
        elif device is not entry.host:
            host_bytes[device] = max(host_bytes.get(device, 0), on_host)
    # Each load before the last has the room that is reserved for those after it.
    for device, entry in last.items():
        kept_bytes, copy_bytes = reserved[entry]
        reserved[entry] = (
            kept_bytes + extra_bytes[device],
            copy_bytes + host_bytes.get(device, 0),
        )
    return reserved


def demands(wanted: Sequence[Wanted]) -> tuple[Demand, ...]:
    """
    Returns what leases on all of *wanted* at once would add, by device.
    """
    found: dict[str, Demand] = {}
    for entry, (n_bytes, host_bytes) in reservations(wanted).items():
        _add(found, Demand(entry.device.name, n_bytes, models=1))
        if host_bytes:
            _add(found, Demand(entry.host.name, host_bytes))
    for entry in dict.fromkeys(each.entry for each in wanted):
        if entry.state is State.RESIDENT:
            works = [w.footprint.workspace_bytes for w in wanted if w.entry is entry]
            total_bytes = entry.workspace_with(max(works), len(works))
            extra_bytes = max(0, total_bytes - entry.workspace_bytes)
            # Room that its own models take cannot be made by evicting them.
            own_bytes = 0 if entry.pinned else entry.weights_bytes
            own_models = int(not entry.pinned)
            own = Demand(entry.device.name, extra_bytes, 0, own_bytes, own_models)
            _add(found, own)
    return tuple(found.values())


def _add(found: dict[str, Demand], more: Demand) -> None:
    one = found.get(more.device, Demand(more.device, 0))
    found[more.device] = Demand(
        more.device,
        one.n_bytes + more.n_bytes,
        one.models + more.models,
        one.own_bytes + more.own_bytes,
        one.own_models + more.own_models,
    )


def pending(waiter: Waiter, *, impatient: bool) -> Pending:
    """
    Returns a request as the planner sees it.
    """
    keys = tuple(entry.key for entry in waiter.entries)
    need = Need.WORKSPACE
    for entry in waiter.entries:
        if entry.state is State.ABSENT:
            need = Need.LOAD
        elif not entry.is_open_to(waiter):
            return Pending(keys, Need.NOTHING)
    # Its memory was granted; it only waits for loads.
    if waiter.held is not None:
        return Pending(keys, Need.NOTHING)
    return Pending(
        keys,
        need,
        demands(waiter.wanted),
        overtaken=waiter.overtaken,
        impatient=impatient,
        passes=waiter.passes,
        shares=any(entry.num_workers > 1 for entry in waiter.entries),
    )


def queue_of(waiters: Sequence[Waiter], patient_since_s: float) -> list[Pending]:
    """
    Returns *waiters* as the planner sees them, impatient if older than that time.
    """
    first: dict[ModelKey, int] = {}
    found: list[Pending] = []
    for place, waiter in enumerate(waiters):
        one = pending(waiter, impatient=waiter.since_s <= patient_since_s)
        if one.need is Need.LOAD and not waiter.is_group:
            # Only the first asks for its load; the others share it.
            asks = first.setdefault(one.keys[0], place)
            if asks != place:
                # Or the load that it shares would wait where it must not.
                if one.passes:
                    found[asks] = replace(found[asks], passes=True)
                one = Pending(one.keys, Need.NOTHING)
        found.append(one)
    return found


# What devices hold --------------------------------------------------------------------


def room(state: CacheState, device: Device) -> Room:
    """
    Returns a device's memory as the planner sees it, with host copies of models that
    are on other devices.
    """
    held = device.entries.values()
    coming = [entry for entry in held if entry.state is State.UNLOADING]
    pinned = [entry for entry in held if entry.stays]
    found = Room(
        capacity_bytes=device.budget.capacity_bytes,
        ceiling_bytes=device.budget.ceiling_bytes,
        charged_bytes=device.budget.charged_bytes,
        coming_bytes=sum(entry.weights_bytes for entry in coming),
        pinned_bytes=sum(entry.weights_bytes for entry in pinned),
        max_models=device.max_models,
        models=len(held),
        coming_models=len(coming),
        pinned_models=len(pinned),
    )
    for entry in state.copies_on(device.name):
        if entry.stays:
            found.pinned_bytes += entry.copy_bytes
        if entry.state is State.UNLOADING:
            # Kept or dropped, it is no longer charged once the model is unloaded.
            found.coming_bytes += entry.copy_bytes
    return found


def ordered(entries: Iterable[Entry], policy: Policy, now_s: float) -> list[Resident]:
    """
    Returns those of *entries* that are not pinned, the first to evict first.
    """
    found = [entry.resident() for entry in entries if not entry.stays]
    return sorted(found, key=lambda resident: policy(resident, now_s))


def residents(
    state: CacheState, device: str, policy: Policy, now_s: float, *, idle: bool
) -> list[Resident]:
    """
    Returns what could be evicted for room on *device*, the first to go first: its own
    models, then models of cards with a host copy there, each as what its copy frees.

    Idle ones can be evicted now, leased ones once they are idle.
    """
    held = state.devices[device]
    # In the order of release; the policy may have another one.
    own = held.shelf if idle else [e for e in held.entries.values() if e.leases]
    copied = [
        entry
        for entry in state.copies_on(device)
        if (entry.is_idle if idle else entry.leases)
    ]
    return ordered(own, policy, now_s) + [
        replace(one, device=device, weights_bytes=state.entries[one.key].copy_bytes)
        for one in ordered(copied, policy, now_s)
    ]


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
    idle = [e for e in device.shelf if not e.stays and e not in beside]
    found = room(state, device)
    # Host copies do not matter here: a candidate is a card.
    can_come = found.reachable_models() > len(coming) + len(staying)
    reachable_bytes = found.reachable_bytes() - coming_bytes - staying_bytes
    return Candidate(
        key.device,
        needed_bytes,
        free_bytes=device.budget.left_bytes - coming_bytes,
        idle_bytes=sum(other.weights_bytes for other in idle),
        ceiling_bytes=reachable_bytes if can_come else 0,
        free_models=found.free_models - len(coming),
        idle_models=len(idle),
        is_there=is_there,
        leases=0 if entry is None else len(entry.leases),
        has_copy=entry is not None and entry.parked_bytes > 0,
    )


# What others are told -----------------------------------------------------------------


def is_used(state: CacheState, device: Device) -> bool:
    """
    Returns True if anything is on *device*, or waited for.
    """
    held = device.entries or device.kept_bytes or device.copies_bytes
    return bool(held) or any(
        device in (entry.device, entry.host)
        for waiter in state.queue
        for entry in waiter.entries
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
    idle_bytes = sum(e.weights_bytes for e in device.shelf if not e.stays)
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
        for demand in pending(waiter, impatient=False).demands:
            if demand.device != device.name:
                continue
            after_bytes = budget.charged_bytes - idle_bytes + demand.n_bytes
            if budget.limit_bytes is None or after_bytes <= budget.limit_bytes:
                return max(0, demand.n_bytes - idle_bytes)
    return 0


# Deadlocks ----------------------------------------------------------------------------


def suspects(state: CacheState) -> list[Waiter]:
    """
    Returns the requests whose owners hold leases; without any there is no deadlock.
    """
    # An owner of None is not known: the lease was handed over.
    waiting = [w for w in state.queue if w.held is None and w.owner is not None]
    if not waiting:
        return []
    holders = {owner for e in _leased(state) for owner in e.owners.values()}
    return [waiter for waiter in waiting if waiter.owner in holders]


def victim_of_deadlock(state: CacheState) -> Waiter | None:
    """
    Returns the request that completed a deadlock, if there is one.
    """
    waiters = [waiter for waiter in state.queue if waiter.held is None]
    claims = [_claim(waiter) for waiter in waiters]
    found = deadlock.culprit(claims, _holds(state), _ceilings(state))
    return None if found is None else waiters[claims.index(found)]


def detained(state: CacheState) -> list[Waiter]:
    """
    Returns the requests whose owners hold leases that block another request.

    They must not wait for that one's turn, or both would wait for ever. If letting one
    of several pass is enough, the oldest passes.
    """
    waiters = [waiter for waiter in state.queue if waiter.held is None]
    claims = [_claim(waiter) for waiter in waiters]
    holds, ceilings = _holds(state), _ceilings(state)
    deadlocked = deadlock.unserved(claims, holds, ceilings)
    staying: list[Owner] = []
    passing: list[Waiter] = []
    # From the youngest: as many as possible keep to the order of arrival.
    for waiter in reversed(suspects(state)):
        never = [*staying, waiter.owner]
        left = deadlock.unserved(claims, holds, ceilings, never)
        if all(claim in deadlocked for claim in left):
            staying.append(waiter.owner)
        else:
            passing.append(waiter)
    return passing


def _leased(state: CacheState) -> list[Entry]:
    return [entry for entry in state.entries.values() if entry.leases]


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
    return Claim(waiter.owner, waiter.since_s, parts, loading)


def _holds(state: CacheState) -> list[Hold]:
    leased = _leased(state)
    return [
        Hold(entry.owners[serial], _model(entry, entry.weights_bytes), n_bytes)
        for entry in leased
        for serial, n_bytes in entry.leases.items()
    ] + [
        # Its copy on the host stays as long as the lease.
        Hold(owner, Model(entry.key, entry.host.name, entry.copy_bytes, 1), 0)
        for entry in leased
        if entry.copy_bytes
        for owner in entry.owners.values()
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
