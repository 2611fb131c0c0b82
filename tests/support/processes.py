"""
Processes: tests that start any are marked, so that ``make quick`` can leave them out.

Whoever forgets the mark is told by the test itself.
"""

from __future__ import annotations

import multiprocessing.util
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MARKS", "forbidden"]

MARKS = ("process", "browser")
"""
Marks of tests that may start processes.
"""

_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
_spawn: Any = multiprocessing.util.spawnv_passfds
_is_forbidden = False


def _check() -> None:
    # Variants are built in the background, perhaps of a test that is over.
    is_builder = threading.current_thread().name == "whispercache-variants"
    if _is_forbidden and not is_builder:
        raise AssertionError("a test that starts a process needs @pytest.mark.process")


def _audit(event: str, _arguments: object) -> None:
    if event in _EVENTS:
        _check()


def _checked_spawn(*arguments: Any) -> Any:
    # Of the ways to start a process the one of which Python tells no audit hook.
    _check()
    return _spawn(*arguments)


sys.addaudithook(_audit)
multiprocessing.util.spawnv_passfds = _checked_spawn  # type: ignore[assignment]


@contextmanager
def forbidden() -> Iterator[None]:
    """
    Let nothing in this process start another one, in a ``with`` block.
    """
    global _is_forbidden  # noqa: PLW0603 - audit hooks are there once per process, too
    _is_forbidden = True
    try:
        yield
    finally:
        _is_forbidden = False
