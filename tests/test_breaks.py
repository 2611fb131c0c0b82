"""
Breaks: batches give their model to more urgent requests between two segments, and go on
afterwards as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from faster_whisper import BatchedInferencePipeline
from real import at_once, clip, decode_audio, micro, micro_copy, model_of, packaged

from whispercache import (
    AsyncModelCache,
    CacheClosed,
    LeaseTimeout,
    ModelCache,
    ModelEvicted,
    ModelStillReferenced,
)
from whispercache.base import ModelSource
from whispercache.model import CachedModel
from whispercache.testing import settle, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from faster_whisper.transcribe import Segment

OPTIONS: list[dict[str, Any]] = [
    {},
    {"word_timestamps": True},
    {"vad_filter": True, "beam_size": 1},
    {"language": "en", "without_timestamps": True},
    {"condition_on_previous_text": False, "chunk_length": 5, "language": "en"},
    {"clip_timestamps": "0,4,6,20", "language": "en", "word_timestamps": True},
    {"initial_prompt": "A talk.", "hallucination_silence_threshold": 1.0},
    {"batch_size": 1},
    {"batch_size": 1, "word_timestamps": True, "without_timestamps": False},
]


@pytest.fixture
def cache() -> Iterator[ModelCache]:
    """
    A cache with real models, of which one is in memory at a time. In the end no lease
    is left, and nothing refers to the models.
    """
    referenced: list[object] = []

    def noted(event: object) -> None:
        if isinstance(event, ModelStillReferenced):
            referenced.append(event)

    with ModelCache(variants=False, max_models=1) as made:
        made.subscribe(noted)
        yield made
        gc.collect()
        settle(made)
        made._core.check()
        assert made.stats().leases == 0
    assert not referenced


@pytest.fixture
def urgent(cache: ModelCache, tmp_path: Path) -> Callable[[], None]:
    """
    Somebody who wants another model at once, for a moment.
    """
    other = micro_copy(tmp_path / "urgent", "hello")

    def ask() -> None:
        cache.lease(str(other), "cpu", timeout_s=60, cpu_threads=1).release()

    return ask


def talk() -> np.ndarray[Any, np.dtype[np.float32]]:
    """
    Speech in several windows.
    """
    said = [decode_audio(clip(name)) for name in ("en-harbour-long", "en-weather")]
    return np.concatenate([said[0], np.zeros(8000, np.float32), said[1]])


def plain(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    """
    All that segments say.
    """
    return [asdict(each) for each in segments]


# The text stays the same --------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["tiny.en"])
def test_a_batch_that_is_stopped_after_each_segment_says_the_same(
    cache: ModelCache, urgent: Callable[[], None], options: dict[str, Any], name: str
) -> None:
    """
    Whatever its options are, with words and without, in batches and not.
    """
    directory = packaged(name)
    expected, _ = model_of(cache, directory).transcribe(talk(), **options)
    said = plain(expected)
    assert len(said) > 2
    batch = model_of(cache, directory, priority="batch")
    segments, _ = batch.transcribe(talk(), **options)
    found = []
    loads = cache.stats().loads
    for segment in segments:
        found.append(asdict(segment))
        urgent()
    assert found == said
    assert cache.stats().loads >= loads + 3
