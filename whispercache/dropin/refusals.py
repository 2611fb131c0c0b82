"""
Errors of constructors, as the programs expect them that they are raised in.

A program that tries a smaller model, the CPU or a download after an error knows the
types that faster-whisper raises. What is wrong is told in words of this package.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whispercache.errors import CorruptModel, LoadFailed, ModelTooLarge, UnknownModel

if TYPE_CHECKING:
    from whispercache.errors import WhisperCacheError


def expected(error: WhisperCacheError) -> WhisperCacheError:
    """
    Returns an *error* that is also caught as what the plain constructor raises.

    Source: faster_whisper/utils.py, 1.2.1, ``download_model``, for models that are not
    here; CTranslate2 4.8.5, which raises RuntimeError for directories, and where a card
    has no room (src/cuda/utils.h).
    """
    kind = _kind_of(error)
    if kind is None or isinstance(error, kind):
        return error

    def reduce(_made: object) -> tuple[object, ...]:
        # Other processes have no such class.
        return type(error), error.args

    members: dict[str, Any] = {
        "__module__": type(error).__module__,
        "__reduce__": reduce,
    }
    if issubclass(kind, OSError):
        # Which would be the fields of the error, by position.
        members |= {"errno": errno.ENOENT, "strerror": str(error)}
        members |= dict.fromkeys(("filename", "filename2"))
    name = type(error).__name__
    made: Any = type(name, (type(error), kind), members)
    found: WhisperCacheError = made(*error.args)
    return found


def _kind_of(error: WhisperCacheError) -> type[Exception] | None:
    if isinstance(error, UnknownModel):
        return RuntimeError if Path(error.model).is_dir() else ValueError
    if isinstance(error, (CorruptModel, ModelTooLarge)):
        return RuntimeError
    if isinstance(error, LoadFailed):
        # What CTranslate2 itself said in a load.
        cause = type(error.__cause__)
        if cause in (RuntimeError, ValueError):
            return cause
        from huggingface_hub.errors import LocalEntryNotFoundError

        return LocalEntryNotFoundError
    return None
