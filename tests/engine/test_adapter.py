"""
The adapter: a loader needs three methods, and may have more.
"""

from __future__ import annotations

import io
import wave
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from whispercache import AudioError, ModelCache
from whispercache.devices.probe import SystemProbe
from whispercache.engine.adapter import completed
from whispercache.engine.api import LoadedModel, Loader, Released
from whispercache.engine.loader import FasterWhisperLoader
from whispercache.engine.sizes.footprint import Footprint
from whispercache.testing import FakeLoader, FakeMachine, check, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faster_whisper import WhisperModel

    from whispercache.engine.files import ModelFiles
    from whispercache.engine.sizes.footprint import Workload
    from whispercache.keys import ModelKey

SILENCE = np.zeros(16_000, np.float32)


class Parrot:
    """
    A model of another library.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def transcribe(
        self, audio: Any, **options: Any
    ) -> tuple[Iterator[str], dict[str, Any]]:
        """
        Repeats how much it has heard.
        """
        return iter([f"{self.name}: {len(audio)}"]), options

    def detect_language(self, audio: Any) -> tuple[str, float, list[Any]]:
        """
        Parrots speak Portuguese.
        """
        del audio
        return "pt", 1.0, []


class Minimal:
    """
    A loader with what every loader must have, and nothing else.
    """

    def __init__(self) -> None:
        self.there: list[str] = []

    def footprint(
        self, key: ModelKey, files: ModelFiles, workload: Workload
    ) -> Footprint:
        """
        A gigabyte and a bit.
        """
        del key, files
        return Footprint(10**9, 10**6 * workload.beam_size, 10**9, 0)

    def load(self, key: ModelKey, files: ModelFiles) -> LoadedModel:
        """
        At once.
        """
        self.there.append(key.model)
        return LoadedModel(key, files, cast("WhisperModel", Parrot(key.model)))

    def unload(self, loaded: LoadedModel, **_hints: object) -> Released:
        """
        At once, too.
        """
        self.there.remove(loaded.key.model)
        return Released(confirmed=True)


def recording() -> io.BytesIO:
    """
    A second of silence as a file.
    """
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes(bytes(2 * 16_000))
    file.seek(0)
    return file


@pytest.fixture
def loader() -> Minimal:
    """
    A minimal loader.
    """
    return Minimal()


@pytest.fixture
def cache(loader: Minimal) -> Iterator[ModelCache]:
    """
    A cache in which two of its models fit.
    """
    probe = FakeMachine({"cpu": "8GiB"})
    with ModelCache(loader=loader, probe=probe, ram="2.2GB") as made:
        yield made
        check(made)
    assert not loader.there


def test_three_methods_are_enough(cache: ModelCache, loader: Minimal) -> None:
    """
    Models are shared, evicted, and charged as ever; calls take what the model takes.
    """
    for name in ("tiny", "base", "small", "tiny"):
        segments, info = cache.get_model(name).transcribe(SILENCE, loudness=11)
        assert list(segments) == [f"{name}: 16000"]
        assert info["loudness"] == 11
    assert loader.there == ["small", "tiny"]
    assert cache.stats().evictions == 2
    assert [device.charged_bytes for device in cache.devices()] == [2 * 10**9]


def test_all_else_works_with_defaults(cache: ModelCache, loader: Minimal) -> None:
    """
    Whatever else one may ask of a cache.
    """
    cache.preload("tiny", tier="page")
    assert not loader.there
    cache.pin("tiny")
    assert cache.explain("tiny").reason
    model = cache.get_model("tiny")
    assert model.detect_language(SILENCE)[0] == "pt"
    assert list(model.transcribe(recording())[0]) == ["tiny: 16000"]
    segments, info = model.transcribe(SILENCE, batch_size=4)
    assert list(segments) == ["tiny: 16000"]
    assert info == {"batch_size": 4}
    with pytest.raises(AudioError):
        model.transcribe(io.BytesIO(b"no audio"))
    with cache.lease_many(["tiny", "base"]):
        assert loader.there == ["tiny", "base"]
    cache.unpin("tiny")
    assert cache.evict() == 2
    settle(cache)


def test_a_loader_that_has_everything_is_taken_as_it_is() -> None:
    """
    As are ours.
    """
    for loader in (FakeLoader(FakeMachine({})), FasterWhisperLoader(SystemProbe())):
        assert completed(loader) is loader


def test_a_method_more_is_taken_from_the_loader(loader: Minimal) -> None:
    """
    One by one; the rest are defaults, and none is missing.
    """

    class More(Minimal):
        def devices(self) -> tuple[str, ...]:
            return ("cpu", "cuda:0")

    made = completed(More())
    assert made.devices() == ("cpu", "cuda:0")
    assert completed(loader).devices() == ("cpu",)
    assert "float16" in made.supported_compute_types("cuda:0")
    methods = {name for name in dir(Loader) if not name.startswith("_")}
    assert set(vars(made)) == methods


def test_a_loader_that_lacks_a_load_is_refused() -> None:
    """
    By name, when the cache is made.
    """

    class Half:
        footprint = Minimal.footprint
        load = Minimal.load

    with pytest.raises(TypeError, match=r"Half has no unload$"):
        ModelCache(loader=Half())  # type: ignore[arg-type]
