"""
One client's conversation: what it asks for, what it says, and what was heard.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from starlette.requests import ClientDisconnect
from wyoming.asr import Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.error import Error
from wyoming.event import async_write_event
from wyoming.info import AsrModel, AsrProgram, Attribution, Info
from wyoming.ping import Pong

from whispercache.engine.audio.decoder import SAMPLES_PER_S
from whispercache.engine.calls.prepare import workload_of
from whispercache.server import seen
from whispercache.server.calls import unless
from whispercache.server.decode import samples
from whispercache.server.engine import Terms
from whispercache.server.errors import ApiError, as_refusal, nonsense, shutting_down
from whispercache.server.following import log_end
from whispercache.version import __version__

from .asked import Asked, languages_of
from .recording import Format, Recording
from .wire import PIECE_BYTES, BrokenStream, Frame, read_frame, read_payload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from faster_whisper.transcribe import TranscriptionInfo
    from wyoming.event import Eventable

    from whispercache.server.engine import Segments
    from whispercache.server.seen import Outcome, SeenRequest
    from whispercache.server.service import Service

_log = logging.getLogger("whispercache")

PROGRAM: Final = "whispercache"

PROTOCOL: Final = "WYOMING"
"""
The method of its requests, where others have one of HTTP's.
"""

AFTER_ERROR_S: Final = 3.0
"""
Seconds that a client has to go on after an error; then its connection is closed. Home
Assistant reads on until there is a transcript or an end, and knows no errors.
Source: homeassistant/components/wyoming/stt.py, async_process_audio_stream.
"""

SEND_S: Final = 30.0
"""
Seconds that a client may take to read what it is sent.
"""

END_S: Final = 2.0
"""
Seconds at the end of a connection for its last words.
"""

_T = TypeVar("_T")


class Left(Exception):
    """
    The client has left, or says nothing any more.
    """


class Session:
    """
    A conversation, from the first event to the end of the connection.

    Args:
        service: Has the models and the limits.
        reader, writer: The connection.
        left: Set when the client has left.
    """

    def __init__(
        self,
        service: Service,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        left: asyncio.Event,
    ) -> None:
        self._service = service
        self._reader = reader
        self._writer = writer
        self._left = left
        # None after a wish that was refused: what is said to it has no answer.
        self._asked: Asked | None = Asked()
        self._recording: Recording | None = None
        # What it says, and the answer to it, as others see them.
        self._request: SeenRequest | None = None
        # What it says now was refused, and is passed over to its end.
        self._is_refused = False
        self._has_failed = False
        self._spoken_by_s = 0.0
        # For the end of the server: with what is under way, the connection ends.
        self.is_answering: bool = False
        self.is_last: bool = False
        self._handlers: dict[str, Callable[[Frame], Awaitable[None]]] = {
            "describe": self._describe,
            "ping": self._ping,
            "select-program": self._select,
            "transcribe": self._transcribe,
            "audio-start": self._start,
            "audio-chunk": self._chunk,
            "audio-stop": self._stop,
        }

    async def run(self) -> None:
        """
        Listens and answers until the client leaves, breaks the protocol, or is silent
        for too long. Never raises what a client can cause.
        """
        try:
            while not self.is_last and (frame := await self._next()) is not None:
                await self._handle(frame)
        except BrokenStream as error:
            await self._tell_end(ApiError(400, str(error), code="broken_stream"))
            await self._linger()
        except asyncio.CancelledError:
            # By the end of the server.
            await self._tell_end(shutting_down())
        except (Left, OSError):
            pass
        except Exception as error:
            await self._tell_end(as_refusal(error))
        finally:
            self._forget()
            await hang_up(self._writer)

    async def _tell_end(self, error: ApiError) -> None:
        self._end_refused(error)
        try:
            await self._send(Error(str(error), error.detail.code), END_S)
        except (Left, OSError):
            _log.debug("a client left before it was told: %s", error)

    async def _linger(self) -> None:
        """
        Drops what still comes for a moment: a connection that is closed in the middle
        of it would be reset, and its client never see the error.
        """
        with suppress(TimeoutError, asyncio.TimeoutError, OSError):
            await asyncio.wait_for(self._drop(), END_S)

    async def _drop(self) -> None:
        while await self._reader.read(PIECE_BYTES):
            pass

    # What comes -------------------------------------------------------------------

    async def _next(self) -> Frame | None:
        """
        Returns the next event, if the client says it in time.
        """
        timeout_s = self._service.options.upload_timeout_s
        if self._recording is not None:
            # However slowly it speaks, it comes to an end.
            now_s = asyncio.get_running_loop().time()
            timeout_s = min(timeout_s, max(0.0, self._spoken_by_s - now_s))
        elif self._has_failed and not self._is_refused:
            timeout_s = AFTER_ERROR_S
        return await _in_time(read_frame(self._reader), timeout_s)

    async def _handle(self, frame: Frame) -> None:
        if frame.payload_bytes > self._service.options.max_upload_bytes:
            raise BrokenStream(f"{frame.type} has {frame.payload_bytes} bytes")
        handler = self._handlers.get(frame.type)
        # The protocol has unknown events passed over.
        if handler is not None:
            if frame.type != "describe":
                self._has_failed = False
            try:
                await handler(frame)
            except (Left, ConnectionError, ClientDisconnect):
                raise Left from None
            except Exception as error:
                await self._refuse(error)
        if frame.type != "audio-chunk":
            await self._pass_over(read_payload(self._reader, frame.payload_bytes))

    async def _pass_over(self, pieces: AsyncIterator[bytes]) -> None:
        async def drop() -> None:
            async for _ in pieces:
                pass

        await _in_time(drop(), self._service.options.upload_timeout_s)

    async def _refuse(self, error: Exception) -> None:
        """
        Tells an error, and goes on.
        """
        refusal = as_refusal(error)
        self._end_refused(refusal)
        self._forget()
        self._has_failed = True
        await self._send(Error(str(refusal), refusal.detail.code))

    def _forget(self) -> None:
        self._end("left")
        if self._recording is not None:
            self._recording.close()
            self._recording = None

    def _follow(self) -> SeenRequest:
        """
        Begins a request, unless one has begun, and lists it.
        """
        if self._request is None:
            request_id = f"req_{secrets.token_hex(16)}"
            self._request = self._service.seen.begin(request_id, PROTOCOL)
            self._request.route = "transcribe"
            self._request.admit()
        return self._request

    def _end_refused(self, error: ApiError) -> None:
        if self._request is not None:
            self._request.error = error.detail.code
            self._end("failed" if error.is_ours else "refused")

    def _end(self, outcome: Outcome) -> None:
        """
        Ends the request, unless that was done.
        """
        request, self._request = self._request, None
        if request is not None:
            request.end(outcome)
            log_end(request)

    # What is asked ----------------------------------------------------------------

    async def _describe(self, _frame: Frame) -> None:
        await self._send(await info_of(self._service))

    async def _ping(self, frame: Frame) -> None:
        text = frame.data.get("text")
        await self._send(Pong(text if isinstance(text, str) else None))

    async def _select(self, frame: Frame) -> None:
        if frame.data.get("name") != PROGRAM:
            raise nonsense("name", f"the only program here is {PROGRAM}")

    async def _transcribe(self, frame: Frame) -> None:
        self._forget()
        self._asked, self._is_refused = None, True
        with seen.following(self._follow()):
            asked = Asked.of(frame.data)
            await asked.offer(self._service)
        self._asked, self._is_refused = asked, False

    # What is said -----------------------------------------------------------------

    async def _start(self, frame: Frame) -> None:
        if self._recording is not None:
            self._forget()
        self._is_refused = self._asked is None
        if not self._is_refused:
            self._begin(frame)

    def _begin(self, frame: Frame) -> Recording:
        options = self._service.options
        self._follow()
        self._is_refused = True
        shape = Format.of(frame.data)
        self._recording = Recording(
            shape, options.max_duration_s, options.max_upload_bytes
        )
        self._is_refused = False
        now_s = asyncio.get_running_loop().time()
        self._spoken_by_s = now_s + options.max_duration_s + options.upload_timeout_s
        return self._recording

    async def _chunk(self, frame: Frame) -> None:
        failure: Exception | None = None
        timeout_s = self._service.options.upload_timeout_s
        pieces = read_payload(self._reader, frame.payload_bytes)
        if not self._is_refused:
            try:
                await _in_time(self._add(frame, pieces), timeout_s)
            except (Left, ConnectionError):
                raise
            except Exception as error:
                self._is_refused, failure = True, error
        # What is left of it, so that the next event is found.
        await self._pass_over(pieces)
        if failure is not None:
            raise failure

    async def _add(self, frame: Frame, pieces: AsyncIterator[bytes]) -> None:
        # Some clients begin without audio-start.
        recording = self._recording or self._begin(frame)
        if Format.of(frame.data) != recording.shape:
            raise nonsense("rate", "all of one recording has one rate, width, channels")
        async for piece in pieces:
            await recording.add(piece)

    async def _stop(self, _frame: Frame) -> None:
        asked, is_refused = self._asked, self._is_refused
        # A wish holds for one recording.
        self._asked, self._is_refused = Asked(), False
        if asked is None or is_refused:
            # It was told why. From now on it waits for nothing.
            self._has_failed = True
            return
        self.is_answering = True
        try:
            with seen.following(self._follow()):
                await unless(self._left.wait(), self._answer(asked))
        finally:
            self.is_answering = False
        self._end("answered")
        self._forget()

    # What was heard ---------------------------------------------------------------

    async def _answer(self, asked: Asked) -> None:
        recording, service = self._recording, self._service
        if recording is None or recording.is_empty:
            await self._send(Transcript("", asked.context))
            return
        offer, known = await asked.offer(service)
        seen.wants(offer.name)
        async with AsyncExitStack() as stack:
            # A full queue is told before anything is decoded.
            visit = stack.enter_context(service.gate.visit(offer.name))
            seen.enter("decoding")
            path, audio_s = await recording.samples(service.decoder)
            tell = visit.teller(seen.teller(audio_s))
            options = asked.options(vad=service.options.vad)
            terms = Terms(
                service.options.timeout_s,
                # Memory is reserved for this length, and no longer one.
                workload=workload_of(options, None, round(audio_s * SAMPLES_PER_S)),
                # A model that is downloaded first is checked before it is loaded.
                check=partial(asked.check, offer.name) if known is None else None,
                audio_s=audio_s,
            )
            with visit.waiting():
                segments, info = await service.engine.transcribe(
                    offer, partial(samples, path), options, terms, tell
                )
            await stack.enter_async_context(segments)
            text = await self._tell(segments, info, asked)
        # The model is free by now.
        await self._send(Transcript(text, asked.context, info.language))
        await self._send(TranscriptStop())

    async def _tell(
        self, segments: Segments, info: TranscriptionInfo, asked: Asked
    ) -> str:
        """
        Sends each part of a transcript as it is heard, and returns all of it.
        """
        await self._send(TranscriptStart(asked.context, info.language))
        text = ""
        async for segment in segments:
            # Segments begin with a space, which a first one has no use for.
            part = segment.text if text else segment.text.lstrip()
            text += part
            await self._send(TranscriptChunk(part))
        return text.strip()

    async def _send(self, event: Eventable, timeout_s: float = SEND_S) -> None:
        await _in_time(async_write_event(event.event(), self._writer), timeout_s)


async def _in_time(work: Awaitable[_T], timeout_s: float) -> _T:
    """
    Returns the result of *work*; raises `Left` if that takes too long.
    """
    try:
        return await asyncio.wait_for(work, timeout_s)
    except (TimeoutError, asyncio.TimeoutError):
        raise Left from None


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """
    Closes a connection, even if the client reads nothing of what it was sent.
    """
    writer.close()
    try:
        await asyncio.wait_for(writer.wait_closed(), END_S)
    except (OSError, TimeoutError, asyncio.TimeoutError):
        writer.transport.abort()


async def info_of(service: Service) -> Info:
    """
    Returns what is served, for a client that asks.
    """
    models = [
        AsrModel(
            name=offer.name,
            description=offer.name,
            attribution=Attribution("OpenAI", "https://github.com/openai/whisper"),
            # It is there for whoever asks, if perhaps downloaded first: Home Assistant
            # offers no other languages than those of what is installed.
            installed=True,
            version=None,
            languages=await languages_of(offer, service.engine),
        )
        for offer in service.offers
    ]
    program = AsrProgram(
        name=PROGRAM,
        description="faster-whisper models, in the memory there is",
        attribution=Attribution("SYSTRAN", "https://github.com/SYSTRAN/faster-whisper"),
        installed=True,
        version=__version__,
        models=models,
        supports_transcript_streaming=True,
    )
    return Info(asr=[program])
