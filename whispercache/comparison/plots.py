"""
The coordinates of the report's pictures, which the template draws.

Drawn by hand and not by a plotting library: they then follow the reader's light or dark
theme, their text is text, and there is one dependency less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .values import Comparison, Difference, ModelSummary

    # The number of a model's colour, equal throughout the page, and the model.
    Numbered: TypeAlias = tuple[int, ModelSummary]
    # A line of the grid: its place, and what it stands for.
    Tick: TypeAlias = tuple[float, str]

# Spread of speeds above which their axis is logarithmic.
WIDTH = 480
SPAN_WIDTH = 120
_HEIGHT = 360
_LARGEST = 30
_SMALLEST = 5
_ROW = 40
_NAMES = 132
_LETTER = 8.2
_LONGEST_NAME = 17
_TICKS = 5
_DECADE = 8

_T = TypeVar("_T")


class Box(NamedTuple):
    """
    A rectangle.
    """

    left: float
    top: float
    right: float
    bottom: float


_FRAME = Box(58, 40, 462, 308)


@dataclass(frozen=True, slots=True)
class Bubble:
    """
    A model between speed and errors; its area is its memory.
    """

    name: str
    title: str
    colour: int
    x: float
    y: float
    radius: float
    label_x: float
    label_y: float


@dataclass(frozen=True, slots=True)
class Row:
    """
    A model's errors with their interval; *low* and *high* are None where there is none.
    """

    name: str
    title: str
    colour: int
    y: float
    at: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Plot(Generic[_T]):
    """
    A picture of all models, with the lines of its grid.
    """

    frame: Box
    width: int
    height: int
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    marks: tuple[_T, ...]


def plots_of(comparison: Comparison) -> tuple[Plot[Bubble] | None, Plot[Row] | None]:
    """
    Returns errors against speed, and errors with their intervals; None where no errors
    are known.
    """
    models = [
        (number, model)
        for number, model in enumerate(comparison.models)
        if model.wer is not None and model.real_time_factor
    ]
    return (_scatter(models), _whiskers(models)) if models else (None, None)


def spans_of(
    differences: Sequence[Difference],
) -> tuple[tuple[float, float, float] | None, ...]:
    """
    Returns the differences on one scale, each small enough for a cell, with zero in the
    middle: its place, and the ends of its interval. None for those without one.
    """
    intervals = [each.interval for each in differences if each.interval]
    ends = [abs(end) for each in intervals for end in (each.low, each.high)]
    largest = max(ends, default=0.0) or 1.0

    def place(value: float) -> float:
        return round(SPAN_WIDTH / 2 * (1 + 0.94 * value / largest), 1)

    return tuple(
        (place(each.wer), place(each.interval.low), place(each.interval.high))
        if each.interval and each.wer is not None
        else None
        for each in differences
    )


def _scatter(models: Sequence[Numbered]) -> Plot[Bubble]:
    # Times as fast as speech: more is better, to the right.
    speeds = [1 / (model.real_time_factor or 1) for _, model in models]
    rates = [100 * (model.wer or 0) for _, model in models]
    sizes = [model.peak_bytes or model.weights_bytes or 1 for _, model in models]
    place_x, across = _speed_axis(speeds)
    # Room below for the largest bubble.
    place_y, up = _axis(max(rates), _FRAME.bottom - _LARGEST - 2, _FRAME.top, " %")
    points = [
        (
            place_x(speed),
            place_y(rate),
            max(_SMALLEST, _LARGEST * math.sqrt(size / max(sizes))),
        )
        for speed, rate, size in zip(speeds, rates, sizes, strict=True)
    ]
    texts = [
        f"{speed:.2g} times as fast as speech, {rate:.1f} % errors"
        for speed, rate in zip(speeds, rates, strict=True)
    ]
    names = [_short(model.name) for _, model in models]
    bubbles = [
        Bubble(name, f"{model.name}: {text}", number, *point, *label)
        for name, (number, model), text, point, label in zip(
            names, models, texts, points, _labels(points, names), strict=True
        )
    ]
    # Large ones first, so that they do not hide small ones.
    bubbles.sort(key=lambda bubble: -bubble.radius)
    return Plot(_FRAME, WIDTH, _HEIGHT, across, up, tuple(bubbles))


def _whiskers(models: Sequence[Numbered]) -> Plot[Row]:
    frame = Box(_NAMES, 12, WIDTH - 22, 12 + _ROW * len(models))
    ends = [
        100 * max(model.wer or 0, model.wer_interval.high if model.wer_interval else 0)
        for _, model in models
    ]
    place, across = _axis(max(ends), frame.left, frame.right, " %")
    rows = []
    for line, (number, model) in enumerate(models):
        percent = 100 * (model.wer or 0)
        text, within = f"{percent:.1f} %", ""
        low = high = None
        if model.wer_interval:
            least, most = 100 * model.wer_interval.low, 100 * model.wer_interval.high
            low, high = place(max(0, least)), place(most)
            within = f", 95 % interval {least:.1f} to {most:.1f} %"
        title = f"{model.name}: {text} word errors{within}"
        y, at = frame.top + _ROW * (line + 0.5), place(percent)
        rows.append(Row(_short(model.name), title, number, y, at, low, high, text))
    return Plot(frame, WIDTH, int(frame.bottom) + 48, across, (), tuple(rows))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _axis(
    largest: float, start: float, end: float, unit: str
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """
    Returns a scale from 0 to a little above *largest*, and its grid.
    """
    # A little air above the largest value.
    step = _step(max(largest, 1.0) * 1.08)
    top = step * math.ceil(max(largest, 1.0) * 1.08 / step)

    def place(value: float) -> float:
        return round(start + (end - start) * value / top, 1)

    values = [step * count for count in range(round(top / step) + 1)]
    return place, tuple((place(value), f"{value:g}{unit}") for value in values)


def _step(span: float) -> float:
    """
    Returns a round distance between lines, for about `_TICKS` of them.
    """
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(
        power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= _TICKS
    )


def _speed_axis(
    speeds: Sequence[float],
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    left, right = _FRAME.left, _FRAME.right
    if max(speeds) / min(speeds) < _DECADE:
        return _axis(max(speeds), left, right, "×")
    # Room at both ends for the bubbles.
    low, high = math.log10(min(speeds) / 1.6), math.log10(max(speeds) * 1.6)

    def place(value: float) -> float:
        return round(
            left + (right - left) * (math.log10(value) - low) / (high - low), 1
        )

    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [10.0**power * factor for power, factor in product(powers, (1, 2, 5))]
    seen = [value for value in values if low <= math.log10(value) <= high]
    # Lines at 1, 2 and 5 stand too close over many decades.
    if len(seen) > 2 * _TICKS:
        seen = [value for value in seen if math.log10(value).is_integer()]
    return place, tuple((place(value), f"{value:g}×") for value in seen)


def _labels(
    points: Sequence[tuple[float, float, float]], names: Sequence[str]
) -> list[tuple[float, float]]:
    """
    Returns places for the names, clear of bubbles and each other.
    """
    taken = [Box(x - r, y - r, x + r, y + r) for x, y, r in points]
    found = []
    for (x, y, r), name in zip(points, names, strict=True):
        length = len(name) * _LETTER
        # In the order of preference: right, left, above, below.
        spots = [
            (x + r + 6, y + 5),
            (x - r - 6 - length, y + 5),
            *((x - length / 2, y - r - 7 - 16 * line) for line in range(4)),
            *((x - length / 2, y + r + 16 + 16 * line) for line in range(4)),
        ]
        boxes = [Box(x, y - 12, x + length, y + 4) for x, y in spots]
        inside = [box for box in boxes if _is_inside(box)] or boxes
        free = (box for box in inside if not any(_meet(box, one) for one in taken))
        # An overlap is better than a name outside of the picture.
        box = next(free, inside[0])
        taken.append(box)
        found.append((round(box.left, 1), round(box.bottom - 4, 1)))
    return found


def _is_inside(box: Box) -> bool:
    return (
        _FRAME.left <= box.left
        and box.right <= WIDTH
        and box.top >= 0
        and box.bottom <= _FRAME.bottom
    )


def _meet(one: Box, other: Box) -> bool:
    return (
        one.left < other.right
        and other.left < one.right
        and one.top < other.bottom
        and other.top < one.bottom
    )
