"""
Settings as options of a command.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .kinds import SWITCH, shown
from .sources import settle
from .table import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

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
    add(
        setting.option,
        dest=key,
        metavar=setting.metavar or setting.kind.metavar,
        action="append" if setting.kind.is_list else "store",
        help=f"{text}; may be repeated" if setting.kind.is_list else text,
    )


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
