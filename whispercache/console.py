"""
What all commands share: exit codes, the one line of an error, and Ctrl-C.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INTERRUPTED", "WRONG_USE", "error_line", "interruptible"]

_T = TypeVar("_T")

WRONG_USE = 2
INTERRUPTED = 130
"""
Exit codes; for Ctrl-C what shells use, 128 and the number of the signal.
"""


def error_line(error: BaseException) -> str:
    """
    An error as the one line that the user sees.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return f"whispercache: error: {' '.join(text.split())}"


def interruptible(
    work: Callable[[], _T], *, name: str, interrupted: Callable[[], None]
) -> _T:
    """
    Runs *work* on a thread named *name*, since CTranslate2 computes deaf to Ctrl-C.

    Ctrl-C calls *interrupted* and ends the process at once with `INTERRUPTED`: a model
    in the middle of a window can be neither stopped nor unloaded.

    Raises:
        BaseException: whatever *work* raises.
    """
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
        os._exit(INTERRUPTED)
