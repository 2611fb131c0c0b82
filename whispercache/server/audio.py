"""
OpenAI's transcriptions and translations, as existing clients ask for them.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from whispercache.engine.calls.languages import check_language, language_code
from whispercache.engine.calls.prepare import workload_of
from whispercache.errors import AudioError, LoadFailed

from . import seen
from .calls import while_present
from .decode import samples
from .engine import Terms
from .errors import ApiError, as_refusal, nonsense, responses
from .forms import FILE, GRANULARITIES, SmallForm, check_keep_alive
from .offers import ALIGNMENT_HEADS
from .service import Served, Service
from .transcripts import (
    MEDIA_TYPES,
    Plain,
    Verbose,
    as_event,
    as_lines,
    as_plain,
    as_verbose,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from faster_whisper.transcribe import Segment, TranscriptionInfo

    from whispercache.engine.calls.languages import Knowledge

    from .engine import Segments
    from .offers import Offer

router: APIRouter = APIRouter(prefix="/v1/audio", tags=["audio"], route_class=SmallForm)

_RATE_HZ = 16_000

NO_WORDS = (
    "this model cannot tell when words were said, since its config.json names no "
    f"{ALIGNMENT_HEADS} of it; ask for segments, or for another model"
)

Kind = Literal["json", "text", "srt", "vtt", "verbose_json"]
Task = Literal["transcribe", "translate"]


@dataclass(frozen=True, slots=True)
class Asked:
    """
    A request for a transcript: the task, the format, and the parameters.
    """

    task: Task
    kind: Kind
    prompt: str | None
    temperature: float
    keep_alive: str | None
    language: str | None = None
    granularities: tuple[str, ...] = ()
    stream: bool = False

    def check(self) -> None:
        """
        Refuses parameters that make no sense together, by an `ApiError`.
        """
        # Other formats have no place for them.
        if self.granularities and self.kind != "verbose_json":
            raise nonsense(
                GRANULARITIES, "timestamps come with response_format=verbose_json only"
            )
        if self.stream and self.kind not in ("json", "text"):
            raise nonsense(
                "stream", "a stream carries text: response_format json or text"
            )
        if self.keep_alive is not None:
            # Now, and not when the lease is taken, after minutes of waiting.
            check_keep_alive(self.keep_alive)

    def check_model(self, name: str, known: Knowledge | None) -> None:
        """
        Refuses what the model of that *name* cannot do, as far as that is known.
        """
        if known is not None and not known.is_multilingual:
            message = "this model understands English only"
            if self.language not in (None, "en"):
                raise nonsense("language", message)
            if self.task == "translate":
                raise nonsense("model", message)
        if known is not None and not known.can_detect and self.language is None:
            # A translation has no field for the language.
            field, cure = "model", "take another one"
            if self.task == "transcribe":
                field, cure = "language", "name it"
            raise nonsense(field, f"this model cannot detect the language; {cure}")
        try:
            check_language(name, self.language, known)
        except ValueError as error:
            raise nonsense("language", str(error)) from None

    def options(self) -> dict[str, Any]:
        """
        Returns the same as parameters of ``transcribe``.
        """
        options: dict[str, Any] = {
            "task": self.task,
            "language": self.language,
            # None where there is none: an empty prompt would be tokens too.
            "initial_prompt": self.prompt,
            "word_timestamps": "word" in self.granularities,
        }
        # At 0 Whisper itself raises it where it hears nonsense, as OpenAI's does.
        if self.temperature > 0:
            options["temperature"] = self.temperature
        return options


async def _lifetime() -> AsyncIterator[AsyncExitStack]:
    """
    Yields the stack for all that a request holds until it is over.
    """
    async with AsyncExitStack() as stack:
        yield stack


Lifetime = Annotated[AsyncExitStack, Depends(_lifetime)]
Audio = Annotated[UploadFile, File(description="Anything that FFmpeg reads.")]
Named = Annotated[str, Form(min_length=1, description="A model that is served here.")]
Prompt = Annotated[
    str | None,
    # A model looks at the last 223 tokens of it.
    Form(max_length=10_000, description="Words that came before, or may come."),
]
Temperature = Annotated[float, Form(ge=0, le=1)]
KeepAlive = Annotated[
    str | None,
    Form(description='How long the model stays when idle: seconds, "5m", 0, -1.'),
]

_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {
        "description": "What was heard, in the format asked for.",
        "content": {
            "application/json": {},
            **{kind.partition(";")[0]: {} for kind in MEDIA_TYPES.values()},
            "text/event-stream": {},
        },
    },
    **responses(400, 401, 403, 404, 408, 413, 429, 503),
}


@router.post(
    "/transcriptions",
    response_model=Plain | Verbose,
    response_model_exclude_none=True,
    responses=_RESPONSES,
)
async def transcriptions(
    *,
    request: Request,
    service: Served,
    lifetime: Lifetime,
    file: Audio,
    model: Named,
    language: Annotated[
        str | None, Form(description="Code, name or locale: de, German, de-AT.")
    ] = None,
    prompt: Prompt = None,
    response_format: Annotated[Kind, Form()] = "json",
    temperature: Temperature = 0.0,
    timestamp_granularities: Annotated[
        list[Literal["word", "segment"]] | None, Form(alias=f"{GRANULARITIES}[]")
    ] = None,
    granularities: Annotated[
        list[Literal["word", "segment"]] | None,
        # Never there any more: `SmallForm` has put all spellings into the one above.
        Form(alias=GRANULARITIES, description="The same, as some send it."),
    ] = None,
    stream: Annotated[bool, Form(description="Send text as it is heard.")] = False,
    keep_alive: KeepAlive = None,
) -> Response | Plain | Verbose:
    """
    Writes down speech in its own language.
    """
    asked = Asked(
        task="transcribe",
        kind=response_format,
        language=_code(language),
        prompt=prompt or None,
        temperature=temperature,
        granularities=tuple(timestamp_granularities or granularities or ()),
        keep_alive=keep_alive or None,
        stream=stream,
    )
    return await while_present(request, _answer(service, lifetime, file, model, asked))


def _code(language: str | None) -> str | None:
    try:
        return language_code(language)
    except ValueError as error:
        raise nonsense("language", str(error)) from None


@router.post(
    "/translations",
    response_model=Plain | Verbose,
    response_model_exclude_none=True,
    responses=_RESPONSES,
)
async def translations(
    *,
    request: Request,
    service: Served,
    lifetime: Lifetime,
    file: Audio,
    model: Named,
    prompt: Prompt = None,
    response_format: Annotated[Kind, Form()] = "json",
    temperature: Temperature = 0.0,
    keep_alive: KeepAlive = None,
) -> Response | Plain | Verbose:
    """
    Writes down in English what is said in another language.
    """
    asked = Asked(
        task="translate",
        kind=response_format,
        prompt=prompt or None,
        temperature=temperature,
        keep_alive=keep_alive or None,
    )
    return await while_present(request, _answer(service, lifetime, file, model, asked))


async def _answer(
    service: Service,
    lifetime: AsyncExitStack,
    file: UploadFile,
    name: str,
    asked: Asked,
) -> Response | Plain | Verbose:
    asked.check()
    # Before the upload is decoded, which costs the most until here.
    offer = service.offer(name)
    segments, info = await _begin(service, lifetime, file, offer, asked)
    # Nothing has failed so far, so the status may be sent.
    if asked.stream:
        events = _events(segments, info)
        return StreamingResponse(events, media_type="text/event-stream")
    try:
        # Without a stream, an error in the middle still has a status.
        heard = [segment async for segment in segments]
    except (LoadFailed, RuntimeError) as error:
        # The files did not tell; CTranslate2 does.
        if "word" in asked.granularities and ALIGNMENT_HEADS in str(error):
            raise nonsense(GRANULARITIES, NO_WORDS) from error
        raise
    if asked.kind == "json":
        return as_plain(heard, info)
    if asked.kind == "verbose_json":
        return as_verbose(heard, info, asked.task, asked.granularities)
    text = "".join(as_lines(heard, info, asked.kind))
    return Response(text, media_type=MEDIA_TYPES[asked.kind])


async def _begin(
    service: Service,
    lifetime: AsyncExitStack,
    file: UploadFile,
    offer: Offer,
    asked: Asked,
) -> tuple[Segments, TranscriptionInfo]:
    """
    Decodes, waits for the model, and begins to transcribe; *lifetime* ends all of it.
    """
    engine = service.engine
    known = await engine.knowledge(offer)
    asked.check_model(offer.name, known)
    if "word" in asked.granularities and not await engine.may_tell_words(offer):
        raise nonsense(GRANULARITIES, NO_WORDS)
    # A full queue is told before the upload is decoded.
    service.gate.check(offer.name)
    # Of its own: whatever becomes of the request, all is removed with it.
    folder = lifetime.enter_context(tempfile.TemporaryDirectory(prefix="whispercache-"))
    decoded = Path(folder, "samples")
    # Decoded before the wait, so that the queue holds files and no memory, and knows
    # how long the work will be.
    seen.enter("decoding")
    audio_s = await _decode(service, file, Path(folder, "upload"), decoded)
    tell = seen.teller(audio_s)
    left_s = await lifetime.enter_async_context(
        service.gate.turn(offer.name, service.options.timeout_s, audio_s)
    )
    options = asked.options()
    terms = Terms(
        left_s,
        asked.keep_alive,
        # Memory is reserved for this length, and no longer one.
        workload_of(options, None, round(audio_s * _RATE_HZ)),
        # A model that is downloaded first is checked between download and load.
        partial(asked.check_model, offer.name) if known is None else None,
    )
    heard = partial(samples, decoded)
    segments, info = await engine.transcribe(offer, heard, options, terms, tell)
    await lifetime.enter_async_context(segments)
    return segments, info


async def _decode(
    service: Service, file: UploadFile, upload: Path, decoded: Path
) -> float:
    """
    Decodes an upload, keeps no more of it than its samples, and returns its seconds.
    """
    await run_in_threadpool(_save, file, upload)
    try:
        return await service.decoder.decode(upload, decoded)
    except AudioError as error:
        if file.filename:
            raise
        hint = "the file came without a name; curl means a file by -F file=@talk.wav"
        raise ApiError(
            400, f"{error}; {hint}", code="invalid_audio", param=FILE
        ) from None
    finally:
        await run_in_threadpool(upload.unlink)


def _save(file: UploadFile, target: Path) -> None:
    # Closed when copied: Starlette would keep the spooled file until the end of the
    # answer.
    with file.file, target.open("wb") as out:
        shutil.copyfileobj(file.file, out)


async def _events(segments: Segments, info: TranscriptionInfo) -> AsyncIterator[bytes]:
    heard: list[Segment] = []
    try:
        async for segment in segments:
            # Segments begin with a space, which a first one has no use for.
            delta = segment.text if heard else segment.text.lstrip()
            heard.append(segment)
            yield as_event("transcript.text.delta", delta=delta)
    except Exception as error:
        # The status has been sent: what went wrong is an event, too.
        detail = as_refusal(error).detail
        seen.failed(detail.code)
        yield as_event("error", error=detail.model_dump())
        return
    # Its usage would be in tokens, which a Whisper of OpenAI's does not stream.
    yield as_event("transcript.text.done", text=text_of(heard), duration=info.duration)
