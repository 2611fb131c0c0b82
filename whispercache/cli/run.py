"""
The command ``whispercache run``: a program that one did not write, with its models from
a cache.

The program takes the place of this process, so its process id, its streams, its signals
and its exit code are its own. It learns of the cache by its environment, as its
children do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache import startup
from whispercache.console import explain
from whispercache.settings.arguments import add_config, add_settings, settings_of
from whispercache.settings.kinds import shown
from whispercache.settings.table import (
    CACHE_KEYS,
    CONFIG_VARIABLE,
    RUN_TOP_VARIABLE,
    RUN_VARIABLE,
    RUN_WORDS,
    SETTINGS,
)
from whispercache.watch.log import TERMINAL

from .programs import become, program_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_HELP = """\
examples:
  whispercache run --ram 2GiB -- whisper-ctranslate2 talk.wav --model small
  whispercache run --keep-alive 1m -m wyoming_faster_whisper --model base

The program, and each Python that it starts, must be able to import whispercache. It is
reached by PYTHONPATH: a Python that ignores the environment (-I, -E) has plain models.
Each process has a cache of its own; --coordinate has them take turns.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """
    Adds the command's parameters to *parser*.
    """
    parser.description = (
        "Run a program whose faster-whisper models come from a cache, those of its "
        "children too."
    )
    parser.usage = "whispercache run [OPTIONS] [--] PROGRAM [ARGUMENT ...]\n       "
    parser.usage += "whispercache run [OPTIONS] -m MODULE [ARGUMENT ...]"
    explain(parser, _HELP)
    add = parser.add_argument
    # The rest of the line, whatever it looks like.
    add("command", nargs="...", metavar="PROGRAM", help="with its arguments")
    add("-m", dest="is_module", action="store_true", help="it is a module of Python")
    add(
        "--ctranslate2",
        action="store_true",
        help="also for programs that use ctranslate2.models.Whisper directly",
    )
    add(
        "--preload",
        action="store_true",
        help="load models where the program makes them, not at their first use",
    )
    add(
        "--no-huge-pages",
        dest="huge_pages",
        action="store_false",
        help="load models as the C library does by itself",
    )
    add(
        "--top",
        metavar="FILE",
        help=f"write loads, evictions and the peak there; {TERMINAL} is the terminal, "
        "at the end",
    )
    add_config(add)
    add_settings(add, *CACHE_KEYS, "on")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """
    Becomes the program. Returns only if it does not start, or on Windows.
    """
    command = program_of(options, "run")
    # Nonsense is told here, not by the program.
    settings_of(options)
    if options.is_module:
        command = [sys.executable, "-m", *command]
    return become(command, {**os.environ, **_variables(options)})


def _variables(options: argparse.Namespace) -> dict[str, str]:
    given = vars(options)
    found = {
        SETTINGS[key].variable: shown(given[key])
        for key in CACHE_KEYS
        if given[key] not in (None, [])
    }
    if given["on"]:
        found[SETTINGS["on"].variable] = _lines(given["on"])
    config = options.config or os.environ.get(CONFIG_VARIABLE, "").strip()
    if config:
        # The program may go to another directory.
        found[CONFIG_VARIABLE] = str(Path(config).expanduser().absolute())
    words = ["faster_whisper"]
    words += [name for name in RUN_WORDS if given[name]]
    found[RUN_VARIABLE] = ",".join(words)
    if options.top is not None:
        found[RUN_TOP_VARIABLE] = _place(options.top)
    assert startup.__file__ is not None
    place = str(Path(startup.__file__).parent)
    others = os.environ.get("PYTHONPATH")
    # An empty entry is the working directory; an empty variable is none.
    given_paths = others.split(os.pathsep) if others else []
    paths = [place, *(path for path in given_paths if path != place)]
    found["PYTHONPATH"] = os.pathsep.join(paths)
    return found


def _lines(hooks: Sequence[Sequence[str]]) -> str:
    """
    Returns hooks as a variable says them.
    """
    texts = [" ".join(hook) for hook in hooks]
    for text in texts:
        if len(text.splitlines()) > 1:
            raise ValueError(f"--on: {text!r} has several lines; make it a script")
    return "\n".join(texts)


def _place(top: str) -> str:
    if top == TERMINAL:
        return top
    path = Path(top).absolute()
    # That it cannot be written is told now.
    path.open("a").close()
    return str(path)
