"""
The process-wide cache. Its limits come from outside the program, or from `configure`.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from .cache import ModelCache
    from .model import CachedModel
    from .options import CacheOptions, ComputeType, DeviceIndex, Priority
    from .units import DurationValue

_lock = threading.Lock()
_default: ModelCache | None = None
_configured: CacheOptions = {}


def configure(**options: Unpack[CacheOptions]) -> None:
    """
    Sets parameters of the process-wide cache, before its first use.

    Takes those of `ModelCache`. They win over environment variables and the file, which
    say the rest. A later call changes only what it names.

    Raises:
        TypeError, ValueError: a parameter is unknown or nonsense.
        RuntimeError: the cache is in use already.
    """
    from .settings.sources import checked_options

    checked = checked_options(options)
    with _lock:
        if _default is not None and not _default.is_closed:
            raise RuntimeError(
                "the default cache is in use already; call configure() before the "
                "first get_model() or default_cache(), or make a ModelCache"
            )
        _configured.update(checked)


def default_cache() -> ModelCache:
    """
    Returns the cache of the whole process, made at its first use.

    Its parameters are those of `configure`, of the ``WHISPERCACHE_`` variables and of
    the user's file of settings; ``whispercache config`` shows them. Closed when the
    interpreter exits. After a `ModelCache.close` the next call makes a new one.

    Raises:
        ValueError: a setting is unknown or nonsense; it names the variable or file.
        OSError: a file of settings that was named cannot be read.
    """
    global _default
    with _lock:
        # A program that closes it, as tests do, gets a new one.
        if _default is None or _default.is_closed:
            # Here, so that the import of `get_model` alone is light.
            from .cache import ModelCache
            from .settings.sources import cache_options, settle
            from .settings.table import CACHE_KEYS

            options = cache_options(settle(), CACHE_KEYS)
            options.update(_configured)
            _default = ModelCache(**options)
        return _default


def get_model(
    model_size_or_path: str | os.PathLike[str],
    device: str = "auto",
    *more: ComputeType | DeviceIndex,
    compute_type: ComputeType = "default",
    timeout_s: DurationValue | None = None,
    keep_alive: DurationValue | None = None,
    priority: Priority | None = None,
    parallel: int | None = None,
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
        *more,
        compute_type=compute_type,
        timeout_s=timeout_s,
        keep_alive=keep_alive,
        priority=priority,
        parallel=parallel,
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
