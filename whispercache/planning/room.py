"""
Room: a device's memory as the planner sees it, and what a request would take of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .policies import Resident


@dataclass(frozen=True, slots=True)
class Demand:
    """
    The memory that serving a request would add on one device.

    Attributes:
        device: The device.
        n_bytes: Bytes to add.
        models: Models to add.
        own_bytes: Bytes of its own models there, which cannot be evicted to serve it.
            Pinned ones are not counted: no request counts on their memory.
        own_models: The number of those models.
    """

    device: str
    n_bytes: int
    models: int = 0
    own_bytes: int = 0
    own_models: int = 0


@dataclass(slots=True)
class Room:
    """
    A device's memory as the cache may use it; scratch for one `plan`.

    Attributes:
        capacity_bytes: Most that may be charged now, by the limit and by the gauge.
        ceiling_bytes: Most that could be charged if the cache held nothing.
        charged_bytes: Reserved and resident bytes, loads in flight included.
        coming_bytes: The part of *charged_bytes* that unloads in flight will return.
        pinned_bytes: The part of pinned models, which are not evicted.
        max_models: Most models that may be there; None for any number.
        models: The number there, loads and unloads in flight included.
        coming_models: The models of these that are being unloaded.
        pinned_models: The models of these that are pinned.
        idle_bytes: No more can be freed by evicting idle models; to skip a look at them
            that would be in vain.
        idle_models: No more idle models can be evicted.
    """

    capacity_bytes: int
    ceiling_bytes: int
    charged_bytes: int = 0
    coming_bytes: int = 0
    pinned_bytes: int = 0
    max_models: int | None = None
    models: int = 0
    coming_models: int = 0
    pinned_models: int = 0
    idle_bytes: float = math.inf
    idle_models: float = math.inf

    @property
    def free_bytes(self) -> int:
        """
        Bytes that may still be charged; negative after a limit was lowered.
        """
        return self.capacity_bytes - self.charged_bytes

    @property
    def free_models(self) -> int:
        """
        The number of models that may still be loaded.
        """
        # More than there ever are, so that it can be compared and subtracted.
        if self.max_models is None:
            return 1 << 62
        return self.max_models - self.models

    @property
    def reach_bytes(self) -> float:
        """
        Bytes that are free, will be, or could be without the end of a lease.
        """
        return self.free_bytes + self.coming_bytes + self.idle_bytes

    @property
    def reach_models(self) -> float:
        """
        The number of models that could be loaded likewise.
        """
        return self.free_models + self.coming_models + self.idle_models

    def fits(self, demand: Demand) -> bool:
        """
        Returns True if *demand* can be served at once.
        """
        n_bytes, models = demand.n_bytes, demand.models
        # Asked for each request that is looked at. A demand for nothing is served even
        # if a lowered limit leaves less than that.
        if n_bytes and n_bytes > self.capacity_bytes - self.charged_bytes:
            return False
        return (
            not models
            or self.max_models is None
            or models <= self.max_models - self.models
        )

    def lack(self, demand: Demand) -> tuple[int, int]:
        """
        Returns the bytes and models that are missing now.
        """
        return self._short(demand, coming=False)

    def shortfall(self, demand: Demand) -> tuple[int, int]:
        """
        Returns the bytes and models that are missing even after unloads in flight.
        """
        return self._short(demand, coming=True)

    def _short(self, demand: Demand, *, coming: bool) -> tuple[int, int]:
        free_bytes = self.free_bytes + coming * self.coming_bytes
        free_models = self.free_models + coming * self.coming_models
        # A demand for nothing is served even if a lowered limit leaves less than that.
        return (
            max(0, demand.n_bytes - free_bytes) if demand.n_bytes else 0,
            max(0, demand.models - free_models) if demand.models else 0,
        )

    def reachable_bytes(self) -> int:
        """
        Returns the bytes that one request could have if all unpinned models were gone.
        """
        return self.ceiling_bytes - self.pinned_bytes

    def reachable_models(self) -> int:
        """
        Returns the number of models that one request could have then.
        """
        if self.max_models is None:
            return 1 << 62
        return self.max_models - self.pinned_models

    def charge(self, demand: Demand) -> None:
        """
        Gives *demand* its memory.
        """
        self.charged_bytes += demand.n_bytes
        self.models += demand.models

    def promise(self, demand: Demand) -> None:
        """
        Sets aside what is free and what unloads return, so that no younger request
        takes it.
        """
        # First from what is free, the rest from what unloads will return.
        from_free = max(0, min(demand.n_bytes, self.free_bytes))
        self.charged_bytes += from_free
        self.coming_bytes -= demand.n_bytes - from_free
        models = max(0, min(demand.models, self.free_models))
        self.models += models
        self.coming_models -= demand.models - models

    def expect(self, victim: Resident) -> None:
        """
        Counts *victim* as being unloaded.
        """
        self.coming_bytes += victim.weights_bytes
        self.coming_models += 1
        self.idle_bytes -= victim.weights_bytes
        self.idle_models -= 1


@dataclass(slots=True)
class Margin:
    """
    The least growth of a device's memory by which a decision on it might change.

    Attributes:
        free_bytes: Of what is free.
        free_models: Likewise, of the models that may be loaded.
        reach_bytes: Of what is free, is being unloaded or could be evicted.
        reach_models: Likewise, of models.
    """

    free_bytes: float = math.inf
    free_models: float = math.inf
    reach_bytes: float = math.inf
    reach_models: float = math.inf
