"""
The models and the requests of a cluster, in virtual time (simulate/fleet.py) and on Ray
(cluster.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

GIB = 2**30
CARD_BYTES = int(6.5 * GIB)

SIZES = {
    "large-v3": (3.1, 0.9),
    "large-v2": (3.1, 0.9),
    "large-v3-turbo": (1.6, 0.4),
    "medium": (1.5, 0.5),
    "medium.en": (1.5, 0.5),
    "distil-large-v3": (1.5, 0.35),
    "small": (0.5, 0.25),
    "small.en": (0.5, 0.25),
}
"""
GiB of each model, and seconds of a call on it: together twice what a card holds.
"""


def load_s(name: str) -> float:
    """
    Seconds of a load: 0.3, and half a second for each GiB.
    """
    gib, _ = SIZES[name]
    return 0.3 + gib / 2


def requests_of(
    dice: random.Random, n: int, cards: int, share: float = 0.58
) -> Iterator[tuple[float, str]]:
    """
    Requests at random times, in seconds, that keep *cards* busy for a *share* of it
    without loads; popularity falls with the rank, by Zipf with 0.8, and ranks are
    drawn.
    """
    ranked = list(SIZES)
    dice.shuffle(ranked)
    weights = [(rank + 1) ** -0.8 for rank in range(len(ranked))]
    pairs = zip(weights, ranked, strict=True)
    usual_s = sum(weight * SIZES[name][1] for weight, name in pairs) / sum(weights)
    at_s = 0.0
    for _ in range(n):
        at_s += dice.expovariate(share * cards / usual_s)
        (name,) = dice.choices(ranked, weights)
        yield at_s, name
