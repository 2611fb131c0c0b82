"""
What a program says to WhisperModel, said to a cache: parameters, audio, errors.
"""

from __future__ import annotations

import inspect
import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av.error
import numpy as np
import pytest
from faster_whisper import WhisperModel
from real import clip, decode_audio, micro, model_of

from whispercache import AudioError, ModelCache, footprint, read_audio
from whispercache.devices import nvml
from whispercache.devices.host import cpu_name
from whispercache.devices.probe import SystemProbe
from whispercache.engine.audio.samples import samples_of
from whispercache.engine.files import ModelFiles
from whispercache.engine.sizes.architecture import ARCHITECTURES
from whispercache.engine.sizes.footprint import DEFAULT_WORKLOAD
from whispercache.engine.sizes.learned import LearnedFootprints, Sizer
from whispercache.keys import ModelKey
from whispercache.options import AFTER_DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import MakeCache
    from driver import Driver

TYPES = {"cuda": "float16", "cpu": "int8"}


class TestConstructor:
    """
    `ModelCache.get_model` takes what the constructor takes, by position and by name.
    """

    def test_the_order_is_that_of_the_constructor(self) -> None:
        """
        As far as it can be called by position.
        """
        found = inspect.signature(WhisperModel.__init__).parameters.values()
        positional = [
            each.name
            for each in found
            if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        assert positional[3:] == list(AFTER_DEVICE)
        assert positional[2] == "device"

    @pytest.mark.parametrize(
        ("args", "options", "key"),
        [
            (("cuda", 1), {}, "base/cuda:1/float16"),
            (("cuda", [1]), {}, "base/cuda:1/float16"),
            (("cuda", (1,)), {}, "base/cuda:1/float16"),
            (("cuda", 1, "float32"), {}, "base/cuda:1/float32"),
            (("cuda", 1), {"compute_type": "float32"}, "base/cuda:1/float32"),
            (("cuda",), {"device_index": [1]}, "base/cuda:1/float16"),
            (("cuda", np.int64(1)), {}, "base/cuda:1/float16"),
            (
                ("cuda",),
                {"device_index": [np.int32(1)], "num_workers": np.int64(2)},
                "base/cuda:1/float16?num_workers=2",
            ),
            (("cpu", 0, "int8", 3), {}, "base/cpu/int8_float32?cpu_threads=3"),
            (
                ("cpu", "int8"),
                {"cpu_threads": 3},
                "base/cpu/int8_float32?cpu_threads=3",
            ),
            (("cpu", [0], TYPES, 0, 1, None, True), {}, "base/cpu/int8_float32"),
            (("cpu", TYPES), {}, "base/cpu/int8_float32"),
            (
                ("cuda:1",),
                {"compute_type": {"cuda": "int8"}},
                "base/cuda:1/int8_float16",
            ),
            (("cpu",), {"compute_type": {"cuda": "float16"}}, "base/cpu/float32"),
        ],
    )
    def test_a_model_is_the_one_that_was_meant(
        self,
        make_cache: MakeCache,
        driver: Driver,
        args: tuple[Any, ...],
        options: dict[str, Any],
        key: str,
    ) -> None:
        """
        For threads and tasks, and asked twice it is one model.
        """
        cache = make_cache()
        for _ in range(2):
            model = driver.call(cache, "get_model", "base", *args, **options)
            assert str(model.key) == key

    @pytest.mark.parametrize(
        ("args", "options", "said"),
        [
            (("cuda", [0, 1]), {}, "device_index must be one integer"),
            (("cuda", []), {}, "device_index must be one integer"),
            (("cuda", True), {}, "device_index must be one integer"),
            (("cuda", 1, 2), {}, "compute_type must be text"),
            (("cpu", "int8", 4), {}, "after a compute type, give the others by name"),
            (("cpu", 0, *range(9)), {}, "10 positional arguments follow the device"),
            (("cuda", 1), {"device_index": 0}, "by position and by name"),
            (("cpu", 0, "int8"), {"compute_type": "float32"}, "by position and by"),
        ],
    )
    def test_nonsense_is_told(
        self,
        make_cache: MakeCache,
        args: tuple[Any, ...],
        options: dict[str, Any],
        said: str,
    ) -> None:
        """
        In words of the parameter.
        """
        with pytest.raises(TypeError, match=said):
            make_cache().get_model("base", *args, **options)

    def test_a_list_of_one_index_is_that_of_a_lease_too(
        self, make_cache: MakeCache, driver: Driver
    ) -> None:
        """
        Another spelling of a model is a hit.
        """
        cache = make_cache()
        for index in ([1], 1, (1,)):
            lease = driver.lease(cache, "base", "cuda", device_index=index)
            assert lease.key.device == "cuda:1"
            lease.release()
        assert cache.stats().loads == 1


class TestAudio:
    """
    What is heard, and what is raised where nothing can be.
    """

    def test_samples_of_16_bits_are_scaled(self) -> None:
        """
        Bit by bit those that decoding gives; faster-whisper itself hears noise.
        """
        heard = read_audio(clip("en-bread")).samples
        samples = samples_of((heard * 32768).astype(np.int16))
        assert samples.dtype == np.float32
        assert np.array_equal(samples, heard)

    @pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint8, np.bool_])
    def test_other_integers_are_refused(self, kind: type) -> None:
        """
        What they are scaled by is not known.
        """
        with pytest.raises(AudioError, match="samples are floats"):
            samples_of(np.zeros(16_000, kind))

    @pytest.mark.parametrize(
        "make",
        [
            io.BytesIO,
            lambda: io.BytesIO(b"x" * 5000),
            lambda: io.BytesIO(Path(clip("en-bread")).read_bytes()[:40]),
            lambda: __file__,
            lambda: "nope://nowhere",
            lambda: "http://127.0.0.1:9/nothing",
        ],
    )
    def test_ffmpeg_s_errors_are_caught_by_their_own_names(
        self, make: Callable[[], Any]
    ) -> None:
        """
        And by ours; their numbers and words are there, too.
        """
        with pytest.raises(av.error.FFmpegError) as plain:
            decode_audio(make())
        with pytest.raises(AudioError) as ours:
            read_audio(make())
        assert isinstance(ours.value, type(plain.value))
        told = plain.value.errno, plain.value.strerror
        assert (ours.value.errno, ours.value.strerror) == told
        assert str(ours.value).startswith("cannot decode audio ")
        assert type(ours.value).__name__ == "AudioError"

    def test_a_stream_at_its_end_is_what_ffmpeg_calls_invalid(self) -> None:
        """
        Though it is told before FFmpeg is asked.
        """
        stream = io.BytesIO(Path(clip("en-bread")).read_bytes())
        stream.seek(0, io.SEEK_END)
        with pytest.raises(av.error.InvalidDataError):
            decode_audio(stream)
        stream.seek(0, io.SEEK_END)
        with ModelCache(variants=False) as cache:
            model = model_of(cache, micro())
            with pytest.raises(av.error.InvalidDataError, match="at its end") as ours:
                model.transcribe(stream)
        assert isinstance(ours.value, AudioError)

    def test_such_an_error_travels_as_ours(self) -> None:
        """
        The other process may have another FFmpeg, or none.
        """
        with pytest.raises(AudioError) as caught:
            read_audio(io.BytesIO(b"x"))
        again = pickle.loads(pickle.dumps(caught.value))
        assert type(again) is AudioError
        assert str(again) == str(caught.value)


class TestFootprint:
    """
    The bytes that are told are those that are reserved.
    """

    @pytest.mark.parametrize("compute_type", ["int8", "float32"])
    @pytest.mark.parametrize("ratio", [1.0, 1.3])
    def test_who_sizes_a_cache_by_it_is_not_refused(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        compute_type: str,
        ratio: float,
    ) -> None:
        """
        Also where earlier loads were measured to take more than was predicted.
        """
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        directory = str(micro())
        first = footprint(directory, compute_type)
        effective = {"int8": "int8_float32"}.get(compute_type, compute_type)
        name = str(Path(directory).resolve())
        predicted, measured = 10**6, int(ratio * 10**6)
        for _ in range(3):
            LearnedFootprints().record(name, effective, cpu_name(), predicted, measured)
        told = footprint(directory, compute_type)
        assert (told.weights_bytes > first.weights_bytes) is (ratio > 1)
        with ModelCache(ram=told.total_bytes, variants=False) as cache:
            plan = cache.explain(directory, "cpu", compute_type)
            assert plan.needed_bytes == told.total_bytes
            with cache.lease(directory, "cpu", compute_type, cpu_threads=1):
                pass

    @pytest.mark.parametrize("name", ["Alpha", None])
    def test_on_cards_of_one_kind_it_knows_what_a_cache_has_learned(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
    ) -> None:
        """
        Of weights and of calls; where they have no common name, what is predicted.
        """
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(nvml, "common_name", lambda: name)
        predicted = footprint("small", "float16", "cuda")

        class Probe(SystemProbe):
            def device_name(self, device: str) -> str:
                assert device == "cuda:1"
                return "Alpha"

        sizer = Sizer(Probe())
        key = ModelKey("small", "cuda:1", "float16")
        files = ModelFiles("", "float16", source=ARCHITECTURES["small"])
        for _ in range(3):
            sizer.remember(key, files, int(1.2 * predicted.weights_bytes))
            sizer.remember_work("cuda:1", 10**6, int(1.3 * 10**6))
        charged = sizer.footprint(key, files, DEFAULT_WORKLOAD)
        assert charged.weights_bytes > predicted.weights_bytes
        assert charged.workspace_bytes > predicted.workspace_bytes
        for device in ("cuda", "cuda:1"):
            told = footprint("small", "float16", device)
            assert told == (charged if name else predicted)
