"""
Effort: how often tests try what is chosen at random.

An ordinary run tries each of them for seconds. ``make soak`` multiplies that.
"""

from __future__ import annotations

import os

__all__ = ["EFFORT", "tries"]

EFFORT = int(os.environ.get("WHISPERCACHE_EFFORT", "1"))


def tries(count: int) -> int:
    """
    Returns *count*, what an ordinary run tries, multiplied by the effort of this run.
    """
    return count * EFFORT
