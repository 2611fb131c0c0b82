"""
When the loader has the heap keep what is freed, and how much it asks for.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from real import micro

from whispercache import ModelKey
from whispercache.devices import heap
from whispercache.devices.probe import SystemProbe
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.sizes.footprint import estimate
from whispercache.engine.sizes.learned import Sizer

if TYPE_CHECKING:
    from collections.abc import Iterator

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
