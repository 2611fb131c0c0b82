"""
Lifetime: the end of the process and its forks, for all caches in it.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Hashable
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.core import Core

# Most seconds that the end of the interpreter waits for loads, unloads and calls.
EXIT_S = 10.0


_T = TypeVar("_T", bound=Hashable)

# Each cache with the function that starts it afresh in a forked child.
_caches: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = (
    weakref.WeakKeyDictionary()
)
# Kept apart: while a lease is out, a core outlives the cache that was forgotten.
_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def register(cache: _T, core: Core, after_fork: Callable[[_T], None]) -> None:
    """
    Notes a new cache, without keeping it alive.

    In a forked child *after_fork* is called with it, after its core was told.
    """
    # A plain function: a bound method would keep the cache alive.
    _caches[cache] = after_fork
    _cores.add(core)


@atexit.register
def _close_all() -> None:
    """
    Unloads all models before the interpreter ends, since later destructors can crash.

    Leases are not waited for. Loads, unloads and calls in flight are: a thread that
    returns from CTranslate2 into an interpreter that has ended aborts the process.
    """
    for core in list(_cores):
        # A second close is allowed, and returns what is still held.
        leaving = core.close() or []
        wait([gone for entry, gone in leaving if not entry.leases], EXIT_S)
        # Then what unloaded models have left on the host is dropped, too.
        if core.state.is_over:
            core.join(EXIT_S)
        core.quiesce(EXIT_S)


def _after_fork() -> None:
    """
    Makes all caches refuse work in a forked child, or start afresh if they can.
    """
    cores = list(_cores)
    # Not imported for the sake of a fork: then no GPU was looked for, either.
    if cores:
        from .devices import cuda
    for core in cores:
        core.forked(gpu_in_use=cuda.is_open())
    for cache, after_fork in list(_caches.items()):
        after_fork(cache)


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)
