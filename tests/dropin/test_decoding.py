"""
Files where faster-whisper's own decoder cannot open them: PyAV 19 lacks an option that
faster-whisper 1.2.1 passes it. `make others` has these run with PyAV 19 itself.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any
from unittest import mock

import av
import faster_whisper
import numpy as np
import pytest
from caches import installed_cache
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper import transcribe as transcribing
from real import TEXT, clip, micro, model_of, plain_model, text_of

from whispercache import installed
from whispercache.engine.audio import decoder
from whispercache.engine.process import decoding_problem

if TYPE_CHECKING:
    from whispercache import ModelCache

AUDIO = clip("en-bread")
PLAIN = faster_whisper.decode_audio


cache = installed_cache()


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    PyAV 19, or one that refuses the same option.
    """
    if decoding_problem():
        return
    opened: Any = av.open

    def strictly(file: Any, mode: str = "r", **options: Any) -> Any:
        if "metadata_errors" in options:
            raise TypeError("open() got an unexpected keyword argument")
        return opened(file, mode, **options)

    monkeypatch.setattr(av, "open", strictly)
    monkeypatch.setattr(av, "__version__", "19.0.2")
    monkeypatch.setattr(decoder, "OPENING", {})
    assert decoding_problem()


@pytest.mark.usefixtures("strict")
def test_programs_decode_and_plain_models_hear_files(cache: ModelCache) -> None:
    """
    By each name, at other rates and in stereo; and pipelines, whatever their models.
    """
    plain = plain_model(micro())
    with pytest.raises(TypeError, match="unexpected keyword"):
        plain.transcribe(AUDIO)
    expected = decoder.read_audio(AUDIO).samples
    with installed(cache), installed(cache):
        for module in (faster_whisper, faster_whisper.audio, transcribing):
            assert np.array_equal(module.decode_audio(AUDIO), expected)
        decode: Any = faster_whisper.decode_audio
        assert inspect.signature(decode) == inspect.signature(PLAIN)
        assert abs(len(decode(AUDIO, sampling_rate=8_000)) - len(expected) // 2) <= 1
        left, right = decode(AUDIO, split_stereo=True)
        assert len(left) == len(right) == len(expected)
        leased = WhisperModel(str(micro()), "cpu", cpu_threads=1)
        for model in (plain, leased):
            assert text_of(model.transcribe(AUDIO)[0]) == TEXT
            segments, _ = BatchedInferencePipeline(model).transcribe(AUDIO)
            assert text_of(segments) == TEXT
    with pytest.raises(TypeError, match="unexpected keyword"):
        faster_whisper.decode_audio(AUDIO)
    # An object from before goes on.
    assert text_of(leased.transcribe(AUDIO)[0]) == TEXT


@pytest.mark.usefixtures("strict")
def test_a_pipeline_over_a_leased_model_hears_files(cache: ModelCache) -> None:
    """
    As the model itself does.
    """
    model_of(cache, micro())
    with cache.lease(micro(), "cpu", cpu_threads=1) as whisper:
        segments, _ = BatchedInferencePipeline(whisper).transcribe(AUDIO)
        assert text_of(segments) == TEXT


def test_a_decoder_that_works_is_left_alone(cache: ModelCache) -> None:
    """
    With its own errors and its own samples.
    """
    works = not decoding_problem()
    with installed(cache):
        assert (faster_whisper.decode_audio is PLAIN) is works


@pytest.mark.usefixtures("strict")
def test_a_mock_in_its_place_is_left_alone(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    And is there afterwards.
    """
    fake = mock.Mock()
    with monkeypatch.context() as patched:
        patched.setattr(transcribing, "decode_audio", fake)
        with installed(cache):
            assert faster_whisper.audio.decode_audio is not PLAIN
        assert transcribing.decode_audio is fake
