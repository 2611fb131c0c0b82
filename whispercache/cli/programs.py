"""
Programs that take the place of a command: their process id, their streams, their
signals and their exit code are those of the process that was started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NoReturn

from whispercache.console import error_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

# Exit codes of shells and of env, for programs that do not start.
_NOT_FOUND = 127
_NOT_STARTED = 126
# Signals that Python ignores, and whose being ignored a program would inherit.
# Source: Python/pylifecycle.c, init_signals; subprocess's restore_signals.
_IGNORED = ("SIGPIPE", "SIGXFSZ")


def program_of(options: argparse.Namespace, command: str) -> list[str]:
    """
    Returns the program that the rest of a line names, with its arguments.

    Raises:
        ValueError: It names none.
    """
    words = list(options.command)
    if words[:1] == ["--"]:
        del words[0]
    if not words:
        raise ValueError(
            f"name the program to run; see 'whispercache {command} --help'"
        )
    return words


def become(program: Sequence[str], environment: Mapping[str, str]) -> int:
    """
    Becomes a program. Returns only if it does not start, or on Windows.
    """
    try:
        if os.name == "nt":
            # There, a process that takes the place of another is a new one, for which
            # nobody waits.
            return subprocess.call(list(program), env=environment)  # noqa: S603
        _become(program, environment)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error_line(_named(error, program))}\n")
        return _NOT_FOUND
    except OSError as error:
        sys.stderr.write(f"{error_line(_named(error, program))}\n")
        return _NOT_STARTED


def _named(error: OSError, program: Sequence[str]) -> OSError:
    return type(error)(error.errno, error.strerror, program[0])


def _become(program: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    for name in _IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    # What is still in Python's buffers would be lost.
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(program[0], list(program), environment)  # noqa: S606
