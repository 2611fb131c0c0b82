"""
Circles: `deadlock` over the books of a cache. Called under the lock; changes nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whispercache.planning.deadlock import (
    Ceiling,
    Claim,
    Hold,
    Model,
    culprit,
    unserved,
)

from .entries import State, reservations

if TYPE_CHECKING:
    from whispercache.planning.deadlock import Owner

    from .books import Books
    from .entries import Entry, Waiter

__all__ = ["closing", "held_up", "suspects"]


def suspects(books: Books) -> list[Waiter]:
    """
    The waiters whose owners hold leases; without any there is no circle.
    """
    # None: the lease was handed over to nobody knows whom.
    holders = {owner for entry in _leased(books) for owner in entry.owners.values()} - {
        None
    }
    return [
        waiter
        for waiter in books.queue
        if waiter.held is None and waiter.owner in holders
    ]


def closing(books: Books) -> Waiter | None:
    """
    The waiter that closed a circle of those who wait for each other, if there is one.
    """
    waiters = [waiter for waiter in books.queue if waiter.held is None]
    claims = [_claim(waiter) for waiter in waiters]
    found = culprit(claims, _holds(books), _ceilings(books))
    return None if found is None else waiters[claims.index(found)]


def held_up(books: Books) -> list[Waiter]:
    """
    The waiters without whose leases another one cannot be served.

    They must not wait for that one's turn, or both would wait for ever. Where one of
    several is enough, it is the oldest.
    """
    waiters = [waiter for waiter in books.queue if waiter.held is None]
    claims = [_claim(waiter) for waiter in waiters]
    holds, ceilings = _holds(books), _ceilings(books)
    in_circles = unserved(claims, holds, ceilings)
    staying: list[Owner] = []
    passing: list[Waiter] = []
    for waiter in reversed(suspects(books)):
        never = [*staying, waiter.owner]
        left = unserved(claims, holds, ceilings, never)
        if all(claim in in_circles for claim in left):
            staying.append(waiter.owner)
        else:
            passing.append(waiter)
    return passing


def _leased(books: Books) -> list[Entry]:
    return [entry for entry in books.entries.values() if entry.leases]


def _model(entry: Entry, weights_bytes: int) -> Model:
    return Model(entry.key, entry.device.name, weights_bytes, entry.num_workers)


def _claim(waiter: Waiter) -> Claim:
    """
    What a waiter wants. A load's peak counts beside what stays, like any other bytes.
    """
    parts = tuple(
        (
            _model(part.entry, part.footprint.weights_bytes),
            part.footprint.workspace_bytes,
        )
        for part in waiter.parts
    )
    loading: dict[str, int] = {}
    for entry, (n_bytes, host_bytes) in reservations(waiter.parts).items():
        own = [part.footprint for part in waiter.parts if part.entry is entry]
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


def _holds(books: Books) -> list[Hold]:
    leased = _leased(books)
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


def _ceilings(books: Books) -> dict[str, Ceiling]:
    there = (State.RESIDENT, State.LOADING)
    return {
        name: Ceiling(
            math.inf
            if device.budget.limit_bytes is None
            else device.budget.limit_bytes,
            device.max_models,
            tuple(
                _model(entry, entry.weights_bytes)
                for entry in device.entries.values()
                if entry.stays and entry.state in there
            ),
            device.budget.most_bytes,
        )
        for name, device in books.devices.items()
    }
