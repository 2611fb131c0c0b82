"""
The parameters of a call: they are its own, and nonsense is refused before a lease.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import mmap
import pickle
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from caches import cache_of
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.vad import VadOptions
from real import SILENCE, at_once, clip, micro, model_of, plain_model

from whispercache import AsyncModelCache, AudioError, ModelCache
from whispercache.engine.calls.parameters import check_tokens, checked
from whispercache.engine.calls.signatures import bound, signature_of
from whispercache.engine.views import own_values

if TYPE_CHECKING:
    from conftest import MakeCache
    from driver import Driver

RATE = 16_000
LONG = np.zeros(45 * RATE, np.float32)
SEEKS = {None: [0, 3000], 10: [0, 1000, 2000, 3000, 4000], 20: [0, 2000, 4000]}
"""
Where the windows of *LONG* begin, by ``chunk_length``.
"""

cache = cache_of(variants=False)


def seeks(segments: Any) -> list[int]:
    """
    Where the windows begin.
    """
    return [segment.seek for segment in segments]


# What a call leaves -------------------------------------------------------------------


@pytest.mark.parametrize("again", ["at once", "after evict()"])
def test_a_call_s_chunk_length_is_its_own(cache: ModelCache, again: str) -> None:
    """
    The next call has the usual one, be it on the same weights or after a reload.
    """
    model = model_of(cache, micro())
    assert seeks(model.transcribe(LONG, chunk_length=10)[0]) == SEEKS[10]
    if again == "after evict()":
        cache.evict()
    assert seeks(model.transcribe(LONG)[0]) == SEEKS[None]
    assert model.feature_extractor.nb_max_frames == 3000


def test_long_audio_in_blocks_keeps_its_chunk_length_too(cache: ModelCache) -> None:
    """
    Above a minute features are made in blocks, by other code.
    """
    model = model_of(cache, micro())
    audio = np.zeros(70 * RATE, np.float32)
    first, _ = model.transcribe(audio, chunk_length=20)
    assert seeks(model.transcribe(audio)[0]) == [0, 3000, 6000]
    assert seeks(first) == [0, 2000, 4000, 6000]


def test_calls_under_way_do_not_see_each_other(cache: ModelCache) -> None:
    """
    Segments are lazy: what they need of a parameter is looked up at each step.
    """
    model = model_of(cache, micro())
    calls = {length: model.transcribe(LONG, chunk_length=length)[0] for length in SEEKS}
    found: dict[int | None, list[int]] = {length: [] for length in SEEKS}
    for _ in range(5):
        for length, segments in calls.items():
            found[length] += seeks(itertools.islice(segments, 1))
    assert found == SEEKS


@pytest.mark.slow
def test_threads_with_windows_of_their_own(cache: ModelCache) -> None:
    """
    The same at the same time, through a cached model and through one lease.
    """
    model = model_of(cache, micro())
    with model.lease() as whisper:
        lengths = [*SEEKS] * 2
        found = at_once(
            [
                lambda length=length, place=place: seeks(  # type: ignore[misc]
                    (model if place % 2 else whisper).transcribe(
                        LONG, chunk_length=length
                    )[0]
                )
                for place, length in enumerate(lengths)
            ]
        )
    assert found == [SEEKS[length] for length in lengths]


def test_what_is_set_on_a_leased_model_is_the_lease_s_own(cache: ModelCache) -> None:
    """
    Also what is inside its feature extractor, and a shell that is kept has none of it.
    """
    model = model_of(cache, micro())
    with model.lease() as mine, model.lease() as other, model.lease() as third:
        mine.max_length = 5
        mine.feature_extractor.nb_max_frames = 1000
        mine.feature_extractor(LONG, chunk_length=3)
        mine.transcribe = None
        assert mine.model is other.model
        for whisper in (other, third):
            assert whisper.max_length == 448
            assert whisper.feature_extractor.nb_max_frames == 3000
            assert callable(whisper.transcribe)
    del mine, other, third, whisper
    cache.evict()
    with model.lease() as again:
        assert (again.max_length, again.feature_extractor.n_samples) == (448, 480_000)


def test_a_leased_model_is_a_whisper_model(cache: ModelCache) -> None:
    """
    For ``isinstance``, for pipelines made over it, and for who reads its signature.
    """
    with model_of(cache, micro()).lease() as whisper:
        assert isinstance(whisper, WhisperModel)
        assert inspect.signature(whisper.transcribe) == inspect.signature(
            plain_model(micro()).transcribe
        )
        stamps = [{"start": 0, "end": 20}, {"start": 20, "end": 40}]
        pipeline = BatchedInferencePipeline(whisper)
        segments, _ = pipeline.transcribe(LONG, clip_timestamps=stamps, batch_size=2)
        assert [segment.start for segment in segments] == [0, 20]


def test_a_lease_on_a_leased_model_s_view_ends_with_it() -> None:
    """
    What was lent refers to the model until that is unloaded, and says so afterwards,
    whether or not it was loaded again; CTranslate2's own part is noticed if it is kept.
    """
    from whispercache import ModelStillReferenced

    events: list[object] = []
    with ModelCache(variants=False) as cache:
        cache.subscribe(events.append)
        model = model_of(cache, micro())
        with model.lease() as whisper:
            segments, _ = whisper.transcribe(SILENCE)
            assert whisper.feature_extractor is whisper.feature_extractor
        assert whisper.model.is_multilingual
        cache.evict()
        assert not [each for each in events if isinstance(each, ModelStillReferenced)]
        with model.lease() as other:
            kept = other.model
            for late in (whisper.transcribe, whisper.detect_language, whisper.encode):
                with pytest.raises(RuntimeError, match="unloaded after its lease"):
                    late(SILENCE)
            with pytest.raises(RuntimeError, match="iterate over its segments there"):
                next(iter(segments))
            assert "model" not in dir(whisper)
        cache.evict()
        assert [each for each in events if isinstance(each, ModelStillReferenced)]
        del kept


def test_what_a_caller_gives_stays_as_it_is(cache: ModelCache) -> None:
    """
    faster-whisper adds to lists and takes from mappings that it is given.
    """
    model = model_of(cache, micro())
    suppressed, prompt = [5, 6], iter([7, 8])
    vad = {"threshold": 0.4, "max_speech_duration_s": 20.0}
    model.transcribe(SILENCE, suppress_tokens=suppressed, initial_prompt=prompt)
    model.transcribe(SILENCE, batch_size=2, vad_parameters=vad)
    assert suppressed == [5, 6]
    assert vad == {"threshold": 0.4, "max_speech_duration_s": 20.0}


def test_what_a_call_tells_of_itself_is_its_own_too(cache: ModelCache) -> None:
    """
    faster-whisper tells the list that is its default, for all calls of the process.
    """
    model = model_of(cache, micro())
    segments, info = model.transcribe(SILENCE)
    info.transcription_options.temperatures.clear()
    segments.close()
    assert list(model.transcribe(SILENCE)[0])
    with model.lease() as whisper:
        _, info = whisper.transcribe(SILENCE)
    assert info.transcription_options.temperatures == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_an_iterator_of_tokens_is_there_for_a_second_try() -> None:
    """
    A call that ran out of memory is made again.
    """
    assert checked({"initial_prompt": iter([7, 8])}) == {"initial_prompt": [7, 8]}


# Nonsense -----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NUMBERS: list[Any] = ["x", b"1", NAN]
REFUSED: dict[str, list[Any]] = {
    "chunk_length": [15.5, 0, -1, "x", 31, 31.0, 10**9, [10], INF],
    "task": ["transscribe", None, "", 1],
    "beam_size": [0, -1, 2.5, "5", False, None],
    "best_of": [0, -1, 2.5, "5", None],
    "patience": [*NUMBERS, 0, -1, None],
    "length_penalty": [*NUMBERS, INF, None],
    "repetition_penalty": [*NUMBERS, 0, -1, None],
    "no_repeat_ngram_size": [-1, 1.5, "3", None],
    "temperature": [*NUMBERS, -0.1, INF, [], (), [0.0, "hot"], [0.0, -1], None, {0.2}],
    "compression_ratio_threshold": NUMBERS,
    "log_prob_threshold": NUMBERS,
    "no_speech_threshold": NUMBERS,
    "prompt_reset_on_temperature": [*NUMBERS, None],
    "initial_prompt": [5, b"bytes", ["a"], [-1], [1.5], {"a": 1}],
    "prefix": [5, b"bytes", ["a"], True],
    "suppress_tokens": ["", "-1", 5, [-2], ["a"], [1.5]],
    "max_initial_timestamp": [*NUMBERS, -1, INF, None],
    "max_new_tokens": [-1, 1.5, "9", 448, 10**6],
    "clip_timestamps": [None, "x", "0,", "0,-1", [NAN], [-1.0], [{"start": 0}], 5],
    "hallucination_silence_threshold": NUMBERS,
    "hotwords": [5, b"bytes", ["a"]],
    "language_detection_threshold": NUMBERS,
    "language_detection_segments": [0, -1, 1.5, "1", None],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=str,
)
def test_nonsense_is_refused_by_name(name: str, value: Any) -> None:
    """
    With what it may be.
    """
    with pytest.raises((TypeError, ValueError), match=rf"{name} must be .+, not "):
        checked({name: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": None, "temperature": 0.5},
        {"best_of": None, "temperature": 0},
        {"beam_size": np.int64(3), "temperature": np.float32(0.5)},
        {"max_new_tokens": 0},
        {"log_prob_threshold": -INF, "compression_ratio_threshold": None},
        {"suppress_tokens": None},
        {"suppress_tokens": (-1,)},
        {"suppress_tokens": []},
        {"suppress_tokens": (5,)},
        {"clip_timestamps": [], "language": "en"},
        {"clip_timestamps": "", "language": "en"},
        {"clip_timestamps": []},
        {"clip_timestamps": "0,0.5"},
        {"clip_timestamps": [5, 2]},
        {"initial_prompt": np.array([5, 6])},
        {"vad_parameters": "unused"},
        {"prompt_reset_on_temperature": None, "condition_on_previous_text": False},
        {"language_detection_threshold": None, "language": "en"},
        {"max_initial_timestamp": 1e9},
        {"chunk_length": 30},
        {"chunk_length": 30.0},
        {"prefix": (), "hotwords": []},
        {"hotwords": False},
        {"beam_size": True, "no_speech_threshold": False},
        {"language_detection_threshold": None},
        {"vad_filter": True, "vad_parameters": {"max_speech_duration_s": 0.5}},
        {"vad_filter": True, "vad_parameters": SimpleNamespace(**asdict(VadOptions()))},
        {"word_timestamps": 1, "log_progress": 0},
    ],
    ids=str,
)
def test_what_faster_whisper_takes_is_taken(
    cache: ModelCache, options: dict[str, Any]
) -> None:
    """
    And does the same.
    """
    model = model_of(cache, micro())
    segments, _ = model.transcribe(SILENCE, **options)
    assert isinstance(list(segments), list)


BATCHED: list[dict[str, Any]] = [
    {"batch_size": 0},
    {"batch_size": -1},
    {"batch_size": 1.5},
    {"batch_size": "8"},
    {"batch_size": False},
    {"initial_prompt": [5]},
    {"chunk_length": 31},
    {"chunk_length": "x"},
    {"clip_timestamps": "0"},
    {"clip_timestamps": [0.0, 1.0]},
    {"clip_timestamps": [{"start": 0}]},
    {"clip_timestamps": [{"start": 0, "end": NAN}]},
    {"clip_timestamps": [{"start": 0, "end": 1, "speaker": "A"}]},
    {"beam_size": None, "temperature": 0.5},
]


@pytest.mark.parametrize("options", BATCHED, ids=str)
def test_the_pipeline_has_rules_of_its_own(
    make_cache: MakeCache, options: dict[str, Any]
) -> None:
    """
    Where faster-whisper says something about ranges, strings or pybind11.
    """
    (name, *_) = options
    model = make_cache().get_model("small", "cpu")
    with pytest.raises((TypeError, ValueError), match=f"{name} must be "):
        model.transcribe("audio", **{"batch_size": 2, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_length": 15.5},
        {"chunk_length": 0},
        {"best_of": None},
        {"prefix": 5},
        {"clip_timestamps": None},
        {"max_initial_timestamp": "unused"},
        {"temperature": [0.0, "unused"]},
        {"hallucination_silence_threshold": "unused"},
        {"clip_timestamps": [{"start": 0, "end": 1, "id": 7}]},
        {"vad_parameters": {"max_speech_duration_s": "unused"}},
    ],
    ids=str,
)
def test_the_pipeline_takes_what_it_can_do_or_leaves_alone(
    options: dict[str, Any],
) -> None:
    """
    Windows of broken seconds, and what only the other way of working looks at.
    """
    assert checked(options, is_batched=True) == options


VAD: list[Any] = [
    {"treshold": 0.5},
    {"threshold": 1.5},
    {"threshold": "x"},
    {"speech_pad_ms": -1},
    {"min_silence_duration_ms": None},
    {"speech_pad_ms": "x"},
    VadOptions(threshold=50),
    VadOptions(max_speech_duration_s=0),
    VadOptions(max_speech_duration_s=0.03, speech_pad_ms=0),
    VadOptions,
    0.5,
    ["threshold"],
]


@pytest.mark.slow
@pytest.mark.parametrize("value", VAD, ids=str)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_parameters_of_voice_activity_are_checked(
    cache: ModelCache, value: Any, batch_size: int | None
) -> None:
    """
    By name and range, where voice activity is looked for at all.
    """
    model = model_of(cache, micro())
    with pytest.raises((TypeError, ValueError), match=r"^vad_parameters"):
        model.transcribe(
            SILENCE, vad_filter=True, vad_parameters=value, batch_size=batch_size
        )
    assert cache.stats().requests == 0
    list(model.transcribe(SILENCE, vad_parameters=value)[0])


@pytest.mark.parametrize("chunk_length", [None, 12])
def test_the_pipeline_s_limit_holds_for_options_too(chunk_length: int | None) -> None:
    """
    As an object, they would let a stretch of speech be longer than what is heard of it.
    """
    given = VadOptions(threshold=0.3)
    values = checked(
        {"vad_parameters": given, "chunk_length": chunk_length}, is_batched=True
    )
    limited: Any = values["vad_parameters"]
    assert limited.max_speech_duration_s == (chunk_length or 30)
    assert (limited.threshold, given.max_speech_duration_s) == (0.3, INF)
    shorter = VadOptions(max_speech_duration_s=7)
    values = checked({"vad_parameters": shorter}, is_batched=True)
    assert values["vad_parameters"] == shorter
    values = checked({"vad_parameters": given, "vad_filter": True})
    assert values["vad_parameters"] == given


def test_speech_beyond_30_seconds_is_not_lost(cache: ModelCache) -> None:
    """
    A clip that is one long stretch of speech, with options and with a mapping.
    """
    model = model_of(cache, micro())
    fields = {"min_silence_duration_ms": 160, "threshold": 0.1}

    def starts(parameters: Any) -> list[float]:
        segments, _ = model.transcribe(
            clip("en-harbour-long"), batch_size=4, vad_parameters=parameters
        )
        return [segment.start for segment in segments]

    found = starts(VadOptions(**fields))
    assert found == starts(dict(fields))
    assert found[-1] > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_sise": 5}, "no parameter 'beam_sise'; did you mean 'beam_size'"),
        ({"batch": 5}, "no parameter 'batch'"),
        ({"condition": True}, "no parameter 'condition'"),
    ],
)
def test_unknown_parameters_are_told(
    cache: ModelCache, options: dict[str, Any], said: str
) -> None:
    """
    With one of that name, if there is one like it.
    """
    with pytest.raises(TypeError, match=said):
        model_of(cache, micro()).transcribe(SILENCE, **options)
    assert cache.stats().requests == 0


def test_parameters_by_position_are_checked_too() -> None:
    """
    In the order of the function that they are for.
    """
    signature = signature_of(WhisperModel.transcribe)
    assert bound(signature, ("a", "de", "translate"), {"beam_size": 3}) == {
        "audio": "a",
        "language": "de",
        "task": "translate",
        "beam_size": 3,
    }
    with pytest.raises(TypeError, match="'language' was given by position and by name"):
        bound(signature, ("a", "de"), {"language": "fr"})
    with pytest.raises(TypeError, match="40 parameters by position"):
        bound(signature, ("a",) * 40, {})


NONSENSE: list[dict[str, Any]] = [
    {"chunk_length": 15.5},
    {"chunk_length": 0},
    {"task": "x"},
    {"temperature": []},
    {"batch_size": 0},
    {"language": "tlh"},
    {"language": 5},
]


@pytest.mark.parametrize("options", NONSENSE, ids=str)
def test_nonsense_takes_no_lease(
    make_cache: MakeCache, driver: Driver, options: dict[str, Any]
) -> None:
    """
    Nor is the audio decoded, nor a model evicted for it; threads and tasks alike.
    """
    cache = make_cache(max_models=1)
    cache.preload("small", "cpu")
    model: Any = cache.get_model("base", "cpu")
    if driver.__class__.__name__ == "TaskDriver":
        model = driver.call_on(AsyncModelCache(cache), "get_model", "base", "cpu")
    before = cache.stats().requests
    with pytest.raises((TypeError, ValueError)):
        driver.call_on(model, "transcribe", "no such file", **options)
    assert cache.stats().requests == before
    assert [info.key.model for info in cache.models()] == ["small"]


DETECTION: list[dict[str, Any]] = [
    {"language_detection_segments": 0},
    {"language_detection_threshold": "x"},
    {"language_detection_segment": 1},
    {"vad_filter": True, "vad_parameters": {"tresh": 1}},
]


@pytest.mark.parametrize("options", DETECTION, ids=str)
def test_detection_is_checked_too(cache: ModelCache, options: dict[str, Any]) -> None:
    """
    Before its lease.
    """
    with pytest.raises((TypeError, ValueError)):
        model_of(cache, micro()).detect_language(SILENCE, **options)
    assert cache.stats().requests == 0


def test_detection_takes_what_its_signature_says(cache: ModelCache) -> None:
    """
    A mapping of VAD's parameters, on which faster-whisper itself fails; and something
    to listen to.
    """
    model = model_of(cache, micro())
    speech = clip("en-bread")
    found = model.detect_language(
        speech, vad_filter=True, vad_parameters={"threshold": 0.4}
    )
    assert found[0] == "en"
    with pytest.raises(TypeError, match="give audio, or features"):
        model.detect_language()


def test_a_leased_model_checks_too(cache: ModelCache) -> None:
    """
    Whoever holds it would wait for ever, and others behind him.
    """
    with model_of(cache, micro()).lease() as whisper:
        nonsense = {"chunk_length": 0, "task": "x", "suppress_tokens": [9**9]}
        for name, value in nonsense.items():
            options: dict[str, Any] = {name: value}
            with pytest.raises(ValueError, match=f"{name} must be"):
                whisper.transcribe(SILENCE, **options)
        segments, info = whisper.transcribe(SILENCE)
        assert (info.language, len(list(segments))) == ("en", 1)


def test_tokens_that_a_model_does_not_have_never_reach_it(cache: ModelCache) -> None:
    """
    CTranslate2 would write beyond its memory.
    """
    model = model_of(cache, micro())
    for name in ("suppress_tokens", "initial_prompt"):
        options: dict[str, Any] = {name: [10**6]}
        with pytest.raises(ValueError, match=rf"{name} must be ids below \d+, "):
            model.transcribe(SILENCE, **options)
    assert cache.stats().requests == 0
    check_tokens({"suppress_tokens": [99, -1], "initial_prompt": "text"}, 100)


def test_every_parameter_of_faster_whisper_s_is_known_here() -> None:
    """
    A version that has others should be looked at.
    """
    from whispercache.engine.calls.parameters import _CHECKS

    free = {"audio", "language", "log_progress", "condition_on_previous_text"}
    free |= {"suppress_blank", "without_timestamps", "word_timestamps", "multilingual"}
    free |= {"vad_filter"}
    names = set(signature_of(WhisperModel.transcribe).parameters)
    assert names - free == set(_CHECKS)
    batched = set(signature_of(BatchedInferencePipeline.transcribe).parameters)
    assert batched - names == {"batch_size"}


def test_functions_that_take_anything_get_it() -> None:
    """
    As those that tests put in faster-whisper's place.
    """

    def anything(*args: object, **options: object) -> None:
        """
        Take it.
        """

    given = (1, 2), {"beam_size": 3, "x": 4}
    assert own_values(anything, *given) == given


def test_parameters_stay_where_they_were_given() -> None:
    """
    By position or by name, for who is put in a method's place and goes by that.
    """

    def method(self: object, audio: str, task: str = "", *, beam_size: int = 5) -> None:
        """
        Take it.
        """

    assert own_values(method, ("a", "translate"), {"beam_size": 3}) == (
        ("a", "translate"),
        {"beam_size": 3},
    )
    with pytest.raises(TypeError, match="did you mean 'beam_size'"):
        own_values(method, ("a",), {"beam_sise": 3})


# Handles ------------------------------------------------------------------------------


def test_nothing_can_be_set_on_a_cached_model(make_cache: MakeCache) -> None:
    """
    It would reach nobody's model; the error says what would.
    """
    cache = make_cache()
    handles: list[Any] = [cache.get_model("small", "cpu")]
    for model in handles:
        for name in ("max_length", "key", "hf_tokenizer", "beam_size", "transcribe"):
            with pytest.raises(AttributeError, match=r"transcribe\(audio.*lease\(\)"):
                setattr(model, name, 5)
        with pytest.raises(AttributeError, match="cannot be changed"):
            del model.max_length


def test_a_cached_model_is_not_pickled(make_cache: MakeCache, driver: Driver) -> None:
    """
    The cache is in this process; another one names the model to its own.
    """
    cache = make_cache()
    names = [cache.get_model("small", "cpu")]
    names.append(
        driver.call_on(AsyncModelCache(cache), "get_model", "small", "cpu")
        if driver.__class__.__name__ == "TaskDriver"
        else names[0]
    )
    for model in names:
        with pytest.raises(TypeError, match=r"get_model\(\) in the other process"):
            pickle.dumps(model)
        assert copy.copy(model) is copy.deepcopy(model) is model
        assert asdict_of(model) is model
    segments, _ = names[0].transcribe("audio")
    with segments, pytest.raises(TypeError, match=r"list\(segments\)"):
        pickle.dumps(segments)


def asdict_of(model: object) -> object:
    """
    What becomes of a model in a dataclass that is made a dictionary, as configurations
    are.
    """
    from dataclasses import make_dataclass

    return asdict(make_dataclass("Settings", ["model"])(model))["model"]


@pytest.mark.parametrize(
    ("device", "error", "said"),
    [
        ("Cuda", ValueError, "did you mean 'cuda'"),
        ("Cuda:1", ValueError, "did you mean 'cuda:1'"),
        ("gpu", ValueError, "did you mean 'cuda'"),
        ("GPU:0", ValueError, "did you mean 'cuda:0'"),
        ("0", ValueError, "did you mean 'cuda:0'"),
        ("mps", ValueError, "CTranslate2 knows no others"),
        ("", ValueError, "CTranslate2 knows no others"),
        (None, TypeError, "leave it out for 'auto'"),
        (0, TypeError, "did you mean 'cuda:0'"),
        (["cuda"], TypeError, "must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_odd_devices_are_told_what_they_may_be(
    make_cache: MakeCache, device: Any, error: type[Exception], said: str
) -> None:
    """
    Wherever a device is named.
    """
    cache = make_cache()
    calls: list[Any] = [cache.get_model, cache.lease, cache.preload]
    for call in [*calls, *([cache.evict] if device is not None else [])]:
        with pytest.raises(error, match=said):
            call("small", device)
    with pytest.raises(error, match=said):
        cache.lease_many([("small", device)])


def test_a_device_of_pytorch_s_is_told_as_text(make_cache: MakeCache) -> None:
    """
    It prints as what is wanted.
    """

    class Device:
        type, index = "cuda", 0

        def __str__(self) -> str:
            return "cuda:0"

    with pytest.raises(TypeError, match="did you mean 'cuda:0'"):
        make_cache().get_model("small", Device())  # type: ignore[arg-type]


def test_compute_types_may_go_by_device(make_cache: MakeCache) -> None:
    """
    As CTranslate2 takes them.
    """
    cache: Any = make_cache()
    kinds = {"cuda": "int8_float16", "cpu": "int8"}
    assert cache.get_model("small", "cpu", kinds).key.compute_type == "int8_float32"
    assert cache.get_model("small", "cuda:0", kinds).key.compute_type == "int8_float16"
    assert cache.get_model("small", "auto", kinds).key.device.startswith("cuda")
    plain = cache.get_model("small", "cpu").key
    assert cache.get_model("small", "cpu", {}).key == plain
    with cache.lease("small", "cpu", kinds), cache.lease("small", "cpu", "int8"):
        assert cache.stats().loads == 1
    assert cache.stats().hits == 1
    assert cache.evict("small", "cpu", kinds) == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (None, TypeError),
        (8, TypeError),
        (["int8"], TypeError),
        ({"gpu": "int8"}, ValueError),
        ({"cuda": None}, ValueError),
    ],
)
def test_odd_compute_types_are_told_what_they_may_be(
    make_cache: MakeCache, kind: Any, error: type[Exception]
) -> None:
    """
    In place of an error of pybind11's or of a hash.
    """
    with pytest.raises(error, match=r"compute_type must be text such as 'int8'"):
        make_cache().get_model("small", "cpu", compute_type=kind)


def test_a_stream_at_its_end_is_told_so(cache: ModelCache) -> None:
    """
    As after it was written, or read once; one in the middle is heard from there.
    """
    content = Path(clip("en-bread")).read_bytes()
    stream = io.BytesIO()
    stream.write(content)
    model = model_of(cache, micro())
    for call in (model.transcribe, model.detect_language):
        with pytest.raises(AudioError, match=r"at its end; seek\(0\)"):
            call(stream)
    assert cache.stats().requests == 0
    stream.seek(0)
    assert list(model.transcribe(stream)[0])
    with pytest.raises(AudioError, match="cannot decode audio BytesIO"):
        model.transcribe(io.BytesIO(b""))


def test_a_mapped_file_is_a_stream_too(cache: ModelCache) -> None:
    """
    Before Python 3.13, its position is not told where it is set. One whose methods are
    to be awaited is told to be no audio.
    """

    class Awaited:
        def read(self, _size: int = -1) -> object:
            return object()

        seek = tell = read

    model: Any = model_of(cache, micro())
    with (
        Path(clip("en-bread")).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert list(model.transcribe(mapped)[0])
        mapped.seek(len(mapped))
        with pytest.raises(AudioError, match="at its end"):
            model.transcribe(mapped)
    with pytest.raises(AudioError, match="cannot decode audio Awaited"):
        model.transcribe(Awaited())


def test_calls_at_the_end_of_the_interpreter_find_no_model(cache: ModelCache) -> None:
    """
    Whatever view of it they have: it is looked up where it was lent.
    """
    from whispercache.errors import CacheClosed

    model = model_of(cache, micro())
    segments, _ = model.transcribe(LONG)
    (entry,) = cache._core.entries.values()
    assert entry.loaded is not None
    real = entry.loaded.whisper.model
    try:
        assert cache._core.loader.quiesce(entry.loaded, 5)
        with pytest.raises(CacheClosed):
            list(segments)
    finally:
        entry.loaded.whisper.model = real
    assert threading.active_count()
