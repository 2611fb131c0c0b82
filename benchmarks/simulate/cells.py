"""
Cells: a workload, on a card of some size, with a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from contenders import MODELS
from pieces import NOTHING
from simulation import Simulation
from traces import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pieces import Host, Model, Report, Strategy
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

    @property
    def file_bytes(self) -> int:
        """
        What the files of all models take.
        """
        return sum(model.file_bytes for model in self.models)

    @property
    def by_popularity(self) -> tuple[int, ...]:
        """
        All models, by place; first what is asked for most often.
        """
        asked = Counter(request.model for request in self.requests)
        places = range(len(self.models))
        return tuple(sorted(places, key=lambda place: -asked[place]))

    def alone(self, strategy: Strategy, host: Host = NOTHING) -> Report:
        """
        A single caller, who asks for nothing before it was served.
        """
        simulation = Simulation(self.models, self.capacity_bytes, strategy, host)
        return simulation.run(callers=[self.requests])

    def together(self, strategy: Strategy, host: Host = NOTHING) -> Report:
        """
        Requests that come when they come.
        """
        simulation = Simulation(self.models, self.capacity_bytes, strategy, host)
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
