"""
Requests for transcripts: what their fields mean, and what is done for it.
"""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import UploadFile
from faster_whisper.transcribe import Segment, TranscriptionInfo, Word

from whispercache.server.asked import BATCH, Asked
from whispercache.server.errors import ApiError
from whispercache.server.fields import Asr, Inference, Speech
from whispercache.server.transcripts import (
    Growing,
    as_lines,
    logprobs_of,
    within,
)

FILE = UploadFile(io.BytesIO())


def asked(**fields: Any) -> Asked:
    """
    What a form of OpenAI's API means, and is fine.
    """
    request = Speech(file=FILE, model="m", **fields).asked("transcribe")
    request.check()
    return request


def test_a_plain_form_asks_for_nothing_special() -> None:
    """
    The call has its own defaults, but for the pauses, which the server decides.
    """
    plain = {
        "task": "transcribe",
        "language": None,
        "initial_prompt": None,
        "word_timestamps": False,
    }
    assert asked().options() == plain
    assert asked().options(vad=True) == {**plain, "vad_filter": True}
    assert asked(vad_filter=False).options(vad=True) == plain
    assert asked(vad_filter="true").options() == {**plain, "vad_filter": True}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"language": "en-US"}, {"language": "en"}),
        ({"language": "auto"}, {"language": None}),
        ({"language": "null"}, {"language": None}),
        ({"language": "deu"}, {"language": "de"}),
        ({"languages[]": ["de"]}, {"language": "de"}),
        ({"languages[]": ["de-AT", "eng"]}, {"languages": ["de", "en"]}),
        # Both are true.
        ({"languages[]": ["de", "en"], "language": "de-AT"}, {"language": "de"}),
        ({"languages[]": ["en", "auto"], "language": "fr"}, {"language": "fr"}),
        ({"prompt": "null"}, {"initial_prompt": "null"}),
        ({"temperature": "0"}, {}),
        ({"temperature": "null"}, {}),
        ({"temperature": "0.4"}, {"temperature": [0.4]}),
        ({"temperature[]": ["0", "0.4"]}, {"temperature": [0.0, 0.4]}),
        ({"temperature[]": ["0"]}, {"temperature": [0.0]}),
        ({"temperature[]": [0, 0.4], "temperature": 0}, {"temperature": [0.0, 0.4]}),
        ({"seed": "42"}, {"temperature": [0.0]}),
        ({"seed": "0", "temperature[]": ["0"]}, {"temperature": [0.0]}),
        (
            {"hotwords": "Zug", "keywords[]": ["Köln", "Bonn, Rhein"]},
            {
                "hotwords": "Zug, Köln, Bonn, Rhein",
                "condition_on_previous_text": False,
            },
        ),
        (
            {"hotwords": "Zug", "prompt": "Wir fahren."},
            {"hotwords": "Zug Wir fahren.", "initial_prompt": None},
        ),
        ({"include[]": ["logprobs"]}, {"word_timestamps": True}),
        ({"timestamp_granularities[]": ["segment"]}, {"word_timestamps": False}),
        (
            {"chunking_strategy": "auto"},
            {"vad_filter": True, "batch_size": BATCH},
        ),
        # A window of a batch would be one cue.
        (
            {"chunking_strategy": "auto", "response_format": "srt"},
            {"vad_filter": True, "batch_size": None},
        ),
        (
            {
                "chunking_strategy": '{"type": "server_vad", "threshold": 0.3, '
                '"prefix_padding_ms": 200, "silence_duration_ms": 700}',
                "batch_size": "2",
            },
            {
                "vad_parameters": {
                    "threshold": 0.3,
                    "speech_pad_ms": 200,
                    "min_silence_duration_ms": 700,
                },
                "batch_size": 2,
            },
        ),
        ({"batch_size": "4"}, {"vad_filter": True, "batch_size": 4}),
    ],
)
def test_each_field_reaches_the_call(
    fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """
    By the name that faster-whisper has for it.
    """
    found = asked(**fields).options()
    assert {name: found.get(name) for name in options} == options


def test_fields_within_a_field_are_unknown_too() -> None:
    """
    By both names.
    """
    strategy = '{"type": "server_vad", "eagerness": "high"}'
    fields = {"file": FILE, "model": "m", "chunking_strategy": strategy, "beam": "5"}
    form = Speech.model_validate(fields)
    assert form.unknown() == ["beam", "chunking_strategy.eagerness"]


@pytest.mark.parametrize(
    ("fields", "audio_s", "size"),
    [
        ({"chunking_strategy": "auto"}, 3, 1),
        ({"chunking_strategy": "auto"}, 30, 1),
        ({"chunking_strategy": "auto"}, 31, 3),
        ({"chunking_strategy": "auto"}, 3600, BATCH),
        ({"batch_size": 2}, 3600, 2),
        ({}, 3600, None),
    ],
)
def test_a_batch_is_no_larger_than_the_audio(
    fields: dict[str, Any], audio_s: float, size: int | None
) -> None:
    """
    Memory is reserved for all of it, which there might not be.
    """
    assert asked(**fields).fitted(audio_s).batch_size == size


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"timestamp_granularities[]": ["word"]}, "timestamp_granularities"),
        ({"include[]": ["logprobs"], "response_format": "srt"}, "include"),
        ({"seed": 1, "temperature": 0.2}, "seed"),
        ({"batch_size": 2, "vad_filter": False}, "batch_size"),
        ({"chunking_strategy": "auto", "vad_filter": False}, "chunking_strategy"),
        (
            {
                "chunking_strategy": "auto",
                "vad_filter": False,
                "response_format": "srt",
            },
            "chunking_strategy",
        ),
        ({"batch_size": 2, "temperature[]": [0, 0.5]}, "temperature"),
        ({"temperature[]": [0.4], "temperature": 0}, "temperature"),
        ({"languages[]": ["en"], "language": "de"}, "languages"),
        ({"languages[]": ["fr", "en"], "language": "de"}, "languages"),
        ({"hotwords": "é" * 400, "prompt": "a"}, "hotwords"),
        ({"keywords[]": ["a" * 300] * 4}, "hotwords"),
        ({"language": "klingon"}, "language"),
        ({"languages[]": ["en", "klingon"]}, "languages"),
        ({"keep_alive": "soon"}, "keep_alive"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    """
    And never left out of the call.
    """
    with pytest.raises(ApiError) as refused:
        asked(**fields)
    assert refused.value.status == 400
    assert refused.value.detail.param == param


def test_other_formats_need_no_words_for_segments() -> None:
    """
    A client may ask for segments always; only words need a place.
    """
    for kind in ("json", "text", "srt", "vtt", "verbose_json"):
        asked(response_format=kind, **{"timestamp_granularities[]": ["segment"]})


def knows(*languages: str, detects: bool = True) -> Any:
    """
    A model that knows these languages.
    """
    return SimpleNamespace(
        languages=languages,
        is_multilingual=languages != ("en",),
        can_detect=detects,
    )


@pytest.mark.parametrize("language", ["en", "en-GB", "eng", "English", "auto", ""])
def test_a_model_of_english_takes_any_english(language: str) -> None:
    """
    Whatever the region is.
    """
    asked(language=language).check_model("tiny.en", knows("en"))
    asked(**{"languages[]": ["de", language or "en"]}).check_model("m", knows("en"))


def test_a_model_refuses_languages_that_it_does_not_know() -> None:
    """
    By the field that names them.
    """
    cases: list[tuple[Asked, Any, str]] = [
        (asked(language="de"), knows("en"), "language"),
        (asked(**{"languages[]": ["de", "fr"]}), knows("en"), "languages"),
        (Asked(task="translate"), knows("en"), "model"),
        (asked(language="yue"), knows("en", "zh"), "language"),
        (asked(**{"languages[]": ["en", "yue"]}), knows("en", "zh"), "languages"),
        (asked(), knows("en", "de", detects=False), "language"),
    ]
    for request, known, param in cases:
        with pytest.raises(ApiError) as refused:
            request.check_model("m", known)
        assert refused.value.detail.param == param
    # Not known until it is downloaded.
    asked(language="de").check_model("m", None)


def test_whisper_cpp_s_form_means_the_same() -> None:
    """
    Its ladder of temperatures is Whisper's own.
    """
    form = Inference(
        file=FILE,
        **cast("dict[str, Any]", {"translate": "true", "language": "de"}),
        temperature_inc=0.2,
        vad_threshold=0.4,
        vad=True,
    )
    request = form.asked()
    assert request.task == "translate"
    assert request.temperatures == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    options = request.options()
    assert options["language"] == "de"
    assert options["vad_parameters"] == {"threshold": 0.4}
    one = Inference(file=FILE, temperature=0.3, temperature_inc=0).asked()
    assert one.temperatures == (0.3,)
    assert Inference(file=FILE, language="de", detect_language=True).asked() == (
        Inference(file=FILE, language="auto").asked()
    )


def test_whisper_asr_webservices_parameters_mean_the_same() -> None:
    """
    Words are timed in whatever format.
    """
    request = Asr(output="srt", language="en", word_timestamps=True).asked()
    request.check()
    assert request.options()["word_timestamps"] is True
    assert Asr(output="json").asked().kind == "segments"
    more: Any = {"video_file": "x"}
    assert Asr(**more).unknown() == ["video_file"]


# Transcripts --------------------------------------------------------------------------


def segment(start: float, end: float, text: str = " Hi.", **more: Any) -> Segment:
    """
    A segment with one word.
    """
    words = [Word(start, end, text, more.pop("probability", 0.5))]
    return Segment(1, 0, start, end, text, [1], -0.5, 1.0, 0.1, words, 0.0)


INFO = cast("TranscriptionInfo", SimpleNamespace(language="en", duration=3.0))


@pytest.mark.parametrize(
    ("span", "kept"),
    [((0, 2), (0, 2)), ((1, 30), (1, 3)), ((3.5, 30), (3, 3)), ((0, 3), (0, 3))],
)
def test_nothing_ends_after_the_audio(
    span: tuple[float, float], kept: tuple[float, float]
) -> None:
    """
    Neither segments, nor words, nor cues.
    """
    found = within(segment(*span), 3.0)
    assert (found.start, found.end) == kept
    assert found.words is not None
    assert (found.words[0].start, found.words[0].end) == kept
    (times,) = [line for line in cues(segment(*span), "srt") if "-->" in line]
    start, end = times.split(" --> ")
    assert start < end <= "00:00:03,000"


def cues(one: Segment, kind: str) -> list[str]:
    """
    The lines of a transcript of one segment.
    """
    return "".join(as_lines([one], INFO, kind)).splitlines()


@pytest.mark.parametrize("kind", ["text", "json", "verbose_json", "srt", "vtt"])
@pytest.mark.parametrize(
    "texts", [[], [" One."], [" One.", " ", " Two,", "", " three."], [" "]]
)
def test_a_stream_adds_up_to_the_whole(kind: str, texts: list[str]) -> None:
    """
    In each format, numbers and head included; empty segments are no cues.
    """
    segments = [segment(i, i + 0.5, text) for i, text in enumerate(texts)]
    growing = Growing(INFO, kind)
    pieces = [growing.add(each) for each in segments]
    whole = "".join([*pieces, growing.rest()])
    if kind in ("srt", "vtt"):
        assert whole == "".join(as_lines(segments, INFO, kind))
    else:
        assert whole.strip() == "".join(texts).strip()


def test_log_probabilities_are_numbers_that_json_has() -> None:
    """
    Also where alignment left nothing of a word.
    """
    found = logprobs_of([segment(0, 1, " Zöe", probability=p) for p in (1.0, 0.0)])
    assert found[0].logprob == 0
    assert -1000 < found[1].logprob < -10
    assert bytes(found[0].bytes).decode() == found[0].token == " Zöe"
