"""
The way in: how models of a cache come to programs that construct a WhisperModel.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from whispercache import installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache import ModelCache

__all__ = ["through"]


@contextmanager
def through(cache: ModelCache, *, ctranslate2: bool = False) -> Iterator[None]:
    """
    Has all that constructs a WhisperModel get one of *cache*; with *ctranslate2* also
    what constructs CTranslate2's Whisper itself.
    """
    with installed(cache, ctranslate2=ctranslate2):
        yield
