"""
The way in: how models of a cache come to programs that construct a WhisperModel.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import faster_whisper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache import ModelCache

__all__ = ["through"]

_GENUINE = faster_whisper.WhisperModel


@contextmanager
def through(cache: ModelCache) -> Iterator[None]:
    """
    Has all that constructs a WhisperModel get one of *cache*, by that name: in modules
    that took it when they were imported, and in those that will.
    """

    class Kind(type):
        def __call__(cls, *args: Any, **options: Any) -> Any:
            return cache.get_model(*args, **options)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _GENUINE)

    stand_in = Kind("WhisperModel", (), {})
    _rename(_GENUINE, stand_in)
    try:
        yield
    finally:
        _rename(stand_in, _GENUINE)


def _rename(old: object, new: object) -> None:
    for name, module in list(sys.modules.items()):
        if not name.startswith(("whispercache", "faster_whisper.", __name__)):
            # Not getattr(): some modules import others when they are asked for a name.
            mine = getattr(module, "__dict__", {})
            for key in [key for key, value in mine.items() if value is old]:
                mine[key] = new
