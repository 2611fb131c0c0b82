"""
A request, as a cache knows it. Plain data, guarded by the cache's one lock.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from whispercache.planning.priority import INTERACTIVE

from .entries import State

if TYPE_CHECKING:
    from whispercache.engine.sizes.footprint import Footprint, Workload
    from whispercache.lease import Lease
    from whispercache.planning.deadlock import Owner
    from whispercache.planning.priority import Turn

    from .entries import Entry


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    One model of a request, and what will be done with it.
    """

    entry: Entry
    workload: Workload

    @property
    def footprint(self) -> Footprint:
        """
        The bytes that this takes.
        """
        return self.entry.footprints[self.workload]


@dataclass(eq=False, slots=True)
class Waiter:
    """
    A request in the queue. Its future is done once, with its leases or an error.

    Attributes:
        turn: Its place in the line, by its priority and its arrival; the last number
            is negative before it queues.
        priority: Its level, the higher the sooner.
        parallel: Most leases on each model with its own; None for any number.
        resumes: It goes on with a call that gave its lease back.
        wanted: The models that it wants, all or nothing.
        keep_alive_s: For each of them, once its lease ends.
        since_s: When it was made.
        owner: The thread or task that waits.
        future: How it ends.
        deadline_s: When it times out.
        waits: It was not served at once.
        overtaken: Loads that passed it.
        passes: An older request waits for leases of its owner, so it waits for none.
        draining: Models that take no new leases for its sake.
        held: Once its memory was granted, its leases as far as their models are there;
            None before.
        entries: The models that it wants, each once.
    """

    wanted: tuple[Wanted, ...]
    keep_alive_s: float | None
    since_s: float
    owner: Owner
    future: Future[tuple[Lease, ...]] = field(default_factory=Future)
    priority: float = INTERACTIVE
    parallel: int | None = None
    resumes: bool = False
    turn: Turn = (math.inf, -1)
    deadline_s: float = math.inf
    waits: bool = False
    overtaken: int = 0
    passes: bool = False
    draining: list[Entry] = field(default_factory=list)
    held: dict[int, Lease] | None = None
    entries: tuple[Entry, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.entries = tuple(dict.fromkeys(each.entry for each in self.wanted))

    @property
    def serial(self) -> int:
        """
        Its number in the order of arrival; negative before it queues.
        """
        return self.turn[1]

    @property
    def is_group(self) -> bool:
        """
        True if it wants several leases at once.
        """
        return len(self.wanted) > 1

    @property
    def is_loading(self) -> bool:
        """
        True if a model that it wants is on its way.
        """
        return any(entry.state is State.LOADING for entry in self.entries)

    def wants(self, entry: Entry) -> bool:
        """
        Returns True if *entry* is among the models that it wants.
        """
        return entry in self.entries

    def __str__(self) -> str:
        return " + ".join(str(each.entry.key) for each in self.wanted)
