"""
A device, as a cache knows it. Plain data, guarded by the cache's one lock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .budget import Budget

if TYPE_CHECKING:
    from whispercache.keys import ModelKey
    from whispercache.units import Limit

    from .entries import Entry
    from .threads import DeviceThread


@dataclass(slots=True)
class Tally:
    """
    A number of models, with their bytes.
    """

    models: int = 0
    n_bytes: int = 0

    def add(self, models: int, n_bytes: int) -> None:
        """
        Counts some more.
        """
        self.models += models
        self.n_bytes += n_bytes


@dataclass(slots=True)
class Outlook:
    """
    The bounds of a device's memory below which no request that waits can be helped, as
    of the last walk along the queue.

    Attributes:
        free_bytes: A promised request might fit with as much left.
        free_models: Likewise, with room for as many models.
        reach_bytes: A stuck one might, with as much left, coming or idle.
        reach_models: Likewise, with room for as many models.
        promised_bytes: What is set aside of the memory that is left.
        is_draining: A request that lost its patience is stuck here.
    """

    free_bytes: float = math.inf
    free_models: float = math.inf
    reach_bytes: float = math.inf
    reach_models: float = math.inf
    promised_bytes: int = 0
    is_draining: bool = False

    @property
    def is_known(self) -> bool:
        """
        True if nothing has happened that may change more than these bounds tell.
        """
        return self.free_bytes > -math.inf

    def forget(self) -> None:
        """
        Notes that anything may help, until the next walk.
        """
        self.free_bytes = -math.inf


class Device:
    """
    A device, and what the cache has there.

    Attributes:
        thread: Builds, loads and unloads its models.
        max_models: Most models that may be there; None for any number.
        budget: Its bytes.
        entries: Its models that are not absent.
        shelf: Its idle models that are not pinned, as a set in order. A lease takes its
            model off, the last release puts it back at the end: this is the order of
            release.
        idle_bytes: The bytes of these.
        pinned: Its idle models that are pinned, likewise.
        spared: Those that others cannot have evicted for a short while, likewise.
        coming: Its models that are being unloaded.
        staying: Its models that are pinned, and not to be evicted.
        moving: Its models that are being loaded, or unloaded for the first time.
        moved: Its models whose requests the line has to file anew.
        outlook: What would help the requests that wait for it.
        kept_bytes: Host memory of kept tokenizers and of copies that no load claims.
            Nothing is charged for it: it gives way to anything else.
        is_shrinking: Some of that is about to be dropped.
        lost_to: The error that left the device unusable; None while it is well.
        is_stale: Its gauge would tell something new.
        look_at_s: When its gauge is read again for those who wait.
        looked_s: When it last was because something had ended.
        loads_begun: How many there were.
    """

    def __init__(
        self, name: str, limit: Limit, max_models: int | None, thread: DeviceThread
    ) -> None:
        self.name: str = name
        self.thread: DeviceThread = thread
        self.max_models: int | None = max_models
        self.budget: Budget = Budget(name, limit)
        self.entries: dict[ModelKey, Entry] = {}
        self.shelf: dict[Entry, None] = {}
        self.idle_bytes: int = 0
        self.pinned: dict[Entry, None] = {}
        self.spared: dict[Entry, None] = {}
        self.coming: Tally = Tally()
        self.staying: Tally = Tally()
        self.moving: set[Entry] = set()
        self.moved: set[Entry] = set()
        self.outlook: Outlook = Outlook()
        self.kept_bytes: int = 0
        self.is_shrinking: bool = False
        self.lost_to: str | None = None
        self.is_stale: bool = False
        self.look_at_s: float = math.inf
        self.looked_s: float = -math.inf
        self.loads_begun: int = 0

    @property
    def is_over_limit(self) -> bool:
        """
        True if a limit was lowered below what is held.
        """
        if self.max_models is not None and len(self.entries) > self.max_models:
            return True
        budget = self.budget
        most_bytes = budget.limit_bytes
        return most_bytes is not None and budget.charged_bytes > most_bytes
