"""
What was asked of whispercache on a card, beside what was seen there.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_records import Cycle, Size, Tier, Work, of_type
from gpu_run import SIZES
from gpu_tiers import CONSTRUCT, PAGEABLE, RESTORE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gpu_records import Record

__all__ = ["Target", "growth", "judge", "seconds_of"]

LEAST_RETURNED = 0.97
MOST_OF_CROSSING = 1.5
LEAST_FASTER = 5.0
MOST_GROWTH = 0.01
MOST_ASTRAY = 0.10


@dataclass(frozen=True, slots=True)
class Target:
    """
    One of them.

    Attributes:
        asked: What.
        seen: What came of it, in words.
        reached: Whether that is enough; None if it was not measured.
    """

    asked: str
    seen: str
    reached: bool | None


def judge(records: Sequence[Record]) -> list[Target]:
    """
    All targets, whatever was measured.
    """
    sizes, works = of_type(records, Size), of_type(records, Work)
    tiers, cycles = of_type(records, Tier), of_type(records, Cycle)
    return [
        _returned(sizes),
        _restore_beside_crossing(tiers),
        _restore_beside_construction(tiers),
        *(_growth(name, cycles) for name in _GAUGES),
        _astray("weights", [(e.size, *e.bytes) for e in sizes if not e.error]),
        _astray("work", [(f"{e.size}, {e.work}", *e.bytes) for e in works]),
    ]


def seconds_of(tiers: Iterable[Tier], size: str, kind: str, step: str) -> float | None:
    """
    Median seconds of a step; None if it was not measured.
    """
    for tier in tiers:
        if (tier.size, tier.compute_type, tier.step) == (size, kind, step):
            return statistics.median(tier.seconds) if tier.seconds else None
    return None


def _returned(sizes: Sequence[Size]) -> Target:
    asked = f"at least {LEAST_RETURNED:.0%} of the weights' bytes return at each unload"
    shares = {each.size: each.returned_share for each in sizes}
    known = {size: share for size, share in shares.items() if share is not None}
    if not known:
        return Target(asked, "not measured", None)
    worst = min(known, key=known.__getitem__)
    failed = "".join(f"; {size} was not measured" for size in shares.keys() - known)
    seen = f"{known[worst]:.1%} at worst ({worst}), {len(known)} sizes{failed}"
    return Target(asked, seen, known[worst] >= LEAST_RETURNED)


def _restore_beside_crossing(tiers: Sequence[Tier]) -> Target:
    asked = (
        f"a restore takes at most {MOST_OF_CROSSING} × the card's own copy of its "
        "bytes from pageable memory"
    )
    ratios = _ratios(tiers, RESTORE, PAGEABLE)
    if not ratios:
        return Target(asked, "not measured", None)
    worst = max(ratios, key=ratios.__getitem__)
    seen = "; ".join(f"{name}: {ratio:.2f} ×" for name, ratio in ratios.items())
    return Target(asked, seen, ratios[worst] <= MOST_OF_CROSSING)


def _restore_beside_construction(tiers: Sequence[Tier]) -> Target:
    asked = (
        f"a restore of large-v3 is at least {LEAST_FASTER:g} × as fast as constructing "
        "it from files in the page cache"
    )
    large = [tier for tier in tiers if tier.size == SIZES[-1]]
    ratios = _ratios(large, CONSTRUCT, RESTORE)
    if not ratios:
        return Target(asked, "not measured", None)
    seen = "; ".join(f"{name}: {ratio:.1f} ×" for name, ratio in ratios.items())
    return Target(asked, seen, min(ratios.values()) >= LEAST_FASTER)


def _ratios(tiers: Sequence[Tier], one: str, other: str) -> dict[str, float]:
    """
    By model and type, how much longer one step takes than the other.
    """
    ratios = {}
    for size, kind in dict.fromkeys((tier.size, tier.compute_type) for tier in tiers):
        times = [seconds_of(tiers, size, kind, step) for step in (one, other)]
        if times[0] is not None and times[1]:
            ratios[f"{size} {kind}"] = times[0] / times[1]
    return ratios


_GAUGES: dict[str, Callable[[Cycle], int | None]] = {
    "the process's memory pool, loaded": lambda cycle: cycle.loaded.reserved_bytes,
    "the card by its gauge, loaded": lambda cycle: cycle.loaded.gauge_bytes,
    "the card by its gauge, unloaded": lambda cycle: cycle.left.gauge_bytes,
    "anonymous memory of the host, unloaded": lambda cycle: cycle.host_bytes,
}


def growth(numbers: Sequence[int]) -> float | None:
    """
    How much the last tenth is above the second, as a share; None with less than 10.

    The first tenth is left out: what is made once, such as buffers, is made there.
    """
    tenth = len(numbers) // 10
    if not tenth:
        return None
    start = statistics.median(numbers[tenth : 2 * tenth])
    end = statistics.median(numbers[-tenth:])
    return end / start - 1 if start else None


def _growth(name: str, cycles: Sequence[Cycle]) -> Target:
    asked = f"no growth above {MOST_GROWTH:.0%} over 100 cycles: {name}"
    read = [_GAUGES[name](cycle) for cycle in cycles]
    grown = growth([number for number in read if number is not None])
    if grown is None:
        return Target(asked, "not measured", None)
    enough = len(cycles) >= 100  # noqa: PLR2004 - as asked
    seen = f"{grown:+.2%} over {len(cycles)} cycles"
    return Target(asked, seen, grown <= MOST_GROWTH if enough else None)


def _astray(what: str, pairs: Sequence[tuple[str, int | None, int]]) -> Target:
    asked = f"bytes of {what} are predicted within {MOST_ASTRAY:.0%}"
    ratios = {
        name: measured / predicted
        for name, measured, predicted in pairs
        if measured is not None and predicted
    }
    if not ratios:
        return Target(asked, "not measured", None)
    low, high = (f(ratios, key=ratios.__getitem__) for f in (min, max))
    seen = (
        f"measured {ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}) "
        "of the prediction"
    )
    astray = max(abs(ratio - 1) for ratio in ratios.values())
    return Target(asked, seen, astray <= MOST_ASTRAY)
