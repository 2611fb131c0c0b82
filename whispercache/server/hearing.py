"""
The way of a request from an upload to its transcript, whatever form it came in.
"""

from __future__ import annotations

import shutil
import tempfile
import wave
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from fastapi import Depends, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from whispercache.engine.calls.prepare import workload_of
from whispercache.errors import AudioError, LoadFailed
from whispercache.planning.priority import INTERACTIVE

from . import seen
from .asked import NO_WORDS
from .decode import samples
from .engine import Terms
from .errors import ApiError, as_refusal, nonsense
from .forms import FILE
from .offers import ALIGNMENT_HEADS
from .transcripts import (
    MEDIA_TYPES,
    Growing,
    Plain,
    Verbose,
    as_done,
    as_event,
    as_lines,
    as_plain,
    as_segments,
    as_verbose,
    logprobs_of,
    within,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import UploadFile
    from faster_whisper.transcribe import Segment, TranscriptionInfo

    from .asked import Asked
    from .engine import Segments
    from .offers import Offer
    from .service import Service

_RATE_HZ = 16_000


async def _lifetime() -> AsyncIterator[AsyncExitStack]:
    """
    Yields the stack for all that a request holds until it is over.
    """
    async with AsyncExitStack() as stack:
        yield stack


Lifetime: TypeAlias = Annotated[AsyncExitStack, Depends(_lifetime)]
Answer: TypeAlias = Response | Plain | Verbose


@dataclass(frozen=True, slots=True)
class Hearing:
    """
    One request at work; *lifetime* ends all that it holds.

    *is_raw* says that the upload has samples alone: 16 bits, mono, 16 kHz; *level* is
    the priority of the request.
    """

    service: Service
    lifetime: AsyncExitStack
    file: UploadFile
    offer: Offer
    asked: Asked
    is_raw: bool = False
    level: float = INTERACTIVE

    async def answer(self) -> Answer:
        """
        Returns the transcript in the format asked for, or the stream that becomes it.
        """
        asked = self.asked
        segments, info = await self.begin()
        # Nothing has failed so far, so the status may be sent.
        if asked.stream:
            events = _events(segments, info, asked)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            # Without a stream, an error in the middle still has a status.
            heard = [within(segment, info.duration) async for segment in segments]
        except (LoadFailed, RuntimeError) as error:
            # The files did not tell; CTranslate2 does.
            if asked.wants_words and ALIGNMENT_HEADS in str(error):
                raise nonsense(asked.words_field, NO_WORDS) from error
            raise
        if asked.kind == "json":
            return as_plain(heard, info, asked)
        if asked.kind == "verbose_json":
            return as_verbose(heard, info, asked)
        if asked.kind == "segments":
            return JSONResponse(as_segments(heard, info))
        text = "".join(as_lines(heard, info, asked.kind))
        return Response(text, media_type=MEDIA_TYPES.get(asked.kind, _PLAIN))

    async def begin(self) -> tuple[Segments, TranscriptionInfo]:
        """
        Decodes, waits for the model, and begins to transcribe.
        """
        engine, offer, asked = self.service.engine, self.offer, self.asked
        asked.check()
        known = await engine.knowledge(offer)
        asked.check_model(offer.name, known)
        if asked.wants_words and not await engine.may_tell_words(offer):
            raise nonsense(asked.words_field, NO_WORDS)
        # A full queue is told before the upload is decoded, which costs the most.
        visit = self.lifetime.enter_context(self.service.gate.visit(offer.name))
        # Of its own: whatever becomes of the request, all is removed with it.
        folder = Path(
            self.lifetime.enter_context(
                tempfile.TemporaryDirectory(prefix="whispercache-")
            )
        )
        # Decoded before the wait, so that the queue holds files and no memory, and
        # knows how long the work will be.
        seen.enter("decoding")
        audio_s = await self._decode(folder / "upload", folder / "samples")
        tell = visit.teller(seen.teller(audio_s))
        asked = asked.fitted(audio_s)
        options = asked.options(vad=self.service.options.vad)
        terms = Terms(
            self.service.options.timeout_s,
            asked.keep_alive,
            # Memory is reserved for this length, and no longer one.
            workload_of(options, asked.batch_size, round(audio_s * _RATE_HZ)),
            # A model that is downloaded first is checked between download and load.
            partial(asked.check_model, offer.name) if known is None else None,
            self.level,
            audio_s,
        )
        heard = partial(samples, folder / "samples")
        with visit.waiting():
            segments, info = await engine.transcribe(offer, heard, options, terms, tell)
        await self.lifetime.enter_async_context(segments)
        return segments, info

    async def _decode(self, upload: Path, decoded: Path) -> float:
        """
        Decodes the upload, keeps no more of it than its samples, and returns its
        seconds.
        """
        await run_in_threadpool(_save, self.file, upload, is_raw=self.is_raw)
        try:
            return await self.service.decoder.decode(upload, decoded)
        except AudioError as error:
            if self.file.filename:
                raise
            hint = (
                "the file came without a name; curl means a file by -F file=@talk.wav"
            )
            raise ApiError(
                400, f"{error}; {hint}", code="invalid_audio", param=FILE
            ) from None
        finally:
            await run_in_threadpool(upload.unlink)


_PLAIN = MEDIA_TYPES["text"]


def _save(file: UploadFile, target: Path, *, is_raw: bool) -> None:
    # Closed when copied: Starlette would keep the spooled file until the end of the
    # answer.
    with file.file, target.open("wb") as out:
        # A file with a header needs none, whatever its client says.
        if is_raw and file.file.read(4) != b"RIFF":
            with wave.open(out, "wb") as header:
                header.setparams((1, 2, _RATE_HZ, (file.size or 0) // 2, "NONE", ""))
                header.writeframesraw(b"")
        file.file.seek(0)
        shutil.copyfileobj(file.file, out)


async def _events(
    segments: Segments, info: TranscriptionInfo, asked: Asked
) -> AsyncIterator[bytes]:
    heard: list[Segment] = []
    growing, text = Growing(info, asked.kind), ""
    try:
        async for each in segments:
            segment = within(each, info.duration)
            heard.append(segment)
            delta = growing.add(segment)
            text += delta
            more = (
                {"logprobs": [p.model_dump() for p in logprobs_of([segment])]}
                if asked.logprobs
                else {}
            )
            if delta:
                yield as_event("transcript.text.delta", delta=delta, **more)
    except Exception as error:
        # The status has been sent: what went wrong is an event, too.
        detail = as_refusal(error).detail
        seen.failed(detail.code)
        yield as_event("error", error=detail.model_dump())
        return
    yield as_done(heard, info, asked, text + growing.rest())
