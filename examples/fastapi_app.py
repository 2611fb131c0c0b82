"""
Speech to text with FastAPI: one cache for the process, made and closed by the lifespan.

::

    uvicorn --app-dir examples fastapi_app:app --timeout-graceful-shutdown 10
    curl -F file=@examples/clips/en-bread.flac localhost:8000/transcriptions
    curl -N -F file=@examples/clips/en-harbour-long.flac localhost:8000/segments

What not to do:

- ``model.transcribe(...)`` of a `WhisperModel` or a `ModelCache` in an ``async def``:
  it stops the loop, and with it all other requests. `AsyncModelCache` is awaited. Nor
  does a ``for`` loop over ``segments`` belong there: that is where the work is done.
- ``@lru_cache`` or a global for models: loaded when imported, never closed, and loaded
  once more by each request that misses meanwhile. A new one in each request is worse.
- ``@app.on_event``: it is deprecated, and closes nothing if the start fails half-way.
- Keep ``segments`` unfinished: nothing can take their model's place. Or keep the model
  of a lease after its end: to touch it then can crash the process.
- Save the upload under a temporary name: that file stays when the request dies. The
  cache reads streams.

For the open internet, limit the length of the audio too, as ``whispercache serve``
does: ten hours of silence fit into a small file.
"""

# No `from __future__ import annotations`: FastAPI looks at them while it imports this.
import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from fastapi import Depends, FastAPI, Form, Request, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from weights import find_model

from whispercache import (
    AsyncModelCache,
    AudioError,
    CacheClosed,
    LeaseTimeout,
    LoadFailed,
    TooManyWaiters,
    WhisperCacheError,
)

if TYPE_CHECKING:
    from faster_whisper.transcribe import Segment
    from starlette.types import ASGIApp, Receive, Scope, Send

    from whispercache.aio import AsyncSegments

DEVICE, COMPUTE_TYPE = "cpu", "int8"
MAX_UPLOAD_BYTES = 25 * 2**20
RETRY_S = 10.0

log = logging.getLogger("uvicorn.error")


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, AsyncModelCache]]:
    """
    One cache, as long as the application runs. It loads nothing yet.
    """
    async with AsyncModelCache(
        keep_alive="10m", max_waiting=32, coordinate=True
    ) as cache:
        yield {"cache": cache}


class LimitUploads:
    """
    Refuses what is too large before it is read; a dependency would be asked after that.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """
        Let a request pass, or answer it.
        """
        application = self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            # No server hands on more than that; a body in chunks does not tell.
            length = Headers(scope=scope).get("content-length")
            if length is None:
                application = JSONResponse({"error": "how long is it?"}, 411)
            elif int(length) > MAX_UPLOAD_BYTES:
                application = JSONResponse({"error": "it is too large"}, 413)
        await application(scope, receive, send)


app = FastAPI(title="Speech", lifespan=lifespan)
app.add_middleware(LimitUploads)


class Speech(NamedTuple):
    """
    What is being transcribed for a request.
    """

    language: str
    segments: "AsyncSegments[Segment]"


async def begin(
    request: Request,
    file: UploadFile,
    # Nothing else is loaded, whatever clients ask for.
    model: Annotated[Literal["tiny.en", "base"], Form()] = "tiny.en",
) -> AsyncIterator[Speech]:
    """
    Begin to transcribe the upload of this request, with the model that it names.
    """
    cache: AsyncModelCache = request.state.cache
    path = await asyncio.to_thread(find_model, model)  # may copy files: not on the loop
    cached = await cache.get_model(path, DEVICE, COMPUTE_TYPE, timeout_s=60)
    segments, info = await cached.transcribe(file.file)
    # Until the response was sent, or the client left.
    async with segments:
        yield Speech(info.language, segments)


@app.post("/transcriptions")
async def transcribe(speech: Annotated[Speech, Depends(begin)]) -> dict[str, object]:
    """
    The whole text of an upload.
    """
    found = [as_json(segment) async for segment in speech.segments]
    text = "".join(str(segment["text"]) for segment in found).strip()
    return {"language": speech.language, "text": text, "segments": found}


@app.post("/segments")
async def stream(speech: Annotated[Speech, Depends(begin)]) -> StreamingResponse:
    """
    One segment a line, as they are found.
    """
    lines = (json.dumps(as_json(found)) + "\n" async for found in speech.segments)
    return StreamingResponse(lines, media_type="application/x-ndjson")


@app.get("/health")
async def health(request: Request) -> dict[str, int]:
    """
    Leases that are held, and requests that wait.
    """
    cache: AsyncModelCache = request.state.cache
    stats = cache.stats()
    return {"leases": stats.leases, "waiting": stats.waiting}


def as_json(segment: "Segment") -> dict[str, object]:
    """
    A segment as clients see it; times in seconds.
    """
    return {"start": segment.start, "end": segment.end, "text": segment.text}


@app.exception_handler(WhisperCacheError)
async def refuse(_request: Request, error: WhisperCacheError) -> JSONResponse:
    """
    Whose fault it is, and when to come back. Messages may name paths of ours.
    """
    if isinstance(error, AudioError):
        told = f"cannot read this audio: {error.reason}"
        return JSONResponse({"error": told}, 422)
    log.error("%s", error)
    if isinstance(error, (LeaseTimeout, TooManyWaiters, LoadFailed, CacheClosed)):
        retry_s = getattr(error, "retry_in_s", None) or RETRY_S
        headers = {"Retry-After": str(math.ceil(retry_s))}
        return JSONResponse({"error": "busy"}, 503, headers)
    return JSONResponse({"error": "this server is not set up well"}, 500)
