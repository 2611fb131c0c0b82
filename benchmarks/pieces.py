"""
What a simulated cache is made of: models, who waits, copies in host RAM, a report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from whispercache import admission
from whispercache.admission import POLICIES, Resident
from whispercache.cache import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Mapping, Sequence

    from traces import Request

    from whispercache.admission import Decision, Pending, Policy, Room
    from whispercache.keys import ModelKey

    Planner: TypeAlias = Callable[
        [
            Sequence[Pending],
            Mapping[str, Room],
            Callable[[str], Sequence[Resident]],
            Callable[[str], Sequence[Resident]],
        ],
        list[Decision],
    ]

__all__ = [
    "CARD",
    "Copies",
    "Entry",
    "Model",
    "Report",
    "State",
    "Strategy",
    "Waiter",
]

CARD = "cuda:0"


@dataclass(frozen=True, slots=True)
class Model:
    """
    What a model takes.

    Attributes:
        key: Its key.
        weights_bytes: While it is in memory.
        workspace_bytes: On top of that, while it is leased.
        load_s: To load it from its file.
        restore_s: To restore it from a copy in host RAM, and to make that copy.
    """

    key: ModelKey
    weights_bytes: int
    workspace_bytes: int
    load_s: float
    restore_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Strategy:
    """
    How a cache decides.

    Attributes:
        policy: Who leaves first.
        plan: What happens to those who wait.
        keep_alive_s: How long an idle model stays.
        patience_s: How long hits may pass one who waits.
    """

    policy: Policy = POLICIES["lru"]
    plan: Planner = admission.plan
    keep_alive_s: float = math.inf
    patience_s: float = PATIENCE_S


class State(Enum):
    """
    Where a model is on its way through memory.
    """

    ABSENT = auto()
    LOADING = auto()
    RESIDENT = auto()
    UNLOADING = auto()


@dataclass(eq=False, slots=True)
class Waiter:
    """
    A request in the queue.
    """

    entry: Entry
    since_s: float
    service_s: float
    caller: Iterator[Request] | None
    overtaken: int = 0
    draining: list[Entry] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Entry:
    """
    The books of one model.
    """

    model: Model
    place: int
    state: State = State.ABSENT
    leases: int = 0
    last_used_s: float | None = None
    gap_s: float | None = None
    load_s: float = 0.0
    expires_at_s: float = math.inf
    drained_for: Waiter | None = None
    seen: Resident | None = None

    def resident(self) -> Resident:
        """
        The model as a policy sees it.
        """
        if self.seen is None:
            self.seen = Resident(
                self.model.key,
                CARD,
                self.model.weights_bytes,
                self.last_used_s or 0.0,
                self.gap_s or 0.0,
                self.load_s,
            )
        return self.seen


class Report(NamedTuple):
    """
    How a run went.

    Attributes:
        requests: Requests; each was served once.
        hits: Those that found their model in memory.
        loads: Loads, restores included.
        restores: Loads from a copy in host RAM.
        swaps: Models unloaded to make room.
        load_s: Seconds spent on loads and on copies to host RAM.
        waits_s: How long each request that waited had to, sorted.
        longest_s: By model, its longest wait.
        peak_bytes: The most that was charged.
        end_s: When the last lease ended.
    """

    requests: int
    hits: int
    loads: int
    restores: int
    swaps: int
    load_s: float
    waits_s: list[float]
    longest_s: list[float]
    peak_bytes: int
    end_s: float

    @property
    def hit_ratio(self) -> float:
        """
        The share of requests that found their model in memory.
        """
        return self.hits / self.requests

    @property
    def stall_s_per_1000(self) -> float:
        """
        Seconds waited per 1,000 requests.
        """
        return 1000 * sum(self.waits_s) / self.requests

    @property
    def swaps_per_1000(self) -> float:
        """
        Models unloaded to make room, per 1,000 requests.
        """
        return 1000 * self.swaps / self.requests

    def wait_s(self, share: float) -> float:
        """
        The wait that *share* of all requests did not exceed.
        """
        place = math.ceil(share * self.requests) - 1
        place -= self.requests - len(self.waits_s)  # the others did not wait
        return self.waits_s[place] if place >= 0 else 0.0


class Copies:
    """
    Models in host RAM: copied at their first eviction, and kept when restored.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._free_bytes = capacity_bytes
        self._entries: dict[Entry, None] = {}  # the least recently used first

    def use(self, entry: Entry) -> bool:
        """
        Whether there is a copy to restore *entry* from.
        """
        if entry not in self._entries:
            return False
        del self._entries[entry]
        self._entries[entry] = None
        return True

    def keep(self, entry: Entry, wanted: Container[Entry]) -> bool:
        """
        Whether *entry* has to be copied now. Others make room, duplicates of what is on
        the card first, and never one of what is *wanted*.
        """
        n_bytes = entry.model.weights_bytes
        if entry in self._entries:
            return False
        leaving = [each for each in self._entries if each not in wanted]
        leaving.sort(key=lambda each: each.state is not State.RESIDENT)
        may_leave_bytes = sum(each.model.weights_bytes for each in leaving)
        if n_bytes > self._free_bytes + may_leave_bytes:
            return False
        for other in leaving:
            if self._free_bytes >= n_bytes:
                break
            del self._entries[other]
            self._free_bytes += other.model.weights_bytes
        self._entries[entry] = None
        self._free_bytes -= n_bytes
        return True
