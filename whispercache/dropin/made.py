"""
The parts of a WhisperModel that are made of its files alone, and must be those of the
weights: a tokenizer of other files turns what they say into other words.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whispercache.engine.api import LoadedModel

_EXTRACTOR = "feature_extractor"
_PARTS = ("hf_tokenizer", _EXTRACTOR)


class Made:
    """
    The parts that an object was made with, before there were weights.

    Args:
        whisper: The object. It is not kept alive.
        stamp: That of the files, as `stamp_of` gives it.
    """

    def __init__(self, whisper: object, stamp: tuple[int, ...]) -> None:
        self._whisper = weakref.ref(whisper)
        self._stamp = stamp
        mine = vars(whisper)
        self._parts: dict[str, object] = {
            name: mine[name] for name in _PARTS if name in mine
        }

    def of(self, copied: object) -> Made:
        """
        Returns the same for a copy of the object.
        """
        return Made(copied, self._stamp)

    def fit(self, loaded: LoadedModel) -> bool:
        """
        Gives the object the parts of a leased model where its own are of other files:
        they were replaced before or after the weights were loaded. What a program has
        set stays. Returns True if they were.
        """
        if loaded.stamp == self._stamp:
            return False
        whisper, theirs = self._whisper(), vars(loaded.whisper)
        self._stamp = loaded.stamp
        if whisper is not None:
            for name, part in self._parts.items():
                if vars(whisper).get(name) is part:
                    # A copy: calls write into an extractor.
                    own = (
                        copy.copy(theirs[name]) if name == _EXTRACTOR else theirs[name]
                    )
                    vars(whisper)[name] = self._parts[name] = own
        return True
