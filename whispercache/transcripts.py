"""
Transcripts: as plain text, SubRip or WebVTT subtitles, or JSON.

Each format is a generator, so that the first words can be written while the rest is
still being computed. Pure: no file, no model.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


@dataclass(frozen=True, slots=True)
class Cue:
    """
    A piece of speech, with its start and end in seconds since the audio began.
    """

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """
    The transcript of one file by one model.
    """

    file: str  # as it was named
    model: str  # its key, as text
    language: str  # its code, given or detected
    duration_s: float
    cues: Iterable[Cue]  # often a generator, to be consumed once


def _txt(transcript: Transcript) -> Iterator[str]:
    for cue in transcript.cues:
        if text := " ".join(cue.text.split()):
            yield f"{text}\n"


def _srt(transcript: Transcript) -> Iterator[str]:
    # SubRip has no escape: an arrow in the text would be read as the times of a cue.
    for number, (start_ms, end_ms, text) in enumerate(_spans(transcript), 1):
        span = f"{_clock(start_ms, ',')} --> {_clock(end_ms, ',')}"
        yield f"{number}\n{span}\n{text.replace('-->', '->')}\n\n"


def _vtt(transcript: Transcript) -> Iterator[str]:
    """
    Yields WebVTT subtitles.

    Source: https://www.w3.org/TR/webvtt1/, sections 4.1 and 4.2.2.
    """
    yield "WEBVTT\n\n"
    for start_ms, end_ms, text in _spans(transcript):
        span = f"{_clock(start_ms, '.')} --> {_clock(end_ms, '.')}"
        yield f"{span}\n{html.escape(text, quote=False)}\n\n"


def _json(transcript: Transcript) -> Iterator[str]:
    """
    Yields one object on one line, hence JSON Lines where there are several.
    """
    # The text stands before the segments, so all of them are needed first.
    cues = list(transcript.cues)
    document = {
        "file": transcript.file,
        "model": transcript.model,
        "language": transcript.language,
        "duration": round(transcript.duration_s, 3),
        "text": "".join(cue.text for cue in cues).strip(),
        "segments": [
            {
                "start": round(cue.start_s, 3),
                "end": round(cue.end_s, 3),
                "text": cue.text.strip(),
            }
            for cue in cues
        ],
    }
    yield json.dumps(document, ensure_ascii=False) + "\n"


# The formats by name, which is also the ending of their files.
FORMATS: Mapping[str, Callable[[Transcript], Iterator[str]]] = MappingProxyType(
    {"txt": _txt, "srt": _srt, "vtt": _vtt, "json": _json}
)


def _spans(transcript: Transcript) -> Iterator[tuple[int, int, str]]:
    """
    Yields start and end in milliseconds, and lines of text, of the cues that have any.
    """
    # Whisper counts in windows of 30 s, which may end after the audio.
    last_ms = max(1, round(transcript.duration_s * 1000))
    for cue in transcript.cues:
        lines = (" ".join(line.split()) for line in cue.text.splitlines())
        # An empty line would end the cue.
        if text := "\n".join(filter(None, lines)):
            # Subtitles have no times before the start.
            start_ms = min(max(0, round(cue.start_s * 1000)), last_ms - 1)
            end_ms = min(round(cue.end_s * 1000), last_ms)
            # A cue that ends when it starts is never shown.
            yield start_ms, max(end_ms, start_ms + 1), text


def _clock(total_ms: int, point: str) -> str:
    """
    Returns ``"01:02:03,450"``; more than two digits of hours where needed.
    """
    minutes, ms = divmod(total_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{ms // 1000:02}{point}{ms % 1000:03}"
