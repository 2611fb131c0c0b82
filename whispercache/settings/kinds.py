"""
Kinds of settings: how each is written, whether as text or in TOML.

A kind reads a value that somebody gave, says what is wrong with it under the name that
it was given by, and returns it as the cache or the server takes it: a text, a number, a
bool, None, or a list or mapping of them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from whispercache.core.fallback import as_ladder
from whispercache.keys import canonical_device
from whispercache.options import OFF, parse_card, variants_bytes
from whispercache.planning.priority import parse_priority
from whispercache.units import parse_bytes, parse_duration, parse_limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.units import DurationValue, LimitValue

    Reader: TypeAlias = Callable[[object, str], object]

_WORDS = {
    **dict.fromkeys(OFF, False),
    **dict.fromkeys(("on", "1", "yes", "true"), True),
}
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_LAST_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Kind:
    """
    A way of writing a setting.

    Attributes:
        read: Takes a value and its name in messages; returns what it means. Raises
            TypeError or ValueError for nonsense.
        metavar: Its placeholder in help, or one for each word of a value; empty for a
            switch.
        is_list: True if it may be given several times.
        is_path: True if it names files.
    """

    read: Reader
    metavar: str | tuple[str, ...]
    is_list: bool = False
    is_path: bool = False


def shown(value: object) -> str:
    """
    Returns a setting as people read it, and as a variable would say it.
    """
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{card}={shown(limit)}" for card, limit in value.items())
    return str(value)


def _limit(value: object, name: str) -> object:
    parse_limit(cast("LimitValue", value), name)
    return value


def _limits(value: object, name: str) -> object:
    """
    Returns a limit for all cards, or a mapping from cards to theirs.
    """
    if isinstance(value, str) and "=" in value:
        value = dict(map(_pair, value.split(",")))
    if not isinstance(value, Mapping):
        return _limit(value, name)
    for card, limit in value.items():
        parse_card(card, name)
        _limit(limit, f"{name}[{card!r}]")
    return value


def _pair(text: str) -> tuple[str, str]:
    card, _, limit = text.partition("=")
    return card.strip(), limit.strip()


def _switch(value: object, name: str) -> bool:
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be on or off, not {value!r}")  # noqa: TRY004
    return value


def _variants(value: object, name: str) -> object:
    variants_bytes(cast("LimitValue", value), name)
    return value


def _switch_or(read_other: Reader, other: str) -> Reader:
    def read(value: object, name: str) -> object:
        with suppress(ValueError):
            return _switch(value, name)
        try:
            return read_other(value, name)
        except ValueError:
            message = f"{name} must be on, off or {other}, not {value!r}"
            raise ValueError(message) from None

    return read


def _bytes(value: object, name: str) -> object:
    parse_bytes(cast("LimitValue", value), name)
    return value


def _keep_alive(value: object, name: str) -> object:
    seconds = parse_duration(cast("DurationValue", value), name)
    # One word for ever, which JSON has, too.
    return -1 if seconds == math.inf else value


def _time(value: object, name: str) -> object:
    # -1 is for ever in Ollama's words.
    if math.isinf(parse_duration(cast("DurationValue", value), name)):
        raise ValueError(f"{name} must have an end")
    return value


def _time_or_none(value: object, name: str) -> object:
    return None if _is_none(value) else _time(value, name)


def _priority(value: object, name: str) -> object:
    try:
        parse_priority(value)
    except (TypeError, ValueError) as error:
        # A setting is called by its whole name.
        raise type(error)(str(error).replace("priority", name, 1)) from None
    return value


def _seconds(value: object, name: str) -> float:
    return parse_duration(cast("DurationValue", _time(value, name)))


def _is_none(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() == "none"


def _at_least(least: int) -> Reader:
    def read(value: object, name: str) -> int:
        if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
            value = int(value)
        # True counts as 1 in Python, but is never meant as one.
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
        return value

    return read


def _count_or_none(value: object, name: str) -> object:
    return None if _is_none(value) else _at_least(1)(value, name)


def _port(value: object, name: str) -> int:
    text = str(value).strip()
    # [0-9], since other alphabets' digits are decimal to Python, too.
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > _LAST_PORT:
        raise ValueError(
            f"{name}: {value!r} is no port; give a number up to {_LAST_PORT}"
        )
    return int(text)


def _address_or_none(value: object, name: str) -> object:
    if value is None or _is_none(value):
        return None
    text = str(value).strip()
    host, colon, port = text.rpartition(":")
    if not colon or not host.strip("[]"):
        example = "HOST:PORT, such as 0.0.0.0:10300"
        raise ValueError(f"{name} must be {example}, not {value!r}")
    _port(port, name)
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, not {value!r}")
    return value.strip()


def _text_or_none(value: object, name: str) -> str | None:
    return None if _is_none(value) else _text(value, name)


def _directory_or_none(value: object, name: str) -> object:
    if value is None or _is_none(value):
        return None
    # Everywhere the same, wherever a process was started.
    path = Path(_text(os.fspath(cast("str", value)), name)).expanduser()
    if not path.is_absolute():
        raise ValueError(f"{name} must be an absolute path, not {value!r}")
    return str(path)


def _device(value: object, name: str) -> str:
    text = _text(value, name)
    canonical_device(text)
    return text


def _texts(value: object, name: str) -> list[str]:
    # As an option says it, too, which may be repeated.
    if _is_none(value) or value == ["none"]:
        return []
    # One text has commas between; what came as a list may have them within.
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of texts, not {value!r}")
    return [_text(each, f"{name}: each") for each in value]


def _rungs(value: object, name: str) -> list[str]:
    rungs = _texts(value, name)
    as_ladder(rungs)
    return rungs


def _files(value: object, name: str) -> list[str]:
    return [str(Path(each).expanduser()) for each in _texts(value, name)]


def _hooks(value: object, name: str) -> list[str]:
    if _is_none(value) or value == ["none"]:
        return []
    # Commas and semicolons are in many a command, the ends of lines in none.
    given = value.splitlines() if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a list of texts, not {value!r}")
    # An option has two words for each.
    from whispercache.watch.hooks import parse_hook

    texts = [each if isinstance(each, str) else " ".join(each) for each in given]
    for text in texts:
        parse_hook(text)
    return texts


def one_of(*words: str) -> Kind:
    """
    Returns the kind of a setting that is one of some words.
    """

    def read(value: object, name: str) -> str:
        if value not in words:
            raise ValueError(f"{name} must be {' or '.join(words)}, not {value!r}")
        return str(value)

    return Kind(read, "|".join(words))


ADDRESS_OR_NONE = Kind(_address_or_none, "HOST:PORT")
COUNT = Kind(_at_least(1), "N")
COUNT_OR_NONE = Kind(_count_or_none, "N")
COUNT_OR_ZERO = Kind(_at_least(0), "N")
DEVICE = Kind(_device, "DEVICE")
DIRECTORY_OR_NONE = Kind(_directory_or_none, "DIR")
FILES = Kind(_files, "FILE", is_list=True, is_path=True)
FALLBACK = Kind(_rungs, "RUNG", is_list=True)
HOOKS = Kind(_hooks, ("EVENT", "COMMAND|URL"), is_list=True)
KEEP_ALIVE = Kind(_keep_alive, "TIME")
LIMIT = Kind(_limit, "LIMIT")
LIMITS = Kind(_limits, "LIMIT")
PORT = Kind(_port, "PORT")
PRIORITY = Kind(_priority, "interactive|batch|N")
SECONDS = Kind(_seconds, "TIME")
SIZE = Kind(_bytes, "SIZE")
SWITCH = Kind(_switch, "")
SWITCH_OR_BYTES = Kind(_switch_or(_variants, "bytes such as '5GiB'"), "SIZE")
SWITCH_OR_LIMIT = Kind(
    _switch_or(_limit, "an amount of memory such as '16GiB' or '80%'"), "LIMIT"
)
TEXT = Kind(_text, "TEXT")
TEXT_OR_NONE = Kind(_text_or_none, "TEXT")
TEXTS = Kind(_texts, "TEXT", is_list=True)
TIME = Kind(_time, "TIME")
TIME_OR_NONE = Kind(_time_or_none, "TIME")
