"""
The coordinates of the report's pictures, which the template draws.

Drawn by hand and not by a plotting library: they then follow the reader's light or dark
theme, their text is text, and there is one dependency less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .values import Comparison, Difference, Interval, ModelSummary

__all__ = [
    "Box",
    "Bubble",
    "Mark",
    "Row",
    "Scatter",
    "Span",
    "Tick",
    "Whiskers",
    "plots_of",
    "spans_of",
]

WIDTH = 480
_HEIGHT = 360
_FRAME = (58, 40, 462, 308)
_LARGEST = 30
_SMALLEST = 5
_ROW = 40
_NAMES = 132
_LETTER = 8.2
_LONGEST_NAME = 17
_TICKS = 5
_DECADE = 8
"""
Spread of speeds above which their axis is logarithmic.
"""


@dataclass(frozen=True, slots=True)
class Tick:
    """
    A line of the grid, and what it stands for.
    """

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Box:
    """
    A rectangle.
    """

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """
        True if the two have a point in common.
        """
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """
    The text and colour of a bubble or a row.

    Attributes:
        name: The model, shortened to what there is room for.
        title: All there is to say, in a sentence.
        colour: Number of the model's colour; equal throughout the page.
    """

    name: str
    title: str
    colour: int


@dataclass(frozen=True, slots=True)
class Bubble:
    """
    A model between speed and errors; its area is its memory.
    """

    mark: Mark
    x: float
    y: float
    radius: float
    label_x: float
    label_y: float


@dataclass(frozen=True, slots=True)
class Scatter:
    """
    A plot of errors against speed.
    """

    frame: Box
    width: int
    height: int
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    bubbles: tuple[Bubble, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """
    A value with its interval; *low* and *high* are None where there is none.
    """

    mark: Mark
    y: float
    at: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Whiskers:
    """
    A plot of error rates with their intervals, one below the other.
    """

    frame: Box
    width: int
    height: int
    across: tuple[Tick, ...]
    rows: tuple[Row, ...]


def plots_of(comparison: Comparison) -> tuple[Scatter | None, Whiskers | None]:
    """
    Returns the report's pictures; None where no errors are known.
    """
    models = [
        (number, model)
        for number, model in enumerate(comparison.models)
        if model.wer is not None and model.real_time_factor
    ]
    return (_scatter(models), _whiskers(models)) if models else (None, None)


@dataclass(frozen=True, slots=True)
class Span:
    """
    A difference with its interval, small enough for a cell; zero is in the middle.
    """

    at: float
    low: float
    high: float


SPAN_WIDTH = 120


def spans_of(differences: Sequence[Difference]) -> tuple[Span | None, ...]:
    """
    Returns the differences on one scale; None for those without an interval.
    """
    ends = [
        abs(end)
        for each in differences
        if each.interval
        for end in (each.interval.low, each.interval.high)
    ]
    largest = max(ends, default=0.0) or 1.0

    def place(value: float) -> float:
        return round(SPAN_WIDTH / 2 * (1 + 0.94 * value / largest), 1)

    return tuple(
        Span(place(each.wer), place(each.interval.low), place(each.interval.high))
        if each.interval and each.wer is not None
        else None
        for each in differences
    )


def _scatter(models: Sequence[tuple[int, ModelSummary]]) -> Scatter:
    frame = Box(*_FRAME)
    # Times as fast as speech: more is better, to the right.
    speeds = [1 / (model.real_time_factor or 1) for _, model in models]
    rates = [100 * (model.wer or 0) for _, model in models]
    sizes = [model.peak_bytes or model.weights_bytes or 1 for _, model in models]
    place_x, across = _speed_axis(speeds, frame)
    # Room below for the largest bubble.
    place_y, up = _axis(max(rates), frame.bottom - _LARGEST - 2, frame.top, " %")
    points = [
        (place_x(speed), place_y(rate), _radius(size, max(sizes)))
        for speed, rate, size in zip(speeds, rates, sizes, strict=True)
    ]
    marks = [
        _mark(
            number, model, f"{speed:.2g} times as fast as speech, {rate:.1f} % errors"
        )
        for (number, model), speed, rate in zip(models, speeds, rates, strict=True)
    ]
    labels = _labels(points, [mark.name for mark in marks], frame)
    bubbles = [
        Bubble(mark, *point, *label)
        for mark, point, label in zip(marks, points, labels, strict=True)
    ]
    # Large ones first, so that they do not hide small ones.
    bubbles.sort(key=lambda bubble: -bubble.radius)
    return Scatter(frame, WIDTH, _HEIGHT, across, up, tuple(bubbles))


def _whiskers(models: Sequence[tuple[int, ModelSummary]]) -> Whiskers:
    frame = Box(_NAMES, 12, WIDTH - 22, 12 + _ROW * len(models))
    ends = [100 * _end(model.wer or 0, model.wer_interval) for _, model in models]
    place, across = _axis(max(ends), frame.left, frame.right, " %")
    rows = []
    for line, (number, model) in enumerate(models):
        wer, interval = model.wer or 0, model.wer_interval
        text = f"{100 * wer:.1f} %"
        within = f", 95 % interval {_span(interval)}" if interval else ""
        rows.append(
            Row(
                mark=_mark(number, model, f"{text} word errors{within}"),
                y=frame.top + _ROW * (line + 0.5),
                at=place(100 * wer),
                low=place(max(0, 100 * interval.low)) if interval else None,
                high=place(100 * interval.high) if interval else None,
                text=text,
            )
        )
    return Whiskers(frame, WIDTH, int(frame.bottom) + 48, across, tuple(rows))


def _end(wer: float, interval: Interval | None) -> float:
    return max(wer, interval.high) if interval else wer


def _span(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def _mark(number: int, model: ModelSummary, text: str) -> Mark:
    name = model.name
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 1]}…"
    return Mark(name, f"{model.name}: {text}", number)


def _radius(size: float, largest: float) -> float:
    return max(_SMALLEST, _LARGEST * math.sqrt(size / largest))


# Axes ---------------------------------------------------------------------------------


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
    return place, tuple(Tick(place(value), f"{value:g}{unit}") for value in values)


def _step(span: float) -> float:
    """
    Returns a round distance between lines, for about `_TICKS` of them.
    """
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(
        power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= _TICKS
    )


def _speed_axis(
    speeds: Sequence[float], frame: Box
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    if max(speeds) / min(speeds) < _DECADE:
        return _axis(max(speeds), frame.left, frame.right, "×")
    # Room at both ends for the bubbles.
    low, high = math.log10(min(speeds) / 1.6), math.log10(max(speeds) * 1.6)

    def place(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return round(frame.left + (frame.right - frame.left) * share, 1)

    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [10.0**power * factor for power, factor in product(powers, (1, 2, 5))]
    seen = [value for value in values if low <= math.log10(value) <= high]
    # Lines at 1, 2 and 5 stand too close over many decades.
    if len(seen) > 2 * _TICKS:
        seen = [value for value in seen if math.log10(value).is_integer()]
    return place, tuple(Tick(place(value), f"{value:g}×") for value in seen)


def _labels(
    points: Sequence[tuple[float, float, float]], names: Sequence[str], frame: Box
) -> list[tuple[float, float]]:
    """
    Returns places for the names, as starts of their base lines, clear of bubbles and
    each other.
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
        boxes = [(spot, _text_box(spot, length)) for spot in spots]
        inside = [each for each in boxes if _holds(frame, each[1])] or boxes
        free = (each for each in inside if not any(map(each[1].meets, taken)))
        # An overlap is better than a name outside of the picture.
        spot, box = next(free, inside[0])
        taken.append(box)
        found.append((round(spot[0], 1), round(spot[1], 1)))
    return found


def _text_box(spot: tuple[float, float], length: float) -> Box:
    return Box(spot[0], spot[1] - 12, spot[0] + length, spot[1] + 4)


def _holds(frame: Box, box: Box) -> bool:
    return (
        frame.left <= box.left
        and box.right <= WIDTH
        and box.top >= 0
        and box.bottom <= frame.bottom
    )
