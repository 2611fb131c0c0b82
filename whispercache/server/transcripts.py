"""
Transcripts in the shapes of OpenAI's API. Pure: segments in, text and JSON out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from whispercache.engine.calls.languages import LANGUAGES
from whispercache.transcripts import FORMATS, Cue, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from faster_whisper.transcribe import Segment, TranscriptionInfo

MEDIA_TYPES = {
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}

_SEGMENT_FIELDS = (
    *("seek", "start", "end", "text", "tokens"),
    *("avg_logprob", "compression_ratio", "no_speech_prob"),
)


class Usage(BaseModel):
    """
    The amount of audio that was worked through.
    """

    type: Literal["duration"] = "duration"
    seconds: int


class Plain(BaseModel):
    """
    The answer to ``response_format=json``.
    """

    text: str
    usage: Usage


class VerboseWord(BaseModel):
    """
    A word with its times, in seconds.
    """

    word: str
    start: float
    end: float


class VerboseSegment(BaseModel):
    """
    A stretch of speech with Whisper's own figures.
    """

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class Verbose(BaseModel):
    """
    The answer to ``response_format=verbose_json``.
    """

    task: Literal["transcribe", "translate"]
    language: str
    duration: float
    text: str
    segments: list[VerboseSegment] | None = None
    words: list[VerboseWord] | None = None
    usage: Usage


def text_of(segments: Sequence[Segment]) -> str:
    """
    Returns the whole text.
    """
    return "".join(segment.text for segment in segments).strip()


def _usage(info: TranscriptionInfo) -> Usage:
    return Usage(seconds=round(info.duration))


def as_plain(segments: Sequence[Segment], info: TranscriptionInfo) -> Plain:
    """
    Returns the text alone.
    """
    return Plain(text=text_of(segments), usage=_usage(info))


def as_verbose(
    segments: Sequence[Segment],
    info: TranscriptionInfo,
    task: Literal["transcribe", "translate"],
    granularities: Sequence[str],
) -> Verbose:
    """
    Returns the text with its segments, its words, or both.
    """
    has_words = "word" in granularities
    return Verbose(
        task=task,
        # OpenAI's API has names here, not codes.
        language="english" if task == "translate" else LANGUAGES[info.language],
        duration=info.duration,
        text=text_of(segments),
        segments=None
        if has_words and "segment" not in granularities
        else [
            VerboseSegment(
                id=number,
                **{name: getattr(segment, name) for name in _SEGMENT_FIELDS},
                temperature=segment.temperature or 0.0,
            )
            for number, segment in enumerate(segments)
        ],
        # Whisper's words begin with a space.
        words=[
            VerboseWord(word=word.word.strip(), start=word.start, end=word.end)
            for segment in segments
            for word in segment.words or ()
        ]
        if has_words
        else None,
        usage=_usage(info),
    )


def as_lines(
    segments: Sequence[Segment], info: TranscriptionInfo, kind: str
) -> Iterator[str]:
    """
    Yields the text as ``"text"``, ``"srt"`` or ``"vtt"``.
    """
    if kind == "text":
        yield f"{text_of(segments)}\n"
        return
    cues = [Cue(each.start, each.end, each.text) for each in segments]
    transcript = Transcript("", "", info.language, info.duration, cues)
    yield from FORMATS[kind](transcript)


def as_event(kind: str, **fields: object) -> bytes:
    """
    Returns one server-sent event.
    """
    document = {"type": kind, **fields}
    # JSON has no line breaks outside of escapes, so one data line is enough.
    return f"event: {kind}\ndata: {json.dumps(document)}\n\n".encode()
