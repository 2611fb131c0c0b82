"""
Workloads: who asks for which model, when, and for how long.

Each is a stream of requests by a seeded generator, about 0.4 requests a second with a
median of 1 s of work, which is what the Azure trace has; or that trace, from its file.
"""

from __future__ import annotations

import csv
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["WORKLOADS", "Request", "read_trace"]

PERIOD_S = 2.5
"""
Mean seconds between requests.

Source: the Azure trace has 0.38 requests a second.
"""

SLOPE = 1.05
"""
How fast popularity falls with rank: Zipf's exponent.

Source: the Azure trace.
"""


class Request(NamedTuple):
    """
    Someone wants a model.

    Attributes:
        at_s: When, on the trace's clock.
        model: Which, by place.
        service_s: How long the lease is held.
        priority: The level of its turn.
        segment_s: After each such time the lease can be given back for a while.
    """

    at_s: float
    model: int
    service_s: float
    priority: float = 0.0
    segment_s: float = math.inf


def _timed(dice: random.Random, models: Iterator[int]) -> Iterator[Request]:
    """
    Requests at random times, for *models* in order.
    """
    at_s = 0.0
    for model in models:
        at_s += dice.expovariate(1 / PERIOD_S)
        yield Request(at_s, model, _service_s(dice))


def _service_s(dice: random.Random) -> float:
    return min(max(dice.lognormvariate(0.0, 1.0), 0.1), 60.0)


def _popular(n: int) -> list[float]:
    return list(itertools.accumulate((rank + 1) ** -SLOPE for rank in range(n)))


def _zipf(dice: random.Random, n: int) -> Iterator[Request]:
    """
    Some models are asked for far more often than others, always the same.
    """
    ranks, popular = range(n), _popular(n)
    return _timed(
        dice, (dice.choices(ranks, cum_weights=popular)[0] for _ in itertools.count())
    )


def _shifting(dice: random.Random, n: int) -> Iterator[Request]:
    """
    A working set of a quarter of the models; one is replaced every 100 requests.
    """

    def models() -> Iterator[int]:
        now = dice.sample(range(n), max(1, n // 4))
        while True:
            for _ in range(100):
                yield dice.choice(now)
            others = [model for model in range(n) if model not in now]
            if others:
                now.pop(0)
                now.append(dice.choice(others))

    return _timed(dice, models())


def _sweep(dice: random.Random, n: int) -> Iterator[Request]:
    """
    Each model in turn, round and round, as an evaluation does.
    """
    return _timed(dice, itertools.cycle(dice.sample(range(n), n)))


def _ab(dice: random.Random, n: int) -> Iterator[Request]:
    """
    Two models in turn for 50 clips, then the next two.
    """

    def models() -> Iterator[int]:
        while True:
            pair = dice.sample(range(n), min(2, n))
            for _ in range(50):
                yield from pair

    return _timed(dice, models())


def _bursts(dice: random.Random, n: int) -> Iterator[Request]:
    """
    Ten requests for one model within seconds, then a pause; popular ones more often.
    """
    ranks, popular, at_s = range(n), _popular(n), 0.0
    while True:
        at_s += dice.expovariate(1 / (10 * PERIOD_S))
        model = dice.choices(ranks, cum_weights=popular)[0]
        while True:
            yield Request(at_s, model, _service_s(dice))
            if dice.random() < 1 / 10:
                break
            at_s += dice.expovariate(5.0)


def _jobs(dice: random.Random, n: int) -> Iterator[Request]:
    """
    Jobs of two passes, each with the model of its kind: a draft, then the final text.
    """
    kinds = [(i, (i + n // 2) % n) for i in range(n)]
    popular = _popular(n)

    def models() -> Iterator[int]:
        while True:
            yield from dice.choices(kinds, cum_weights=popular)[0]

    return _timed(dice, models())


WORKLOADS: dict[str, Callable[[random.Random, int], Iterator[Request]]] = {
    "zipf": _zipf,
    "shifting": _shifting,
    "sweep": _sweep,
    "a/b": _ab,
    "bursts": _bursts,
    "jobs": _jobs,
}
"""
Endless streams over so many models, by name.
"""


def read_trace(path: Path) -> list[Request]:
    """
    A trace from a CSV file with the columns t_seconds, key_id and service_seconds.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        requests = [
            Request(
                float(row["t_seconds"]),
                int(row["key_id"]),
                float(row["service_seconds"]),
            )
            for row in csv.DictReader(lines)
        ]
    return sorted(requests)
