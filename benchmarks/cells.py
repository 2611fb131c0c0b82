"""
Cells: a workload, on a card of some size, with a seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from contenders import MODELS
from traces import WORKLOADS
from virtual import Simulation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pieces import Model, Report, Strategy
    from traces import Request

__all__ = ["SHARES", "Cell", "cells"]

SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Cell:
    """
    One thing to simulate.

    Attributes:
        workload: Its name.
        share: The card's share of all weights; the largest work fits besides.
        models: What may be asked for.
        requests: Who asks for what.
    """

    workload: str
    share: float
    models: Sequence[Model]
    requests: Sequence[Request]

    @property
    def capacity_bytes(self) -> int:
        """
        What the card has.
        """
        weights_bytes = sum(model.weights_bytes for model in self.models)
        work_bytes = max(model.workspace_bytes for model in self.models)
        return int(self.share * weights_bytes) + work_bytes

    def alone(self, strategy: Strategy, *, ram_bytes: int = 0) -> Report:
        """
        A single caller, who asks for nothing before it was served.
        """
        simulation = Simulation(
            self.models, self.capacity_bytes, strategy, ram_bytes=ram_bytes
        )
        return simulation.run(callers=[self.requests])

    def together(self, strategy: Strategy, *, ram_bytes: int = 0) -> Report:
        """
        Requests that come when they come.
        """
        simulation = Simulation(
            self.models, self.capacity_bytes, strategy, ram_bytes=ram_bytes
        )
        return simulation.run(self.requests)


def cells(
    trace: Sequence[Request],
    *,
    n_models: int,
    n_requests: int,
    seeds: int,
    shares: Sequence[float] = SHARES,
) -> Iterator[Cell]:
    """
    Every workload at every capacity with every seed; the trace only if there is one.
    """
    for workload in ["azure", *WORKLOADS] if trace else WORKLOADS:
        for seed in range(seeds):
            dice = random.Random(f"{workload}/{seed}")
            models = dice.sample(MODELS[:n_models], n_models)
            if workload == "azure":
                requests = [request for request in trace if request.model < n_models]
            else:
                endless = WORKLOADS[workload](dice, n_models)
                requests = list(islice(endless, n_requests))
            for share in shares:
                yield Cell(workload, share, models, requests)
