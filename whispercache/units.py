"""
Units: amounts as people write them.

Limits of memory are ``"10GiB"``, ``0.8`` or ``"80%"``, durations ``300``, ``"5m"`` or
``-1``. Pure: text and numbers in, numbers out.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

LimitValue: TypeAlias = int | float | str | None
DurationValue: TypeAlias = int | float | str

_BINARY = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

# A whole number below this is far more often a misplaced fraction or a number of
# gigabytes than a limit that is meant.
_SMALLEST_PLAIN_BYTES = 1024**2

# At most 18 digits a side: int() and float() then never fail or overflow.
_NUMBER = r"(?P<whole>[0-9]{1,18})(?:\.(?P<part>[0-9]{1,18}))?"
_SIZE = re.compile(
    _NUMBER + r"\s*(?P<unit>%|(?P<prefix>[kmgt])(?P<kind>i?b?)|b)?", re.IGNORECASE
)

# As in Go's time.ParseDuration: no spaces, any number of parts.
_DURATION_UNIT_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "\N{MICRO SIGN}s": 1e-6,
    "\N{GREEK SMALL LETTER MU}s": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_DURATION_PART = re.compile(
    rf"([0-9]{{1,18}}(?:\.[0-9]{{1,18}})?)({'|'.join(_DURATION_UNIT_S)})"
)
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
_SECONDS = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,18})?")


@dataclass(frozen=True, slots=True)
class Limit:
    """
    The part of a device that may be used: bytes, a fraction of it, or all.
    """

    n_bytes: int | None = None
    fraction: float | None = None  # above 0 and at most 1

    def of(self, total_bytes: int) -> int | None:
        """
        Returns the limit in bytes on a device of *total_bytes*, or None for no limit.

        Not clipped to the device: a limit above what it has bounds nothing.
        """
        if self.fraction is not None:
            return int(total_bytes * self.fraction)
        return self.n_bytes


def parse_limit(value: LimitValue, name: str = "limit") -> Limit:
    """
    Returns the `Limit` that *value* means; *name* is the parameter in messages.

    None and ``"auto"`` set no limit. A whole number is bytes, a float is a fraction of
    the device: ``1.0`` is all of it. Text is a number with a unit (``"10GiB"``,
    ``"1.5 GB"``, ``"512m"``, ``"80%"``; a bare letter is binary, as in Docker), or
    either kind of plain number.

    Raises:
        TypeError: *value* is of another type, or a bool.
        ValueError: It is not positive, too small to be meant, or cannot be read.
    """
    if value is None:
        return Limit()
    if isinstance(value, str):
        return _limit_from_text(value, name)
    # 1.0 is all of a device, and 1 a byte, so the type decides.
    if isinstance(value, float):
        return _fraction(value, name, value)
    return _plain_bytes(_whole(value, name), name, value)


def parse_bytes(value: LimitValue, name: str = "size") -> int:
    """
    Returns the bytes in *value*, as `parse_limit` reads it, where neither a share nor
    no limit would mean anything.

    Raises:
        TypeError, ValueError: As for `parse_limit`, or they are no bytes.
    """
    try:
        n_bytes = parse_limit(value, name).n_bytes
    except ValueError:
        n_bytes = None
    if not n_bytes:
        raise ValueError(
            f"{name} must be bytes, such as '6GiB' or '800MiB', not {_shown(value)}"
        )
    return n_bytes


def parse_duration(value: DurationValue, name: str = "duration") -> float:
    """
    Returns the seconds in *value*; ``math.inf``, never, for anything negative.

    Numbers are seconds. Text is a plain number of seconds or one in Go's notation:
    ``"5m"``, ``"1h30m"``, ``"1.5h"``, ``"250ms"``, ``"-1"``, ``"-1m"``.

    Raises:
        TypeError: *value* is neither a real number nor text, or a bool.
        ValueError: It is not a number (NaN), or cannot be read.

    Source: Ollama's ``keep_alive``, so that its users need not learn other words.
    """
    if isinstance(value, str):
        return _duration_from_text(value, name)
    if isinstance(value, (float, Real)) and not isinstance(value, Integral):
        seconds = float(value)
    else:
        whole = _whole(value, name)
        # Past that many seconds there is no difference to "never", whatever the sign.
        seconds = float(whole) if abs(whole) < 2**63 else math.inf
    if math.isnan(seconds):
        raise ValueError(f"{name} must be a number of seconds, not NaN")
    # abs() makes 0.0 of -0.0, which else would print as "-0".
    return math.inf if seconds < 0 else abs(seconds)


def parse_seconds(value: DurationValue, name: str = "time") -> float:
    """
    Returns the seconds in *value*, as `parse_duration` reads it, but for what is
    negative: that is no time, and not for ever. ``math.inf`` is.

    Raises:
        TypeError, ValueError: As for `parse_duration`, or it is negative.
    """
    seconds = parse_duration(value, name)
    is_negative = value.strip().startswith("-") if isinstance(value, str) else value < 0
    if is_negative:
        raise ValueError(f"{name} must be 0 or more seconds, not {_shown(value)}")
    return seconds


def _limit_from_text(text: str, name: str) -> Limit:
    if text.strip().lower() == "auto":
        return Limit()
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{name} must be an amount of memory such as '10GiB', '512MiB' or '80%', "
            f"not {_shown(text)}"
        )
    # Digits are computed with as integers, so that "0.1GiB" is exact.
    whole, part, unit = match["whole"], match["part"] or "", match["unit"]
    if unit == "%":
        return _fraction(float(f"{whole}.{part or 0}") / 100, name, text)
    if unit is None:
        if match["part"] is None:
            return _plain_bytes(int(whole), name, text)
        return _fraction(float(f"{whole}.{part}"), name, text)
    n_bytes = int(whole + part) * _unit_bytes(match) // 10 ** len(part)
    if n_bytes < 1:
        raise ValueError(f"{name} must be at least one byte, not {_shown(text)}")
    return Limit(n_bytes=n_bytes)


def _unit_bytes(match: re.Match[str]) -> int:
    prefix, kind = match["prefix"], match["kind"]
    if prefix is None:
        return 1
    # Decimal only for ``kB``, ``MB``, ….
    units = _DECIMAL if kind.lower() == "b" else _BINARY
    return units[prefix.lower()]


def _fraction(value: float, name: str, given: object) -> Limit:
    # NaN fails the comparison, too.
    if not 0 < value <= 1:
        raise ValueError(
            f"{name} as a fraction must be above 0 and at most 1.0 (all of it), "
            f"not {_shown(given)}; for bytes give an int or text such as '10GiB'"
        )
    return Limit(fraction=value)


def _plain_bytes(n_bytes: int, name: str, given: object) -> Limit:
    if n_bytes < _SMALLEST_PLAIN_BYTES:
        raise ValueError(
            f"{name}={_shown(given)} would be that many bytes; "
            "give bytes, e.g. '10GiB', or a fraction such as 0.8"
        )
    return Limit(n_bytes=n_bytes)


def _whole(value: object, name: str) -> int:
    # Any integer type will do, NumPy's too, but no bool.
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    raise TypeError(f"{name} must be a number or text, not {type(value).__name__}")


def _duration_from_text(text: str, name: str) -> float:
    # One sign for the whole, as in Go: "-1h30m" is negative.
    body = text.strip()
    sign, body = (body[:1], body[1:]) if body[:1] in {"+", "-"} else ("", body)
    if _SECONDS.fullmatch(body):
        seconds = float(body)
    elif _DURATION.fullmatch(body):
        parts = _DURATION_PART.findall(body)
        seconds = sum(float(number) * _DURATION_UNIT_S[unit] for number, unit in parts)
    else:
        raise ValueError(
            f"{name} must be seconds or a duration such as '5m' or '1h30m', "
            f"not {_shown(text)}"
        )
    return math.inf if sign == "-" and seconds > 0 else seconds


def _shown(value: object) -> str:
    """
    Returns *value* for a one-line message: quoted, escaped and cut.
    """
    longest = 40
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than the interpreter will print
        return "a huge number"
    return text if len(text) <= longest else f"{text[:longest]}..."
