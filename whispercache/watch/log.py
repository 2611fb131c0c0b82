"""
The events of a cache in lines, for who looks at them when a program has ended.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.errors import format_bytes

from .live import in_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.events import Event

    from .live import Watchable

_log = logging.getLogger("whispercache")

# The place that means the terminal.
TERMINAL = "-"
# Lines that are kept for the terminal.
_MOST_LINES = 1000


class EventLog:
    """
    The lines on what caches of this process do, and their sums at the end.

    A file gets each line when it happens, after what is in it already, so that several
    processes may share one, and what is killed has told all but its sums. stderr gets
    the last lines, and the sums, when the interpreter ends.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._cache: Watchable | None = None
        self._failed = False
        self._pid = os.getpid()
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)

    def follow(self, cache: Watchable) -> None:
        """
        Writes what happens in *cache* from now on.
        """
        if self._cache is cache:
            return
        if self._cache is None:
            at_end(self._end)
        else:
            # The one before was closed.
            self._write(*_sums(self._cache))
        self._cache = cache
        self._unsubscribe = cache.subscribe(self._note)

    def _note(self, event: Event) -> None:
        kind, name, text = in_words(event)
        # Each load would have three lines.
        if kind not in ("loading", "granted"):
            self._write(f"{name} {text}")

    def _write(self, *texts: str) -> None:
        start = f"{time.strftime('%H:%M:%S')} whispercache[{os.getpid()}]"
        lines = [f"{start} {text}\n" for text in texts]
        if self._place != TERMINAL:
            self._append("".join(lines))
            return
        # A forked child does not repeat its parent's.
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._lines.clear()
        self._lines.extend(lines)

    def _append(self, text: str) -> None:
        try:
            # One write to the end of the file: others' lines stay whole.
            with Path(self._place).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            # It was there at the start; the program is to go on without it.
            if not self._failed:
                _log.warning("events are not written: %s", error)
            self._failed = True

    def _end(self) -> None:
        assert self._cache is not None
        # That all models leave with the process is no news.
        self._unsubscribe()
        self._write(*_sums(self._cache))
        # None if the program was started without one.
        if sys.stderr is not None:
            sys.stderr.writelines(self._lines)


def at_end(function: Callable[[], None]) -> None:
    """
    Has *function* called when this process ends, unless a signal kills it.
    """
    started = sys.modules.get("multiprocessing.process")
    if started is None or started.parent_process() is None:
        atexit.register(function)
        return
    # A child that multiprocessing forked ends without the interpreter's own end.
    from multiprocessing.util import Finalize

    Finalize(None, function, exitpriority=-100)


def _sums(cache: Watchable) -> list[str]:
    stats = cache.stats()
    counts = (
        f"calls: {stats.requests}, loads: {stats.loads} in {stats.load_s:.2f} s, "
        f"evictions: {stats.evictions}"
    )
    peaks = (
        f"peak on {each.device} {format_bytes(each.peak_bytes)}"
        for each in cache.devices()
    )
    return [", ".join((counts, *peaks))]
