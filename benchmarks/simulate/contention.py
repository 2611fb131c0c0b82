"""
Contention: many callers who want more than fits, all the time.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING

from contenders import MODELS
from simulation import Simulation, StrictFifo
from traces import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pieces import Report, Strategy

__all__ = ["CALLERS", "LOAD_S", "LONGEST_LEASE_S", "alternate", "starve"]

CALLERS = 16
LOAD_S = 1.0
LONGEST_LEASE_S = 4.0
_CROWD_BYTES = 1_900_000_000


def starve(strategy: Strategy, *, crowd: int = 0, hammering_s: float = 600.0) -> Report:
    """
    Sixteen callers hammer two models that fill the card; one needs a third, once.

    They are models 0 and 1; the third, 2, is asked for at 30 s.

    Args:
        strategy: How the cache decides.
        crowd: So many more callers, of a dozen small models for which there is some
            room besides.
        hammering_s: How long each goes on.
    """
    large = [replace(MODELS[place], load_s=LOAD_S) for place in (8, 10, 12)]
    small = [
        replace(MODELS[place], load_s=0.3) for place in (*range(6), *range(16, 22))
    ]
    capacity_bytes = sum(m.weights_bytes + m.workspace_bytes for m in large[:2])
    capacity_bytes += _CROWD_BYTES * bool(crowd)

    def hammer(place: int) -> Iterator[Request]:
        dice = random.Random(place)
        spent_s = 0.0
        while spent_s < hammering_s:
            service_s = dice.uniform(1.0, LONGEST_LEASE_S)
            spent_s += service_s
            is_small = place >= CALLERS
            model = len(large) + dice.randrange(len(small)) if is_small else place % 2
            yield Request(0.0, model, service_s)

    simulation = Simulation([*large, *small], capacity_bytes, strategy)
    callers = [hammer(place) for place in range(CALLERS + crowd)]
    return simulation.run(callers=[*callers, [Request(30.0, 2, 1.0)]])


def alternate(
    strategy: Strategy, *, strict: bool = False, randomly: bool = False, n: int = 500
) -> Report:
    """
    Sixteen callers alternate between two models of which one fits; half start with
    the other.

    Args:
        strategy: How the cache decides.
        strict: Nobody passes anybody.
        randomly: Each takes the one or the other by chance instead of in turn.
        n: Requests of each caller.
    """
    models = [replace(MODELS[place], load_s=LOAD_S) for place in (8, 10)]
    capacity_bytes = max(m.weights_bytes + m.workspace_bytes for m in models)

    def caller(place: int) -> Iterator[Request]:
        dice = random.Random(place)
        for turn in islice(count(place), n):
            model = dice.randrange(2) if randomly else turn % 2
            yield Request(0.0, model, dice.uniform(0.5, 1.5))

    kind = StrictFifo if strict else Simulation
    simulation = kind(models, capacity_bytes, strategy)
    return simulation.run(callers=[caller(place) for place in range(CALLERS)])
