"""
The parts that all commands share: options, exit codes, errors, progress and Ctrl-C.

rich is imported when something is shown, not with this module.
"""

from __future__ import annotations

import argparse
import os
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.progress import Progress, ProgressColumn

_T = TypeVar("_T")

# Exit codes; for Ctrl-C what shells use, 128 and the number of the signal.
WRONG_USE = 2
INTERRUPTED = 130


def explain(parser: argparse.ArgumentParser, text: str) -> None:
    """
    Puts *text* below the options in the help of *parser*, with its lines as they are.
    """
    parser.epilog = text
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def add_huge_pages(parser: argparse.ArgumentParser, *, keep: bool) -> None:
    """
    Adds the option of a command that loads models. One that ends with its work *keeps*
    what calls free.
    """
    parser.add_argument(
        "--no-huge-pages",
        action="store_true",
        help="load models as the C library does by itself",
    )
    parser.set_defaults(keeps_freed=keep)


def error_line(error: BaseException) -> str:
    """
    Returns an error as the one line that the user sees.
    """
    text = str(error) or type(error).__name__
    # Python's own text begins with the error's number; an AudioError can be an OSError,
    # too, and has a text for people.
    has_number = text.startswith("[")
    if has_number and isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return f"whispercache: error: {' '.join(text.split())}"


def clock(seconds: float) -> str:
    """
    Returns a time as a clock shows it: ``"0:42"``, ``"1:00:00"``.
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def distinct(
    names: Iterable[str], same: Callable[[str], str] = str.casefold
) -> list[str]:
    """
    Returns *names*, with numbers after those for which *same* gives an equal text.
    """
    found: dict[str, str] = {}
    for name in names:
        other, number = name, 1
        while same(other) in found:
            number += 1
            other = f"{name}-{number}"
        found[same(other)] = other
    return list(found.values())


def bars(*columns: ProgressColumn) -> Progress:
    """
    Returns lines of progress on stderr: a description, a bar, a share, and *columns*.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    name = Column(no_wrap=True, overflow="ellipsis", ratio=3)
    return Progress(
        TextColumn("{task.description}", table_column=name, markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=2)),
        TaskProgressColumn(),
        *columns,
        console=Console(stderr=True, highlight=False),
        expand=True,
        transient=True,
        # stdout carries results alone.
        redirect_stdout=False,
    )


def interruptible(
    work: Callable[[], _T], *, name: str, interrupted: Callable[[], None]
) -> _T:
    """
    Runs *work* on a thread named *name*, since CTranslate2 computes deaf to Ctrl-C.

    Ctrl-C calls *interrupted* and ends the process at once with `INTERRUPTED`: a model
    in the middle of a window can be neither stopped nor unloaded.
    """
    # Not an executor, whose threads the end of the interpreter waits for.
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again on the main thread
            done.set_exception(error)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
        # Some systems deliver no Ctrl-C to a thread that waits without end.
        while not wait([done], timeout=0.2).done:
            pass
        return done.result()
    except KeyboardInterrupt:
        interrupted()
        # Past all cleaning up, which would wait for the model.
        os._exit(INTERRUPTED)
