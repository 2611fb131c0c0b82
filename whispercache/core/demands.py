"""
Demands: the memory that serving a request would take, as the planner sees it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.planning.planner import Need, Pending
from whispercache.planning.room import Demand

from .entries import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .device import Device
    from .entries import Entry
    from .waiters import Waiter, Wanted


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


def pending(
    waiter: Waiter,
    *,
    impatient: bool,
    passes: bool = False,
    asks_below: float = -math.inf,
) -> Pending:
    """
    Returns a request as the planner sees it; it *passes* older ones if it must, or if
    another one for its model does.
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
        passes=passes or waiter.passes,
        shares=any(entry.num_workers > 1 for entry in waiter.entries),
        asks_below=asks_below,
    )
