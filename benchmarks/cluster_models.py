"""
The models and the requests of a cluster, in virtual time (simulate/fleet.py) and on Ray
(cluster.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping

GIB = 2**30
CARD_BYTES = int(6.5 * GIB)

# What a call takes of a card, while it works.
WORKSPACE_BYTES = GIB // 4

# Without loads.
BUSY_SHARE = 0.58

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


CALLS_S = {name: call_s for name, (_, call_s) in SIZES.items()}

UNLIKE_CALLS_S = dict(zip(SIZES, (3.0, 3.0, 0.5, 1.2, 1.2, 0.5, 0.2, 0.1), strict=True))
"""
Seconds of calls that differ more, as those of tiny and large models do.
"""


def load_s(name: str) -> float:
    """
    Seconds of a load: 0.3, and half a second for each GiB.
    """
    gib, _ = SIZES[name]
    return 0.3 + gib / 2


def requests_of(
    dice: random.Random, n: int, cards: int, calls_s: Mapping[str, float] = CALLS_S
) -> Iterator[tuple[float, str]]:
    """
    Requests at random times, in seconds, that keep *cards* busy for 58 % of it without
    loads; popularity falls with the rank, by Zipf with 0.8, and ranks are drawn.
    """
    ranked = list(SIZES)
    dice.shuffle(ranked)
    weights = [(rank + 1) ** -0.8 for rank in range(len(ranked))]
    pairs = zip(weights, ranked, strict=True)
    usual_s = sum(weight * calls_s[name] for weight, name in pairs) / sum(weights)
    at_s = 0.0
    for _ in range(n):
        at_s += dice.expovariate(BUSY_SHARE * cards / usual_s)
        (name,) = dice.choices(ranked, weights)
        yield at_s, name
