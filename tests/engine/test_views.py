"""
Leased models: WhisperModels to programs, each with attributes of its own.
"""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
import types
from typing import TYPE_CHECKING, Any
from unittest import mock

import faster_whisper
import numpy as np
import pytest
from caches import cache_of
from faster_whisper import BatchedInferencePipeline, WhisperModel, vad
from faster_whisper import transcribe as transcribing
from real import (
    SILENCE,
    TEXT,
    clip,
    decode_audio,
    micro,
    micro_copy,
    model_of,
    plain_model,
    text_of,
)

from whispercache import ModelCache, ModelStillReferenced
from whispercache.engine import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RATE = 16_000
LONG = np.zeros(45 * RATE, np.float32)

cache = cache_of(variants=False)


@pytest.fixture
def leased(cache: ModelCache) -> Iterator[Any]:
    """
    A leased model.
    """
    with model_of(cache, micro()).lease() as whisper:
        yield whisper


# What it is ---------------------------------------------------------------------------


def test_it_says_that_it_is_faster_whisper_s(leased: Any) -> None:
    """
    As stable-ts asks: by the module of its class.
    """
    assert isinstance(leased, WhisperModel)
    for name in ("__module__", "__qualname__", "__name__", "__doc__"):
        assert getattr(type(leased), name) == getattr(WhisperModel, name)
    assert leased.__module__ == "faster_whisper.transcribe"
    assert repr(leased).startswith("<faster_whisper.transcribe.WhisperModel object")


def test_it_has_all_that_a_whisper_model_has(leased: Any) -> None:
    """
    To look at, and to find; what it has not is missed as there.
    """
    plain: Any = plain_model(micro())
    assert set(dir(plain)) <= set(dir(leased))
    for name in vars(plain):
        assert type(getattr(leased, name)) is type(getattr(plain, name)) or (
            name == "feature_extractor"
        )
    for model in (plain, leased):
        with pytest.raises(
            AttributeError, match="'WhisperModel' object has no attribute 'encoder'"
        ):
            _ = model.encoder
        assert not hasattr(model, "n_tokens")
        assert not hasattr(model, "lend")


def test_it_is_copied_but_not_pickled(leased: Any) -> None:
    """
    A copy has the same weights and settings of its own; elsewhere there are none.
    """
    leased.max_length = 5
    other = copy.copy(leased)
    assert (other.max_length, other.model is leased.model) == (5, True)
    other.max_length = 6
    other.feature_extractor.nb_max_frames = 1000
    assert (leased.max_length, leased.feature_extractor.nb_max_frames) == (5, 3000)
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"pickled .*lease it in the other"):
            send(leased)


# What is set on it --------------------------------------------------------------------


def test_what_is_set_inside_its_feature_extractor_is_used(leased: Any) -> None:
    """
    By that lease's calls, and by no others.
    """
    leased.feature_extractor.nb_max_frames = 1000
    found = [segment.seek for segment in leased.transcribe(LONG)[0]]
    assert found == [0, 1000, 2000, 3000, 4000]
    filters = np.zeros_like(leased.feature_extractor.mel_filters)
    leased.feature_extractor.mel_filters = filters
    for audio in (SILENCE, np.random.default_rng(1).random(70 * RATE, np.float32)):
        features = leased.feature_extractor(audio)
        assert np.all(features == features[0, 0])
    copied = copy.copy(leased.feature_extractor)
    assert copied.mel_filters is filters


def test_methods_that_are_set_on_it_are_used(leased: Any) -> None:
    """
    By its own calls, as where a program counts, or looks at, what goes in.
    """
    seen: list[Any] = []
    encode, transcribe = leased.encode, leased.transcribe

    def seen_encode(features: Any) -> Any:
        seen.append(features.shape)
        return encode(features)

    leased.encode = seen_encode
    leased.transcribe = lambda audio, **_: transcribe(audio, beam_size=1)
    segments, info = leased.transcribe(SILENCE, beam_size=4)
    assert text_of(segments) == TEXT
    assert info.transcription_options.beam_size == 1
    assert seen
    del leased.encode, leased.transcribe
    assert text_of(leased.transcribe(SILENCE)[0]) == TEXT


@pytest.mark.parametrize("by_position", [True, False])
def test_methods_that_a_program_wraps_get_what_was_given(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch, *, by_position: bool
) -> None:
    """
    As those that measure or trace: positions stay positions, and names stay names.
    """
    plain, seen = WhisperModel.transcribe, []

    @functools.wraps(plain)
    def traced(self: Any, *args: Any, **options: Any) -> Any:
        seen.append((len(args), sorted(options)))
        return plain(self, *args, **options)

    monkeypatch.setattr(WhisperModel, "transcribe", traced)
    model = model_of(cache, micro())
    args: Any = (SILENCE, "en") if by_position else (SILENCE,)
    options: Any = {} if by_position else {"language": "en"}
    with model.lease() as whisper:
        assert text_of(whisper.transcribe(*args, **options)[0]) == TEXT
    assert seen == [(len(args), sorted(options))]
    assert text_of(model.transcribe(*args, **options)[0]) == TEXT


def test_methods_that_a_test_replaces_see_what_they_would(
    cache: ModelCache, leased: Any
) -> None:
    """
    A mock is no method, and gets no model.
    """
    answer = iter(["said"]), "info"
    with mock.patch.object(WhisperModel, "transcribe", return_value=answer) as called:
        assert leased.transcribe("a.wav", beam_size=2) is answer
        called.assert_called_once_with("a.wav", beam_size=2)
    pipeline = "faster_whisper.BatchedInferencePipeline.transcribe"
    with mock.patch(pipeline, return_value=answer) as called:
        segments, _ = model_of(cache, micro()).transcribe(SILENCE, batch_size=2)
        assert list(segments) == ["said"]
        assert called.call_args.kwargs == {"batch_size": 2}


def test_voice_activity_of_a_program_s_own_is_used(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where it stands in faster-whisper's place; sequential and batched.
    """
    found = [{"start": 0, "end": 8000}]
    model = model_of(cache, micro())
    model.transcribe(SILENCE, vad_filter=True)[0].close()
    monkeypatch.setattr(transcribing, "get_speech_timestamps", lambda *_: found)
    for batch_size in (None, 2):
        _, info = model.transcribe(SILENCE, vad_filter=True, batch_size=batch_size)
        assert info.duration_after_vad == 0.5
    monkeypatch.undo()
    everywhere = np.ones((40, 1), np.float32)
    monkeypatch.setattr(vad, "get_vad_model", lambda: lambda _audio: everywhere)
    _, info = model.transcribe(SILENCE, vad_filter=True)
    assert info.duration_after_vad == 1


# What else it is used for -------------------------------------------------------------


def test_languages_that_a_model_has_no_token_for_are_refused(leased: Any) -> None:
    """
    A lease's calls, too, would answer garbage for a minute.
    """
    for args, options in [((), {"language": "yue"}), (("yue",), {})]:
        with pytest.raises(ValueError, match="does not know Cantonese"):
            leased.transcribe(SILENCE, *args, **options)
    with pytest.raises(ValueError, match="'german' is not a valid language code"):
        leased.transcribe(SILENCE, language="german")
    assert leased.transcribe(SILENCE, language="de")[1].language == "de"


def test_pipelines_over_it_let_it_go(cache: ModelCache) -> None:
    """
    With all that was made of it, nothing refers to it once it has left.
    """
    events: list[object] = []
    cache.subscribe(events.append)
    model = model_of(cache, micro())
    whisper: Any
    with model.lease() as whisper:
        pipeline = faster_whisper.BatchedInferencePipeline(model=whisper)
        # By itself, the pipeline reads no file with PyAV 19.
        samples = decode_audio(clip("en-bread"))
        list(pipeline.transcribe(samples, batch_size=2)[0])
        segments, info = whisper.transcribe(SILENCE)
        list(segments)
        whisper.detect_language(SILENCE)
        copy.copy(whisper).feature_extractor(SILENCE)
        # As stable-ts does, which ties it to itself.
        whisper.pipeline = pipeline
        whisper.align = types.MethodType(lambda self: self, whisper)
        assert whisper.align() is whisper
    assert isinstance(pipeline, BatchedInferencePipeline)
    del whisper, pipeline
    for batch_size in (None, 2):
        segments, info = model.transcribe(clip("en-bread"), batch_size=batch_size)
        next(segments)
        segments.close()
    assert info.language == "en"
    model.transcribe(SILENCE)
    cache.evict()  # also of what was just dropped
    assert not [each for each in events if isinstance(each, ModelStillReferenced)]


def test_a_model_in_memory_is_known_without_its_files(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    Though they are gone, and so many others were looked at since that they are
    forgotten.
    """
    directory = micro_copy(tmp_path / "model")
    model = model_of(cache, directory)
    assert text_of(model.transcribe(SILENCE, language="de")[0]) == TEXT
    shutil.rmtree(directory)
    files._claims.cache_clear()
    files._header.cache_clear()
    assert text_of(model.transcribe(SILENCE, language="de")[0]) == TEXT
    with pytest.raises(ValueError, match="does not know Cantonese"):
        model.transcribe(SILENCE, language="yue")
