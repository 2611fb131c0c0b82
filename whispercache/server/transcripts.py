"""
Transcripts in the shapes of OpenAI's API. Pure: segments in, text and JSON out.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from whispercache.engine.calls.languages import LANGUAGES
from whispercache.transcripts import FORMATS, Cue, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from faster_whisper.transcribe import Segment, TranscriptionInfo

    from .asked import Asked

# OpenAI's SubRip is plain text.
MEDIA_TYPES = {
    "text": "text/plain; charset=utf-8",
    "srt": "text/plain; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}

# What a float has room for; log(0) is nothing that JSON has.
_LEAST = 1e-30

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


class Logprob(BaseModel):
    """
    The log probability of a word: the mean of its tokens', as Whisper hears them.
    """

    token: str
    bytes: list[int]
    logprob: float


class Language(BaseModel):
    """
    A language that was heard.
    """

    code: str


class Plain(BaseModel):
    """
    The answer to ``response_format=json``.
    """

    text: str
    languages: list[Language] | None = None
    logprobs: list[Logprob] | None = None
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


def within(segment: Segment, duration_s: float) -> Segment:
    """
    Returns a segment, with its words, that ends where the audio does at the latest:
    Whisper counts in windows of 30 s.
    """
    if segment.end <= duration_s:
        return segment
    words = segment.words and [
        replace(each, start=min(each.start, duration_s), end=min(each.end, duration_s))
        for each in segment.words
    ]
    start_s = min(segment.start, duration_s)
    return replace(segment, start=start_s, end=duration_s, words=words)


def logprobs_of(segments: Sequence[Segment]) -> list[Logprob]:
    """
    Returns the log probabilities of all words, each as it stands in the text.
    """
    return [
        Logprob(
            token=word.word,
            bytes=list(word.word.encode()),
            # Alignment may leave nothing for a word.
            logprob=math.log(max(word.probability, _LEAST)),
        )
        for segment in segments
        for word in segment.words or ()
    ]


def as_plain(
    segments: Sequence[Segment], info: TranscriptionInfo, asked: Asked
) -> Plain:
    """
    Returns the text alone, or with what was asked for besides.
    """
    return Plain(
        text=text_of(segments),
        languages=[Language(code=info.language)] if asked.languages else None,
        logprobs=logprobs_of(segments) if asked.logprobs else None,
        usage=_usage(info),
    )


def as_verbose(
    segments: Sequence[Segment], info: TranscriptionInfo, asked: Asked
) -> Verbose:
    """
    Returns the text with its segments, its words, or both.
    """
    has_words = "word" in asked.granularities
    is_english = asked.task == "translate"
    return Verbose(
        task=asked.task,
        # OpenAI's API has names here, not codes.
        language="english" if is_english else LANGUAGES[info.language],
        duration=info.duration,
        text=text_of(segments),
        segments=None
        if has_words and "segment" not in asked.granularities
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


def as_segments(segments: Sequence[Segment], info: TranscriptionInfo) -> dict[str, Any]:
    """
    Returns all that is known, as whisper-asr-webservice does.
    """
    return {
        "language": info.language,
        "segments": [asdict(segment) for segment in segments],
        "text": text_of(segments),
    }


def as_tsv(segments: Sequence[Segment]) -> Iterator[str]:
    """
    Yields the lines of a table: start and end in milliseconds, and the text.
    """
    yield "start\tend\ttext\n"
    for each in segments:
        text = " ".join(each.text.split())
        yield f"{round(each.start * 1000)}\t{round(each.end * 1000)}\t{text}\n"


def as_lines(
    segments: Sequence[Segment], info: TranscriptionInfo, kind: str
) -> Iterator[str]:
    """
    Yields the text as ``"text"``, ``"txt"``, ``"tsv"``, ``"srt"`` or ``"vtt"``.
    """
    if kind == "text":
        yield f"{text_of(segments)}\n"
    elif kind == "tsv":
        yield from as_tsv(segments)
    else:
        yield from _written(map(_cue, segments), info, kind)


def _cue(segment: Segment) -> Cue:
    return Cue(segment.start, segment.end, segment.text)


def _written(cues: Iterable[Cue], info: TranscriptionInfo, kind: str) -> Iterator[str]:
    return FORMATS[kind](Transcript("", "", info.language, info.duration, cues))


class Growing:
    """
    A transcript that grows by one segment after the other, in one of the formats.
    """

    def __init__(self, info: TranscriptionInfo, kind: str) -> None:
        self._cues: deque[Cue] = deque()
        self._is_empty = True
        self._lines: Iterator[str] | None = (
            _written(iter(self._cues.popleft, None), info, kind)
            if kind in ("srt", "vtt")
            else None
        )
        # Its head stands alone.
        self._head: str = next(self._lines) if self._lines and kind == "vtt" else ""

    def add(self, segment: Segment) -> str:
        """
        Returns the text that a further segment adds.
        """
        head, self._head = self._head, ""
        if self._lines is None:
            # Segments begin with a space, which a first one has no use for.
            text: str = segment.text.lstrip() if self._is_empty else segment.text
        elif segment.text.strip():
            self._cues.append(_cue(segment))
            # Takes just the cue that is there.
            text = f"{head}{next(self._lines)}"
        else:
            return head
        self._is_empty = False
        return text

    def rest(self) -> str:
        """
        Returns what has to be there even if nothing was heard.
        """
        return self._head


def as_done(
    segments: Sequence[Segment], info: TranscriptionInfo, asked: Asked, text: str
) -> bytes:
    """
    Returns the event at the end of a stream: the whole text, with all that the format
    has besides.
    """
    more: dict[str, Any] = {}
    if asked.kind == "verbose_json":
        more = as_verbose(segments, info, asked).model_dump(exclude_none=True)
    elif asked.kind == "json":
        more = as_plain(segments, info, asked).model_dump(exclude_none=True)
    else:
        more = {"text": text, "usage": _usage(info).model_dump()}
    return as_event("transcript.text.done", **{"duration": info.duration, **more})


def as_event(kind: str, **fields: object) -> bytes:
    """
    Returns one server-sent event.
    """
    document = {"type": kind, **fields}
    # JSON has no line breaks outside of escapes, so one data line is enough.
    return f"event: {kind}\ndata: {json.dumps(document)}\n\n".encode()
