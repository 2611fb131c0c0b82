"""
Calls on a cached model: what programs do to a WhisperModel, they may do to this one.
"""

from __future__ import annotations

import gc
import types
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from caches import cache_of
from faster_whisper import BatchedInferencePipeline, WhisperModel
from real import (
    SILENCE,
    TEXT,
    at_once,
    clip,
    decode_audio,
    micro,
    micro_copy,
    model_of,
    plain_model,
    text_of,
)

from whispercache import CorruptModel, ModelCache

if TYPE_CHECKING:
    from pathlib import Path

LONG = np.zeros(65 * 16_000, np.float32)
SECOND = [{"start": 0, "end": 1}]
STAMPS = [{"start": start, "end": start + 20} for start in (0, 20, 40)]

cache = cache_of(variants=False, max_models=1)


# One lease for a call -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"word_timestamps": True}, {"language": "en", "vad_filter": True}],
    ids=str,
)
def test_one_lease_is_held_over_a_transcription(
    cache: ModelCache, options: dict[str, Any]
) -> None:
    """
    Whatever it calls, and from whichever thread its segments are read.
    """
    samples = decode_audio(clip("en-bread"))
    heard, _ = plain_model(micro()).transcribe(samples, **options)
    expected = [asdict(each) for each in heard]
    segments, _ = model_of(cache, micro()).transcribe(clip("en-bread"), **options)
    assert cache.stats().leases == 1
    assert at_once([lambda: [asdict(each) for each in segments]]) == [expected]
    assert (cache.stats().leases, cache.stats().requests) == (0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {},
        {"batch_size": 2, "word_timestamps": True, "without_timestamps": False},
        {"language": "en", "multilingual": True},
    ],
    ids=str,
)
def test_one_lease_is_held_over_a_batched_one(
    cache: ModelCache, options: dict[str, Any]
) -> None:
    """
    By the pipeline that a program makes of it, with the text of the plain one.
    """
    audio = clip("en-two-voices")
    plain = BatchedInferencePipeline(plain_model(micro()))
    heard, _ = plain.transcribe(decode_audio(audio), **options)
    expected = [asdict(each) for each in heard]
    model: Any = model_of(cache, micro())
    pipeline = BatchedInferencePipeline(model=model)
    assert pipeline.model is model
    segments, _ = pipeline.transcribe(audio, **options)
    assert cache.stats().leases == 1
    assert [asdict(each) for each in segments] == expected
    assert expected
    # Parameters by position too, as old programs have them.
    segments, info = pipeline.transcribe(audio, "en", "translate")
    assert (info.language, text_of(segments)) == ("en", text_of(segments) or TEXT)
    pipeline.transcribe(audio)[0].close()
    assert (cache.stats().leases, cache.stats().requests) == (0, 3)


def test_a_pipeline_refuses_nonsense_before_a_load(cache: ModelCache) -> None:
    """
    As the model does.
    """
    pipeline = BatchedInferencePipeline(model_of(cache, micro()))
    for options in ({"batch_size": 0}, {"language": "tlh"}, {"beam_sise": 5}):
        with pytest.raises((TypeError, ValueError)):
            pipeline.transcribe(SILENCE, **options)
    assert cache.stats().requests == 0


def test_a_call_without_audio_is_told_what_is_missing(cache: ModelCache) -> None:
    """
    By Python, as on a plain model; nothing is loaded.
    """
    model: Any = model_of(cache, micro())
    for kind in (model, BatchedInferencePipeline(model)):
        with pytest.raises(TypeError, match=r"missing 1 required .* 'audio'"):
            kind.transcribe()
    assert not cache.models()


def test_one_lease_is_held_over_a_detection(cache: ModelCache) -> None:
    """
    Of several windows.
    """
    model = model_of(cache, micro())
    options: dict[str, Any] = {
        "language_detection_segments": 3,
        "language_detection_threshold": 1.0,
    }
    expected = plain_model(micro()).detect_language(LONG, **options)
    assert model.detect_language(LONG, **options) == expected
    assert cache.stats().requests == 1


def test_a_method_of_the_class_works_on_it(cache: ModelCache) -> None:
    """
    Called as a function, as wrappers do; each inner call has a lease of its own.
    """
    model: Any = model_of(cache, micro())
    segments, _ = WhisperModel.transcribe(model, SILENCE)
    assert text_of(segments) == TEXT
    assert cache.stats().requests > 1


def test_several_calls_at_a_time_have_windows_of_their_own(cache: ModelCache) -> None:
    """
    On one object: what faster-whisper keeps of a call in it stays with that call.
    """
    model: Any = model_of(cache, micro())
    calls = {
        length: model.transcribe(LONG, chunk_length=length)[0] for length in (30, 10)
    }
    found: dict[int, list[int]] = {length: [] for length in calls}
    for _ in range(3):
        for length, segments in calls.items():
            found[length].append(next(segments).seek)
    assert found == {30: [0, 3000, 6000], 10: [0, 1000, 2000]}
    calls[10].close()
    assert not list(calls[30])
    assert model.feature_extractor.nb_max_frames == 3000


# What a program sets ------------------------------------------------------------------


def test_what_is_set_on_it_counts(cache: ModelCache) -> None:
    """
    In its own calls, and in those of nobody else; also before anything was read.
    """
    model: Any = model_of(cache, micro())
    other: Any = model_of(cache, micro())
    model.max_length = 2
    assert model.hf_tokenizer
    assert model.max_length == 2
    with pytest.raises(ValueError, match="exceeds the `max_length`"):
        text_of(model.transcribe(SILENCE, max_new_tokens=9)[0])
    assert text_of(other.transcribe(SILENCE, max_new_tokens=9)[0]) == TEXT
    del model.max_length
    model.my_own = {"note": 1}
    assert (model.my_own, model.max_length) == ({"note": 1}, 448)
    with pytest.raises(AttributeError):
        _ = other.my_own


def test_a_feature_extractor_that_is_set_or_changed_is_used(cache: ModelCache) -> None:
    """
    As by programs that mend it for large-v3.
    """
    model: Any = model_of(cache, micro())
    model.feature_extractor.nb_max_frames = 1000
    assert [s.seek for s in model.transcribe(LONG)[0]][:3] == [0, 1000, 2000]
    heard: list[int] = []
    plain = plain_model(micro()).feature_extractor

    class Listening:
        def __getattr__(self, name: str) -> object:
            return getattr(plain, name)

        def __call__(self, audio: Any, **options: Any) -> object:
            heard.append(len(audio))
            return plain(audio, **options)

    model.feature_extractor = Listening()
    assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    assert heard == [16_000]
    assert [s.seek for s in model_of(cache, micro()).transcribe(LONG)[0]][1] == 3000


def test_a_method_that_is_set_on_it_reaches_nobody_else(cache: ModelCache) -> None:
    """
    As stable-ts does it, twice over, with the old one behind it.
    """
    model: Any = model_of(cache, micro())
    kept = model.transcribe

    def shouted(self: Any, audio: Any, **options: Any) -> str:
        return text_of(self.plainly(audio, **options)[0]).upper()

    model.plainly = kept
    model.transcribe = types.MethodType(shouted, model)
    assert model.transcribe(SILENCE) == TEXT.upper()
    assert text_of(model_of(cache, micro()).transcribe(SILENCE)[0]) == TEXT
    del kept, model
    gc.collect()


def test_a_leased_model_that_was_changed_reaches_nobody_else(
    cache: ModelCache,
) -> None:
    """
    Neither the next holder, nor who holds it at the same time, nor calls in between.
    """
    model: Any = model_of(cache, micro())
    with model.lease() as mine, model.lease() as theirs:
        mine.transcribe = lambda *_, **__: ("mine", None)
        mine.__class__ = type("Other", (type(mine),), {})
        assert mine.transcribe(SILENCE)[0] == "mine"
        assert text_of(theirs.transcribe(SILENCE)[0]) == TEXT
        assert type(theirs) is not type(mine)
        assert text_of(model.transcribe(SILENCE)[0]) == TEXT
        pipeline = BatchedInferencePipeline(theirs)
        segments, _ = pipeline.transcribe(SILENCE, clip_timestamps=SECOND)
        assert text_of(segments) == TEXT
    with model.lease() as whisper:
        assert text_of(whisper.transcribe(SILENCE)[0]) == TEXT
    del mine, theirs, whisper, pipeline


def test_inner_methods_that_are_set_on_it_run_on_it(cache: ModelCache) -> None:
    """
    Within the lease of the call around them, what they set stays on the object.
    """
    model: Any = model_of(cache, micro())
    encode = model.encode

    def counting(self: Any, features: Any) -> Any:
        self.encoded = getattr(self, "encoded", 0) + 1
        return encode(features)

    model.encode = types.MethodType(counting, model)
    assert text_of(model.transcribe(LONG, language="en")[0]) == TEXT * 3
    assert (model.encoded, cache.stats().requests) == (3, 1)
    segments, _ = BatchedInferencePipeline(model).transcribe(
        LONG, language="en", clip_timestamps=STAMPS, batch_size=1
    )
    assert text_of(segments) == TEXT * 3
    assert (model.encoded, cache.stats().requests) == (6, 2)
    model.__dict__.clear()


def test_another_class_may_be_put_on_it(cache: ModelCache) -> None:
    """
    As where a package has a subclass with methods of its own: its attributes and leased
    calls are there.
    """
    model: Any = model_of(cache, micro())
    assert model.max_length

    class Mine(WhisperModel):  # type: ignore[misc]
        def spoken(self, audio: Any) -> str:
            return text_of(self.transcribe(audio)[0])

    model.__class__ = Mine
    assert model.spoken(SILENCE) == TEXT


def test_a_model_that_is_put_in_the_place_of_the_view_is_used(
    cache: ModelCache,
) -> None:
    """
    A mock of a test, or a plain one.
    """
    model: Any = model_of(cache, micro())
    model.model = plain_model(micro("quite another one")).model
    plain = plain_model(micro("quite another one"))
    model.hf_tokenizer = plain.hf_tokenizer
    assert text_of(model.transcribe(SILENCE)[0]) == " quite another one"
    assert model.detect_language(SILENCE)[0] == "en"
    assert cache.stats().requests == 0
    answer = mock.Mock()
    with mock.patch.object(WhisperModel, "transcribe", return_value=(iter([]), answer)):
        assert model.transcribe(SILENCE)[1] is answer
        assert model_of(cache, micro()).transcribe(SILENCE)[1] is answer


def test_a_pipeline_that_a_test_replaces_is_seen(cache: ModelCache) -> None:
    """
    For as long as it is there.
    """
    pipeline = BatchedInferencePipeline(model_of(cache, micro()))
    kind = "faster_whisper.BatchedInferencePipeline.transcribe"
    with mock.patch(kind, return_value=("said", None)) as called:
        assert pipeline.transcribe("a.wav")[0] == "said"
        called.assert_called_once_with("a.wav")
        assert model_of(cache, micro())
    segments, _ = pipeline.transcribe(SILENCE, clip_timestamps=SECOND)
    assert text_of(segments) == TEXT


# Segments that need nothing else ------------------------------------------------------


def test_an_object_that_is_dropped_leaves_its_segments(cache: ModelCache) -> None:
    """
    And the model stays in memory for others.
    """
    segments, _ = model_of(cache, micro()).transcribe(LONG)
    gc.collect()
    assert text_of(segments) == TEXT * 3
    assert [info.state for info in cache.models()] == ["resident"]


def test_words_that_a_model_cannot_time_are_refused(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    CTranslate2 would end the process, from whichever call it is asked.
    """
    import json

    directory = micro_copy(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["alignment_heads"] = [[77, 0]]
    (directory / "config.json").write_text(json.dumps(config))
    model: Any = model_of(cache, directory)
    assert text_of(model.transcribe(SILENCE)[0]) == TEXT
    features = model.encode(np.zeros((80, 3000), np.float32))
    for _ in range(2):
        with pytest.raises(CorruptModel, match="alignment_heads"):
            model.model.align(features, [1], [[2]], 100)
    with pytest.raises(CorruptModel, match="alignment_heads"):
        text_of(model.transcribe(SILENCE, word_timestamps=True)[0])


def test_languages_that_a_model_cannot_tell_are_refused(
    cache: ModelCache, tmp_path: Path
) -> None:
    """
    Likewise.
    """
    import json

    directory = micro_copy(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["lang_ids"] = []
    (directory / "config.json").write_text(json.dumps(config))
    model: Any = model_of(cache, directory)
    features = model.encode(np.zeros((80, 3000), np.float32))
    for asked, audio in ((model.model, features), (model, SILENCE)):
        with pytest.raises(CorruptModel, match="lang_ids"):
            asked.detect_language(audio)
    assert text_of(model.transcribe(SILENCE, language="en")[0]) == TEXT
