"""
The command ``whispercache config``: the settings that hold, and where each came from.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from whispercache.console import explain
from whispercache.settings.arguments import add_config, settings_of
from whispercache.settings.kinds import shown
from whispercache.settings.sources import file_in_use, usual_file
from whispercache.settings.table import CONFIG_VARIABLE, OTHER_VARIABLES, SETTINGS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from pathlib import Path

    from whispercache.settings.sources import Held

_WIDTH = max(len(setting.variable) for setting in SETTINGS.values())
_SETTINGS = "\n".join(
    f"  {setting.variable:{_WIDTH}}  {setting.meaning}" for setting in SETTINGS.values()
)
_HELP = f"""\
Arguments of a command win over environment variables, those over the file, and that
over the defaults. The file is --config or ${CONFIG_VARIABLE}, else config.toml in
the user's directory for whispercache, which is printed below the settings:

  vram = "10GiB"
  keep_alive = "10m"

  [serve]
  models = ["base", "large-v3:int8"]
  port = 8080

settings:
{_SETTINGS}
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters to *parser*.
    """
    parser.description = "The settings that hold, and where each came from."
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    add_config(parser.add_argument)
    parser.set_defaults(run=run)
    explain(parser, _HELP)


def run(options: argparse.Namespace) -> int:
    """
    Prints, and returns the exit code.
    """
    held = settings_of(options)
    file = file_in_use(options.config)
    secret = [name for name in OTHER_VARIABLES if os.environ.get(name)]
    if options.json:
        sys.stdout.write(f"{as_json(held, file, secret)}\n")
        return 0
    sys.stdout.writelines(f"{line}\n" for line in as_lines(held, file, secret))
    return 0


def as_json(held: Mapping[str, Held], file: Path | None, variables: list[str]) -> str:
    """
    Returns settings as one JSON object. Other *variables* only have their names in it:
    some are secret.
    """
    settings = {
        key: {"value": each.value, "source": each.source, "place": each.place or None}
        for key, each in held.items()
    }
    document = {
        "file": None if file is None else str(file),
        "settings": settings,
        "variables": variables,
    }
    return json.dumps(document, indent=2)


def as_lines(
    held: Mapping[str, Held], file: Path | None, variables: list[str]
) -> list[str]:
    """
    Returns settings as a table, and a line on each source besides.
    """
    rows = [("setting", "value", "from")]
    rows += ((key, shown(it.value), it.place or it.source) for key, it in held.items())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    place = f"file: {file}" if file else f"no file; there could be one: {usual_file()}"
    return [
        # Not by rich, which would fold or cut long paths.
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        "",
        place,
        *(f"{name} is set: {OTHER_VARIABLES[name]}" for name in variables),
    ]
