"""
The process-wide cache, for programs that need no limits of their own.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .cache import ModelCache
    from .model import CachedModel
    from .units import DurationValue

_lock = threading.Lock()
_default: ModelCache | None = None


def default_cache() -> ModelCache:
    """
    Returns the cache of the whole process, made at its first use with default limits.

    Closed when the interpreter exits. After a `ModelCache.close` the next call makes a
    new one.
    """
    global _default
    with _lock:
        # A program that closes it, as tests do, gets a new one.
        if _default is None or _default.is_closed:
            # Here, so that the import of `get_model` alone is light.
            from .cache import ModelCache

            _default = ModelCache()
        return _default


def get_model(
    model_size_or_path: str | os.PathLike[str],
    device: str = "auto",
    compute_type: str = "default",
    *,
    timeout_s: DurationValue | None = None,
    keep_alive: DurationValue | None = None,
    fallback: Sequence[str] | None = None,
    **load_options: object,
) -> CachedModel:
    """
    Returns a model of the process-wide cache: the drop-in for an ``lru_cache`` of
    models.

    Takes, returns and raises what `ModelCache.get_model` does.
    """
    return default_cache().get_model(
        model_size_or_path,
        device,
        compute_type,
        timeout_s=timeout_s,
        keep_alive=keep_alive,
        fallback=fallback,
        **load_options,
    )


def _new_lock() -> None:
    """
    Replaces the lock in a forked child, where the thread that held it does not exist.
    """
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_new_lock)
