"""
Waiting for a cache, and the check of its invariants.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from whispercache.async_cache import AsyncModelCache
    from whispercache.cache import ModelCache

# Seconds after which a test fails that waits for what does not happen.
PATIENCE_S = 30.0

_QUIET_PASSES = 2


def check(cache: ModelCache | AsyncModelCache) -> None:
    """
    Asserts the invariants of a cache.
    """
    cache._core.check()


def settle(cache: ModelCache | AsyncModelCache) -> None:
    """
    Blocks until all loads and unloads that were begun are over.

    An unload that was refused is over; it is tried again when the clock ticks.
    """
    core = cache._core
    # Until nothing changed twice: the end of a load or unload on one device may begin
    # another elsewhere, which is seen in the state before its thread has it.
    before: object = None
    unchanged = 0
    while unchanged < _QUIET_PASSES:
        for device in list(core.devices.values()):
            done, thread = threading.Event(), device.thread._thread
            device.thread.submit(done.set)
            # The thread of a closed cache may have ended before.
            wait_until(partial(_is_over, done, thread), f"an idle {device.name}")
        entries = list(core.entries.values())
        after = [(entry.key, entry.state, entry.loads) for entry in entries]
        unchanged = unchanged + 1 if after == before else 0
        before = after


def _is_over(done: threading.Event, thread: threading.Thread) -> bool:
    return done.is_set() or not thread.is_alive()


def wait_until(condition: Callable[[], object], what: str = "condition") -> None:
    """
    Blocks until *condition* holds, and looks every millisecond.

    Raises:
        AssertionError: it does not within half a minute.
    """
    pause = threading.Event()
    for _ in range(int(PATIENCE_S * 1000)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError(f"{what} did not come true within {PATIENCE_S:.0f} s")
