"""
install(): the models that a program makes by itself come from a cache.

For programs that one did not write. dropin/inplace.py changes the classes; here stands
which cache it is, and which models it is not for.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .default import configure, default_cache
from .devices.heap import use_huge_pages
from .dropin.inplace import Offer, change, restore
from .settings.table import RUN_TOP_VARIABLE, RUN_VARIABLE
from .units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from typing_extensions import Unpack

    from .cache import ModelCache
    from .options import CacheOptions
    from .source import ModelSource
    from .units import DurationValue

_log = logging.getLogger("whispercache")
_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Installation:
    """
    What `install` was told.
    """

    cache: ModelCache | None = None
    ctranslate2: bool = False
    preload: bool = False
    keep_alive: DurationValue | None = None
    # Told of each cache that is used.
    followers: Sequence[Callable[[ModelCache], None]] = ()

    def source_of(self, given: Mapping[str, Any]) -> ModelSource | None:
        """
        Returns the source of a model that is made with parameters *given*; None if it
        cannot be cached.
        """
        reason = _obstacle(given)
        if reason:
            _warn(reason)
            return None
        options = dict(given)
        for name in ("files", "tensor_parallel"):
            options.pop(name, None)
        # Now: the process-wide one may have been closed since.
        cache = default_cache() if self.cache is None else self.cache
        for follow in self.followers:
            follow(cache)
        # Without a device_index "cuda" is the best card, so it is passed on only if the
        # program gave one.
        model = cache.get_model(
            options.pop("model_size_or_path"),
            options.pop("device", "auto"),
            compute_type=options.pop("compute_type", "default"),
            keep_alive=self.keep_alive,
            **options,
        )
        return model._source


_installed: _Installation | None = None


def install(
    cache: ModelCache | None = None,
    *,
    ctranslate2: bool = False,
    preload: bool = False,
    **limits: Unpack[CacheOptions],
) -> ModelCache:
    """
    Has every WhisperModel that this process makes from now on come from a cache.

    faster-whisper's class is changed in place, so it does not matter who imported it,
    or made a subclass of it, before. What programs get are its own objects, made by its
    own constructor; their calls take a lease each, as those of `ModelCache.get_model`.
    Objects from before stay as they are. Called again, the last call holds.

    A model from ``files=``, over several cards or with ``tensor_parallel`` cannot be
    cached: it is a plain one, and the log says so once.

    Args:
        cache: The cache; None for that of the process, `default_cache`.
        ctranslate2: Cache what is made by `ctranslate2.models.Whisper` itself, too, for
            programs that do without WhisperModel. The name is replaced: a program that
            did ``from ctranslate2.models import Whisper`` before has the plain class.
        preload: Load each model in its constructor, and so raise there what goes wrong.
            Otherwise the first call does.
        limits: Parameters for the cache of the process, as `configure` takes them.
            Beside a *cache* only ``keep_alive``, for the models that are made.

    Returns:
        The cache.

    Raises:
        TypeError, ValueError: A parameter is nonsense; or other *limits* are given
            beside a *cache*, which has its own; or that has a loader of a user's own.
        RuntimeError: Other *limits* are given, and the cache of the process is in use.
        ImportError: faster-whisper cannot be imported.
    """
    keep_alive = limits.pop("keep_alive", None)
    if keep_alive is not None:
        parse_duration(keep_alive, "keep_alive")
    if limits:
        if cache is not None:
            names = ", ".join(limits)
            raise TypeError(f"{names}: the cache that was given has limits of its own")
        configure(**limits)
    from .cache import ModelCache

    used = default_cache() if cache is None else cache
    if not isinstance(used, ModelCache):
        raise TypeError(
            f"install() takes a ModelCache, not {used!r}; that of an AsyncModelCache "
            "is its attribute cache"
        )
    if used.loader.whisper_class() is None:
        raise ValueError(
            "install() takes a cache that loads with faster-whisper, and this has a "
            "loader of its own"
        )
    _put(_Installation(cache, ctranslate2, preload, keep_alive))
    return used


def uninstall() -> None:
    """
    Has new models made as without a cache again. Objects that were made meanwhile go on
    with their cache, which stays open. Does nothing if nothing was installed.
    """
    _put(None)


@contextmanager
def installed(
    cache: ModelCache | None = None,
    *,
    ctranslate2: bool = False,
    preload: bool = False,
    **limits: Unpack[CacheOptions],
) -> Iterator[ModelCache]:
    """
    Installs for a ``with`` block, of all threads. Takes, returns and raises what
    `install` does. Afterwards things are as they were before.
    """
    before = _installed
    used = install(cache, ctranslate2=ctranslate2, preload=preload, **limits)
    try:
        yield used
    finally:
        _put(before)


def start() -> None:
    """
    Installs what the variables of ``whispercache run`` say. The cache is made with the
    first model.
    """
    words = os.environ.get(RUN_VARIABLE, "").split(",")
    place = os.environ.get(RUN_TOP_VARIABLE)
    if "huge_pages" in words:
        use_huge_pages()
    from .watch.hooks import HooksOfProcess

    followers = [HooksOfProcess(_hooks).follow]
    if place:
        from .watch.log import EventLog

        followers.append(EventLog(place).follow)
    _put(
        _Installation(
            ctranslate2="ctranslate2" in words,
            preload="preload" in words,
            followers=followers,
        )
    )


def _hooks() -> list[str]:
    # The cache has read them by now, so that nonsense was told.
    from .settings.sources import settle

    return cast("list[str]", settle()["on"].value)


def _put(installation: _Installation | None) -> None:
    global _installed
    with _lock:
        if installation is None:
            restore()
        else:
            offer = Offer(installation.source_of, installation.preload)
            change(offer, ctranslate2=installation.ctranslate2)
        _installed = installation


def _obstacle(given: Mapping[str, Any]) -> str:
    """
    Returns the reason why a model cannot be cached; nothing if it can.
    """
    if given.get("files"):
        return "files= (CTranslate2 keeps a second copy of such a model)"
    if given.get("tensor_parallel"):
        return "tensor_parallel=True"
    index = given.get("device_index", 0)
    if isinstance(index, (list, tuple)) and len(index) != 1:
        return "a device_index of several cards"
    return ""


@functools.cache
def _warn(reason: str) -> None:
    _log.warning("models with %s cannot be cached; they stay plain ones", reason)
