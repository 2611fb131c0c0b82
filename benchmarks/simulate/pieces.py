"""
Pieces of a simulation: models, strategies, copies in host RAM, files, a report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from whispercache.options import PATIENCE_S
from whispercache.planning.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import (
        Container,
        Iterable,
    )

    from whispercache.keys import ModelKey
    from whispercache.planning.planner import Planner
    from whispercache.planning.policies import Policy

__all__ = [
    "CARD",
    "NOTHING",
    "Copies",
    "Disk",
    "Host",
    "Model",
    "Report",
    "Strategy",
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
        load_s: To load it from its file, read from the disk.
        restore_s: To restore it from a copy in host RAM, and to make that copy.
        file_bytes: Its file.
        read_s: To read that from the disk; part of *load_s*.
        warm_load_s: To load it when its file is in the page cache.
    """

    key: ModelKey
    weights_bytes: int
    workspace_bytes: int
    load_s: float
    restore_s: float = 0.0
    file_bytes: int = 0
    read_s: float = 0.0
    warm_load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Strategy:
    """
    How a cache decides.

    Attributes:
        policy: Who leaves first.
        plan: What happens to those who wait; None for what the real scheduler does.
        keep_alive_s: How long an idle model stays.
        patience_s: How long hits may pass one who waits.
        reads_ahead: The file of a model that somebody waits for is read at once.
    """

    policy: Policy = POLICIES["lru"]
    plan: Planner | None = None
    keep_alive_s: float = math.inf
    patience_s: float = PATIENCE_S
    reads_ahead: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """
    What the host lends a card's cache.

    Attributes:
        ram_bytes: For copies of models that were evicted; 0 for none.
        page_bytes: For pages of files; with 0 every load reads the disk.
        preloaded: Models whose files were read before the first request, by place, the
            most wanted first; as far as *page_bytes* hold them.
    """

    ram_bytes: int = 0
    page_bytes: int = 0
    preloaded: tuple[int, ...] = ()


NOTHING = Host()
"""
A host that lends nothing.
"""


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
        waits_by_model: By model, how long each request had to wait at first.
        ends_by_model: By model, when the last lease ended.
        stops: How often a lease was given back for a while.
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
    waits_by_model: list[list[float]]
    ends_by_model: list[float]
    stops: int

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
        self._models: dict[Model, None] = {}  # the least recently used first

    def use(self, model: Model) -> bool:
        """
        Whether there is a copy to restore *model* from.
        """
        if model not in self._models:
            return False
        del self._models[model]
        self._models[model] = None
        return True

    def keep(
        self, model: Model, wanted: Container[Model], resident: Container[Model]
    ) -> bool:
        """
        Returns True if *model* has to be copied now. Others make room, duplicates of
        what is *resident* first, and never one of what is *wanted*.
        """
        n_bytes = model.weights_bytes
        if model in self._models:
            return False
        leaving = [each for each in self._models if each not in wanted]
        leaving.sort(key=lambda each: each not in resident)
        may_leave_bytes = sum(each.weights_bytes for each in leaving)
        if n_bytes > self._free_bytes + may_leave_bytes:
            return False
        for other in leaving:
            if self._free_bytes >= n_bytes:
                break
            del self._models[other]
            self._free_bytes += other.weights_bytes
        self._models[model] = None
        self._free_bytes -= n_bytes
        return True


class Disk:
    """
    The models' files on their disk, and the kernel's page cache before it.

    A file is in the page cache as a whole or not at all, and the least recently read
    leave first. The kernel is kinder to files that were read twice, and can have parts.
    The disk reads one file at a time: what a load needs, else what was asked for, in
    order. A load that finds a part read ahead gains the time of that part.

    Args:
        page_bytes: What the page cache has.
    """

    def __init__(self, page_bytes: int) -> None:
        self._free_bytes = self._page_bytes = page_bytes
        self._files: dict[Model, None] = {}  # the least recently read first
        self._asked: dict[Model, float] = {}  # seconds left of each
        self._now_s = 0.0  # until when the disk's time is accounted for

    def fill(self, models: Iterable[Model]) -> None:
        """
        Have read the files of *models*, the most wanted first, as far as they fit.
        """
        fitting = []
        left_bytes = self._free_bytes
        for model in models:
            if model.file_bytes <= left_bytes:
                left_bytes -= model.file_bytes
                fitting.append(model)
        for model in reversed(fitting):
            self._keep(model)

    def ask(self, model: Model, now_s: float) -> None:
        """
        Read the file of *model* ahead, once nothing else is to be read.
        """
        self._pass(now_s)
        if model not in self._files and model.file_bytes <= self._page_bytes:
            self._asked.setdefault(model, model.read_s)

    def load_s(self, model: Model, now_s: float) -> float:
        """
        Seconds of a load of *model* that begins now.
        """
        self._pass(now_s)
        left_s = 0.0
        if model not in self._files:
            left_s = self._asked.pop(model, model.read_s)
        self._now_s += left_s  # what was asked for waits
        self._keep(model)
        load_s = model.load_s - (model.read_s - left_s)
        return min(model.load_s, max(model.warm_load_s, load_s))

    def _pass(self, now_s: float) -> None:
        """
        Read what was asked for, until *now_s*.
        """
        while self._asked and self._now_s < now_s:
            model, left_s = next(iter(self._asked.items()))
            if self._now_s + left_s > now_s:
                self._asked[model] = left_s - (now_s - self._now_s)
                break
            self._now_s += left_s
            del self._asked[model]
            self._keep(model)
        self._now_s = max(self._now_s, now_s)

    def _keep(self, model: Model) -> None:
        """
        Note that the file of *model* was read; others leave for it.
        """
        n_bytes = model.file_bytes
        if n_bytes > self._page_bytes:
            return
        if model in self._files:
            del self._files[model]
            self._free_bytes += n_bytes
        while self._free_bytes < n_bytes:
            other = next(iter(self._files))
            del self._files[other]
            self._free_bytes += other.file_bytes
        self._files[model] = None
        self._free_bytes -= n_bytes
