"""
Settings as options of a command.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

from .kinds import SWITCH, shown
from .sources import settle
from .table import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from whispercache.cache import ModelCache
    from whispercache.keys import ModelKey

    from .sources import Held

    Add = Callable[..., object]

# Shorter ways to say one value: option, value, meaning.
_SHORT = {
    "pressure": ("--watch", "watch", "unload before other programs run out"),
    "variants": ("--no-variants", "off", "read models as they were saved"),
}


def add_config(add: Add) -> None:
    """
    Adds the option that names a file of settings.
    """
    add("--config", metavar="FILE", help="settings, in place of the user's own")


def add_settings(add: Add, *keys: str) -> None:
    """
    Adds the options of some settings. One that is not given is None in the result.
    """
    for key in keys:
        _add(add, key)
        if key in _SHORT:
            option, value, meaning = _SHORT[key]
            add(option, dest=key, action="store_const", const=value, help=meaning)


def _add(add: Add, key: str) -> None:
    setting = SETTINGS[key]
    default = "" if setting.default in (None, []) else shown(setting.default)
    text = f"{setting.meaning} ({default})" if default else setting.meaning
    text = text.replace("%", "%%")
    if setting.kind is SWITCH:
        # With a --no- of its own: an argument wins over the file both ways.
        action = argparse.BooleanOptionalAction
        add(setting.option, dest=key, action=action, help=text)
        return
    metavar = setting.metavar or setting.kind.metavar
    add(
        setting.option,
        dest=key,
        metavar=metavar,
        nargs=None if isinstance(metavar, str) else len(metavar),
        action="append" if setting.kind.is_list else "store",
        help=f"{text}; may be repeated" if setting.kind.is_list else text,
    )


def hooks_of(
    held: Mapping[str, Held],
    cache: ModelCache,
    name_of: Callable[[ModelKey], str] | None = None,
) -> AbstractContextManager[object]:
    """
    Returns the hooks of a command on *cache*, for the ``with`` block of its work.
    """
    hooks = cast("list[str]", held["on"].value)
    if not hooks:
        return nullcontext()
    from whispercache.watch.hooks import Hooks

    return Hooks(hooks, cache.subscribe, name_of)


def settings_of(options: argparse.Namespace) -> dict[str, Held]:
    """
    Returns all settings as they hold for a command that was given *options*.

    Raises:
        ValueError, OSError: As `settle` does.
    """
    given = vars(options)
    # argparse makes an empty list of words that were left out.
    said = {key: given[key] for key in SETTINGS if given.get(key) not in (None, [])}
    return settle(said, options.config)
