"""
When loads and calls have the heap keep what is freed, and how much a load asks for.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from real import SILENCE, TEXT, micro, model_of, text_of

from whispercache import ModelCache, ModelKey
from whispercache.devices import heap
from whispercache.devices.probe import SystemProbe
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.sizes.footprint import estimate
from whispercache.engine.sizes.learned import Sizer
from whispercache.engine.views import in_heap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whispercache import CachedModel
    from whispercache.engine.files import ModelFiles


class NotedHeap:
    """
    A heap that notes what it is told.
    """

    def __init__(self) -> None:
        self.noted: list[str | int] = []

    def keep(self) -> None:
        """
        Note it.
        """
        self.noted.append("keep")

    def settle(self) -> None:
        """
        Note it.
        """
        self.noted.append("settle")

    @contextmanager
    def calling(self, *, keeps: bool) -> Iterator[None]:
        """
        Note its begin and its end.
        """
        self.noted.append("keeps" if keeps else "begins")
        try:
            yield
        finally:
            self.noted.append("returns")

    @contextmanager
    def loading(self, n_bytes: int) -> Iterator[None]:
        """
        Note the bytes.
        """
        self.noted.append(n_bytes)
        yield


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """
    What a process with huge pages tells its heap.
    """
    made = NotedHeap()
    monkeypatch.setattr(heap, "_heap", [made])
    return made.noted


@pytest.fixture
def loader() -> FasterWhisperLoader:
    """
    A loader of its own.
    """
    return FasterWhisperLoader(SystemProbe())


def key_on(device: str) -> ModelKey:
    """
    The key of the micro model.
    """
    options = (("cpu_threads", 1),)
    return ModelKey(os.path.realpath(micro()), device, "float32", options)


def files_of(loader: FasterWhisperLoader) -> ModelFiles:
    """
    Its files.
    """
    files = loader.locate(key_on("cpu").model, {}, download=False)
    assert files is not None
    return files


def test_only_an_unload_that_a_load_follows_leaves_memory_in_the_heap(
    loader: FasterWhisperLoader, noted: list[str | int]
) -> None:
    """
    If that load does not come, returning the memory ends it as well.
    """
    files = files_of(loader)
    load_bytes = loader._sizer.host_loading_bytes(key_on("cpu"), files)
    loaded = loader.load(key_on("cpu"), files)
    loader.unload(loaded, load_follows=True)
    assert noted == [load_bytes, "keep"]
    loader.return_memory("cpu")
    assert noted[2:] == ["settle"]
    loaded = loader.load(key_on("cpu"), files)
    loader.unload(loaded, load_follows=False)
    assert noted[3:] == [load_bytes, "settle"]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_load_takes_host_memory_on_its_way_to_a_card_too(
    loader: FasterWhisperLoader, device: str
) -> None:
    """
    The peak of that, as it is predicted, without what a cache reserves for holes.
    """
    files = files_of(loader)
    assert files.source is not None
    predicted = estimate(files.source, "float32", device)
    expected = predicted.host_loading_bytes or predicted.loading_bytes
    sizer = Sizer(SystemProbe())
    assert sizer.host_loading_bytes(key_on(device), files) == expected > 0


class TestCalls:
    """
    Calls of a real model that has been loaded.
    """

    CALL = ("keeps", "returns")

    @pytest.fixture
    def model(self, noted: list[str | int]) -> Iterator[CachedModel]:
        """
        A model whose load has been noted already.
        """
        with ModelCache(variants=False) as cache:
            model = model_of(cache, micro())
            assert text_of(model.transcribe(SILENCE, language="en")[0]) == TEXT
            noted.clear()
            yield model

    def test_a_call_and_its_segments_keep_what_they_free(
        self, model: CachedModel, noted: list[str | int]
    ) -> None:
        """
        Nothing is kept between them, however long a program waits.
        """
        segments, _ = model.transcribe(SILENCE, language="en")
        assert noted == [*self.CALL]
        next(segments)
        assert noted == [*self.CALL, "keeps"]
        segments.close()
        assert noted == [*self.CALL * 2]

    def test_so_do_calls_of_a_leased_model(
        self, model: CachedModel, noted: list[str | int]
    ) -> None:
        """
        They are the same ones.
        """
        with model.lease() as whisper:
            list(whisper.transcribe(SILENCE, language="en")[0])
            assert noted == [*self.CALL * 2]
            whisper.detect_language(SILENCE)
        assert noted == [*self.CALL * 3]

    def test_batches_only_return_it(
        self, model: CachedModel, noted: list[str | int]
    ) -> None:
        """
        Their blocks are of different sizes.
        """
        found = model.transcribe(SILENCE, language="en", batch_size=2)
        list(found[0])
        assert noted == ["begins", "returns"] * 2

    def test_calls_on_a_card_and_of_other_processes_stay_as_they_are(
        self, monkeypatch: pytest.MonkeyPatch, noted: list[str | int]
    ) -> None:
        """
        Their blocks are not on this heap, or there is none.
        """
        assert in_heap("cuda", print) is print
        assert in_heap("cpu", print) is not print
        monkeypatch.setattr(heap, "_heap", [])
        assert in_heap("cpu", print) is print
        assert noted == []
