"""
Placement: the card for a model, out of several, if the caller named none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A card that can compute in the wanted type, as one model sees it.

    Attributes:
        device: For example ``"cuda:1"``.
        needed_bytes: Bytes of the model and of one call on it.
        free_bytes: Bytes that nothing is charged for.
        idle_bytes: Bytes that the eviction of idle models would return.
        ceiling_bytes: Bytes that could be had if every lease ended.
        free_models: The number of models that may still be loaded.
        idle_models: The number of idle ones that could be evicted for them.
        is_there: The model is there, or on its way there.
        leases: The number of leases on it there.
        has_copy: A host copy of its weights is meant for that card.
    """

    device: str
    needed_bytes: int
    free_bytes: int
    idle_bytes: int = 0
    ceiling_bytes: int = 0
    free_models: int = 1
    idle_models: int = 0
    is_there: bool = False
    leases: int = 0
    has_copy: bool = False

    @property
    def room(self) -> tuple[bool, bool, bool, int]:
        """
        Sort key, best last: fits after evictions; fits without any; has a host copy;
        free bytes.
        """
        all_bytes = self.free_bytes + self.idle_bytes
        all_models = self.free_models + self.idle_models
        fits_at_once = self.needed_bytes <= self.free_bytes and self.free_models > 0
        fits = self.needed_bytes <= all_bytes and all_models > 0
        left_bytes = self.free_bytes if fits_at_once else all_bytes
        return fits, fits_at_once, self.has_copy, left_bytes


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """
    Returns the card where the model is already, or else the one with the most room for
    it; of equal ones the first. None if no card could ever hold it.
    """
    # A second copy on another card would cost a load and save nothing.
    there = [each for each in candidates if each.is_there]
    if there:
        return min(there, key=lambda each: each.leases)
    # One that is full of leased models may be free again; one that is too small, never.
    able = [each for each in candidates if each.needed_bytes <= each.ceiling_bytes]
    return max(able, key=lambda each: each.room, default=None)
