"""
Policies: which idle model is evicted first, as functions of what is known of each.

A new stateless policy is one function and one line in `POLICIES`. One that needs to
know more of a model adds a field to `Resident`, which `core.entries.Entry` fills in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from whispercache.keys import ModelKey


@dataclass(frozen=True, slots=True)
class Resident:
    """
    A model in memory, as a policy sees it.

    Attributes:
        key: The model.
        device: Where its bytes would be freed.
        weights_bytes: How many bytes its eviction would free there.
        last_used_s: When its last lease ended, on the cache's clock.
        gap_s: Smoothed seconds between its uses; see `next_gap_s`.
        cost_s: Seconds that loading it again takes.
        yields_to: It becomes idle soon if a request above this level asks for that:
            minus infinity if it is idle, infinity if its leases cannot be asked.
    """

    key: ModelKey
    device: str
    weights_bytes: int
    last_used_s: float
    gap_s: float
    cost_s: float
    yields_to: float = math.inf

    @property
    def is_copy(self) -> bool:
        """
        True for the copy of its weights that the host keeps beside those on a card.
        """
        return self.device != self.key.device


Policy: TypeAlias = "Callable[[Resident, float], float]"
"""
A policy: from a model and the time now to a score. The lowest score is evicted first.
"""


def _lru(resident: Resident, now_s: float) -> float:
    return resident.last_used_s - now_s


def _gap(resident: Resident, now_s: float) -> float:
    """
    Evicts first where a second of absence costs least per byte.

    Source: simulated, 105 cells: 1.36 × the optimum's load seconds against LRU's 1.58
    (benchmarks/simulate).
    """
    idle_s = max(now_s - resident.last_used_s, resident.gap_s, 1e-9)
    return resident.cost_s / (max(resident.weights_bytes, 1) * idle_s)


POLICIES: Mapping[str, Policy] = {"lru": _lru, "gap": _gap}


def is_lru(policy: Policy) -> bool:
    """
    Returns True for the policy whose order is that of release, at any time. Others are
    functions of the time, so each decision has to ask them.
    """
    return policy is _lru


def next_gap_s(gap_s: float | None, since_last_use_s: float) -> float:
    """
    Returns the smoothed gap after one more use; *gap_s* is None before the first.
    """
    if gap_s is None:
        return since_last_use_s
    # One long pause counts as four usual ones at most, or it would hide all others.
    return gap_s + (min(since_last_use_s, 4 * gap_s) - gap_s) / 8
