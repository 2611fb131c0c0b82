"""
Priority: how much earlier than others a request has its turn.

The line is one of arrival, in which a request of a lower level stands as if it had come
later, by the same time for each level. So a request waits for younger ones of higher
levels for a bounded time, and the order of two never changes while they wait.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

PriorityName: TypeAlias = Literal["interactive", "batch"]
Turn: TypeAlias = tuple[float, int]
"""
A place in the line: the time by which requests are ordered, and the number of those
that have the same.
"""

INTERACTIVE = 0.0
"""
The level of requests that name none. Calls below it give their model back between two
segments when one above them waits for its memory.
"""

LEVELS: Mapping[str, float] = MappingProxyType(
    {"interactive": INTERACTIVE, "batch": -1.0}
)

LEVEL_S = 60.0
"""
Seconds for which requests of one level more pass a request that came before them.

Source: simulated, dictation beside a night's subtitles (benchmarks/simulate).
"""


def parse_priority(value: object) -> float:
    """
    Returns the level that a user means by a name or a number, the higher the sooner.

    Raises:
        TypeError, ValueError: it is neither.
    """
    wanted = f"one of {', '.join(get_args(PriorityName))}, or a number"
    if isinstance(value, str):
        if value in LEVELS:
            return LEVELS[value]
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"priority must be {wanted}, not {value!r}") from None
    # True counts as 1 in Python, but is never meant as one.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"priority must be {wanted}, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"priority must be {wanted}, not {value!r}")
    return float(value)


def name_of(level: float) -> str:
    """
    Returns what a user may call a level.
    """
    names = (name for name, each in LEVELS.items() if each == level)
    return next(names, f"{level:g}")


def turn_s(arrived_s: float, level: float) -> float:
    """
    Returns the time by which a request of that *level* stands in the line.
    """
    return arrived_s - LEVEL_S * level
