"""
The sources of settings: arguments win over variables, those over the file, and that
over the defaults.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from whispercache.devices.host import user_config
from whispercache.options import CacheOptions

from .table import (
    CACHE_KEYS,
    CONFIG_VARIABLE,
    PREFIX,
    SERVE,
    SETTINGS,
    is_of_a_service,
    key_of,
    unknown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .table import Setting

    Source: TypeAlias = Literal["argument", "variable", "file", "default"]

_log = logging.getLogger("whispercache")

# Parameters of which None says nothing.
_NEVER_NONE = ("keep_alive", "patience_s", "pressure")


@dataclass(frozen=True, slots=True)
class Held:
    """
    A setting that holds.

    Attributes:
        value: As the cache or the server takes it; JSON has it, too.
        source: The kind of place that it came from.
        place: The option, the variable or the file; empty for a default.
    """

    value: object
    source: Source = "default"
    place: str = ""


def settle(
    arguments: Mapping[str, object] | None = None, config: str | None = None
) -> dict[str, Held]:
    """
    Returns all settings as they hold now, in the order of the table.

    Args:
        arguments: What was said on the command line, by key.
        config: The file; that of ``WHISPERCACHE_CONFIG``, or else the user's, if None.

    Raises:
        ValueError: A setting is unknown or nonsense; it names the place.
        OSError: The file that was named cannot be read.
    """
    held = {key: Held(setting.default) for key, setting in SETTINGS.items()}
    held.update(_in_file(config))
    held.update(_in_variables())
    held.update(_in_arguments(arguments or {}))
    return held


def cache_options(held: Mapping[str, Held], keys: Iterable[str]) -> CacheOptions:
    """
    Returns the parameters of a `ModelCache` among *keys*.
    """
    return cast("CacheOptions", {key: held[key].value for key in keys})


def values_below(table: str, held: Mapping[str, Held]) -> dict[str, Any]:
    """
    Returns the values of the settings in a table of the file, by their names.
    """
    start = f"{table}."
    return {
        key.removeprefix(start): each.value
        for key, each in held.items()
        if key.startswith(start)
    }


def checked_options(options: CacheOptions) -> CacheOptions:
    """
    Returns parameters of a `ModelCache` that a program gave, as the cache takes them.

    Raises:
        TypeError, ValueError: One is unknown or nonsense.
    """
    found: dict[str, object] = {}
    for name, value in options.items():
        if name not in CacheOptions.__annotations__:
            raise TypeError(str(unknown(name, CacheOptions.__annotations__)))
        # What Python alone has passes: None for no limit, functions, the parts.
        is_none = value is None and name not in _NEVER_NONE
        is_plain = name in CACHE_KEYS and not is_none and not callable(value)
        found[name] = SETTINGS[name].kind.read(value, name) if is_plain else value
    return cast("CacheOptions", found)


def read(setting: Setting, value: object, name: str) -> object:
    """
    Returns a value as the cache or the server takes it; *name* is for messages.

    Raises:
        ValueError: It is nonsense.
    """
    try:
        return setting.kind.read(value, name)
    except (TypeError, ValueError) as error:
        # To a user of a file or a command, a type is a matter of spelling.
        text = str(error)
        raise ValueError(text if name in text else f"{name}: {text}") from error


def _in_arguments(given: Mapping[str, object]) -> Iterator[tuple[str, Held]]:
    for key, value in given.items():
        setting = SETTINGS[key]
        yield (
            key,
            Held(read(setting, value, setting.option), "argument", setting.option),
        )


def _in_variables() -> Iterator[tuple[str, Held]]:
    for variable, value in os.environ.items():
        if (
            not variable.startswith(PREFIX)
            # As good as unset, which Docker Compose cannot say otherwise.
            or not value.strip()
            or is_of_a_service(variable, value)
        ):
            continue
        key = key_of(variable)
        if key is not None:
            yield key, Held(read(SETTINGS[key], value, variable), "variable", variable)


# The file -----------------------------------------------------------------------------


def usual_file() -> Path | None:
    """
    Returns the path of the user's file, there or not; None for a user without a home.
    """
    try:
        return user_config() / "config.toml"
    except FileNotFoundError:
        return None


def file_in_use(config: str | None = None) -> Path | None:
    """
    Returns the file that settings are read from; None if there is none.
    """
    named = config or os.environ.get(CONFIG_VARIABLE, "").strip()
    if named:
        return Path(named).expanduser()
    usual = usual_file()
    try:
        return usual if usual is not None and usual.stat() else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        # A service that gave up its rights still has the HOME of whoever started it.
        _log.warning("%s; the settings in it do not hold", error)
        return None


def _in_file(config: str | None) -> Iterator[tuple[str, Held]]:
    path = file_in_use(config)
    if path is None:
        return
    for key, value in _entries(_parsed(path), path):
        setting = SETTINGS[key]
        found = read(setting, value, f"{path}: {key}")
        if setting.kind.is_path:
            # Beside the file, wherever the program is started.
            found = [str(path.parent / each) for each in cast("list[str]", found)]
        yield key, Held(found, "file", str(path))


def _parsed(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        # Windows' editors begin a file with a byte order mark.
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    return document


def _entries(document: dict[str, Any], path: Path) -> Iterator[tuple[str, object]]:
    served = document.pop(SERVE, {})
    if not isinstance(served, dict):
        raise ValueError(f"{path}: {SERVE} must be a table, [{SERVE}]")  # noqa: TRY004
    keys = {**document, **{f"{SERVE}.{name}": served[name] for name in served}}
    for key, value in keys.items():
        # A dot may stand in a key with quotes: "serve.port" = 1
        if key not in SETTINGS:
            raise unknown(key, (*SETTINGS, SERVE), f"{path}: ")
        yield key, value
