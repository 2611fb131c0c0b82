"""
The fixture ``cache`` of tests with real models: each file says what its own is like.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import ctranslate2
import faster_whisper
import pytest
from faster_whisper import WhisperModel

from whispercache import ModelCache, ModelStillReferenced, uninstall
from whispercache.engine.construct import decoders
from whispercache.engine.rebound import plain_of
from whispercache.testing import settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Unpack

    from whispercache.options import CacheOptions

__all__ = ["cache_of", "installed_cache"]

# Before anything is installed.
PLAIN_WHISPER = ctranslate2.models.Whisper
GENUINE = WhisperModel.__init__
PLAIN_DECODE = faster_whisper.decode_audio


@contextmanager
def opened(**options: Unpack[CacheOptions]) -> Iterator[ModelCache]:
    """
    A cache. In the end its books are right, no lease is left, and nothing refers to the
    models.
    """
    referenced: list[object] = []

    def noted(event: object) -> None:
        if isinstance(event, ModelStillReferenced):
            referenced.append(event)

    with ModelCache(**options) as made:
        end = made.subscribe(noted)
        yield made
        gc.collect()
        settle(made)
        made._core.check()
        assert made.stats().leases == 0
    end()
    assert not referenced


def cache_of(
    scope: Literal["function", "module"] = "function", **options: Unpack[CacheOptions]
) -> object:
    """
    The fixture of a cache with these parameters.
    """

    @pytest.fixture(scope=scope)
    def cache() -> Iterator[ModelCache]:
        """
        A cache with real models. In the end no lease is left.
        """
        with opened(**options) as made:
            yield made

    return cache


def installed_cache() -> object:
    """
    The fixture of a cache of one model at a time, for `install`.
    """

    @pytest.fixture
    def cache() -> Iterator[ModelCache]:
        """
        A cache with real models. In the end no lease is left, and nothing is installed.
        """
        with opened(variants=False, max_models=1) as made:
            yield made
            uninstall()
            # These stay, for the models that were leased; other tests begin without.
            for name in ("transcribe", "detect_language"):
                setattr(WhisperModel, name, plain_of(getattr(WhisperModel, name)))
        assert WhisperModel.__init__ is GENUINE
        assert ctranslate2.models.Whisper is PLAIN_WHISPER
        assert {module.decode_audio for module in decoders()} == {PLAIN_DECODE}

    return cache
